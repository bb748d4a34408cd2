"""At which times do we ask the network?

A grid holds points of falling noise; the last is the clean picture (σ = 0), where nothing is asked. Times are floats.

Two kinds, each defined on every noise schedule. Those that are uniform in time are defined by the times 0 … T − 1 of a
table; a flow has there σ = shifted((t + 1)/T), and EDM the same fraction of its ln σ. Ramps run in σ/α from the
schedule's largest to its smallest, n points; on a flow they run in σ itself. Where a table ends in pure noise, a ramp's
first point is that end, and the ramp proper begins one entry below it.

    k = 0 … n − 1                   n = 10, T = 1000
    trailing       T·(1 − k/n) − 1            999 899 … 99     Lin et al. 2023, table 2
    leading        (n − 1 − k)·⌊T/n⌋ + 1      901 801 … 1      DDIM and Stable Diffusion; misses the noisiest times
    linspace       (T − 1)·(1 − k/(n − 1))    999 888 … 0
    sgm_uniform    (T − 1)·(1 − k/n)          999 899.1 … 99.9
    simple         T − 1 − ⌊k·T/n⌋            999 899 … 99     ComfyUI; whole times only
    beta_t         (T − 1)·Beta(0.6, 0.6)⁻¹   999 952 … 0      ComfyUI's beta, but with a last point at t = 0
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from .noise import CLEAN, NoiseSchedule, Point, ops


class Grid:
    """N + 1 points from the noisiest down to σ = 0. `grid[i]` is a point, `grid[i:]` the rest of the grid.

    `total` is the number of steps of the whole grid that this is a part of: a run that begins mid-way, as
    image-to-image does, has fewer, and asks as the whole run would have asked from there on. `corrections` are those
    of a tuned grid, a row for each step of the whole; see `solver.corrected`.
    """

    def __init__(
        self,
        points: Sequence[Point],
        noise: NoiseSchedule,
        total: int | None = None,
        corrections: Sequence[Sequence[Any]] = (),
    ) -> None:
        self.points, self.noise, self.corrections = list(points), noise, corrections
        self.total = len(self.points) - 1 if total is None else total

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: Any) -> Any:
        return (
            Grid(self.points[i], self.noise, self.total, self.corrections) if isinstance(i, slice) else self.points[i]
        )

    def pairs(self) -> Iterator[tuple[Point, Point]]:
        """(from, to) of each step."""
        yield from zip(self.points[:-1], self.points[1:], strict=True)

    def at(self, *, t: Any = None, lam: Any = None) -> Point:
        """A point off the grid: a solver's midpoint."""
        return self.noise.at(t=t, lam=lam)


Points = Callable[[NoiseSchedule, int], Sequence[Point]]  # the n points at which to ask
GRIDS: dict[str, Points] = {}
ALIASES = {  # the names that AUTOMATIC1111, ComfyUI and stable-diffusion.cpp have for the same
    "normal": "linspace",
    "uniform": "linspace",
    "discrete": "linspace",
    "ddim_uniform": "leading",
    "beta": "beta_t",
    "align_your_steps": "ays",
}


def grid(function: Points) -> Points:
    """Register a grid: a function of (noise, n) that returns the n points at which to ask."""
    name = function.__name__
    if name in GRIDS and GRIDS[name].__module__ != function.__module__:
        raise ValueError(f"the name {name!r} is taken, by {GRIDS[name].__module__}")
    GRIDS[name] = function
    return function


def build(points: str | Points, noise: NoiseSchedule, n: int) -> Grid:
    """The grid of n steps. Raises ValueError for n < 1 or points that do not fall strictly."""
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ValueError(f"steps must be a whole number, at least 1; got {n!r}")
    found = list((named(points) if isinstance(points, str) else points)(noise, int(n)))
    if len(found) != n:
        raise ValueError(f"the grid {name_of(points)!r} gave {len(found)} points for {n} steps")
    if any(p.sigma * q.alpha <= q.sigma * p.alpha for p, q in zip(found, [*found[1:], CLEAN], strict=True)):
        raise ValueError(f"{n} steps are too many for {noise!r} on the grid {name_of(points)!r}: the noise must fall")
    corrections = points.corrections_for(n) if isinstance(points, Explicit) else ()
    return Grid([*found, CLEAN], noise, corrections=corrections)


def named(name: str) -> Points:
    """The grid of that canonical name, or of a file; "karras:5" is karras with ρ = 5. Raises ValueError for a wrong
    number, and for a file as `tuned` does."""
    if name.lower().endswith(".json"):
        return tuned(name)
    plain, colon, number = name.partition(":")
    if not colon:
        return GRIDS[plain]
    parameters = list(inspect.signature(GRIDS[plain]).parameters)[2:]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not parameters or not 0 < value < math.inf:
        raise ValueError(
            f"the grid {plain!r} takes no {number!r}: a number above 0, and that only where it has a parameter"
        )
    return partial(GRIDS[plain], **{parameters[0]: value})


