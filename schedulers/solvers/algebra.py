"""The algebra that the solvers share: the first-order step, what two evaluations add to it, noise, quadrature.

Everything is a pure function of the points: of Python floats, or of 0-d tensors whose gradient is kept. ρ is σ/α and λ
is ln(α/σ). Along the probability-flow ODE, x/σ gains ∫e^λ x0 dλ and x/α gains ∫ε dρ. A method of higher order is the
exact integral of a constant x0 or ε (`first`, the same for both) plus that of a polynomial through earlier values, as
coefficients times differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Any

from schedulers.grid import Grid
from schedulers.noise import Point, ops
from schedulers.prediction import Denoised, combine
from schedulers.solver import Steps


def first(q: Point, d: Denoised) -> Any:
    """The first-order step to q, DDIM eq. 12: x' = α'·x0 + σ'·ε."""
    return combine(q.alpha, d.x0, q.sigma, d.eps)


def trapezoid(p: Point, q: Point, d: Denoised, e: Denoised) -> Any:
    """The correction of `first` by e at q: dx = x0·dα + ε·dσ by the trapezoidal rule, finite from α = 0."""
    return (e.x0 - d.x0) * ((q.alpha - p.alpha) / 2) + (e.eps - d.eps) * ((q.sigma - p.sigma) / 2)


def noised(x: Any, scale: Any, noise: Any, p: Point, q: Point) -> Any:
    """x plus scale times the noise of the interval; no noise is drawn if the scale is 0."""
    return x if scale == 0 else x + noise(p, q) * scale


def ancestral(p: Point, q: Point, eta: float) -> tuple[Point, Any]:
    """(the point below q at which the step ends, the standard deviation of the noise from there up to q).

    DDIM eq. 16: σ_up = η·σ'·√(1 − (ρ'/ρ)²). At η = 1 both together draw from the posterior q(x'|x, x0).
    """
    if eta == 0:
        return q, 0.0
    up = min(eta * (1 - (q.rho / p.rho) ** 2) ** 0.5, 1.0)
    return Point(q.t, q.alpha, q.sigma * (1 - up * up) ** 0.5), q.sigma * up


def middle(grid: Grid, p: Point, q: Point) -> Point:
    """The point half-way between p and q in λ."""
    return grid.at(lam=(p.lam + q.lam) / 2)


def heun_step(x: Any, p: Point, q: Point, grid: Grid) -> Steps:
    """EDM algorithm 1: Heun in ρ, or in σ on a flow schedule."""
    d = yield x, p
    x = first(q, d)
    if q.sigma == 0:
        return x
    e = yield x, q
    return x + heun_correction(grid, p, q, d, e)


def heun_correction(grid: Grid, p: Point, q: Point, d: Denoised, e: Denoised) -> Any:
    """The correction of `first` to the mean ε of d and e; on a flow schedule and from pure noise, `trapezoid`."""
    if p.alpha == 0 or grid.noise.is_flow:
        return trapezoid(p, q, d, e)
    return (e.eps - d.eps) * ((q.sigma - q.alpha * p.rho) / 2)


def midpoint_step(
    x: Any, p: Point, q: Point, grid: Grid, noise: Any, of: str, eta: float = 0.0, s_noise: float = 1.0
) -> Steps:
    """Use the ε (DPM-Solver-2) or the x0 (DPM-Solver++ 2S) half-way in λ for the whole step, then add noise."""
    d = yield x, p
    if q.sigma == 0:
        return d.x0
    to, up = ancestral(p, q, eta)
    if p.alpha == 0 or to.sigma == 0:
        x = yield from from_pure_noise(p, q, to, d)
    else:
        m = middle(grid, p, to)
        e = yield first(m, d), m
        x = first(to, d) + midpoint(p, to, d, e, of)
    return noised(x, up * s_noise, noise, p, q)


def midpoint(p: Point, q: Point, d: Denoised, e: Denoised, of: str) -> Any:
    """The correction of `first` that uses the x0 (or ε) of e, instead of d's, for the whole step."""
    if of == "x0":
        return (e.x0 - d.x0) * (q.alpha - q.sigma / p.rho)
    return (e.eps - d.eps) * (q.sigma - q.alpha * p.rho)


def from_pure_noise(p: Point, q: Point, to: Point, d: Denoised) -> Steps:
    """The step p → `to` from α = 0, where λ has no middle: the second evaluation is at q, so every step has two."""
    e = yield first(q, d), q
    return first(to, d) + trapezoid(p, to, d, e)


# Polynomials through earlier values


