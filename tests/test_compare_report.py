"""report.html: valid and safe as text, and working in a real browser."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shlex
from base64 import b64decode
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffgen.comparison import plots, report
from diffgen.comparison.measure import measure
from diffgen.comparison.plan import Axes, parse_entries
from diffgen.comparison.report import page
from diffgen.comparison.results import Results
from diffgen.comparison.run import Comparison, ReferenceSpec
from diffgen.comparison.subjects import MixtureSubject

HOSTILE = '</script><b>bold</b><img src=x onerror=alert(1)> & "quoted" \u202e'
VOID = {"meta", "img", "input", "br", "link", "hr"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A real comparison: three schedulers, two budgets, two seeds."""
    folder = tmp_path_factory.mktemp("mixture")
    axes = Axes(parse_entries(["euler", "dpmpp_2m", "euler_ancestral"]), (4, 12), (0, 1), ("",), (1.0,))
    comparison = Comparison(MixtureSubject(), axes, ReferenceSpec(None), folder)
    for _ in comparison.make():
        pass
    return written(measure(comparison, "diffgen compare -m mixture -o mixture/", 1.5).to_json(), folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A comparison by hand: two prompts, one hostile; two guidance scales; failures; all pictures different."""
    return invented(tmp_path_factory.mktemp("hostile"), [HOSTILE, "a cat"], [1.0, 3.0], [5, 10], [0, 1, 7])


def written(content: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path]:
    """The content of results.json, with the keys that it may lack, and the folder."""
    content = Results.from_json(content).to_json()
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "report.html").write_bytes(page_of(content, folder).encode())
    return content, folder


def page_of(content: dict[str, Any], folder: Path) -> str:
    return page(Results.from_json(content, folder), folder)


def invented(
    folder: Path,
    prompts: list[str],
    guidance: list[float],
    budgets: list[int],
    seeds: list[int],
    names: tuple[str, ...] = ("euler", "heun", "dpmpp_2m", "euler_ancestral"),
) -> tuple[dict[str, Any], Path]:
    """A comparison with round figures: the error is 1 / budget; heun fails at the smallest budget."""
    (folder / "images").mkdir()
    entries = [
        {"label": n, "scheduler": n.partition(":")[0], "grid": g, "stochastic": "ancestral" in n, "order": 2}
        | {"evaluations_per_step": 1 + (n == "heun")}
        for n, g in zip(names, ["karras", "tuned.json", "karras", "trailing"] * 9, strict=False)
    ]

    def picture(number: int) -> str:
        name = f"images/{number:04}.png"
        image = Image.new("RGB", (16, 16), (number % 256, number // 256, 77))
        image.putpixel((3, 3), (255, 255, 255))
        image.save(folder / name)
        return name

    cells, rows, starts = [], [], []
    for p, g, s in product(prompts, guidance, seeds):
        start = {"seed": s, "prompt": p, "guidance": g, "key": "k", "error": 0.01, "nfe": 64}
        starts.append(start | {"image": picture(60000 + len(starts))})
        for b, entry in product(budgets, entries):
            fails = entry["label"] == "heun" and b == budgets[0]
            cell = {k: entry[k] for k in ("label", "scheduler", "grid", "stochastic")}
            cell |= {"budget": b, "nfe": b, "steps": b, "seed": s, "prompt": p, "guidance": g}
            cell |= {"seconds": 0.25, "seconds_per_nfe": 0.25 / b, "peak_memory": None, "psnr": 20.0, "ssim": 0.5}
            cell |= {"error": None if entry["stochastic"] else 1 / b, "image": None if fails else picture(len(cells))}
            cell |= {"pixels_sha256": "ab", "noise_sha256": "cd", "key": "k", "reason": None, "status": "done"}
            if fails:
                cell |= {"status": "failed", "reason": f"{HOSTILE} not finite", "error": None}
            cells.append(cell)
    for p, g, b, entry in product(prompts, guidance, budgets, entries):
        members = [c for c in cells if (c["prompt"], c["guidance"], c["budget"]) == (p, g, b)]
        done = [c for c in members if c["label"] == entry["label"] and c["status"] == "done"]
        row = {k: entry[k] for k in ("label", "scheduler", "grid", "stochastic")}
        row |= {"prompt": p, "guidance": g, "budget": b, "nfe": b, "steps": b, "psnr": None, "ssim": None}
        mean = {"mean": 1 / b, "low": -1.0 if b == max(budgets) else 0.9 / b, "high": 1.1 / b, "n": len(seeds)}
        judged = done and not entry["stochastic"]
        row |= {"error": mean if judged else None, "rank": 1 if judged else None}
        row |= {"seconds": {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 3}, "seconds_per_nfe": None}
        rows.append(row | {"done": len(done), "failed": len(seeds) - len(done)})
    content = {
        "schema": "diffgen.compare/1",
        "command": shlex.join(["diffgen", "compare", "-m", "emoji", "--grids=x/tuned.json", *prompts, "-o", "out/"]),
        "seconds": 12.0,
        "model": {"name": "emoji", "family": "sd1", "hash": "e" * 64, "noise": "scaled_linear", "prediction": "epsilon"}
        | {"device": "cpu", "dtype": "float32"},
        "axes": {"entries": entries, "budgets": budgets, "seeds": seeds, "prompts": prompts, "guidance": guidance},
        "reference": {"kind": "numerical", "name": "dpmpp_3m on karras", "error": 0.01, "starts": starts},
        "cells": cells,
        "rows": rows,
        "orders": [],
        "grids": [
            {"label": e["label"], "grid": e["grid"], "budget": 5, "times": [], "sigmas": [9, 1]} for e in entries
        ],
        "duplicates": [{"cells": [[0, 2]], "expected": False, "why": "different arithmetic"}],
        "versions": {"torch": "2"},
        "verdict": [f"At 5 evaluations euler is nearest ({prompts[0]!r})."],
    }
    return written(content, folder)


# As text


class Reader(HTMLParser):
    """Checks the nesting, and collects tags, text and data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def read(folder: Path) -> Reader:
    return Reader((folder / "report.html").read_text("utf-8"))


@pytest.mark.parametrize("which", ["mixture", "hostile"])
def test_the_page_is_complete_and_self_contained(which: str, request: pytest.FixtureRequest) -> None:
    content, folder = request.getfixturevalue(which)
    reader = read(folder)
    for tag, attributes in reader.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, attributes)
        assert "style" not in attributes, tag  # its policy would not let it in
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        if tag == "img":
            assert "alt" in attributes
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in reader.tags:
        for name in ("aria-labelledby", "data-copy"):
            assert attributes.get(name, ids[0]) in ids, (tag, attributes)
    assert ("html", {"lang": "en"}) in reader.tags
    style = "".join(reader.text["style"])
    assert "url(" not in style
    assert "@import" not in style
    stored = next(text for text in reader.text["script"] if text.startswith('{"schema"'))
    assert json.loads(stored) == content
    listed = "".join(reader.text["li"])
    assert all(sentence in listed for sentence in content["verdict"])


