"use strict";
// The controls of the page: the starting noise, the enlarged cell, the two compared cells, the order of the table.
// All texts come from Python and enter the page as text, never as markup.
(() => {
  const one = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(one(id).textContent);
  const view = read("view");
  const sources = new Map(Object.entries(read("sources")));
  for (const img of document.querySelectorAll("img[data-picture]")) sources.set(img.dataset.picture, img.src);
  const chosen = { prompt: 0, guidance: 0, seed: 0 };
  const REFERENCE = -1;

  const setting = () => chosen.prompt * view.guidance.length + chosen.guidance;
  const start = () => view.starts[setting()][chosen.seed];
  const cellAt = ({ entry, budget }) =>
    entry === REFERENCE ? start().reference : start().cells[entry * view.budgets.length + budget];
  const source = (cell) => sources.get(String(cell.picture));
  const same = (a, b) => a && b && a.entry === b.entry && (a.entry === REFERENCE || a.budget === b.budget);

  function make(tag, attributes, ...children) {
    const svg = tag === "svg" || tag === "rect";
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // The table of pictures

  const places = [...document.querySelectorAll("#pictures-table td[data-entry]")];
  const placeOf = (td) => ({ entry: Number(td.dataset.entry), budget: Number(td.dataset.budget) });

  function fill(td) {
    const place = placeOf(td), cell = cellAt(place);
    if (!cell || cell.reason) {
      td.replaceChildren(make("p", { class: "failed", role: "note" }, cell ? cell.reason : "no reference"));
      return;
    }
    const img = make("img", { src: source(cell), alt: cell.alt });
    const open = make("button", { type: "button", class: "open" }, img);
    open.addEventListener("click", () => show(place));
    const picks = make("div", { class: "picks" });
    for (const which of ["a", "b"]) {
      const letter = which.toUpperCase();
      const button = make("button", { type: "button", "data-pick": which, "aria-label": `Take as ${letter}: ${cell.where}` }, letter);
      button.addEventListener("click", () => pick(which, place));
      picks.append(button);
    }
    const value = make("p", { class: "value" });
    if (cell.value) value.append(make("b", {}, cell.value));
    if (cell.best) value.append(make("span", { class: "chip best", title: "nearest to the reference at this budget, in the mean over the seeds" }, cell.best));
    if (cell.stochastic) value.append(make("span", { class: "chip", title: "draws noise: there is no fixed solution to measure against" }, "stochastic"));
    const parts = [make("div", { class: "frame" }, open, picks), value];
    if (cell.bar !== null) {
      const bar = make("svg", { class: "bar", viewBox: "0 0 100 3", preserveAspectRatio: "none", "aria-hidden": "true" });
      bar.append(make("rect", { width: 100, height: 3 }), make("rect", { class: "full", width: cell.bar, height: 3 }));
      parts.push(bar);
    }
    parts.push(make("p", { class: "small" }, cell.small));
    td.replaceChildren(...parts);
  }

  function refresh() {
    places.forEach(fill);
    for (const block of document.querySelectorAll(".setting")) block.hidden = Number(block.dataset.setting) !== setting();
    compare();
    if (one("box").open) show(shown);
  }

  for (const name of Object.keys(chosen)) {
    const select = one(name);
    if (!select) continue;
    select.value = "0"; // browsers keep the old value after a reload
    select.addEventListener("change", () => {
      chosen[name] = Number(select.value);
      refresh();
    });
  }
  one("tools").addEventListener("submit", (event) => event.preventDefault());
  const size = one("size");
  const resize = () => one("pictures-table").style.setProperty("--side", `${size.value}px`);
  size.value = size.getAttribute("value");
  size.addEventListener("input", resize);
  if (matchMedia("(max-width: 820px)").matches) size.value = Math.min(size.value, 128);
  resize();

  // A table that fits does not scroll by itself, so its headings stick to the window.
  for (const scroll of document.querySelectorAll(".pictures, .rows")) {
    const table = scroll.querySelector("table");
    const fit = () => {
      const room = scroll.clientWidth - 2 * parseFloat(getComputedStyle(scroll).paddingLeft);
      scroll.classList.toggle("fits", table.offsetWidth <= Math.ceil(room));
    };
    const observer = new ResizeObserver(fit);
    observer.observe(scroll);
    observer.observe(table);
  }

  // One cell, large

  const box = one("box");
  let shown = { entry: 0, budget: 0 };

  function show(place) {
    shown = place;
    const cell = cellAt(place);
    if (!cell) return;
    one("box-title").textContent = cell.where;
    one("box-picture").hidden = cell.reason !== null;
    one("box-failed").hidden = cell.reason === null;
    one("box-failed").textContent = cell.reason ?? "";
    one("box-facts").replaceChildren(
      ...(cell.facts ?? []).flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]),
    );
    one("box-again").hidden = !cell.command;
    one("box-command").textContent = cell.command ?? "";
    const save = one("box-save");
    for (const button of box.querySelectorAll("[data-pick]")) button.hidden = cell.reason !== null;
    save.hidden = cell.reason !== null;
    if (cell.reason === null) {
      one("box-picture").src = source(cell);
      one("box-picture").alt = cell.alt;
      save.href = view.reduced ? cell.file : source(cell);
      save.download = `${cell.where.replace(/[^\w.-]+/g, "-")}.png`;
    }
    if (!box.open) box.showModal();
    box.scrollTop = 0;
  }

  function go(down, right) {
    const { entry, budget } = shown;
    const first = start().reference ? REFERENCE : 0;
    const next = {
      entry: Math.min(Math.max(entry + down, first), view.entries.length - 1),
      budget: Math.min(Math.max(budget + (entry === REFERENCE ? 0 : right), 0), view.budgets.length - 1),
    };
    show(next);
  }

  function turn(by) {
    const seed = Math.min(Math.max(chosen.seed + by, 0), view.seeds.length - 1);
    if (seed === chosen.seed) return;
    chosen.seed = seed;
    one("seed").value = String(seed);
    refresh();
  }

  const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  box.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in KEYS) go(...KEYS[event.key]);
    else if (event.key === "PageUp") turn(-1);
    else if (event.key === "PageDown") turn(1);
    else return;
    event.preventDefault();
  });
  for (const button of box.querySelectorAll("[data-go]")) button.addEventListener("click", () => go(...button.dataset.go.split(" ").map(Number)));
  for (const button of box.querySelectorAll("[data-seed]")) button.addEventListener("click", () => turn(Number(button.dataset.seed)));
  for (const button of box.querySelectorAll("[data-pick]")) {
    button.addEventListener("click", () => {
      pick(button.dataset.pick, shown);
      announce(`${one("box-title").textContent} is ${button.dataset.pick.toUpperCase()}`);
    });
  }
  one("box-close").addEventListener("click", () => box.close());
  box.addEventListener("click", (event) => event.target === box && box.close());

  // Two cells

  const picked = firstTwo();

  function firstTwo() {
    const all = places.map(placeOf).filter((place) => cellAt(place) && !cellAt(place).reason);
    const cells = all.filter((place) => place.entry !== REFERENCE);
    const reference = all.find((place) => place.entry === REFERENCE);
    const middle = cells.find((place) => place.budget === view.budgets.length >> 1);
    return { a: middle ?? cells[0] ?? null, b: reference ?? cells[1] ?? cells[0] ?? null };
  }

  function pick(which, place) {
    picked[which] = place;
    compare();
  }

  function compare() {
    for (const td of places) {
      for (const button of td.querySelectorAll("[data-pick]")) {
        button.setAttribute("aria-pressed", String(same(picked[button.dataset.pick], placeOf(td))));
      }
    }
    const cells = [picked.a, picked.b].map((place) => place && cellAt(place));
    one("ab").hidden = !picked.a;
    ["a", "b"].forEach((which, i) => {
      const cell = cells[i];
      one(`name-${which}`).textContent = cell ? cell.where : "";
      for (const img of [one(`pane-${which}`), one(`wipe-${which}`)]) {
        img.hidden = !cell || cell.reason !== null;
        if (img.hidden) continue;
        img.src = source(cell);
        img.alt = `${which.toUpperCase()}: ${cell.alt}`;
      }
    });
    difference(cells);
  }

  let turnOf = 0;
  async function difference(cells) {
    const turn = ++turnOf, canvas = one("difference"), text = one("difference-text");
    const describe = (message) => {
      text.textContent = message;
      canvas.setAttribute("aria-label", message);
    };
    if (cells.some((cell) => !cell || cell.reason !== null)) {
      canvas.width = canvas.height = 1;
      describe("One of the two has no picture for this noise.");
      return;
    }
    const images = await Promise.all(cells.map(async (cell) => {
      const image = new Image();
      image.src = source(cell);
      await image.decode();
      return image;
    }));
    if (turn !== turnOf) return; // another pair was selected in the meantime
    const { naturalWidth: width, naturalHeight: height } = images[0];
    if (images[1].naturalWidth !== width || images[1].naturalHeight !== height) {
      describe("Pictures of different sizes cannot be compared.");
      return;
    }
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const [a, b] = images.map((image) => {
      context.clearRect(0, 0, width, height);
      context.drawImage(image, 0, 0);
      return context.getImageData(0, 0, width, height);
    });
    let largest = 0;
    for (let i = 0; i < a.data.length; i += 4) {
      for (let c = i; c < i + 3; c++) {
        const distance = Math.abs(a.data[c] - b.data[c]);
        largest = Math.max(largest, distance);
        a.data[c] = 4 * distance;
      }
      a.data[i + 3] = 255;
    }
    context.putImageData(a, 0, 0);
    describe(largest ? `Difference ×4; the largest is ${largest} of 255` : "No difference at all");
  }

  const wipe = one("wipe"), range = one("wipe-range");
  const move = () => wipe.style.setProperty("--at", `${range.value}%`);
  range.addEventListener("input", move);
  const drag = (event) => {
    const { left, width } = wipe.getBoundingClientRect();
    range.value = Math.round(((event.clientX - left) / width) * 100);
    move();
  };
  wipe.addEventListener("pointerdown", (event) => {
    wipe.setPointerCapture(event.pointerId);
    drag(event);
  });
  wipe.addEventListener("pointermove", (event) => wipe.hasPointerCapture(event.pointerId) && drag(event));
  one("swap").addEventListener("click", () => {
    [picked.a, picked.b] = [picked.b, picked.a];
    compare();
  });

  // The table of figures

  const rows = one("rows"), body = rows.tBodies[0];
  [...rows.tHead.rows[0].cells].forEach((th, column) => {
    th.firstElementChild.addEventListener("click", () => {
      const rising = th.getAttribute("aria-sort") !== "ascending";
      for (const other of rows.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const number = th.classList.contains("number");
      const value = (row) => row.cells[column].dataset.value;
      const order = (a, b) => (number ? Number(value(a)) - Number(value(b)) : value(a).localeCompare(value(b)));
      const [empty, full] = [[], []];
      for (const row of body.rows) (value(row) === "" ? empty : full).push(row);
      full.sort((a, b) => (rising ? order(a, b) : order(b, a)));
      body.append(...full, ...empty);
    });
  });

  // Copying and saving

  function announce(text) {
    one("status").textContent = text;
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no permission, or an old browser
      const area = make("textarea", { class: "hidden" });
      area.value = text;
      (box.open ? box : document.body).append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  for (const button of document.querySelectorAll(".copy")) {
    const label = button.textContent;
    button.addEventListener("click", async () => {
      await copy(one(button.dataset.copy).textContent);
      button.textContent = "Copied";
      announce("Copied");
      setTimeout(() => (button.textContent = label), 1500);
    });
  }

  one("json").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([one("results").textContent], { type: "application/json" }));
    one("json").href = url;
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  });

  document.documentElement.classList.add("js");
  refresh();
})();
