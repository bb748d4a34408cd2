"""Explicit grids: a list of times or noise levels, or a JSON file."""

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
    """Whether the name of a grid is the path of a grid file."""
    return name.lower().endswith(".json")


@dataclass(frozen=True)
class Explicit:
    """A list of points, by `times` or by `sigmas`; `explicit` and `tuned` make one."""

    times: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    model_times: tuple[float, ...] = ()
    name: str = "explicit"
    solver: str | None = None  # the solver it was tuned for
    model_hash: str | None = None  # the model it was tuned for
    guidance: float | None = None  # the guidance scale it was tuned at
    gains: tuple[float, ...] = ()  # for each evaluation; see `solver.corrected`
    corrections: tuple[tuple[float, ...], ...] = ()  # the same, without the gains

    @property
    def steps(self) -> int:
        return len(self.times or self.sigmas)

    @property
    def is_tuned(self) -> bool:
        """Whether it may be interpolated to another number of steps; a list that a person wrote may not."""
        return self.solver is not None

    def __call__(self, noise: NoiseSchedule, n: int) -> list[Point]:
        points = [_point_at_time(noise, t) for t in self.times] or [_point_at_sigma(noise, s) for s in self.sigmas]
        model_times = list(self.model_times) or [p.t for p in points]
        if n != self.steps:
            if not self.is_tuned:
                raise ValueError(f"the grid {self.name!r} has {self.steps} steps, not {n}")
            points, model_times = _interpolated(noise, points, model_times, n)
        return [replace(p, t=t) for p, t in zip(points, model_times, strict=True)] if self.model_times else points

    def corrections_for(self, n: int) -> tuple[tuple[float, ...], ...]:
        """The rows of `solver.corrected`; none for another number of steps than the one they were learned at."""
        if n != self.steps or not (self.gains or self.corrections):
            return ()
        return tuple(
            (gain, *row) for gain, row in zip(self.gains or (0.0,) * n, self.corrections or ((),) * n, strict=True)
        )


def _interpolated(
    noise: NoiseSchedule, points: list[Point], model_times: list[float], n: int
) -> tuple[list[Point], list[float]]:
    """n points on the curve through `points` in ln(σ/α) (σ on a flow), with the model times' offsets interpolated."""
    flow = noise.is_flow
    levels = [p.sigma if flow else math.log(p.rho) if p.alpha != 0 else math.inf for p in points]
    offsets = [t - p.t for t, p in zip(model_times, points, strict=True)]
    new_points, new_times = [], []
    for u in fractions(n):
        place = u * (len(points) - 1)
        i = min(int(place), max(len(points) - 2, 0))
        j, part = min(i + 1, len(points) - 1), place - i
        if part == 0 or levels[i] == math.inf:
            p = points[i]
        elif part == 1:
            p = points[j]
        else:
            level = levels[i] + part * (levels[j] - levels[i])
            p = noise.at(level=level) if flow else noise.at(lam=-level)
        new_points.append(p)
        new_times.append(p.t + offsets[i] + part * (offsets[j] - offsets[i]))
    return new_points, new_times


def explicit(
    times: Sequence[Any] | None = None,
    sigmas: Sequence[Any] | None = None,
    *,
    model_times: Sequence[Any] | None = None,
    **details: Any,
) -> Explicit:
    """The grid of these times, or of these noise levels (σ/α; σ on a flow). A last 0 may be left out.

    The network receives `model_times` instead of the levels' own times. `details` are further fields of `Explicit`.
    Raises ValueError for values that are no numbers or do not fall. Whether they lie inside the noise schedule is
    checked when the grid is built.
    """
    if (times is None) == (sigmas is None):
        raise ValueError("an explicit grid needs either times or sigmas")
    t, s, model = _numbers("times", times), _numbers("sigmas", sigmas), _numbers("model_times", model_times)
    s = s[:-1] if s and s[-1] == 0 else s
    levels = t or s
    if not levels or any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"an explicit grid must fall from entry to entry; it begins {list(levels)[:6]}")
    if model and len(model) != len(levels):
        raise ValueError(f"{len(model)} model_times for {len(levels)} points")
    return Explicit(t, s, model, **details)