def test_hostile_texts_stay_texts(hostile: tuple[dict[str, Any], Path]) -> None:
    content, folder = hostile
    text = (folder / "report.html").read_text("utf-8")
    assert "</script><b>" not in text
    assert "<img src=x" not in text
    assert text.count("</script>") == 4
    reader = read(folder)
    assert HOSTILE in reader.text["bdi"]
    assert f"{HOSTILE} not finite" in reader.text["p"]
    assert content["command"] in reader.text["code"]
    assert any(attributes.get("alt", "").endswith(HOSTILE) for _, attributes in reader.tags)


def test_half_a_surrogate_and_numbers_that_are_none(tmp_path: Path) -> None:
    content, folder = invented(tmp_path, ["a \udce4 b"], [1.0], [5, 10], [0])
    content["cells"][0]["error"], content["rows"][0]["error"]["high"] = float("nan"), float("inf")
    text = page_of(content, folder)
    assert "a ? b" in text.encode().decode()
    stored = next(text for text in Reader(text).text["script"] if text.startswith('{"schema"'))
    assert json.loads(stored)["cells"][0]["error"] is None


def test_csv_is_inside(mixture: tuple[dict[str, Any], Path]) -> None:
    content, folder = mixture
    link = next(a["href"] for tag, a in read(folder).tags if tag == "a" and a.get("download") == "results.csv")
    lines = list(csv.DictReader(io.StringIO(b64decode(link.partition(",")[2]).decode())))
    assert len(lines) == 12
    assert [float(line["error"]) for line in lines if line["error"]] == [
        cell["error"] for cell in content["cells"] if cell["error"] is not None
    ]