def name_of(points: str | Points) -> str:
    """What a grid is called: registered, from a file, or a function."""
    return points if isinstance(points, str) else str(getattr(points, "name", getattr(points, "__name__", "grid")))


# Uniform in time


def uniform(noise: NoiseSchedule, t: float) -> Point:
    """The point at the time t ∈ [0, T − 1] of a table; of the others the one at the same fraction of their time."""
    if noise.name == "flow":
        return noise.at(t=noise.T * noise.shifted((t + 1) / noise.T))
    t = min(max(t, 0.0), noise.T - 1.0)  # rounding
    return noise.at(t=t if noise.alphas_cumprod else noise.t_min + (noise.t_max - noise.t_min) * t / (noise.T - 1))


def _enough(noise: NoiseSchedule, n: int) -> int:
    """T. Raises ValueError if that is less than n."""
    if n > noise.T:
        raise ValueError(f"{n} steps are too many: {noise!r} has {noise.T} times, and this grid takes none twice")
    return noise.T


def _fractions(n: int) -> list[float]:
    """n numbers from 0 to 1."""
    return [k / (n - 1) if n > 1 else 0.0 for k in range(n)]


@grid
def trailing(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = T·(1 − k/n) − 1: starts at the most noise (Lin et al. 2023, table 2)."""
    T = noise.T if noise.name == "flow" else _enough(noise, n)
    return [uniform(noise, T - k * T / n - 1) for k in range(n)]


@grid
def leading(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = (n − 1 − k)·⌊T/n⌋ + 1 (+ 0 where n = T): DDIM's; it starts below the most noise."""
    stride = _enough(noise, n) // n
    offset = min(1, noise.T - 1 - (n - 1) * stride)
    return [uniform(noise, k * stride + offset) for k in reversed(range(n))]


@grid
def linspace(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = (T − 1)·(1 − k/(n − 1)): n times from the noisiest to the least noisy."""
    return [uniform(noise, (noise.T - 1) * (1 - u)) for u in _fractions(n)]


@grid
def sgm_uniform(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = (T − 1)·(1 − k/n): trailing, from T − 1 to 0 and the last left out (Stability's generative models)."""
    return [uniform(noise, (noise.T - 1) * (1 - k / n)) for k in range(n)]


@grid
def simple(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = T − 1 − ⌊k·T/n⌋ (ComfyUI)."""
    T = _enough(noise, n)
    return [uniform(noise, T - 1 - k * T // n) for k in range(n)]


@grid
def beta_t(noise: NoiseSchedule, n: int) -> list[Point]:
    """t at the quantiles of Beta(0.6, 0.6): more of the early and the late times (Lee et al. 2024; ComfyUI's beta)."""
    return [uniform(noise, (noise.T - 1) * (1 - beta_quantile(u))) for u in _fractions(n)]


# Ramps


def ramp(noise: NoiseSchedule, n: int, level: Callable[[float, float, float], float]) -> list[Point]:
    """n points whose level falls from the schedule's largest to its smallest: level(u, largest, smallest), u 0 … 1."""
    top, bottom = noise.noisiest, noise.at(t=noise.t_min)
    if noise.name == "flow":
        return [_between(noise, level(u, top.sigma, bottom.sigma), top, bottom) for u in _fractions(n)]
    if top.alpha == 0:
        below = noise.at(t=noise.t_max - 1)
        return [top, *(_between(noise, level(u, below.rho, bottom.rho), below, bottom) for u in _fractions(n - 1))]
    return [_between(noise, level(u, top.rho, bottom.rho), top, bottom) for u in _fractions(n)]


def _between(noise: NoiseSchedule, level: float, top: Point, bottom: Point) -> Point:
    """The point at that σ/α (of a flow, σ); the ends are themselves, so that rounding cannot leave the schedule."""
    flow = noise.name == "flow"
    if level >= (top.sigma if flow else top.rho) * (1 - 1e-12):
        return top
    if level <= (bottom.sigma if flow else bottom.rho) * (1 + 1e-12):
        return bottom
    return noise.at(t=noise.T * level) if flow else noise.at(lam=-ops(level).log(level))


@grid
def karras(noise: NoiseSchedule, n: int, rho: float = 7.0) -> list[Point]:
    """The ρ-th root of σ uniform (EDM eq. 5)."""
    return ramp(noise, n, lambda u, big, small: (big ** (1 / rho) + u * (small ** (1 / rho) - big ** (1 / rho))) ** rho)


@grid
def exponential(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """ln σ uniform: equal steps in λ (what diffusers also calls Lu's lambdas)."""
    return polyexponential(noise, n)


@grid
def polyexponential(noise: NoiseSchedule, n: int, rho: float = 1.0) -> Sequence[Point]:
    """ln σ a ρ-th power of uniform (k-diffusion); the same as exponential at its default, ρ = 1."""
    return ramp(noise, n, lambda u, big, small: small * (big / small) ** ((1 - u) ** rho))


@grid
def beta_sigma(noise: NoiseSchedule, n: int) -> list[Point]:
    """σ at the quantiles of Beta(0.6, 0.6): what diffusers and AUTOMATIC1111 call beta."""
    return ramp(noise, n, lambda u, big, small: big - (big - small) * beta_quantile(u))


@grid
def kl_optimal(noise: NoiseSchedule, n: int) -> list[Point]:
    """arctan σ uniform: the optimum of Align Your Steps for Gaussian data (Sabour et al. 2024, theorem 3.1)."""
    return ramp(noise, n, lambda u, big, small: math.tan(math.atan(big) + u * (math.atan(small) - math.atan(big))))


@grid
def linear_quadratic(noise: NoiseSchedule, n: int, threshold: float = 0.025) -> Sequence[Point]:
    """σ falls linearly, by `threshold` in half of the steps, then quadratically (Mochi); it ends above σ_min."""
    half = max(n // 2, 1)
    curve = (1 - threshold * n / half) / (n - half) ** 2 if n > 1 else 0.0

    def height(k: float) -> float:
        return 1 - threshold * k / half - curve * max(k - half, 0) ** 2

    def level(u: float, big: float, small: float) -> float:
        floor = small if big * height(n - 1) < small else 0.0  # so many steps that the last would leave the schedule
        return floor + (big - floor) * height(u * (n - 1))

    return ramp(noise, n, level)


@lru_cache(maxsize=4096)
def beta_quantile(u: float, a: float = 0.6) -> float:
    """The x below which Beta(a, a) has the mass u: Newton's method in xᵃ, on the power series of the mass."""
    if u > 0.5:
        return 1 - beta_quantile(1 - u, a)
    scale = a * math.gamma(a) ** 2 / math.gamma(2 * a)
    y = u * scale
    for _ in range(6):
        x, term, total, k = y ** (1 / a), 1.0, 1.0, 0
        while abs(term) > 1e-17 and k < 200:
            k += 1
            term *= x * (k - a) / k
            total += term * a / (a + k)
        y -= (y * total - u * scale) * (1 - x) ** (1 - a)
    return y ** (1 / a)


# Align Your Steps (Sabour et al. 2024): the lists its authors give for ten steps and the end, as times of Stable
# Diffusion's noise schedule, and as σ for Stable Video Diffusion.
AYS_SD15 = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
AYS_SDXL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)
AYS_SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


@grid
def ays(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Align Your Steps' list for Stable Diffusion 1.5; other lengths by log-linear interpolation of σ."""
    return _listed(noise, n, _levels(AYS_SD15))


@grid
def ays_sdxl(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Align Your Steps' list for SDXL."""
    return _listed(noise, n, _levels(AYS_SDXL))


@grid
def ays_svd(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Align Your Steps' list for Stable Video Diffusion."""
    return _listed(noise, n, AYS_SVD)


@lru_cache
def _levels(times: tuple[int, ...]) -> tuple[float, ...]:
    noise = NoiseSchedule.scaled_linear()
    return tuple(noise.at(t=t).rho for t in times)


def _listed(noise: NoiseSchedule, n: int, sigmas: tuple[float, ...]) -> Sequence[Point]:
    """The first n of n + 1 points interpolated in ln σ, the list's range stretched onto the schedule's."""
    heights = [math.log(s / sigmas[-1]) / math.log(sigmas[0] / sigmas[-1]) for s in sigmas]  # 1 … 0

    def level(u: float, big: float, small: float) -> float:
        where = u * (n - 1) / n * (len(sigmas) - 1)
        i = min(int(where), len(sigmas) - 2)
        return small * (big / small) ** (heights[i] + (where - i) * (heights[i + 1] - heights[i]))

    return ramp(noise, n, level)


# Given, point by point


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
    for u in _fractions(n):
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
        return noise.at(t=sigma * noise.T)
    top, bottom = noise.noisiest, noise.at(t=noise.t_min)
    if not bottom.rho / 1.01 <= sigma <= top.rho * 1.01:
        raise ValueError(f"σ/α must lie in [{bottom.rho:.4g}, {top.rho:.4g}], got {sigma:g}")
    return _between(noise, sigma, top, bottom)
