"""Write report.html: a comparison as one page that needs no network and no other file, and works without JavaScript.

Python computes every figure, text, alternative text and command and escapes them; the script only selects the cells to
show. The page's content security policy lets no other script run and nothing be loaded.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from diffgen.images.metadata import base_name
from diffgen.images.read import read_image, read_kind
from diffgen.training.metrics import METRICS
from schedulers.noise import level_symbol

from . import plots
from .metrics import CLOUD, PICTURE, Interval
from .plots import Point, Series
from .results import (
    CellResult,
    DistributionRow,
    Place,
    Results,
    RowResult,
    StartResult,
)
from .tables import OnGrid, as_csv, floor_text, name_of, number_text, numbered, with_interval

MAX_EMBEDDED = 20_000_000  # bytes of pictures; above this, reduced copies are embedded
ROOM = 640  # pixels of the pictures' columns beside the verdict
MAX_DRAWN = 24  # prompts × guidance scales with plots
SENTENCES = 6  # of the verdict that are not folded
SMALL = 128  # pictures up to this side are enlarged pixel by pixel
NAME = re.compile(r"images/[0-9A-Za-z._-]+\.png")


def page(results: Results, folder: Path) -> str:
    """The page of a comparison; `folder` is where its images/ are.

    Raises ValueError or LookupError for results that contradict themselves, InputError for a picture that cannot be
    read.
    """
    axes = results.axes
    settings = [(prompt, guidance) for prompt in axes.prompts for guidance in axes.guidance]
    pictures = _Pictures(folder, results)
    cells = _Cells(results, pictures)
    starts = [[cells.start(seed, *setting) for seed in axes.seeds] for setting in settings]
    view = {
        "prompts": axes.prompts,
        "guidance": axes.guidance,
        "seeds": axes.seeds,
        "budgets": axes.budgets,
        "entries": [name_of(entry) for entry in axes.entries],
        "starts": starts,
        "reduced": pictures.reduced,
    }
    first = starts[0][0]
    static = {cell["picture"] for cell in [first["reference"], *first["cells"]] if cell and cell["picture"] is not None}
    script, style = template("report.js"), template("report.css")
    text = ENVIRONMENT.get_template("report.html.j2").render(
        results=results,
        axes=axes,
        title=f"{numbered(len(axes.entries), 'scheduler')} on {results.model.name}",
        facts=list(_facts(results, pictures)),
        summary=_summary(results),
        shown=SENTENCES,
        budgets=[numbered(budget, "evaluation") for budget in axes.budgets],
        first=first,
        settings=[_setting(results, *setting) for setting in settings[:MAX_DRAWN]],
        undrawn=max(0, len(settings) - MAX_DRAWN),
        levels=_levels(results),
        table=_table(results),
        duplicates=_duplicates(results),
        distribution=_distribution(results),
        pictures=pictures,
        side=_side(pictures.size, len(axes.budgets)),
        csv="data:text/csv;charset=utf-8;base64," + _base64(as_csv(results.cells).encode("utf-8", "replace")),
        view=_embedded(view),
        content=_embedded(results.to_json()),
        sources=_embedded({i: source for i, source in enumerate(pictures.sources) if i not in static}),
        script=script,
        style=style,
        script_hash=_digest(script),
        style_hash=_digest(style),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be written


# Pictures


class _Pictures:
    """The pictures of the cells as data: URIs, each different picture once."""

    def __init__(self, folder: Path, results: Results) -> None:
        owners: list[CellResult | StartResult] = [*results.cells, *results.reference.starts]
        names = list(dict.fromkeys(owner.image for owner in owners if owner.image is not None))
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no picture of this folder")
        self.reduced = sum((folder / name).stat().st_size for name in names) > MAX_EMBEDDED
        self.sources: list[str] = []
        self.number: dict[str, int] = {}  # in `sources`, by file name
        self.size = (SMALL, SMALL)
        numbers: dict[bytes, int] = {}
        side = 320 if len(names) <= 1000 else 160
        for i, name in enumerate(names):
            width, height, _ = read_kind(folder / name)
            if i == 0:
                self.size = (width, height)
            data = (folder / name).read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest not in numbers:
                numbers[digest] = len(self.sources)
                self.sources.append(self._source(folder / name, data, side))
            self.number[name] = numbers[digest]

    def _source(self, path: Path, data: bytes, side: int) -> str:
        if not self.reduced:
            return "data:image/png;base64," + _base64(data)
        image, file = read_image(path), io.BytesIO()
        image.thumbnail((side, side))
        image.save(file, "WEBP", quality=88)
        return "data:image/webp;base64," + _base64(file.getvalue())


def _side(size: tuple[int, int], columns: int) -> int:
    """The initial width of the pictures in CSS pixels, so that all columns fit side by side if possible."""
    room = min(max(ROOM // columns - 12, 112), 224)
    width = size[0]
    return room // width * width if width <= min(SMALL, room) else min(width, room)


# Cells


@dataclass(frozen=True)
class _Command:
    """The parts of the command line that reproducing a single cell needs: model, grid files, device, dtype."""

    options: tuple[str, ...]
    grids: dict[str, str]  # the path of a grid file by its base name

    @classmethod
    def parse(cls, command: str) -> _Command:
        try:
            words = shlex.split(command)
        except ValueError:
            words = []
        repeated: dict[str, str] = {}
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
                repeated[name] = value
            if name == "--grids":
                grids = {base_name(grid.strip()): grid.strip() for grid in value.split(",")}
        options = [part for name in repeated for part in (name.replace("--model", "-m"), repeated[name])]
        return cls(tuple(options), grids)

    def cell(self, cell: CellResult) -> str:
        """The command that generates the picture of a cell."""
        words = ["diffgen", "generate", *self.options]
        words += ["--scheduler", cell.label, "--grid", self.grids.get(cell.grid, cell.grid)]
        words += ["--steps", str(cell.steps), "--guidance", f"{cell.guidance:g}", "--seed", str(cell.seed)]
        words += ["-o", f"{cell.scheduler}-{cell.steps}-{cell.seed}.png"]
        if cell.prompt:
            words += [*(["--"] if cell.prompt.startswith("-") else []), cell.prompt]
        return shlex.join(words)


class _Cells:
    """What the page shows of each cell."""

    def __init__(self, results: Results, pictures: _Pictures) -> None:
        self.results, self.pictures = results, pictures
        self.command = _Command.parse(results.command)
        self.by_place = {(*cell.place, cell.seed): cell for cell in results.cells}
        self.rows = {row.place: row for row in results.rows}
        self.references = {(r.prompt, r.guidance, r.seed): r for r in results.reference.starts}
        self.ties = _ties(results.rows)
        errors = [cell.error for cell in results.cells if cell.error]
        self.range = (min(errors), max(errors)) if errors else (1.0, 1.0)

    def start(self, seed: int, prompt: str, guidance: float) -> dict[str, Any]:
        """Everything with the same starting noise: the reference, and the cells, budgets varying fastest."""
        axes = self.results.axes
        cells = []
        for entry in axes.entries:
            for budget in axes.budgets:
                cell = self.by_place.get((entry.label, entry.grid, budget, prompt, guidance, seed))
                where = f"{name_of(entry)}, {numbered(budget, 'evaluation')}, seed {seed}"
                if cell is None or cell.status != "done":
                    reason = (cell and cell.reason) or "not made yet"
                    cells.append({"picture": None, "reason": reason, "where": where})
                else:
                    cells.append(self._cell(cell, where))
        reference = self.references.get((prompt, guidance, seed))
        return {"reference": None if reference is None else self._reference(reference), "cells": cells}

    def _cell(self, cell: CellResult, where: str) -> dict[str, Any]:
        row = self.rows.get(cell.place)
        return {
            "picture": self.pictures.number[cell.image] if cell.image else None,
            "file": cell.image,
            "reason": None if cell.image else "no picture",
            "where": where,
            "alt": f"{where}{': ' + cell.prompt if cell.prompt else ''}",
            "value": self._value(cell),
            "stochastic": cell.stochastic,
            "best": _best(row, self.ties) if row else "",
            "small": self._rank(cell, row),
            "bar": self._bar(cell.error),
            "facts": list(self._cell_facts(cell, row)),
            "command": None if self.results.model.is_mixture else self.command.cell(cell),
        }

    def _cell_facts(self, cell: CellResult, row: RowResult | None) -> Iterator[tuple[str, str]]:
        """(name, value) of everything that is known about a cell."""
        yield "scheduler", cell.label
        yield "grid", cell.grid
        yield "seed", str(cell.seed)
        if cell.prompt:
            yield "prompt", cell.prompt
            yield "guidance", f"{cell.guidance:g}"
        yield "evaluations", f"{cell.nfe} of {cell.budget} allowed"
        yield "steps", str(cell.steps)
        if cell.stochastic:
            yield "error", "none: it draws noise"
        for name, text in _metric_facts(cell.metrics):
            yield name, text
            if name == "error" and row is not None:
                if row.error is not None:
                    yield "mean over the seeds", with_interval(row.error)
                if row.rank:
                    tied = self.ties[_tie(row)]
                    yield "rank at this budget", f"{row.rank}, shared by {tied}" if tied > 1 else str(row.rank)
        if cell.seconds is not None:
            each = f" ({_seconds(cell.seconds_per_nfe)} each)" if cell.seconds_per_nfe else ""
            yield "time", _seconds(cell.seconds) + each
        if cell.peak_memory:
            yield "peak memory", _bytes(cell.peak_memory)
        if cell.pixels_sha256:
            yield "pixels SHA-256", cell.pixels_sha256
        if cell.noise_sha256:
            yield "starting noise SHA-256", cell.noise_sha256

    def _reference(self, start: StartResult) -> dict[str, Any] | None:
        if start.image is None:
            return None
        where = f"reference, seed {start.seed}"
        facts = [("solution", self.results.reference.name or ""), ("seed", str(start.seed))]
        if start.prompt:
            facts += [("prompt", start.prompt), ("guidance", f"{start.guidance:g}")]
        facts += [("evaluations", str(start.nfe))] if start.nfe else []
        facts += [("its own error, about", f"{start.error:.2g}")] if start.error else []
        return {
            "picture": self.pictures.number[start.image],
            "file": start.image,
            "reason": None,
            "where": where,
            "alt": f"{where}{': ' + start.prompt if start.prompt else ''}",
            "value": "exact" if start.error == 0 else "",
            "stochastic": False,
            "best": "",
            "small": f"{start.nfe} NFE" if start.nfe else "",
            "bar": None,
            "facts": [*facts, *_metric_facts(start.metrics)],
            "command": None,
        }

    def _rank(self, cell: CellResult, row: RowResult | None) -> str:
        """The line below the figure of a picture: the mean over the seeds and its rank, else how long it took."""
        made = f"{cell.nfe} NFE · {_seconds(cell.seconds)}"
        if row is None or row.error is None or row.error.n < 2:
            return made
        rank = "" if row.rank is None else f", rank {row.rank} of {self.ties[_tie(replace(row, rank=0))]}"
        return f"mean {number_text(row.error.mean)}{rank}"

    def _value(self, cell: CellResult) -> str:
        """The figure below a picture: its error, or for a stochastic scheduler the distance of its distribution."""
        if cell.error is not None:
            return number_text(cell.error)
        distance = cell.metrics.get("sliced_wasserstein")
        return "" if distance is None else f"W {number_text(distance)}"

    def _bar(self, error: float | None) -> float | None:
        """The length of a bar from 0 to 100: the error between the smallest and largest, on a logarithmic scale."""
        low, high = self.range
        if not error or high <= low:
            return None
        return round(4 + 96 * math.log(error / low) / math.log(high / low), 1)


def _metric_facts(metrics: dict[str, float | None]) -> Iterator[tuple[str, str]]:
    for name, metric in METRICS.items():
        value = metrics.get(name)
        if value is not None:
            yield metric.title, metric.text(value)


Tie = tuple[int, str, float, int | None]


def _tie(row: RowResult) -> Tie:
    return row.budget, row.prompt, row.guidance, row.rank


def _ties(rows: Sequence[RowResult]) -> Counter[Tie]:
    """How many rows share a rank; with rank 0 how many rows of the setting have a rank."""
    ranked = [row for row in rows if row.rank is not None]
    return Counter(map(_tie, ranked)) + Counter(_tie(replace(row, rank=0)) for row in ranked)


def _best(row: RowResult, ties: Counter[Tie]) -> str:
    """The mark of the nearest; none if all are tied."""
    if row.rank != 1 or ties[_tie(row)] == ties[_tie(replace(row, rank=0))] > 1:
        return ""
    return "nearest" if ties[_tie(row)] == 1 else "shares 1st"


# Figures


def _setting(results: Results, prompt: str, guidance: float) -> dict[str, Any]:
    """Plots and measured orders for one prompt at one guidance scale."""
    rows = [row for row in results.rows if row.prompt == prompt and row.guidance == guidance]
    styles = _styles(results)
    drawn: list[dict[str, Any]] = []

    def draw(title: str, x: str, metric: str, y_label: str, floor: float | None, floor_label: str) -> None:
        series = []
        for key, style in styles.items():
            points = [
                Point(place, value.mean, value.low, value.high)
                for row in rows
                if _key(row) == key
                and (value := row.metrics.get(metric)) is not None
                and (place := row.nfe if x == "nfe" else _mean(row.seconds)[1]) is not None
            ]
            if points:
                series.append(Series(style, f"{key[0]} · {key[1]}", tuple(points)))
        x_label = "function evaluations (NFE)" if x == "nfe" else "seconds"
        about = f"{title}: a curve for each of {len(series)} schedulers; a table of the figures follows"
        svg = plots.curves(series, about, x_label, y_label, floor, floor_label)
        if svg is not None:
            figures = [(s.style, s.name, [(number_text(p.x), _between(p)) for p in s.points]) for s in series]
            drawn.append({"title": title, "svg": svg, "x": x_label, "y": y_label, "figures": figures})

    floor = results.reference.error or None
    draw("Error against evaluations", "nfe", "error", "error", floor, "accuracy of the reference")
    draw("Error against time", "seconds", "error", "error", floor, "accuracy of the reference")
    if any(row.metrics.get("sliced_wasserstein") for row in rows):
        exact = [value for s in results.reference.starts if (value := s.metrics.get("sliced_wasserstein"))]
        least = sum(exact) / len(exact) if exact else None
        title, label = "Distance to the distribution", "sliced Wasserstein distance"
        draw(title, "nfe", "sliced_wasserstein", label, least, "exact solution, equally many points")
    measured = {_key(o): o for o in results.orders if o.prompt == prompt and o.guidance == guidance}
    orders = []
    for entry in results.axes.entries:
        order = measured.get(_key(entry))
        text, between = "–", ""
        if order is not None and order.order is not None:
            text, between = f"{order.order:.2f}", f"{order.from_} – {order.to}"
        orders.append({"entry": entry, "style": styles[_key(entry)], "order": text, "between": between})
    return {"name": _setting_name(results, prompt, guidance), "plots": drawn, "orders": orders}


def _setting_name(results: Results, prompt: str, guidance: float) -> str:
    """The parts of a setting that vary; empty if there is only one setting."""
    parts = [f"“{prompt}”"] if len(results.axes.prompts) > 1 else []
    parts += [f"guidance {guidance:g}"] if len(results.axes.guidance) > 1 else []
    return ", ".join(parts)


def _levels(results: Results) -> Markup | None:
    styles = _styles(results)
    rows = [(styles[_key(g)], f"{g.label} · {g.grid}", g.sigmas) for g in results.grids if _key(g) in styles]
    about = f"The noise levels at which each of {len(rows)} schedulers evaluates the network, from high to low"
    return plots.levels(rows, about, f"{level_symbol(results.model.noise)}, from noise to picture")


TableEntry = tuple[str, Any]  # a text of the table, and the value to sort by


def _table(results: Results) -> dict[str, Any]:
    """All rows with every figure: heads (key, title, is it a number) and lines of (text, value to sort by)."""
    axes = results.axes
    means = [row.seconds.mean for row in results.rows if row.seconds is not None]
    unit, factor = ("ms", 1000) if all(mean < 1 for mean in means) else ("s", 1)
    columns: list[tuple[str, str, bool, Callable[[RowResult], TableEntry]]] = [
        ("scheduler", "scheduler", False, lambda row: (row.label, row.label)),
        ("grid", "grid", False, lambda row: (row.grid, row.grid)),
    ]
    if len(axes.prompts) > 1:
        columns.append(("prompt", "prompt", False, lambda row: (row.prompt, row.prompt)))
    if len(axes.guidance) > 1:
        columns.append(("guidance", "guidance", True, lambda row: _number(row.guidance)))
    columns += [
        ("budget", "budget", True, lambda row: _number(row.budget)),
        ("nfe", "NFE", True, lambda row: _number(row.nfe)),
        ("steps", "steps", True, lambda row: _number(row.steps)),
        ("rank", "rank", True, lambda row: _number(row.rank)),
        ("error", "error", True, lambda row: ("stochastic", None) if row.stochastic else _mean(row.error)),
    ]
    for name in CLOUD if results.model.is_mixture else PICTURE:
        columns.append((name, METRICS[name].heading, True, partial(_metric, name)))
    columns += [
        ("seconds", unit, True, lambda row: _mean(row.seconds, factor)),
        ("seconds_per_nfe", f"{unit} / NFE", True, lambda row: _mean(row.seconds_per_nfe, factor)),
        ("done", "cells", True, _done),
    ]
    styles, ties = _styles(results), _ties(results.rows)
    lines = [
        {
            "style": styles.get(_key(row), 0),
            "best": bool(_best(row, ties)),
            "line": [entry(row) for *_, entry in columns],
        }
        for row in results.rows
    ]
    return {"heads": [column[:3] for column in columns], "lines": lines}


def _number(value: float | None) -> TableEntry:
    return ("–" if value is None else f"{value:g}", value)


def _mean(value: Interval | None, factor: float = 1) -> TableEntry:
    if value is None:
        return "–", None
    high = None if value.high is None else value.high * factor
    return with_interval(Interval(value.mean * factor, None, high, value.n)), value.mean


def _metric(name: str, row: RowResult) -> TableEntry:
    return _mean(row.metrics.get(name))


def _done(row: RowResult) -> TableEntry:
    """How many cells are done, and what the others are."""
    notes = [f"{count} {kind}" for count, kind in ((row.failed, "failed"), (row.missing, "missing")) if count]
    notes += ["the reference itself"] if row.is_reference else []
    return ", ".join([str(row.done), *notes]), row.done


def _distribution(results: Results) -> dict[str, Any] | None:
    """The metrics of a run's pictures against its data, real pictures last."""
    distribution = results.distribution
    if distribution is None:
        return None
    names = list(distribution.better)
    styles = _styles(results)

    def line(row: DistributionRow) -> dict[str, Any]:
        return {
            "label": row.label,
            "grid": row.grid,
            "nfe": row.nfe,
            "guidance": f"{row.guidance:g}",
            "style": styles[_key(row)],
            "figures": [number_text((row.values or {}).get(name)) for name in names],
            "reason": row.reason,
        }

    real = {"label": "real pictures", "grid": "", "nfe": "", "guidance": "", "style": None, "reason": None}
    floors = [floor_text(distribution.scales[name]) for name in names]
    return {
        "samples": distribution.samples,
        "held_out": distribution.held_out,
        "data": distribution.data,
        "heads": [(METRICS[name].title if name in METRICS else name, distribution.better[name]) for name in names],
        "lines": [*map(line, distribution.rows), real | {"figures": floors}],
    }


