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

Grids that are lists of noise levels are in `schedulers.lists`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from schedulers.explicit import Explicit, is_grid_file, tuned
from schedulers.grid import Grid, Points, between, fractions
from schedulers.noise import CLEAN, NoiseSchedule, Point

GRIDS: dict[str, Points] = {}
ALIASES = {  # the names of AUTOMATIC1111, Forge, ComfyUI and stable-diffusion.cpp
    "normal": "linspace",
    "uniform": "linspace",
    "discrete": "linspace",
    "ddim_uniform": "leading",
    "beta": "beta_t",
    "turbo": "trailing",
    "align_your_steps": "ays",
    "align_your_steps_11": "ays_11",
    "align_your_steps_32": "ays_32",
    "align_your_steps_gits": "ays_gits",
}
_TEXTS: dict[str, tuple[str, str]] = {}  # of each built-in grid: its formula, its source


@dataclass(frozen=True)
class GridInfo:
    """What people need to know before they choose a grid; `describe` makes one."""

    name: str
    aliases: tuple[str, ...]  # names that other tools use
    about: str
    formula: str
    reference: str
    parameter: str = ""  # the name of the number that may follow a colon
    default: float | None = None  # of that number


def grid(formula: str, reference: str = "") -> Callable[[Points], Points]:
    """Register a grid: a function of (noise, n) that returns its n points, without the clean picture."""

    def register(function: Points) -> Points:
        name = function.__name__
        if name in GRIDS and GRIDS[name].__module__ != function.__module__:
            raise ValueError(f"the name {name!r} is taken, by {GRIDS[name].__module__}")
        GRIDS[name], _TEXTS[name] = function, (formula, reference)
        return function

    return register


def describe(name: str) -> GridInfo:
    """The description of the grid with that canonical name; a grid of another package has only its docstring."""
    function = GRIDS[name]
    formula, reference = _TEXTS.get(name, ("", function.__module__))
    return GridInfo(
        name,
        tuple(alias for alias, of in ALIASES.items() if of == name),
        " ".join((function.__doc__ or "").split()),
        formula,
        reference,
        *next(((p.name, p.default) for p in _numbers(function)), ("", None)),
    )


def _numbers(function: Points) -> list[inspect.Parameter]:
    """The parameters of a grid after (noise, n)."""
    return list(inspect.signature(function).parameters.values())[2:]


def build(points: str | Points, noise: NoiseSchedule, n: int) -> Grid:
    """The grid of n steps. Raises ValueError for n < 1 or points that do not fall strictly."""
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ValueError(f"steps must be a whole number, at least 1; got {n!r}")
    noise = noise.for_steps(n)
    sequence = list((named(points) if isinstance(points, str) else points)(noise, int(n)))
    if len(sequence) != n:
        raise ValueError(f"the grid {name_of(points)!r} gave {len(sequence)} points for {n} steps")
    if noise.terminal is not None and not isinstance(points, Explicit):
        sequence = [noise.at(level=sigma) for sigma in noise.ended([p.sigma for p in sequence])]
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
    parameters = [p.name for p in _numbers(GRIDS[plain])]
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


@lru_cache(maxsize=8)
def training_points(noise: NoiseSchedule) -> Sequence[Point]:
    """The points of all training times, the noisiest first; on an edm schedule, T points of the karras grid.

    On a flow with a dynamic shift they are not shifted.
    """
    if noise.name == "edm":
        return karras(noise, noise.T)
    if noise.dynamic is not None:
        noise = NoiseSchedule.flow(T=noise.T)
    return [uniform(noise, t) for t in reversed(range(noise.T))]


def _enough(noise: NoiseSchedule, n: int) -> int:
    """T. Raises ValueError if T is less than n."""
    if n > noise.T:
        raise ValueError(f"{n} steps are too many: {noise!r} has {noise.T} times, and this grid repeats none")
    return noise.T


@grid(
    "t = s·u/(1 + (s − 1)·u/(T − 1)), u = T·(1 − k/n) − 1, s the shift",
    "Lin et al. 2023 (2305.08891), table 2; diffusers; Forge's Turbo, which rounds t",
)
def trailing(noise: NoiseSchedule, n: int, shift: float = 1.0) -> list[Point]:
    """Even steps in time, from the most noise. A shift below 1 moves them to less noise, one above 1 to more."""
    T = noise.T if noise.is_flow else _enough(noise, n)
    last = T - 1
    even = [T - k * T / n - 1 for k in range(n)]
    return [uniform(noise, min(shift * u / (1 + (shift - 1) * u / max(last, 1)), last)) for u in even]  # min: rounding