def test_every_picture_is_there_once(hostile: tuple[dict[str, Any], Path]) -> None:
    content, folder = hostile
    text = (folder / "report.html").read_text("utf-8")
    names = [c["image"] for c in content["cells"] + content["reference"]["starts"] if c["image"]]
    assert len(names) == 96
    inside = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert sorted(b64decode(i) for i in inside) == sorted((folder / name).read_bytes() for name in names)


def test_too_large_pictures_are_reduced(hostile: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    content, folder = hostile
    monkeypatch.setattr(report, "MAX_EMBEDDED", 1000)
    text = page_of(content, folder)
    assert "data:image/png" not in text
    data = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", text)
    with Image.open(io.BytesIO(b64decode(data[0]))) as image:
        assert image.size == (16, 16)
    assert "reduced copies" in text


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "images/../../a.png", "https://a.b/c.png", "images/a.svg"]
)
def test_only_pictures_of_the_folder(mixture: tuple[dict[str, Any], Path], name: str) -> None:
    content, folder = mixture
    cells = [content["cells"][0] | {"image": name}, *content["cells"][1:]]
    with pytest.raises(ValueError, match="no picture of this folder"):
        page_of(content | {"cells": cells}, folder)


def test_command_of_a_cell_is_one(tmp_path: Path, diffgen_: Callable[..., tuple[int, str, str]]) -> None:
    """The command that a cell offers is accepted and computes just that cell."""
    invented(tmp_path, ["-a 'red' $apple", "a cat"], [1.0, 3.0], [5, 10], [0, 7], ("dpmpp_2m",))
    view = embedded(tmp_path, "prompts")
    cells = [cell for setting in view["starts"] for start in setting for cell in start["cells"]]
    assert len(cells) == 16
    words = shlex.split(cells[0]["command"])
    assert words[:4] == ["diffgen", "generate", "-m", "emoji"]
    assert words[-2:] == ["--", "-a 'red' $apple"]
    code, out, err = diffgen_(*words[1:-2], "--dry-run", "--json", *words[-2:])
    assert code == 0, err
    plan = json.loads(out)["result"]
    assert (plan["scheduler"], plan["grid"], plan["steps"]) == ("dpmpp_2m", "karras", 5)


def test_grid_files_and_devices_come_back_into_commands(hostile: tuple[dict[str, Any], Path]) -> None:
    content, folder = hostile
    text = page_of(content | {"command": content["command"] + " --device cuda:1 --dtype=float16"}, folder)
    stored = next(text for text in Reader(text).text["script"] if text.startswith('{"prompts"'))
    cells = json.loads(stored)["starts"][0][0]["cells"]
    words = shlex.split(cells[3]["command"])  # heun at 10
    assert words[words.index("--grid") + 1] == "x/tuned.json"
    assert words[words.index("--device") + 1] == "cuda:1"
    assert words[words.index("--dtype") + 1] == "float16"


def test_a_model_that_was_typed_without_a_space(hostile: tuple[dict[str, Any], Path]) -> None:
    content, folder = hostile
    text = page_of(content | {"command": "diffgen compare -mruns/digits 3"}, folder)
    stored = next(text for text in Reader(text).text["script"] if text.startswith('{"prompts"'))
    words = shlex.split(json.loads(stored)["starts"][0][0]["cells"][3]["command"])
    assert words[words.index("-m") + 1] == "runs/digits"


def embedded(folder: Path, first_key: str) -> dict[str, Any]:
    return next(json.loads(t) for t in read(folder).text["script"] if t.startswith('{"' + first_key))


def test_mixture_has_no_command(mixture: tuple[dict[str, Any], Path]) -> None:
    view = embedded(mixture[1], "prompts")
    assert all(cell["command"] is None for start in view["starts"][0] for cell in start["cells"])


def test_five_hundred_cells(tmp_path: Path) -> None:
    names = tuple(f"dpmpp_2m:order={i}" for i in range(10))
    content, folder = invented(tmp_path, ["a", "b"], [3.0], [5, 10, 20, 40, 80], list(range(5)), names)
    assert len(content["cells"]) == 500
    assert (folder / "report.html").stat().st_size < 1_500_000
    read(folder)


