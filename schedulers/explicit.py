"""Grids given point by point: by times, by noise levels, or by a JSON file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from schedulers.grid import between, fractions
from schedulers.noise import NoiseSchedule, Point


def is_grid_file(name: str) -> bool:
    """True if the name of a grid is the path of a grid file."""
    return name.lower().endswith(".json")


@dataclass(frozen=True)
class Explicit:
    """A grid whose points are given, by `times` or by `sigmas`; see `explicit` and `tuned`."""

    times: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    model_times: tuple[float, ...] = ()
    name: str = "explicit"
    solver: str | None = None  # the only one that it was tuned for
    model_hash: str | None = None  # of the only model that it was tuned for
    guidance: float | None = None  # at which it was tuned
    gains: tuple[float, ...] = ()  # for each evaluation; see `solver.corrected`
    corrections: tuple[tuple[float, ...], ...] = ()  # the same, without the gains

    @property
    def steps(self) -> int:
        return len(self.times or self.sigmas)

    @property
    def is_tuned(self) -> bool:
        """For other numbers of steps a tuned grid is interpolated; one that somebody wrote down means just that."""
        return self.solver is not None

    def __call__(self, noise: NoiseSchedule, n: int) -> list[Point]:
        points = [_given_time(noise, t) for t in self.times] or [_given_sigma(noise, s) for s in self.sigmas]
        told = list(self.model_times) or [p.t for p in points]
        if n != self.steps:
            if not self.is_tuned:
                raise ValueError(f"the grid {self.name!r} has {self.steps} steps; asked for {n}")
            points, told = _stretched(noise, points, told, n)
        return [replace(p, t=t) for p, t in zip(points, told, strict=True)] if self.model_times else points

    def corrections_for(self, n: int) -> tuple[tuple[float, ...], ...]:
        """The rows of `solver.corrected`. They hold for the number of steps that they were learned at, and no other."""
        if n != self.steps or not (self.gains or self.corrections):
            return ()
        return tuple(
            (gain, *row) for gain, row in zip(self.gains or (0.0,) * n, self.corrections or ((),) * n, strict=True)
        )


def _stretched(noise: NoiseSchedule, points: list[Point], told: list[float], n: int) -> tuple[list[Point], list[float]]:
    """n points along the curve through these in ln σ/α (of a flow in σ), and what is told off the time on the way."""
    flow = noise.name == "flow"
    levels = [p.sigma if flow else math.log(p.rho) if p.alpha != 0 else math.inf for p in points]
    off = [t - p.t for t, p in zip(told, points, strict=True)]
    found, said = [], []
    for u in fractions(n):
        where = u * (len(points) - 1)
        i = min(int(where), max(len(points) - 2, 0))
        j, part = min(i + 1, len(points) - 1), where - i
        if part == 0 or levels[i] == math.inf:
            p = points[i]
        elif part == 1:
            p = points[j]
        else:
            level = levels[i] + part * (levels[j] - levels[i])
            p = noise.at(t=noise.T * level) if flow else noise.at(lam=-level)
        found.append(p)
        said.append(p.t + off[i] + part * (off[j] - off[i]))
    return found, said


def explicit(
    times: Sequence[Any] | None = None,
    sigmas: Sequence[Any] | None = None,
    *,
    model_times: Sequence[Any] | None = None,
    **more: Any,
) -> Explicit:
    """The grid of these times, or of these noise levels: σ/α, on a flow schedule σ; a last 0 may be there or not.

    `model_times`: what the network is told instead, where that is not the time of the level. Raises ValueError for
    values that are no numbers or do not fall; the schedule's range is checked when the grid is built.
    """
    if (times is None) == (sigmas is None):
        raise ValueError("an explicit grid is given by times or by sigmas, one of them")
    t, s, told = _numbers("times", times), _numbers("sigmas", sigmas), _numbers("model_times", model_times)
    s = s[:-1] if s and s[-1] == 0 else s
    levels = t or s
    if not levels or any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"an explicit grid must fall from entry to entry; it begins {list(levels)[:6]}")
    if told and len(told) != len(levels):
        raise ValueError(f"{len(told)} model_times for {len(levels)} points")
    return Explicit(t, s, told, **more)


def tuned(path: str | Path) -> Explicit:
    """The grid of a JSON file: {"schema": "diffgen.grid/1", "solver": …, "nfe": …, "sigmas": [N] or "times": [N],
    "model_times": [N] if the network is told other times, "gains": [N] and "corrections": [N][M], M ≤ max(N, 2), if the
    solver's coefficients are corrected, "model_hash" and "guidance" where it was tuned for one}; other keys are for
    people. Raises OSError, and ValueError that names the file and what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE} bytes")
        found = json.loads(data, object_pairs_hook=_unrepeated)
        if not isinstance(found, dict) or found.get("schema") != "diffgen.grid/1":
            raise ValueError('no grid: "schema" must be "diffgen.grid/1"')
        if not isinstance(found.get("solver"), str) or type(found.get("nfe")) is not int:
            raise ValueError('"solver" (a name) and "nfe" (a number) must be there')
        levels = {key: found.get(key) for key in ("times", "sigmas", "model_times")}
        model_hash, guidance = found.get("model_hash"), found.get("guidance")
        if not isinstance(model_hash, str | None) or not (guidance is None or _finite(guidance)):
            raise ValueError('"model_hash" must be a text and "guidance" a number, where they are there')
        rows = found.get("corrections") or []
        if not isinstance(rows, list):
            raise ValueError('"corrections" must be a list of lists')
        corrections = tuple(_numbers("corrections", row) for row in rows)
        count = len(levels["sigmas"] or levels["times"] or ())
        widths = {len(row) for row in corrections}
        if corrections and (len(corrections) != count or len(widths) > 1 or max(widths) > max(count, 2)):
            raise ValueError(f'"corrections" must be {count} rows of equally many numbers, at most {max(count, 2)}')
        gains = _numbers("gains", found.get("gains"))
        if gains and len(gains) != count:
            raise ValueError(f'"gains" must be {count} numbers')
        more: dict[str, Any] = {"model_hash": model_hash, "guidance": guidance}
        more |= {"gains": gains, "corrections": corrections}
        return explicit(**levels, name=path.name, solver=found["solver"], **more)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from error


