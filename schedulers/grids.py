"""The built-in grids: at which times the network is evaluated.

A grid holds points of falling noise. The last is the clean picture (σ = 0), without an evaluation. Times are floats.

There are two kinds, and both are defined on every noise schedule. Grids that are uniform in time are defined by the
times 0 … T − 1 of a table; a flow has σ = shifted((t + 1)/T) there, and EDM the same fraction of its ln σ. Ramps are n
noise levels (σ/α; σ on a flow) from the schedule's largest to its smallest. If a table ends in pure noise, a ramp's
first point is that end, and the other points begin one entry below it.

    k = 0 … n − 1                   n = 10, T = 1000
    trailing       T·(1 − k/n) − 1            999 899 … 99     Lin et al. 2023, table 2
    leading        (n − 1 − k)·⌊T/n⌋ + 1      901 801 … 1      DDIM and Stable Diffusion; misses the noisiest times
    linspace       (T − 1)·(1 − k/(n − 1))    999 888 … 0
    sgm_uniform    (T − 1)·(1 − k/n)          999 899.1 … 99.9
    simple         T − 1 − ⌊k·T/n⌋            999 899 … 99     ComfyUI; integer times only
    beta_t         (T − 1)·Beta(0.6, 0.6)⁻¹   999 952 … 0      ComfyUI's beta, but with a last point at t = 0
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from schedulers.explicit import Explicit, is_grid_file, tuned
from schedulers.grid import Grid, Points, between, fractions
from schedulers.noise import CLEAN, NoiseSchedule, Point

GRIDS: dict[str, Points] = {}
ALIASES = {  # the names of AUTOMATIC1111, ComfyUI and stable-diffusion.cpp
    "normal": "linspace",
    "uniform": "linspace",
    "discrete": "linspace",
    "ddim_uniform": "leading",
    "beta": "beta_t",
    "align_your_steps": "ays",
}


def grid(function: Points) -> Points:
    """Register a grid: a function of (noise, n) that returns its n points, without the clean picture."""
    name = function.__name__
    if name in GRIDS and GRIDS[name].__module__ != function.__module__:
        raise ValueError(f"the name {name!r} is taken, by {GRIDS[name].__module__}")
    GRIDS[name] = function
    return function


def build(points: str | Points, noise: NoiseSchedule, n: int) -> Grid:
    """The grid of n steps. Raises ValueError for n < 1 or points that do not fall strictly."""
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ValueError(f"steps must be a whole number, at least 1; got {n!r}")
    sequence = list((named(points) if isinstance(points, str) else points)(noise, int(n)))
    if len(sequence) != n:
        raise ValueError(f"the grid {name_of(points)!r} gave {len(sequence)} points for {n} steps")
    if any(p.sigma * q.alpha <= q.sigma * p.alpha for p, q in zip(sequence, [*sequence[1:], CLEAN], strict=True)):
        raise ValueError(f"{n} steps are too many for {noise!r} on the grid {name_of(points)!r}: the noise must fall")
    corrections = points.corrections_for(n) if isinstance(points, Explicit) else ()
    return Grid([*sequence, CLEAN], noise, corrections=corrections)


def named(name: str) -> Points:
    """The grid of that canonical name, or of a file; "karras:5" is karras with ρ = 5.

    Raises ValueError for a wrong number, and for a file as `tuned` does.
    """
    if is_grid_file(name):
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
            f"the grid {plain!r} does not take {number!r}. A grid with a parameter takes a number above 0"
            if parameters
            else f"the grid {plain!r} takes no number (got {number!r})"
        )
    return partial(GRIDS[plain], **{parameters[0]: value})


def name_of(points: str | Points) -> str:
    """The name of a grid: its registered name, its file, or its function."""
    return points if isinstance(points, str) else str(getattr(points, "name", getattr(points, "__name__", "grid")))


# Uniform in time


def uniform(noise: NoiseSchedule, t: float) -> Point:
    """The point at the time t ∈ [0, T − 1] of a table; on other schedules, at the same fraction of their time."""
    if noise.is_flow:
        return noise.at(t=noise.T * noise.shifted((t + 1) / noise.T))
    t = min(max(t, 0.0), noise.T - 1.0)  # rounding
    return noise.at(t=t if noise.alphas_cumprod else noise.t_min + (noise.t_max - noise.t_min) * t / (noise.T - 1))


def _enough(noise: NoiseSchedule, n: int) -> int:
    """T. Raises ValueError if T is less than n."""
    if n > noise.T:
        raise ValueError(f"{n} steps are too many: {noise!r} has {noise.T} times, and this grid repeats none")
    return noise.T


@grid
def trailing(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = T·(1 − k/n) − 1: starts at the most noise (Lin et al. 2023, table 2)."""
    T = noise.T if noise.is_flow else _enough(noise, n)
    return [uniform(noise, T - k * T / n - 1) for k in range(n)]


