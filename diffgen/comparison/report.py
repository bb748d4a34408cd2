"""report.html: a comparison as one page. No network, no other file; without JavaScript a static one.

Python computes every figure, text, alternative text and command, and escapes them; the script only chooses which
cells are on show. A policy in the page lets no other script run, and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from diffgen.images.metadata import base_name
from diffgen.images.read import read_image, read_kind
from schedulers.noise import level_symbol

from . import plots
from .plots import Point, Series
from .tables import as_csv, floor_text, name_of, numbered, of_mixture, shown

MAX_EMBEDDED = 20_000_000  # bytes of pictures; beyond, smaller ones are embedded
MAX_DRAWN = 24  # prompts × guidance scales that get plots
SMALL = 128  # pictures up to this side are enlarged pixel by pixel
NAME = re.compile(r"images/[0-9A-Za-z._-]+\.png")
MOMENTS = (
    ("mean_error", "error of the mean", "mean"),
    ("covariance_error", "error of the covariance", "covariance"),
    ("sliced_wasserstein", "sliced Wasserstein", "sliced W"),
)

Setting = tuple[str, float]  # prompt, guidance


def page(found: dict[str, Any], folder: Path) -> str:
    """The page of a comparison: `found` is the content of results.json, and `folder` where its images/ lie.

    Raises KeyError, TypeError or ValueError where `found` is none, InputError for a picture that cannot be read.
    """
    found = _finite(found)
    settings = [(p, g) for p in found["axes"]["prompts"] for g in found["axes"]["guidance"]]
    pictures = _Pictures(folder, found)
    cells = _Cells(found, pictures)
    starts = [[cells.start(seed, *setting) for seed in found["axes"]["seeds"]] for setting in settings]
    view = {
        "prompts": found["axes"]["prompts"],
        "guidance": found["axes"]["guidance"],
        "seeds": found["axes"]["seeds"],
        "budgets": found["axes"]["budgets"],
        "entries": [name_of(entry) for entry in found["axes"]["entries"]],
        "starts": starts,
        "reduced": pictures.reduced,
    }
    first = starts[0][0]
    static = {cell["picture"] for cell in [first["reference"], *first["cells"]] if cell and cell["picture"] is not None}
    script, style = _part("report.js"), _part("report.css")
    text = ENVIRONMENT.get_template("report.html.j2").render(
        found=found,
        axes=found["axes"],
        title=_title(found),
        facts=list(_facts(found, pictures)),
        first=first,
        settings=[_setting(found, *setting) for setting in settings[:MAX_DRAWN]],
        undrawn=max(0, len(settings) - MAX_DRAWN),
        levels=_levels(found),
        table=_table(found),
        duplicates=_duplicates(found),
        distribution=_distribution(found),
        pictures=pictures,
        side=_side(pictures.size, len(found["axes"]["budgets"])),
        csv="data:text/csv;charset=utf-8;base64," + _base64(as_csv(found).encode("utf-8", "replace")),
        view=_embedded(view),
        results=_embedded(found),
        sources=_embedded({i: source for i, source in enumerate(pictures.sources) if i not in static}),
        script=script,
        style=style,
        script_hash=_digest(script),
        style_hash=_digest(style),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no place in a page


# Pictures


class _Pictures:
    """The pictures of the cells as data: URIs, each different one once."""

    def __init__(self, folder: Path, found: dict[str, Any]) -> None:
        names = [c["image"] for c in [*found["cells"], *found["reference"]["starts"]] if c["image"] is not None]
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no picture of this folder")
        names = list(dict.fromkeys(names))
        self.reduced = sum((folder / name).stat().st_size for name in names) > MAX_EMBEDDED
        self.sources: list[str] = []
        self.number: dict[str, int] = {}  # of a file name
        self.size = (SMALL, SMALL)
        seen: dict[bytes, int] = {}
        side = 320 if len(names) <= 1000 else 160
        for i, name in enumerate(names):
            width, height, _ = read_kind(folder / name)
            if i == 0:
                self.size = (width, height)
            data = (folder / name).read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest not in seen:
                seen[digest] = len(self.sources)
                self.sources.append(self._source(folder / name, data, side))
            self.number[name] = seen[digest]

    def _source(self, path: Path, data: bytes, side: int) -> str:
        if not self.reduced:
            return "data:image/png;base64," + _base64(data)
        image, file = read_image(path), io.BytesIO()
        image.thumbnail((side, side))
        image.save(file, "WEBP", quality=88)
        return "data:image/webp;base64," + _base64(file.getvalue())


def _side(size: tuple[int, int], columns: int) -> int:
    """How wide the pictures are shown at first, in CSS pixels: all columns side by side, if they can be."""
    room = min(max(960 // columns - 12, 112), 224)
    width = size[0]
    return room // width * width if width <= min(SMALL, room) else min(width, room)


# Cells


@dataclass(frozen=True)
class _Command:
    """What was typed, as far as a single cell needs it again: model, grid files, device, dtype."""

    options: tuple[str, ...]
    grids: dict[str, str]  # path of a grid file by its base name

    @classmethod
    def read(cls, typed: str) -> _Command:
        try:
            words = shlex.split(typed)
        except ValueError:
            words = []
        kept: dict[str, str] = {}
        grids: dict[str, str] = {}
        for i, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if not equals and i + 1 < len(words):
                value = words[i + 1]
            if re.match("-m.", word):  # -mNAME
                name, value = "-m", word[2:]
            name = {"-m": "--model"}.get(name, name)
            if name in ("--model", "--device", "--dtype") and value:
                kept[name] = value
            if name == "--grids":
                grids = {base_name(grid.strip()): grid.strip() for grid in value.split(",")}
        options = [part for name in kept for part in (name.replace("--model", "-m"), kept[name])]
        return cls(tuple(options), grids)

    def cell(self, cell: dict[str, Any]) -> str:
        words = ["diffgen", "generate", *self.options]
        words += ["--scheduler", cell["label"], "--grid", self.grids.get(cell["grid"], cell["grid"])]
        words += ["--steps", str(cell["steps"]), "--guidance", f"{cell['guidance']:g}", "--seed", str(cell["seed"])]
        words += ["-o", f"{cell['scheduler']}-{cell['steps']}-{cell['seed']}.png"]
        if cell["prompt"]:
            words += [*(["--"] if cell["prompt"].startswith("-") else []), cell["prompt"]]
        return shlex.join(words)


class _Cells:
    """What the page shows of each cell."""

    def __init__(self, found: dict[str, Any], pictures: _Pictures) -> None:
        self.found, self.pictures = found, pictures
        self.mixture = of_mixture(found)
        self.command = _Command.read(found["command"])
        self.by_place = {_place(cell): cell for cell in found["cells"]}
        self.by_row = {_place(row, seed=False): row for row in found["rows"]}
        self.references = {(r["prompt"], r["guidance"], r["seed"]): r for r in found["reference"]["starts"]}
        self.ties = _ties(found["rows"])
        errors = [c["error"] for c in found["cells"] if c["error"]]
        self.range = (min(errors), max(errors)) if errors else (1.0, 1.0)

    def start(self, seed: int, prompt: str, guidance: float) -> dict[str, Any]:
        """Everything that begins with one noise: the reference, and the cells, schedulers outside, budgets inside."""
        axes = self.found["axes"]
        setting: dict[str, Any] = {"prompt": prompt, "guidance": guidance, "seed": seed}
        cells = [
            self._cell(self.by_place.get(_place(entry | setting | {"budget": budget})), entry, budget, setting)
            for entry in axes["entries"]
            for budget in axes["budgets"]
        ]
        return {"reference": self._reference(self.references.get((prompt, guidance, seed))), "cells": cells}

    def _cell(
        self, cell: dict[str, Any] | None, entry: dict[str, Any], budget: int, setting: dict[str, Any]
    ) -> dict[str, Any]:
        where = f"{name_of(entry)}, {numbered(budget, 'evaluation')}, seed {setting['seed']}"
        if cell is None or cell["status"] != "done":
            reason = (cell and cell["reason"]) or "not made yet"
            return {"picture": None, "reason": reason, "where": where}
        row = self.by_row.get(_place(cell, seed=False), {})
        rank, alike = row.get("rank"), self.ties.get(_tie(row), 0) if row else 0
        facts = [("scheduler", cell["label"]), ("grid", cell["grid"]), ("seed", str(cell["seed"]))]
        if cell["prompt"]:
            facts += [("prompt", cell["prompt"]), ("guidance", f"{cell['guidance']:g}")]
        facts += [("evaluations", f"{cell['nfe']} of {budget} allowed"), ("steps", str(cell["steps"]))]
        if cell["stochastic"]:
            facts.append(("error", "none: it draws noise on the way"))
        elif cell["error"] is not None:
            facts.append(("error", f"{cell['error']:.4g}"))
            facts += [("over the seeds", f"{shown(row['error'])}")] if row.get("error") else []
            said = f"{rank}, shared by {alike}" if alike > 1 else str(rank)
            facts += [("rank at this budget", said)] if rank else []
        facts += [("PSNR", f"{cell['psnr']:.2f} dB")] if cell["psnr"] is not None else []
        facts += [("SSIM", f"{cell['ssim']:.4f}")] if cell["ssim"] is not None else []
        facts += list(self._moments(cell))
        if cell["seconds"] is not None:
            each = f" ({_seconds(cell['seconds_per_nfe'])} each)" if cell["seconds_per_nfe"] else ""
            facts.append(("time", _seconds(cell["seconds"]) + each))
        facts += [("peak memory", _bytes(cell["peak_memory"]))] if cell["peak_memory"] else []
        facts += [(f"{what} SHA-256", cell[key]) for what, key in HASHES if cell[key]]
        return {
            "picture": self.pictures.number[cell["image"]] if cell["image"] else None,
            "file": cell["image"],
            "reason": None if cell["image"] else "no picture",
            "where": where,
            "alt": f"{where}{': ' + cell['prompt'] if cell['prompt'] else ''}",
            "value": self._value(cell),
            "stochastic": cell["stochastic"],
            "best": _best(row, self.ties) if row else "",
            "small": f"{cell['nfe']} NFE · {_seconds(cell['seconds'])}",
            "bar": self._bar(cell["error"]),
            "facts": facts,
            "command": None if self.mixture else self.command.cell(cell),
        }

    def _reference(self, start: dict[str, Any] | None) -> dict[str, Any] | None:
        if start is None or start["image"] is None:
            return None
        where = f"reference, seed {start['seed']}"
        facts = [("solution", self.found["reference"]["name"]), ("seed", str(start["seed"]))]
        if start["prompt"]:
            facts += [("prompt", start["prompt"]), ("guidance", f"{start['guidance']:g}")]
        facts += [("evaluations", str(start["nfe"]))] if start["nfe"] else []
        if start["error"]:
            facts.append(("own error, about", f"{start['error']:.2g}"))
        facts += list(self._moments(start))
        return {
            "picture": self.pictures.number[start["image"]],
            "file": start["image"],
            "reason": None,
            "where": where,
            "alt": f"{where}{': ' + start['prompt'] if start['prompt'] else ''}",
            "value": "exact" if start["error"] == 0 else "",
            "stochastic": False,
            "best": "",
            "small": f"{start['nfe']} NFE" if start["nfe"] else "",
            "bar": None,
            "facts": facts,
            "command": None,
        }

    def _value(self, cell: dict[str, Any]) -> str:
        if cell["error"] is not None:
            return f"{cell['error']:.3g}"
        return f"W {cell['sliced_wasserstein']:.3g}" if cell.get("sliced_wasserstein") is not None else ""

    def _moments(self, said: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for name, words, _ in MOMENTS:
            if said.get(name) is not None:
                yield words, f"{said[name]:.3g}"

    def _bar(self, error: float | None) -> float | None:
        """The length of a bar from 0 to 100: how far from the best of the page, on a logarithmic scale."""
        low, high = self.range
        if not error or high <= low:
            return None
        return round(4 + 96 * math.log(error / low) / math.log(high / low), 1)


def _tie(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["budget"], row["prompt"], row["guidance"], row["rank"]


def _ties(rows: Sequence[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    """How many rows share a rank; with rank 0 how many have one."""
    ranked = [row for row in rows if row["rank"] is not None]
    return Counter(_tie(row) for row in ranked) + Counter(_tie(row | {"rank": 0}) for row in ranked)


def _best(row: dict[str, Any], ties: Counter[tuple[Any, ...]]) -> str:
    """The mark of the nearest; none where all are alike."""
    if row["rank"] != 1 or ties[_tie(row)] == ties[_tie(row | {"rank": 0})] > 1:
        return ""
    return "nearest" if ties[_tie(row)] == 1 else "shares 1st"


HASHES = (("pixels", "pixels_sha256"), ("starting noise", "noise_sha256"))


def _place(said: dict[str, Any], seed: bool = True) -> tuple[Any, ...]:
    place = (said["label"], said["grid"], said["budget"], said["prompt"], said["guidance"])
    return (*place, said["seed"]) if seed else place


# Figures


def _setting(found: dict[str, Any], prompt: str, guidance: float) -> dict[str, Any]:
    """Plots and measured orders for one prompt at one guidance scale."""
    rows = [row for row in found["rows"] if row["prompt"] == prompt and row["guidance"] == guidance]
    styles = {_key(entry): i for i, entry in enumerate(found["axes"]["entries"])}
    floor = found["reference"]["error"]
    exact = [s["sliced_wasserstein"] for s in found["reference"]["starts"] if s.get("sliced_wasserstein")]
    drawn: list[dict[str, Any]] = []

    def draw(what: str, x: str, x_label: str, y: str, y_label: str, low: float | None, low_label: str) -> None:
        series = []
        for key, style in styles.items():
            mine = [r for r in rows if _key(r) == key and r[y] is not None and _number(r[x]) is not None]
            if mine:
                points = [Point(_number(r[x]) or 0.0, r[y]["mean"], r[y]["low"], r[y]["high"]) for r in mine]
                series.append(Series(style, f"{key[0]} · {key[1]}", tuple(points)))
        about = f"{what}: a curve for each of {len(series)} schedulers; the figures follow as a table"
        svg = plots.curves(series, about, x_label, y_label, low, low_label)
        if svg is not None:
            figures = [(s.style, s.name, [(f"{p.x:.3g}", _between(p)) for p in s.points]) for s in series]
            drawn.append({"title": what, "svg": svg, "x": x_label, "y": y_label, "figures": figures})

    about_floor = (floor, "what the reference itself is known to") if floor else (None, "")
    draw("Error against evaluations", "nfe", "function evaluations (NFE)", "error", "error", *about_floor)
    draw("Error against time", "seconds", "seconds", "error", "error", *about_floor)
    if any(row.get("sliced_wasserstein") for row in rows):
        low = sum(exact) / len(exact) if exact else None
        what, y = "Distance to the distribution", "sliced_wasserstein"
        label = "the exact solution of as many points"
        draw(what, "nfe", "function evaluations (NFE)", y, "sliced Wasserstein distance", low, label)
    orders = []
    known = {_key(o): o for o in found["orders"] if o["prompt"] == prompt and o["guidance"] == guidance}
    for entry in found["axes"]["entries"]:
        order = known.get(_key(entry), {})
        said = f"{order['order']:.2f}" if order.get("order") is not None else "–"
        between = f"{order['from']} – {order['to']}" if order.get("order") is not None else ""
        orders.append({"entry": entry, "style": styles[_key(entry)], "order": said, "between": between})
    return {"name": _setting_name(found, prompt, guidance), "plots": drawn, "orders": orders}


def _setting_name(found: dict[str, Any], prompt: str, guidance: float) -> str:
    """Empty where there is only one."""
    axes = found["axes"]
    parts = [f"“{prompt}”"] if len(axes["prompts"]) > 1 else []
    parts += [f"guidance {guidance:g}"] if len(axes["guidance"]) > 1 else []
    return ", ".join(parts)


def _levels(found: dict[str, Any]) -> Markup | None:
    styles = {_key(entry): i for i, entry in enumerate(found["axes"]["entries"])}
    rows = [(styles[_key(g)], f"{g['label']} · {g['grid']}", g["sigmas"]) for g in found["grids"] if _key(g) in styles]
    about = f"The noise levels at which each of {len(rows)} schedulers asks, from much noise to little"
    return plots.levels(rows, about, f"{level_symbol(found['model']['noise'])}, from noise to picture")


def _table(found: dict[str, Any]) -> dict[str, Any]:
    """All rows with every figure: heads (key, title, is it a number) and lines of (text, value to sort by)."""
    axes, mixture = found["axes"], of_mixture(found)
    heads = [("scheduler", "scheduler", False), ("grid", "grid", False)]
    heads += [("prompt", "prompt", False)] if len(axes["prompts"]) > 1 else []
    heads += [("guidance", "guidance", True)] if len(axes["guidance"]) > 1 else []
    heads += [("budget", "budget", True), ("nfe", "NFE", True), ("steps", "steps", True), ("rank", "rank", True)]
    heads += [("error", "error", True)]
    heads += (
        [(k, short, True) for k, _, short in MOMENTS] if mixture else [("psnr", "PSNR", True), ("ssim", "SSIM", True)]
    )
    quick = all(row["seconds"] is None or row["seconds"]["mean"] < 1 for row in found["rows"])
    unit, factor = ("ms", 1000) if quick else ("s", 1)
    heads += [("seconds", unit, True), ("seconds_per_nfe", f"{unit} / NFE", True)]
    heads += [("done", "cells", True)]
    styles = {_key(entry): i for i, entry in enumerate(axes["entries"])}
    lines, ties = [], _ties(found["rows"])
    for row in found["rows"]:
        line: list[tuple[str, Any]] = [(row["label"], row["label"]), (row["grid"], row["grid"])]
        for key, _, number in heads[2:]:
            value = row[key]
            if key == "error" and row["stochastic"]:
                line.append(("stochastic", None))
            elif key == "done":
                lacking = [f"{row[kind]} {kind}" for kind in ("failed", "missing") if row.get(kind)]
                lacking += ["the reference itself"] if row.get("is_reference") else []
                line.append((", ".join([str(row["done"]), *lacking]), row["done"]))
            elif value is not None and key in ("seconds", "seconds_per_nfe"):
                line.append((shown({n: v and v * factor for n, v in value.items()}), value["mean"]))
            elif isinstance(value, dict) or value is None:
                line.append((shown(value), None if value is None else value["mean"]))
            else:
                line.append((f"{value:g}" if number else value, value))
        lines.append({"style": styles.get(_key(row), 0), "best": bool(_best(row, ties)), "line": line})
    return {"heads": heads, "lines": lines}


def _distribution(found: dict[str, Any]) -> dict[str, Any] | None:
    """The table of distances between a run's pictures and its data, real pictures last."""
    said = found.get("distribution")
    if not said:
        return None
    names = list(said["better"])
    styles = {_key(entry): i for i, entry in enumerate(found["axes"]["entries"])}

    def line(row: dict[str, Any]) -> dict[str, Any]:
        values = row["values"] or {}
        figures = ["–" if values.get(name) is None else f"{values[name]:.3g}" for name in names]
        said = {"label": row["label"], "grid": row["grid"], "nfe": row["nfe"], "guidance": f"{row['guidance']:g}"}
        return said | {"style": styles[_key(row)], "figures": figures, "reason": row["reason"]}

    real = {"label": "real pictures", "grid": "", "nfe": "", "guidance": "", "style": None}
    lines = [line(row) for row in said["rows"]]
    lines.append(real | {"figures": [floor_text(said["scales"][name]) for name in names], "reason": None})
    heads = [(name.replace("_", " "), said["better"][name]) for name in names]
    return {key: said[key] for key in ("samples", "held_out", "data")} | {"heads": heads, "lines": lines}