LARGEST_FILE = 1 << 20


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _numbers(what: str, values: Any) -> tuple[float, ...]:
    if values is None:
        return ()
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= 10_000:
        raise ValueError(f"{what} must be a list of 1 to 10000 numbers")
    wrong = [v for v in values if not _finite(v)]
    if wrong:
        raise ValueError(f"{what} must be finite numbers; there is {str(wrong[0])[:40]!r}")
    return tuple(float(v) for v in values)


def _finite(value: Any) -> bool:
    """A number that a float can hold; a whole number in a file may be larger."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _given_time(noise: NoiseSchedule, t: float) -> Point:
    room = 1e-6 * max(abs(noise.t_max), 1.0)
    lowest = 0.0 if noise.name == "flow" else noise.t_min
    if not lowest - room <= t <= noise.t_max + room:
        raise ValueError(f"t must lie in [{lowest:g}, {noise.t_max:g}], got {t:g}")
    return noise.at(t=min(max(t, lowest), noise.t_max))


def _given_sigma(noise: NoiseSchedule, sigma: float) -> Point:
    """The point of that level; the ends of the schedule's range are met where it lies beyond by less than 1 %."""
    if noise.name == "flow":
        if not 0 < sigma <= 1:
            raise ValueError(f"σ of a flow must lie in (0, 1], got {sigma:g}")
        return noise.at(level=sigma)
    top, bottom = noise.noisiest, noise.at(t=noise.t_min)
    if not bottom.rho / 1.01 <= sigma <= top.rho * 1.01:
        raise ValueError(f"σ/α must lie in [{bottom.rho:.4g}, {top.rho:.4g}], got {sigma:g}")
    return between(noise, sigma, top, bottom)