def _duplicates(results: Results) -> list[dict[str, Any]]:
    """Groups of rows with the same pixels, in words."""
    cells = results.cells
    parent: dict[Place, Place] = {}
    reasons: dict[Place, set[tuple[bool, str]]] = defaultdict(set)
    seeds: dict[Place, set[int]] = defaultdict(set)

    def root(place: Place) -> Place:
        while parent.setdefault(place, place) != place:
            place = parent[place]
        return place

    for pair in results.duplicates:
        a, b = (cells[i].place for i in pair.cells[0])
        parent[root(b)] = root(a)
    for pair in results.duplicates:
        group = root(cells[pair.cells[0][0]].place)
        reasons[group].add((pair.expected, pair.why))
        seeds[group] |= {cells[i].seed for i, _ in pair.cells}
    members: dict[Place, list[str]] = defaultdict(list)
    for place in parent:
        label, grid, budget, prompt, guidance = place
        setting = _setting_name(results, prompt, guidance)
        members[root(place)].append(f"{label} on {grid} at {budget}{f' ({setting})' if setting else ''}")
    return [
        {
            "cells": names,
            "seeds": _ranges(sorted(seeds[group])),
            "expected": all(expected for expected, _ in reasons[group]),
            "why": "; ".join(sorted({reason for _, reason in reasons[group]})),
        }
        for group, names in members.items()
    ]


