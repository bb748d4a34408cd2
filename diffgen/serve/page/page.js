// The page: it asks the server for pictures, shows how they form, and keeps the gallery in view.
import { WORDS } from "./words.js";

const $ = (id) => document.getElementById(id);
const client = crypto.randomUUID?.() ?? String(Math.random());
const SMALL = 128; // pixels: pictures that are enlarged with sharp pixels
const LIMIT = 60;
let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let model, job, events, entries = [], total = 0, current, chosen, painted = false, selected = -1;

// --- Texts and themes ---

const say = (name, values = {}) => (WORDS[language][name] ?? name).replace(/\{(\w+)\}/g, (_, key) => values[key]);

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = say(element.dataset.word);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", say(element.dataset.label));
  for (const element of document.querySelectorAll("[data-placeholder]")) element.placeholder = say(element.dataset.placeholder);
  $("language").textContent = say("language");
  $("language").lang = language === "zh" ? "en" : "zh-Hans";
  $("language").removeAttribute("aria-label");
  for (const option of document.querySelectorAll("option[data-name]")) option.textContent = say(option.dataset.name);
  theme(localStorage.getItem("theme"));
}

function theme(name) {
  const dark = name ? name === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (name) document.documentElement.dataset.theme = name;
  $("theme").textContent = say(dark ? "theme_light" : "theme_dark");
  $("theme").removeAttribute("aria-label");
  $("theme").dataset.next = dark ? "light" : "dark";
}

// --- The server ---

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { "X-Diffgen-Client": client, ...options.headers } });
  } catch (error) {
    throw new Error(say("lost", { why: error.message }));
  }
  const content = await response.json();
  if (!response.ok) {
    const { message, hint } = content.error;
    throw new Error(hint ? `${message}; ${hint}` : message);
  }
  return content;
}

const attempt = (action) => async (event) => {
  event?.preventDefault?.();
  $("error").textContent = "";
  try {
    await action(event);
  } catch (error) {
    $("error").textContent = error.message;
  }
};

const url = (id, what = ".png") => `api/pictures/${encodeURIComponent(id)}${what}`;

// --- The model ---

function options(select, values, first) {
  select.replaceChildren();
  if (first) {
    const option = new Option(say(first), "");
    option.dataset.name = first;
    select.append(option);
  }
  for (const [value, text] of values) select.append(new Option(text, value));
}

async function load(name) {
  model = await ask(name ? `api/model?name=${encodeURIComponent(name)}` : "api/model");
  $("model-name").textContent = model.name;
  $("model").hidden = model.models.length < 2;
  $("model-name").hidden = !$("model").hidden;
  options($("model"), model.models.map((one) => [one, one]));
  $("model").value = model.name;
  options($("style"), model.styles.map((one) => [one, one]), "no_style");
  options($("scheduler"), model.schedulers.map((one) => [one.name, one.label]), "by_model");
  options($("grid"), model.grids.map((one) => [one, one]), "by_model");
  options($("lora"), model.loras.map((one) => [one, one]), "none");
  $("style-field").hidden = !model.styles.length;
  $("lora-field").hidden = !model.loras.length;
  $("prompt-field").hidden = !model.reads_prompts && !model.classes;
  $("negative-field").hidden = !model.reads_prompts;
  $("begin").hidden = !model.pictures;
  $("surprise").hidden = !words().length;
  [$("width").value, $("height").value] = model.defaults.size;
  $("count").max = model.limits.count;
  $("steps").max = model.limits.steps;
}

const words = () => model?.concepts ?? model?.classes ?? [];
const phrase = (concept) => (model.concepts ? `${/^[aeiou]/.test(concept) ? "an" : "a"} ${concept}` : concept);

// --- Suggestions: the model's vocabulary, and what was written before ---

const history = () => JSON.parse(localStorage.getItem("history") ?? "[]");

function suggest() {
  const text = $("prompt").value.trim().toLowerCase();
  const bare = text.replace(/^(an?|the) /, "");
  const past = history().filter((one) => one.toLowerCase().includes(text) && one !== $("prompt").value);
  const known = bare.length ? words().filter((one) => one.startsWith(bare)).concat(words().filter((one) => !one.startsWith(bare) && one.includes(bare))) : [];
  const list = [...new Set([...past.slice(0, 4), ...known.map(phrase)])].filter((one) => one !== text).slice(0, 8);
  $("suggestions").replaceChildren(...list.map((one, index) => {
    const item = document.createElement("li");
    item.id = `suggestion-${index}`;
    item.role = "option";
    item.ariaSelected = "false";
    item.textContent = one;
    item.addEventListener("pointerdown", (event) => { event.preventDefault(); take(one); });
    return item;
  }));
  select(-1);
  expand(list.length > 0);
}