def test_contrast_is_enough() -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for curves, in both themes."""
    style = str(report.template("report.css"))
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    for theme in (light, dark):
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme))
        pairs = list(product(["ink", "soft", "accent"], ["paper", "card", "tint"]))
        pairs += [("soft", "hatch"), ("ink", "hatch"), ("good", "good-tint"), ("good", "paper"), ("card", "accent")]
        for ink, paper in pairs:
            assert contrast(colour[ink], colour[paper]) >= 4.5, (ink, paper)
        for curve in [*(f"c{i}" for i in range(8)), "edge"]:
            assert contrast(colour[curve], colour["paper"]) >= 3, curve


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's ratio of two colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# Plots


def test_curves_are_where_they_belong() -> None:
    """On logarithmic axes a straight power law is a straight line, and equal ratios are equal distances."""
    points = tuple(plots.Point(x, 8 / x, 7 / x, 9 / x) for x in (4, 8, 16, 32))
    svg = plots.curves([plots.Series(0, "a", points)], "about", "x", "y", floor=0.2, floor_label="floor")
    assert svg is not None
    marks = [
        (float(x), float(y))
        for x, y in re.findall(r'class="mark" d="[^"]+" transform="translate\(([\d.]+) ([\d.]+)', svg)
    ]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)]
    for step in steps:
        assert step == pytest.approx(steps[0], abs=0.2)
    assert steps[0][0] > 20
    assert steps[0][1] > 20  # SVG's y goes down
    floor = float(re.search(r'class="floor" d="M\d+ ([\d.]+)', svg)[1])
    assert floor == pytest.approx(marks[-1][1] + (marks[-1][1] - marks[-2][1]) * 0.3219, abs=0.3)  # log2(0.25 / 0.2)
    bars = [
        (float(high), float(low)) for high, low in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", svg.partition("bars")[2])
    ]
    assert all(high < y < low for (high, low), (_, y) in zip(bars, marks, strict=True))


def test_values_without_a_logarithm_are_left_out() -> None:
    zero = plots.Series(1, "zero", (plots.Point(4, 0.0, 0.0, 0.0),))
    assert plots.curves([zero], "about", "x", "y") is None
    assert plots.curves([], "about", "x", "y") is None
    wide = plots.Series(0, "<wide>", (plots.Point(4, 0.1, -3.0, 3.2), plots.Point(8, 0.05, None, None)))
    svg = plots.curves([wide, zero], 'a "b" <c>', "x", "y")
    assert svg is not None
    assert "zero" not in svg
    assert "&lt;wide&gt;" in svg
    Reader(svg)
    assert plots.levels([(0, "a", [])], "about", "x") is None


def test_names_beside_curves_do_not_touch() -> None:
    series = [plots.Series(i, f"name{i}", (plots.Point(4, 1 + i / 1000, None, None),)) for i in range(30)]
    svg = plots.curves(series, "about", "x", "y")
    assert svg is not None
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)', svg)[1])
    at = sorted(float(y) for y in re.findall(r'y="([\d.]+)">name', svg))
    assert len(at) == 30
    assert all(b - a >= 14.5 for a, b in pairwise(at))
    assert at[0] > 0
    assert at[-1] < height


# In a browser

Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a report; at the end there must be no message and no request."""
    contexts, messages, requests = [], [], []

    def open_(folder: Path, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        shown = context.new_page()
        shown.set_default_timeout(10_000)
        shown.on("console", lambda message: messages.append(message.text))
        shown.on("pageerror", lambda error: messages.append(str(error)))
        shown.on("dialog", lambda dialog: messages.append(f"dialog: {dialog.message}"))
        shown.on("request", lambda request: requests.append(request.url))
        shown.goto((folder / "report.html").as_uri())
        return shown

    yield open_
    for context in contexts:
        context.close()
    assert messages == []
    assert [
        url for url in requests if not url.startswith(("data:", "blob:")) and not url.endswith("/report.html")
    ] == []


def cell(shown: Any, entry: int, budget: int = 0) -> Any:
    return shown.locator(f"#pictures-table td[data-entry='{entry}'][data-budget='{budget}']")


def test_selectors_choose_the_pictures(hostile: tuple[dict[str, Any], Path], open_page: Open) -> None:
    content, folder = hostile
    shown = open_page(folder)

    def expected(**wanted: Any) -> str:
        return next(c["image"] for c in content["cells"] if all(c[k] == v for k, v in wanted.items()))

    def is_shown(**wanted: Any) -> None:
        source = cell(shown, 2, 1).locator("img").get_attribute("src")
        name = expected(label="dpmpp_2m", budget=10, **wanted)
        assert b64decode(source.partition(",")[2]) == (folder / name).read_bytes()

    is_shown(seed=0, prompt=HOSTILE, guidance=1.0)
    shown.select_option("#seed", label="7")
    is_shown(seed=7, prompt=HOSTILE, guidance=1.0)
    shown.select_option("#guidance", label="3")
    is_shown(seed=7, prompt=HOSTILE, guidance=3.0)
    shown.select_option("#prompt", index=1)
    is_shown(seed=7, prompt="a cat", guidance=3.0)
    assert shown.locator(".setting:visible h3").all_inner_texts() == ["“a cat”, guidance 3"]
    assert cell(shown, 2, 1).locator("img").get_attribute("alt").endswith("seed 7: a cat")
    reference = next(
        s for s in content["reference"]["starts"] if (s["seed"], s["prompt"], s["guidance"]) == (7, "a cat", 3)
    )
    source = cell(shown, -1).locator("img").get_attribute("src")
    assert b64decode(source.partition(",")[2]) == (folder / reference["image"]).read_bytes()
    before = cell(shown, 2, 1).locator("img").bounding_box()["width"]
    shown.locator("#size").fill("304")
    assert cell(shown, 2, 1).locator("img").bounding_box()["width"] == pytest.approx(304)
    assert before < 250


def test_hostile_prompt_and_failures_in_a_browser(hostile: tuple[dict[str, Any], Path], open_page: Open) -> None:
    shown = open_page(hostile[1])
    assert HOSTILE in shown.inner_text("header")
    assert shown.locator("b", has_text="bold").count() == 0
    assert shown.locator("img[src='x']").count() == 0
    failed = cell(shown, 1, 0).locator(".failed")
    assert failed.inner_text() == f"{HOSTILE} not finite"
    assert "repeating-linear-gradient" in failed.evaluate("e => getComputedStyle(e).backgroundImage")
    assert cell(shown, 3, 0).locator(".value").inner_text() == "stochastic"
    pixelated = cell(shown, 0, 0).locator("img").evaluate("e => getComputedStyle(e).imageRendering")
    assert pixelated == "pixelated"


def test_lightbox(hostile: tuple[dict[str, Any], Path], open_page: Open) -> None:
    content, folder = hostile
    shown = open_page(folder)
    box, title = shown.locator("#box"), shown.locator("#box-title")
    assert not box.is_visible()
    cell(shown, 2, 0).locator(".open").click()
    assert title.inner_text() == "dpmpp_2m on karras, 5 evaluations, seed 0"
    assert shown.locator("#box-command").inner_text().endswith(shlex.quote(HOSTILE))
    assert HOSTILE in shown.locator("#box-facts").inner_text()
    shown.keyboard.press("ArrowRight")
    assert title.inner_text() == "dpmpp_2m on karras, 10 evaluations, seed 0"
    shown.keyboard.press("ArrowRight")  # the last one
    assert title.inner_text() == "dpmpp_2m on karras, 10 evaluations, seed 0"
    shown.keyboard.press("ArrowLeft")
    shown.keyboard.press("ArrowUp")
    assert title.inner_text() == "heun on tuned.json, 5 evaluations, seed 0"
    assert shown.locator("#box-failed").inner_text().endswith("not finite")
    assert not shown.locator("#box-save").is_visible()
    shown.keyboard.press("ArrowUp")
    shown.keyboard.press("ArrowUp")
    assert title.inner_text() == "reference, seed 0"
    shown.keyboard.press("PageDown")
    assert title.inner_text() == "reference, seed 1"
    assert shown.locator("#seed").input_value() == "1"
    shown.keyboard.press("ArrowDown")
    with shown.expect_download() as download:
        shown.locator("#box-save").click()
    image = next(c["image"] for c in content["cells"] if (c["label"], c["budget"], c["seed"]) == ("euler", 5, 1))
    assert Path(download.value.path()).read_bytes() == (folder / image).read_bytes()
    shown.locator("#box-again .copy").click()
    shown.locator("#box-again .copy", has_text="Copied").wait_for()
    shown.keyboard.press("Escape")
    assert not box.is_visible()


def test_two_side_by_side(hostile: tuple[dict[str, Any], Path], open_page: Open) -> None:
    content, folder = hostile
    shown = open_page(folder)
    cell(shown, 0, 0).hover()
    cell(shown, 0, 0).locator("[data-pick=a]").click()
    cell(shown, 2, 1).hover()
    cell(shown, 2, 1).locator("[data-pick=b]").click()
    assert shown.inner_text("#name-a") == "euler on karras, 5 evaluations, seed 0"
    assert shown.inner_text("#name-b") == "dpmpp_2m on karras, 10 evaluations, seed 0"
    assert cell(shown, 0, 0).locator("[data-pick=a]").get_attribute("aria-pressed") == "true"
    a, b = (
        Image.open(folder / next(c["image"] for c in content["cells"] if (c["label"], c["budget"]) == which))
        for which in (("euler", 5), ("dpmpp_2m", 10))
    )
    apart = abs(a.getpixel((0, 0))[0] - b.getpixel((0, 0))[0])
    shown.locator("#difference-text", has_text=f"the largest is {apart} of 255").wait_for()
    pixel = "[...document.getElementById('difference').getContext('2d').getImageData({0}, {0}, 1, 1).data]"
    assert shown.evaluate(pixel.format(0)) == [4 * apart, 0, 0, 255]
    assert shown.evaluate(pixel.format(3)) == [0, 0, 0, 255]  # white in both

    def edge() -> float:
        clip = shown.locator("#wipe-a").evaluate("e => getComputedStyle(e).clipPath")
        return 100 - float(re.search(r"([\d.]+)%", clip)[1])

    assert edge() == 50
    shown.locator("#wipe-range").fill("20")
    assert edge() == 20
    place = shown.locator("#wipe").bounding_box()
    shown.locator("#wipe").scroll_into_view_if_needed()
    place = shown.locator("#wipe").bounding_box()
    shown.mouse.move(place["x"] + 10, place["y"] + 10)
    shown.mouse.down()
    shown.mouse.move(place["x"] + 0.75 * place["width"], place["y"] + 20)
    shown.mouse.up()
    assert edge() == pytest.approx(75, abs=1)
    shown.locator("#swap").click()
    assert shown.inner_text("#name-b") == "euler on karras, 5 evaluations, seed 0"


def test_table_sorts_and_data_come_out(mixture: tuple[dict[str, Any], Path], open_page: Open) -> None:
    content, folder = mixture
    shown = open_page(folder)
    shown.locator("#rows th[data-key=error] button").click()
    column = next(
        i for i, key in enumerate(shown.locator("#rows thead th").all()) if key.get_attribute("data-key") == "error"
    )

    def values() -> list[str]:
        return [
            row.locator("th, td").nth(column).get_attribute("data-value")
            for row in shown.locator("#rows tbody tr").all()
        ]

    errors = sorted(row["error"]["mean"] for row in content["rows"] if row["error"])
    assert [float(v) for v in values() if v] == errors
    assert values()[-2:] == ["", ""]  # the stochastic ones
    shown.locator("#rows th[data-key=error] button").click()
    assert [float(v) for v in values() if v] == errors[::-1]
    with shown.expect_download() as download:
        shown.locator("#json").click()
    assert json.loads(Path(download.value.path()).read_text()) == content
    with shown.expect_download() as download:
        shown.get_by_text("All cells as CSV").click()
    assert download.value.suggested_filename == "results.csv"


def test_without_javascript(hostile: tuple[dict[str, Any], Path], open_page: Open) -> None:
    content, folder = hostile
    shown = open_page(folder, java_script_enabled=False)
    assert shown.get_by_text(content["verdict"][0]).is_visible()
    assert cell(shown, 2, 1).locator("img").is_visible()
    assert cell(shown, 1, 0).locator(".failed").is_visible()
    assert shown.locator("#rows tbody tr").count() == len(content["rows"])
    assert shown.locator("svg.plot").first.is_visible()
    assert shown.locator(".setting:visible").count() == 4
    assert "With JavaScript" in html.unescape(shown.locator("noscript").inner_text())
    for hidden in ("#tools", "#ab", "#box", ".copy"):
        assert not shown.locator(hidden).first.is_visible()


@pytest.mark.parametrize("which", ["mixture", "hostile"])
def test_on_a_phone(which: str, request: pytest.FixtureRequest, open_page: Open) -> None:
    _, folder = request.getfixturevalue(which)
    for scripts in (True, False):
        shown = open_page(folder, 390, java_script_enabled=scripts)
        assert shown.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        if scripts:
            cell(shown, 0, 0).locator(".open").click()
            assert shown.locator("#box").bounding_box()["width"] <= 390
            assert shown.evaluate("box.scrollWidth - box.clientWidth") == 0