# Words


def _summary(results: Results) -> str:
    """What was compared, in one line."""
    axes = results.axes
    parts = [f"{', '.join(map(str, axes.budgets))} evaluations", numbered(len(axes.seeds), "seed")]
    if any(axes.prompts):
        parts.append(f"guidance {', '.join(f'{g:g}' for g in axes.guidance)}")
    if results.reference.name:
        parts.append(f"errors against {results.reference.name}")
    return " · ".join(parts)


def _facts(results: Results, pictures: _Pictures) -> Iterator[tuple[str, str, bool]]:
    """(name, value, is it code): what was compared, and how."""
    model, axes, reference = results.model, results.axes, results.reference
    yield "Model", model.name, False
    yield "Seeds", _ranges(axes.seeds), False
    yield "Budgets", f"{', '.join(map(str, axes.budgets))} evaluations", False
    if any(axes.prompts):
        yield "Guidance", ", ".join(f"{g:g}" for g in axes.guidance), False
    if calls := _network_calls(results.cells):
        yield "Network calls", calls, False
    accuracy = f", accurate to about {reference.error:.2g}" if reference.error else ""
    yield "Reference", (reference.name or "none") + accuracy, False
    done = sum(cell.status == "done" for cell in results.cells)
    yield "Cells", str(done) if done == len(results.cells) else f"{done} of {len(results.cells)} done", False
    yield "Pictures", f"{pictures.size[0]} × {pictures.size[1]} pixels", False
    yield "Computed on", f"{model.device}, {model.dtype}", False
    yield "Time", f"{_seconds(sum(cell.seconds or 0.0 for cell in results.cells))} for all cells", False
    yield "Noise and prediction", f"{model.noise}, {model.prediction}", False
    yield "Versions", ", ".join(f"{name} {version}" for name, version in results.versions.items()), False
    yield "Model hash", model.hash, True


def _network_calls(cells: Sequence[CellResult]) -> str:
    """The calls of the network per evaluation, where they were counted."""
    each = {c.guidance: c.network_calls / c.nfe for c in cells if c.network_calls and c.nfe}
    if len(set(each.values())) < 2:
        return "".join(f"{number:g} per evaluation" for number in set(each.values()))
    return ", ".join(f"{number:g} per evaluation at guidance {scale:g}" for scale, number in sorted(each.items()))


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


def _key(entry: OnGrid) -> tuple[str, str]:
    return entry.label, entry.grid


def _styles(results: Results) -> dict[tuple[str, str], int]:
    """The style of each entry in plots and tables."""
    return {_key(entry): i for i, entry in enumerate(results.axes.entries)}


# Safety


def _embedded(value: Any) -> Markup:
    """JSON for a script element; no text in it can end the element or be read as markup."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def template(name: str) -> Markup:
    """A file of the folder templates, as it is."""
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