def tuned(path: str | Path) -> Explicit:
    """Read a grid file, JSON with these keys; other keys are for people.

        "schema"       "diffgen.grid/1"
        "solver"       the solver it was tuned for
        "nfe"          the number of evaluations
        "sigmas"       [N], or "times" [N]
        "model_times"  [N], if the network receives other times
        "gains", "corrections"     [N] and [N][M], M ≤ max(N, 2), if the solver's coefficients are corrected
        "model_hash", "guidance"   if it was tuned for one model, at one guidance scale

    Raises OSError, and ValueError with the file's name and what is wrong in it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE} bytes")
        content = json.loads(data, object_pairs_hook=_unique)
        if not isinstance(content, dict) or content.get("schema") != "diffgen.grid/1":
            raise ValueError('no grid: "schema" must be "diffgen.grid/1"')
        if not isinstance(content.get("solver"), str) or type(content.get("nfe")) is not int:
            raise ValueError('"solver" (a name) and "nfe" (a number) are required')
        levels = {key: _numbers(key, content.get(key)) or None for key in ("times", "sigmas", "model_times")}
        model_hash, guidance = content.get("model_hash"), content.get("guidance")
        if not isinstance(model_hash, str | None) or not (guidance is None or _is_finite(guidance)):
            raise ValueError('"model_hash" must be a text and "guidance" a number')
        rows = content.get("corrections") or []
        if not isinstance(rows, list):
            raise ValueError('"corrections" must be a list of lists')
        corrections = tuple(_numbers("corrections", row, LARGEST_CORRECTION) for row in rows)
        count = len(levels["sigmas"] or levels["times"] or ())
        widths = {len(row) for row in corrections}
        if corrections and (len(corrections) != count or len(widths) > 1 or max(widths) > max(count, 2)):
            raise ValueError(f'"corrections" must be {count} rows of equally many numbers, at most {max(count, 2)}')
        gains = _numbers("gains", content.get("gains"), LARGEST_CORRECTION)
        if gains and len(gains) != count:
            raise ValueError(f'"gains" must be {count} numbers')
        details: dict[str, Any] = {"model_hash": model_hash, "guidance": guidance}
        details |= {"gains": gains, "corrections": corrections}
        return explicit(**levels, name=path.name, solver=content["solver"], **details)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from error


LARGEST_FILE = 1 << 20
LARGEST_CORRECTION = 1e6  # of a solver's coefficients; those that are learned are around 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _numbers(what: str, values: Any, largest: float = math.inf) -> tuple[float, ...]:
    if values is None:
        return ()
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= 10_000:
        raise ValueError(f"{what} must be a list of 1 to 10000 numbers")
    wrong = [v for v in values if not _is_finite(v) or abs(v) > largest]
    if wrong:
        bound = "" if largest == math.inf else f" up to {largest:g}"
        raise ValueError(f"{what} must be finite numbers{bound}, got {str(wrong[0])[:40]!r}")
    return tuple(float(v) for v in values)


def _is_finite(value: Any) -> bool:
    """Whether the value is a number that a float can hold: an integer in a file may be larger."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _point_at_time(noise: NoiseSchedule, t: float) -> Point:
    margin = 1e-6 * max(abs(noise.t_max), 1.0)
    lowest = 0.0 if noise.is_flow else noise.t_min
    if not lowest - margin <= t <= noise.t_max + margin:
        raise ValueError(f"t must lie in [{lowest:g}, {noise.t_max:g}], got {t:g}")
    return noise.at(t=min(max(t, lowest), noise.t_max))


def _point_at_sigma(noise: NoiseSchedule, sigma: float) -> Point:
    """The point of that noise level. A level less than 1 % outside the schedule's range gives the end of the range."""
    if noise.is_flow:
        if not 0 < sigma <= 1:
            raise ValueError(f"σ of a flow must lie in (0, 1], got {sigma:g}")
        return noise.at(level=sigma)
    top, bottom = noise.noisiest, noise.at(t=noise.t_min)
    if not bottom.rho / 1.01 <= sigma <= top.rho * 1.01:
        raise ValueError(f"σ/α must lie in [{bottom.rho:.4g}, {top.rho:.4g}], got {sigma:g}")
    return between(noise, sigma, top, bottom)