@grid("t = (n − 1 − k)·⌊T/n⌋ + 1, + 0 if n = T", "DDIM; Stable Diffusion 1; diffusers; ComfyUI's ddim_uniform")
def leading(noise: NoiseSchedule, n: int) -> list[Point]:
    """Even whole steps in time; it starts below the most noise."""
    stride = _enough(noise, n) // n
    offset = min(1, noise.T - 1 - (n - 1) * stride)
    return [uniform(noise, k * stride + offset) for k in reversed(range(n))]


@grid("t = (T − 1)·(1 − k/(n − 1))", "diffusers; k-diffusion's get_sigmas")
def linspace(noise: NoiseSchedule, n: int) -> list[Point]:
    """Even steps in time, from the most noise to the least."""
    return [uniform(noise, (noise.T - 1) * (1 - u)) for u in fractions(n)]


@grid("t = (T − 1)·(1 − k/n)", "Stability AI's generative models")
def sgm_uniform(noise: NoiseSchedule, n: int) -> list[Point]:
    """Linspace of n + 1 times, without the last."""
    return [uniform(noise, (noise.T - 1) * (1 - k / n)) for k in range(n)]


@grid("t = T − 1 − ⌊k·T/n⌋", "ComfyUI")
def simple(noise: NoiseSchedule, n: int) -> list[Point]:
    """Even steps in time, at whole times."""
    T = _enough(noise, n)
    return [uniform(noise, T - 1 - k * T // n) for k in range(n)]


@grid("t = (T − 1)·Q(1 − k/(n − 1)), Q the quantiles of Beta(a, a)", "Lee et al. 2024 (2407.12173); ComfyUI's beta")
def beta_t(noise: NoiseSchedule, n: int, a: float = 0.6) -> list[Point]:
    """More early and late times, by the quantiles of a beta distribution."""
    return [uniform(noise, (noise.T - 1) * (1 - beta_quantile(u, a))) for u in fractions(n)]


@grid("t = (T − 1)·Q(1 − k/n), Q the quantiles of Beta(a, a + 0.2)", "RES4LYF, which rounds t")
def beta57(noise: NoiseSchedule, n: int, a: float = 0.5) -> list[Point]:
    """More early and, above all, late times, by the quantiles of a skewed beta distribution."""
    return [uniform(noise, (noise.T - 1) * beta_quantile(1 - k / n, a, a + 0.2)) for k in range(n)]


@grid("t = (T − 1)·u²(3 − 2u), u = 1 − k/n", "stable-diffusion.cpp, which rounds t")
def smoothstep(noise: NoiseSchedule, n: int) -> list[Point]:
    """More early and late times, by a cubic; close to a beta grid."""
    return [uniform(noise, (noise.T - 1) * u * u * (3 - 2 * u)) for u in (1 - k / n for k in range(n))]


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


@grid(
    "σ = (σ_max^(1/ρ) + u·(σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ, u = k/(n − 1)", "EDM, Karras et al. 2022 (2206.00364), eq. 5"
)
def karras(noise: NoiseSchedule, n: int, rho: float = 7.0) -> list[Point]:
    """Even steps in the ρ-th root of σ."""
    return ramp(noise, n, lambda u, big, small: (big ** (1 / rho) + u * (small ** (1 / rho) - big ** (1 / rho))) ** rho)


@grid("σ = σ_max·(σ_min/σ_max)^u, u = k/(n − 1)", "k-diffusion; Lu's lambdas in diffusers")
def exponential(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Even steps in ln σ, which is −λ."""
    return polyexponential(noise, n)


@grid("σ = σ_min·(σ_max/σ_min)^((1 − u)^ρ), u = k/(n − 1)", "k-diffusion")
def polyexponential(noise: NoiseSchedule, n: int, rho: float = 1.0) -> Sequence[Point]:
    """The logarithm of σ, a ρ-th power of even steps; with ρ = 1, exponential."""
    return ramp(noise, n, lambda u, big, small: small * (big / small) ** ((1 - u) ** rho))


@grid(
    "σ = σ_min + (σ_max − σ_min)·Q(1 − k/(n − 1)), Q the quantiles of Beta(a, a)",
    "Lee et al. 2024 (2407.12173); beta of diffusers and AUTOMATIC1111",
)
def beta_sigma(noise: NoiseSchedule, n: int, a: float = 0.6) -> list[Point]:
    """Large and small σ, by the quantiles of a beta distribution."""
    return ramp(noise, n, lambda u, big, small: big - (big - small) * beta_quantile(u, a))


@grid(
    "σ = tan(arctan σ_max + u·(arctan σ_min − arctan σ_max)), u = k/(n − 1)",
    "Align Your Steps, Sabour et al. 2024 (2404.14507), theorem 3.1",
)
def kl_optimal(noise: NoiseSchedule, n: int) -> list[Point]:
    """Even steps in arctan σ: the optimum of Align Your Steps for Gaussian data."""
    return ramp(noise, n, lambda u, big, small: math.tan(math.atan(big) + u * (math.atan(small) - math.atan(big))))


@grid(
    "σ = tan(arctan σ_max + u·(arctan σ_min − arctan σ_max)), u = k/n",
    "Align Your Steps, Sabour et al. 2024 (2404.14507), theorem 3.1; KL Optimal of AUTOMATIC1111",
)
def kl_optimal_a1111(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """The first n of n + 1 points of kl_optimal. AUTOMATIC1111 ends at the last of them, with the noise of σ_min."""
    return kl_optimal(noise, n + 1)[:n]


@grid(
    "σ = exp(−β·sign(½ − u)·ln(1 − 2·|½ − u|)), u = k/(n − 1), from σ_max to σ_min",
    "Hang et al. 2024 (2407.03297); ComfyUI's LaplaceScheduler",
)
def laplace(noise: NoiseSchedule, n: int, beta: float = 0.5) -> list[Point]:
    """The quantiles of a Laplace distribution of ln σ around 0: most levels near σ = 1.

    With many steps, or on a flow, several quantiles would lie beyond an end: then u runs between the quantiles of both
    ends.
    """

    def fraction(level: float) -> float:
        """The u of a level."""
        half = math.exp(-abs(math.log(level)) / beta) / 2
        return half if level > 1 else 1 - half

    def level(u: float, big: float, small: float) -> float:
        first, last = fraction(big), fraction(small)
        if u in (0.0, 1.0):
            return small if u else big
        step = 1 / max(n - 1, 1)
        v = u if step > max(first, 1 - last) else first + u * (last - first)
        return math.exp(math.copysign(-beta * math.log(1 - 2 * abs(0.5 - v)), 0.5 - v))

    return ramp(noise, n, level)


def _to_clean(noise: NoiseSchedule, n: int, height: Callable[[float], float]) -> list[Point]:
    """The noise levels σ_max·height(k), k = 0 … n − 1, where height falls from 1 and would be 0 at k = n."""

    def level(u: float, big: float, small: float) -> float:
        floor = small if big * height(n - 1) < small else 0.0  # with many steps the last would fall below the schedule
        return floor + (big - floor) * height(u * (n - 1))

    return ramp(noise, n, level)


@grid(
    "σ/σ_max falls from 1 by `threshold` in even steps for k ≤ n/2, then along a parabola to 0",
    "Mochi; ComfyUI's linear_quadratic",
)
def linear_quadratic(noise: NoiseSchedule, n: int, threshold: float = 0.025) -> Sequence[Point]:
    """Small even steps of σ in the first half, then growing ones; it ends above σ_min."""
    half = max(n // 2, 1)
    curve = (1 - threshold * n / half) / (n - half) ** 2 if n > 1 else 0.0
    return _to_clean(noise, n, lambda k: 1 - threshold * k / half - curve * max(k - half, 0) ** 2)


@grid(
    "σ/σ_max = ½ + ½·(a(m − k) − a(1))/(a(m) − a(1)) for k < m, then ½ − ½·a(k − m + 1)/a(n + 1 − m);"
    " a(x) = arctan(8x/(n + 2)), m = ⌊0.6·(n + 2)⌋",
    "RES4LYF",
)
def bong_tangent(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Two arctangent curves, from σ_max to its half and from there to 0; it ends above σ_min."""
    m = int(0.6 * (n + 2))

    def bend(x: float) -> float:
        return math.atan(8 * x / (n + 2))

    def height(k: float) -> float:
        if k == 0:
            return 1.0
        if k < m - 1:
            return 0.5 + 0.5 * (bend(m - k) - bend(1)) / (bend(m) - bend(1))
        return 0.5 - 0.5 * bend(k - m + 1) / bend(n + 1 - m)

    return _to_clean(noise, n, height)


@lru_cache(maxsize=4096)
def beta_quantile(u: float, a: float = 0.6, b: float | None = None) -> float:
    """The u-quantile of Beta(a, b), b = a by default: Newton's method in xᵃ on the power series of the distribution."""
    b = a if b is None else b
    if u > 0.5:
        return 1 - beta_quantile(1 - u, b, a)
    scale = a * math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    y = min(u * scale, 0.99)
    for _ in range(6 if a == b else 20):
        x, term, total, k = y ** (1 / a), 1.0, 1.0, 0
        while abs(term) > 1e-17 and k < 200:
            k += 1
            term *= x * (k - b) / k
            total += term * a / (a + k)
        y -= (y * total - u * scale) * (1 - x) ** (1 - b)
    return y ** (1 / a)