def cached(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Cache the results for floats, but not for tensors, which carry gradients."""
    remembered = lru_cache(maxsize=8192)(function)

    @wraps(function)
    def call(*numbers: Any) -> tuple[Any, ...]:
        plain = all(isinstance(n, (int, float)) for n in numbers)
        return (remembered if plain else function)(*numbers)

    return call


@cached
def exponential(k: float, h: Any, *us: Any) -> tuple[Any, ...]:
    """∫₀ʰ k·e^(−k(h−u))·L_j(u) du for the nodes 0, *us of λ − λ_p, except the node 0; h is the step in λ.

    k = 1 integrates x0 (times α'), k = −1 integrates ε (times σ'), k = 1 + η integrates x0 along the reverse SDE.
    """
    return moments(lambda u: k * ops(u).exp(k * (u - h)), lambda u: u, 0.0, h, us)


@cached
def halved(k: float, h: Any, u: Any) -> tuple[Any]:
    """As `exponential` for one further node, ∫k·e^(−k(h−u))·u du taken as h/2·(1 − e^(−kh)): the "midpoint" form."""
    return (-ops(h).expm1(-k * h) * h / (2 * u),)


@cached
def linear(k: float, h: Any, u: Any) -> tuple[Any]:
    """As `exponential` for one further node, with e^(−k(h−u)) taken as 1 (UniPC's B₁(h) = h)."""
    return (k * h * h / (2 * u),)


@cached
def damped(k: float, h: Any, u: Any, v: Any) -> tuple[Any, ...]:
    """As `exponential` for two further nodes, with half of the second difference: the mean of parabola and tangent."""
    slope = moments(lambda s: k * ops(s).exp(k * (s - h)), lambda s: s, 0.0, h, (1.0,))[0]  # ∫k·e^(−k(h−s))·s ds
    tangent = (slope * -v / (u * (u - v)), slope * -u / (v * (v - u)))  # of the parabola, at the node 0
    return tuple((whole + linear) / 2 for whole, linear in zip(exponential(k, h, u, v), tangent, strict=True))


@cached
def adams(rho: Any, to: Any, *rhos: Any) -> tuple[Any, ...]:
    """∫ L_j(ρ) dρ over ρ … to, for the nodes ρ, *rhos, except the first: Adams–Bashforth for variable steps."""
    return moments(lambda u: 1.0, lambda u: u, 0.0, to - rho, [r - rho for r in rhos])


# β of the VP-SDE whose t ∈ [0.001, 1] spans σ/α from 0.002 to 80 (Karras et al. 2022, table 1)
_BETA_D = 2 * (math.log1p(0.002**2) / 0.001 - math.log1p(80.0**2)) / (0.001 - 1)
_BETA_MIN = math.log1p(80.0**2) - _BETA_D / 2


@cached
def adams_in_time(rho: Any, to: Any, *rhos: Any) -> tuple[Any, ...]:
    """As `adams`, for polynomials in the time t of the VP-SDE with linear β: DEIS's tAB."""

    def time(r: Any) -> Any:
        return ((_BETA_MIN**2 + 2 * _BETA_D * ops(r).log(1 + r * r)) ** 0.5 - _BETA_MIN) / _BETA_D

    def slope(u: Any) -> Any:  # dρ/dt
        grown = ops(u).exp(_BETA_D * (now + u) ** 2 / 2 + _BETA_MIN * (now + u))
        return (_BETA_D * (now + u) + _BETA_MIN) * grown / (2 * (grown - 1) ** 0.5)

    now = time(rho)
    return moments(slope, lambda u: u, 0.0, time(to) - now, [time(r) - now for r in rhos])


def differences(weights: Iterable[Any], values: Iterable[Any], now: Any) -> Any:
    """Σ c_j·(f_j − f); 0 without values."""
    return sum((f - now) * c for c, f in zip(weights, values, strict=True))


def moments(
    weight: Callable[[Any], Any], node: Callable[[Any], Any], start: Any, end: Any, nodes: Iterable[Any]
) -> tuple[Any, ...]:
    """∫ weight(u)·L_j(node(u)) du from start to end, L_j the Lagrange polynomials of the nodes 0, *nodes, j ≥ 1."""
    points = [0.0, *nodes]
    total: list[Any] = [0.0] * len(points)
    for z, w in GAUSS:
        u = start + (end - start) * z
        scaled = weight(u) * (end - start) * w
        for j in range(1, len(points)):
            basis = scaled
            for m, other in enumerate(points):
                if m != j:
                    basis = basis * (node(u) - other) / (points[j] - other)
            total[j] = total[j] + basis
    return tuple(total[1:])


def _gauss_legendre(n: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1], by Newton's method on the Legendre polynomial."""
    rule = []
    for i in range(n):
        z = math.cos(math.pi * (i + 0.75) / (n + 0.5))
        for _ in range(100):
            value, before = z, 1.0
            for k in range(2, n + 1):
                value, before = ((2 * k - 1) * z * value - (k - 1) * before) / k, value
            slope = n * (z * value - before) / (z * z - 1)
            z -= value / slope
            if abs(value / slope) < 1e-15:
                break
        rule.append(((1 - z) / 2, 1 / ((1 - z * z) * slope * slope)))
    return rule


GAUSS = _gauss_legendre(12)