def _duplicates(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of cells with the same pixels, in words."""
    cells = found["cells"]
    group: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    why: dict[tuple[Any, ...], set[tuple[bool, str]]] = defaultdict(set)
    seeds: dict[tuple[Any, ...], set[int]] = defaultdict(set)

    def top(place: tuple[Any, ...]) -> tuple[Any, ...]:
        while group.setdefault(place, place) != place:
            place = group[place]
        return place

    for pair in found["duplicates"]:
        a, b = (_place(cells[i], seed=False) for i in pair["cells"][0])
        group[top(b)] = top(a)
    for pair in found["duplicates"]:
        here = top(_place(cells[pair["cells"][0][0]], seed=False))
        why[here].add((pair["expected"], pair["why"]))
        seeds[here] |= {cells[i]["seed"] for i, _ in pair["cells"]}
    members: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for place in group:
        label, grid, budget, prompt, guidance = place
        setting = _setting_name(found, prompt, guidance)
        members[top(place)].append(f"{label} on {grid} at {budget}{f' ({setting})' if setting else ''}")
    return [
        {
            "cells": members[here],
            "seeds": _ranges(sorted(seeds[here])),
            "expected": all(expected for expected, _ in why[here]),
            "why": "; ".join(sorted({reason for _, reason in why[here]})),
        }
        for here in members
    ]


# Words


def _title(found: dict[str, Any]) -> str:
    count = len(found["axes"]["entries"])
    return f"{numbered(count, 'scheduler')} on {found['model']['name']}"


def _facts(found: dict[str, Any], pictures: _Pictures) -> Iterator[tuple[str, str, bool]]:
    """(name, value, is it code) of what was compared, and how."""
    model, axes, reference = found["model"], found["axes"], found["reference"]
    yield "Model", f"{model['name']}", False
    yield "Seeds", _ranges(axes["seeds"]), False
    yield "Budgets", f"{', '.join(map(str, axes['budgets']))} evaluations", False
    if any(axes["prompts"]):
        yield "Guidance", ", ".join(f"{g:g}" for g in axes["guidance"]), False
    if calls := _network_calls(found["cells"]):
        yield "Network calls", calls, False
    own = reference["error"]
    said = {"none": "none", "exact": "exact solution"}.get(reference["kind"], reference["name"])
    yield "Reference", f"{said}, itself known to about {own:.2g}" if own else said, False
    yield "Cells", _count(found), False
    yield "Pictures", f"{pictures.size[0]} × {pictures.size[1]} pixels", False
    yield "Computed on", f"{model['device']}, {model['dtype']}", False
    yield "Time", f"{_seconds(sum(cell['seconds'] or 0.0 for cell in found['cells']))} for all cells", False
    yield "Noise", f"{model['noise']}, predicts {model['prediction'].replace('_', ' ')}", False
    yield "Versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()), False
    yield "Model hash", model["hash"], True


def _network_calls(cells: Sequence[dict[str, Any]]) -> str:
    """How often the network looked at a picture for each evaluation, where that was counted."""
    each = {c["guidance"]: c["network_calls"] / c["nfe"] for c in cells if c.get("network_calls") and c["nfe"]}
    if len(set(each.values())) < 2:
        return "".join(f"{number:g} an evaluation" for number in set(each.values()))
    return ", ".join(f"{number:g} an evaluation at guidance {scale:g}" for scale, number in sorted(each.items()))


def _count(found: dict[str, Any]) -> str:
    cells = found["cells"]
    done = sum(cell["status"] == "done" for cell in cells)
    return f"{done}" if done == len(cells) else f"{done} of {len(cells)} done"


def _ranges(numbers: Sequence[int]) -> str:
    """ "0 – 3, 7" of 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]} – {p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.1f} min"


def _bytes(value: float) -> str:
    return f"{value / 2**20:.0f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def _between(point: Point) -> str:
    if point.low is None or point.high is None:
        return f"{point.mean:.3g}"
    return f"{point.mean:.3g} ({point.low:.3g} to {point.high:.3g})"


def _number(value: Any) -> float | None:
    """Of a mean with an interval the mean."""
    if isinstance(value, dict):
        return float(value["mean"])
    return None if value is None else float(value)


def _key(said: dict[str, Any]) -> tuple[str, str]:
    return said["label"], said["grid"]


# Safety


def _embedded(value: Any) -> Markup:
    """JSON for a script element: no text in it can end the element or be read as markup."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    """What is no finite number becomes null: JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _part(name: str) -> Markup:
    return Markup((files("diffgen.comparison") / "templates" / name).read_text("utf-8"))


def _digest(text: str) -> str:
    return _base64(hashlib.sha256(text.encode()).digest())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


ENVIRONMENT = Environment(
    loader=PackageLoader("diffgen.comparison"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals.update(swatch=plots.swatch)