@grid
def leading(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = (n − 1 − k)·⌊T/n⌋ + 1 (+ 0 if n = T): DDIM's; it starts below the most noise."""
    stride = _enough(noise, n) // n
    offset = min(1, noise.T - 1 - (n - 1) * stride)
    return [uniform(noise, k * stride + offset) for k in reversed(range(n))]


@grid
def linspace(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = (T − 1)·(1 − k/(n − 1)): n times from the noisiest to the least noisy."""
    return [uniform(noise, (noise.T - 1) * (1 - u)) for u in fractions(n)]


@grid
def sgm_uniform(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = (T − 1)·(1 − k/n): linspace of n + 1 times without the last (Stability's generative models)."""
    return [uniform(noise, (noise.T - 1) * (1 - k / n)) for k in range(n)]


@grid
def simple(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = T − 1 − ⌊k·T/n⌋ (ComfyUI)."""
    T = _enough(noise, n)
    return [uniform(noise, T - 1 - k * T // n) for k in range(n)]


@grid
def beta_t(noise: NoiseSchedule, n: int) -> list[Point]:
    """t at the quantiles of Beta(0.6, 0.6): more early and late times (Lee et al. 2024; ComfyUI's beta)."""
    return [uniform(noise, (noise.T - 1) * (1 - beta_quantile(u))) for u in fractions(n)]


# Ramps


def ramp(noise: NoiseSchedule, n: int, level: Callable[[float, float, float], float]) -> list[Point]:
    """n points with the noise levels level(u, largest, smallest), u from 0 to 1, between the ends of the schedule."""
    top, bottom = noise.noisiest, noise.at(t=noise.t_min)
    pure_noise = [top] if noise.level(top) == math.inf else []
    if pure_noise:
        top = noise.at(t=noise.t_max - 1)
    largest, smallest = noise.level(top), noise.level(bottom)
    rest = fractions(n - len(pure_noise))
    return [*pure_noise, *(between(noise, level(u, largest, smallest), top, bottom) for u in rest)]


@grid
def karras(noise: NoiseSchedule, n: int, rho: float = 7.0) -> list[Point]:
    """The ρ-th root of σ uniform (EDM eq. 5)."""
    return ramp(noise, n, lambda u, big, small: (big ** (1 / rho) + u * (small ** (1 / rho) - big ** (1 / rho))) ** rho)


@grid
def exponential(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """ln σ uniform: equal steps in λ (also Lu's lambdas in diffusers)."""
    return polyexponential(noise, n)


@grid
def polyexponential(noise: NoiseSchedule, n: int, rho: float = 1.0) -> Sequence[Point]:
    """ln σ a ρ-th power of uniform (k-diffusion); exponential at its default, ρ = 1."""
    return ramp(noise, n, lambda u, big, small: small * (big / small) ** ((1 - u) ** rho))


@grid
def beta_sigma(noise: NoiseSchedule, n: int) -> list[Point]:
    """σ at the quantiles of Beta(0.6, 0.6): beta of diffusers and AUTOMATIC1111."""
    return ramp(noise, n, lambda u, big, small: big - (big - small) * beta_quantile(u))


@grid
def kl_optimal(noise: NoiseSchedule, n: int) -> list[Point]:
    """arctan σ uniform: the optimum of Align Your Steps for Gaussian data (Sabour et al. 2024, theorem 3.1)."""
    return ramp(noise, n, lambda u, big, small: math.tan(math.atan(big) + u * (math.atan(small) - math.atan(big))))


@grid
def linear_quadratic(noise: NoiseSchedule, n: int, threshold: float = 0.025) -> Sequence[Point]:
    """σ falls linearly by `threshold` in half of the steps, then quadratically (Mochi); it ends above σ_min."""
    half = max(n // 2, 1)
    curve = (1 - threshold * n / half) / (n - half) ** 2 if n > 1 else 0.0

    def height(k: float) -> float:
        return 1 - threshold * k / half - curve * max(k - half, 0) ** 2

    def level(u: float, big: float, small: float) -> float:
        floor = small if big * height(n - 1) < small else 0.0  # with many steps the last would fall below the schedule
        return floor + (big - floor) * height(u * (n - 1))

    return ramp(noise, n, level)


@lru_cache(maxsize=4096)
def beta_quantile(u: float, a: float = 0.6) -> float:
    """The u-quantile of Beta(a, a): Newton's method in xᵃ on the power series of the distribution function."""
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


# Align Your Steps (Sabour et al. 2024): the authors' lists for ten steps and the end, as times of Stable Diffusion's
# noise schedule, and as σ for Stable Video Diffusion.
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
    """The first n of n + 1 points, interpolated in ln σ; the range of the list is stretched to the schedule's."""
    heights = [math.log(s / sigmas[-1]) / math.log(sigmas[0] / sigmas[-1]) for s in sigmas]  # 1 … 0

    def level(u: float, big: float, small: float) -> float:
        place = u * (n - 1) / n * (len(sigmas) - 1)
        i = min(int(place), len(sigmas) - 2)
        return small * (big / small) ** (heights[i] + (place - i) * (heights[i + 1] - heights[i]))

    return ramp(noise, n, level)