function expand(shown) {
  $("suggestions").hidden = !shown;
  $("prompt").setAttribute("aria-expanded", String(shown));
}

function select(index) {
  selected = index;
  [...$("suggestions").children].forEach((item, place) => { item.ariaSelected = String(place === index); });
  const item = $("suggestions").children[index];
  if (item) { $("prompt").setAttribute("aria-activedescendant", item.id); item.scrollIntoView({ block: "nearest" }); }
  else $("prompt").removeAttribute("aria-activedescendant");
}

function take(text) {
  $("prompt").value = text;
  expand(false);
}

function onPromptKey(event) {
  const count = $("suggestions").children.length;
  if ($("suggestions").hidden || !count) return;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    select((selected + (event.key === "ArrowDown" ? 1 : count) + (selected < 0 && event.key === "ArrowUp" ? 1 : 0)) % count);
  } else if (event.key === "Escape") {
    event.preventDefault();
    expand(false);
  } else if (event.key === "Enter" && selected >= 0 && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    take($("suggestions").children[selected].textContent);
  }
}

// --- Jobs ---

function fields() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const style = $("style").value;
  const text = $("prompt").value.trim();
  const content = {
    model: model.name,
    prompt: style && text ? `${text}, ${style} style` : text,
    count: number("count") ?? 1,
    size: `${number("width")}x${number("height")}`,
    steps: number("steps"),
    guidance: number("guidance"),
    seed: number("seed"),
    scheduler: $("scheduler").value || undefined,
    grid: $("grid").value || undefined,
    negative: $("negative").value.trim() || undefined,
    loras: $("lora").value ? [$("lora").value] : undefined,
    exact: $("exact").checked || undefined,
  };
  if (!$("painting").hidden) {
    content.image = $("source").toDataURL("image/png");
    if (painted) content.mask = maskUrl();
    content.strength = Number($("strength").value);
  }
  return content;
}

async function create() {
  expand(false);
  if (job) return;
  $("warnings").replaceChildren();
  const content = fields();
  job = await ask("api/jobs", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) });
  const text = $("prompt").value.trim();
  if (text) localStorage.setItem("history", JSON.stringify([text, ...history().filter((one) => one !== text)].slice(0, 50)));
  follow(job);
}

function follow(begun) {
  job = begun;
  sessionStorage.setItem("job", job.id);
  $("stage").hidden = $("cancel").hidden = false;
  $("create").disabled = true;
  $("preview-picture").hidden = true;
  $("progress").removeAttribute("value");
  $("status").textContent = say("starting");
  events = new EventSource(`api/jobs/${job.id}/events`);
  const on = (name, action) => events.addEventListener(name, (event) => action(JSON.parse(event.data)));
  on("queued", ({ position }) => { $("status").textContent = say("queued", { n: position }); });
  on("started", () => { $("status").textContent = say("starting"); });
  on("step", ({ done, total: steps, eta }) => {
    $("progress").value = done / steps;
    $("status").textContent = say("step", { done, total: steps, eta: eta.toFixed(1) });
  });
  on("preview", ({ png }) => {
    $("preview-picture").src = `data:image/png;base64,${png}`;
    $("preview-picture").hidden = false;
  });
  on("picture", (entry) => show(entry));
  for (const end of ["done", "failed", "cancelled"]) on(end, (state) => finish(state));
  events.onerror = () => { if (events.readyState === EventSource.CLOSED) finish(null); };
}

function finish(state) {
  events.close();
  job = undefined;
  sessionStorage.removeItem("job");
  $("stage").hidden = $("cancel").hidden = true;
  $("create").disabled = false;
  for (const entry of state?.pictures ?? []) show(entry);
  $("warnings").replaceChildren(...(state?.warnings ?? []).map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  if (state?.status === "failed") $("error").textContent = state.error.hint ? `${state.error.message}; ${state.error.hint}` : state.error.message;
  if (state?.status === "cancelled") $("error").textContent = say("cancelled");
}

// --- The gallery ---

function matches(entry) {
  const text = `${entry.prompt ?? ""} ${entry.id}`.toLowerCase();
  return $("search").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function show(entry) {
  if (entries.some((one) => one.id === entry.id) || !matches(entry)) return;
  entries.unshift(entry);
  total += 1;
  $("pictures").prepend(card(entry, true));
  count();
}

function count() {
  $("total").textContent = total || "";
  $("older").hidden = entries.length >= total;
  $("empty").hidden = total > 0;
  $("empty").textContent = say($("search").value ? "nothing_matches" : "empty");
}

function card(entry, isNew = false) {
  const item = document.createElement("li");
  const button = Object.assign(document.createElement("button"), { type: "button" });
  const image = Object.assign(document.createElement("img"), { src: url(entry.id, "/thumbnail"), loading: "lazy", alt: "" });
  const text = Object.assign(document.createElement("span"), { textContent: entry.prompt || entry.id });
  image.classList.toggle("small", entry.width === null || Math.max(entry.width, entry.height) <= SMALL);
  button.dataset.id = entry.id;
  button.title = entry.prompt || entry.id;
  button.setAttribute("aria-label", say("open", { prompt: entry.prompt || entry.id, seed: entry.seed ?? "—" }));
  button.append(image, text);
  button.addEventListener("click", attempt(() => (chosen ? compare(chosen, entry) : view(entry))));
  item.classList.toggle("new", isNew);
  item.append(button);
  return item;
}

async function refresh(more = false) {
  const after = more && entries.length ? `&after=${encodeURIComponent(entries.at(-1).id)}` : "";
  const content = await ask(`api/pictures?limit=${LIMIT}&q=${encodeURIComponent($("search").value)}${after}`);
  entries = more ? [...entries, ...content.pictures] : content.pictures;
  total = content.total;
  const cards = content.pictures.map((entry) => card(entry));
  if (more) $("pictures").append(...cards);
  else $("pictures").replaceChildren(...cards);
  count();
}

// --- One picture ---

const FIRST = ["prompt", "negative", "seed", "steps", "guidance", "scheduler", "grid", "width", "height", "model"];
const LAST = ["schema", "model_files", "versions", "warnings", "template", "negative_template", "index"];
const plain = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : String(value).replace(/^([0-9a-f]{12})[0-9a-f]{52}$/, "$1…"));

function rowsOf(record) {
  const names = [...FIRST, ...Object.keys(record).filter((name) => !FIRST.includes(name) && !LAST.includes(name))];
  return names.filter((name) => !["", "null", "undefined", "{}", "[]"].includes(plain(record[name]))).map((name) => [name, plain(record[name])]);
}

function row(cells) {
  const line = document.createElement("tr");
  cells.forEach((text, index) => line.append(Object.assign(document.createElement(index ? "td" : "th"), { textContent: text, ...(index ? {} : { scope: "row" }) })));
  return line;
}

async function view(entry) {
  current = { entry, record: {} };
  const body = $("record").tBodies[0];
  try {
    current.record = await ask(url(entry.id, "/record"));
    body.replaceChildren(...rowsOf(current.record).map(row));
  } catch {
    body.replaceChildren(row([say("no_record")]));
  }
  $("viewer-title").textContent = entry.prompt || entry.id;
  const image = $("viewer-picture");
  image.src = url(entry.id);
  image.alt = entry.prompt || entry.id;
  image.classList.toggle("small", !entry.width || Math.max(entry.width, entry.height) <= 4 * SMALL);
  $("download").href = url(entry.id);
  $("download").download = `${entry.id}.png`;
  $("begin-from").hidden = !model.pictures;
  if (!$("viewer").open) $("viewer").showModal();
}

function neighbour(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const entry = step && entries[entries.findIndex((one) => one.id === current.entry.id) + step];
  if (entry) attempt(() => view(entry))();
}

function again() {
  const { record, entry } = current;
  const style = model.styles.find((one) => (record.prompt ?? "").endsWith(`, ${one} style`));
  $("prompt").value = style ? record.prompt.slice(0, -`, ${style} style`.length) : record.prompt ?? entry.prompt ?? "";
  $("style").value = style ?? "";
  $("negative").value = record.negative ?? "";
  for (const name of ["seed", "steps", "guidance", "width", "height"]) if (record[name] !== undefined && record[name] !== null) $(name).value = record[name];
  $("scheduler").value = record.scheduler ?? "";
  if ($("scheduler").selectedIndex < 0) $("scheduler").value = "";
  $("grid").value = record.grid_from ? "" : record.grid ?? "";
  if ($("grid").selectedIndex < 0) $("grid").value = "";
  $("count").value = 1;
  $("more").open = true;
  $("viewer").close();
  $("prompt").focus();
  expand(false);
}

async function remove() {
  if (!confirm(say("delete_sure"))) return;
  const { id } = current.entry;
  await ask(url(id, ""), { method: "DELETE" });
  $("viewer").close();
  entries = entries.filter((one) => one.id !== id);
  total -= 1;
  $("pictures").querySelector(`[data-id="${CSS.escape(id)}"]`)?.parentElement.remove();
  count();
}

// --- Two pictures ---

function choose() {
  chosen = current.entry;
  $("viewer").close();
  $("choosing").hidden = false;
}

async function compare(left, right) {
  chosen = undefined;
  $("choosing").hidden = true;
  const records = await Promise.all([left, right].map((entry) => ask(url(entry.id, "/record")).catch(() => ({}))));
  [["left", left], ["right", right]].forEach(([id, entry]) => {
    $(id).src = url(entry.id);
    $(id).alt = `${say(id)}: ${entry.prompt || entry.id}`;
    $(id).classList.toggle("small", !entry.width || Math.max(entry.width, entry.height) <= 4 * SMALL);
  });
  const [one, other] = records.map((record) => new Map(rowsOf(record)));
  const names = [...new Set([...one.keys(), ...other.keys()])].filter((name) => one.get(name) !== other.get(name));
  const rows = names.map((name) => row([name, one.get(name) ?? "—", other.get(name) ?? "—"]));
  $("differences").tBodies[0].replaceChildren(...(rows.length ? rows : [row([say("same"), "", ""])]));
  wipe(50);
  $("comparison").showModal();
}

function wipe(share) {
  $("wiper").value = share;
  $("wipe").style.setProperty("--at", `${share}%`);
}

// --- A picture to begin with, and its mask ---

async function begin(source) {
  const picture = await createImageBitmap(source);
  const [width, height] = ["width", "height"].map((id) => Number($(id).value));
  for (const canvas of [$("source"), $("mask")]) [canvas.width, canvas.height] = [width, height];
  const scale = Math.max(width / picture.width, height / picture.height);
  const [w, h] = [picture.width * scale, picture.height * scale];
  const context = $("source").getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
  $("brush").max = Math.max(8, Math.round(width / 2));
  $("painting").hidden = false;
  $("begin").open = true;
  clearMask();
}

function clearMask() {
  $("mask").getContext("2d").clearRect(0, 0, $("mask").width, $("mask").height);
  painted = false;
}

function paint(event) {
  if (!event.buttons) return;
  event.preventDefault();
  const canvas = $("mask"), box = canvas.getBoundingClientRect(), context = canvas.getContext("2d");
  const at = (e) => [((e.clientX - box.left) / box.width) * canvas.width, ((e.clientY - box.top) / box.height) * canvas.height];
  const [x, y] = at(event);
  const [fromX, fromY] = event.type === "pointerdown" ? [x, y] : at({ clientX: event.clientX - event.movementX, clientY: event.clientY - event.movementY });
  if (event.type === "pointerdown") canvas.setPointerCapture(event.pointerId);
  context.strokeStyle = "#ff2d78";
  context.lineWidth = Number($("brush").value);
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(fromX, fromY);
  context.lineTo(x + 0.01, y);
  context.stroke();
  painted = true;
}

function maskUrl() {
  const { width, height } = $("mask");
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage($("mask"), 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const value = pixels.data[i + 3] > 127 ? 255 : 0;
    pixels.data.set([value, value, value, 255], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL("image/png");
}

// --- Together ---

let typing;
const later = (action) => () => { clearTimeout(typing); typing = setTimeout(action, 200); };
const click = (id, action) => $(id).addEventListener("click", attempt(action));

$("form").addEventListener("submit", attempt(create));
$("prompt").addEventListener("input", suggest);
$("prompt").addEventListener("keydown", onPromptKey);
$("prompt").addEventListener("blur", () => expand(false));
$("search").addEventListener("input", later(attempt(() => refresh())));
$("model").addEventListener("change", attempt(() => load($("model").value)));
$("file").addEventListener("change", attempt(() => $("file").files.length && begin($("file").files[0])));
$("wiper").addEventListener("input", () => wipe($("wiper").value));
for (const kind of ["pointerdown", "pointermove"]) $("mask").addEventListener(kind, paint);
$("viewer").addEventListener("keydown", neighbour);
click("cancel", () => job && ask(`api/jobs/${job.id}`, { method: "DELETE" }));
click("older", () => refresh(true));
click("again", again);
click("delete", remove);
click("compare", choose);
click("stop-choosing", () => { chosen = undefined; $("choosing").hidden = true; });
click("close-viewer", () => $("viewer").close());
click("close-comparison", () => $("comparison").close());
click("clear-mask", clearMask);
click("drop-source", () => { $("painting").hidden = true; $("file").value = ""; clearMask(); });
click("begin-from", async () => {
  const { entry } = current;
  if (entry.width) [$("width").value, $("height").value] = [entry.width, entry.height];
  $("viewer").close();
  await begin(await (await fetch(url(entry.id))).blob());
  $("prompt").value = entry.prompt ?? "";
  $("prompt").focus();
  expand(false);
});
click("surprise", () => {
  const list = words();
  take(phrase(list[Math.floor(Math.random() * list.length)]));
});
click("language", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  translate();
  count();
  $("pictures").replaceChildren(...entries.map((entry) => card(entry)));
});
click("theme", () => {
  localStorage.setItem("theme", $("theme").dataset.next);
  theme($("theme").dataset.next);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) attempt(create)(event);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) attempt(() => refresh())(); });

translate();
attempt(async () => {
  await Promise.all([load(), refresh()]);
  const id = sessionStorage.getItem("job");
  if (id) ask(`api/jobs/${id}`).then(follow, () => sessionStorage.removeItem("job"));
})();
