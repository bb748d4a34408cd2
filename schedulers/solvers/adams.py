"""Adams–Bashforth: polynomials of ε in ρ = σ/α."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.solver import Steps, solver

from .algebra import adams
from .multistep import multistep


@solver(
    order=4,
    grid="karras",
    aliases=("k_lms", "LMSDiscreteScheduler"),
    a1111="LMS",
    reference="k-diffusion, sample_lms: Adams–Bashforth for variable steps, in σ/α",
    formula="x' = (α'/α)·x + α'·∫ε dρ, ε a polynomial in ρ through the latest `order` values",
    same="ipndm_v",
    when="To match older pictures. deis has less error in few evaluations.",
)
def lms(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    order: Literal[1, 2, 3, 4] = 4,
    last: Literal["x0", "extrapolated"] = "x0",
) -> Steps:
    """Integrate a polynomial of ε in ρ through the latest `order` values exactly.

    With `last` "extrapolated" the step to σ = 0 has this order too, as in diffusers and k-diffusion.
    """

    def weights(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
        return tuple(q.alpha * c for c in adams(p.rho, q.rho, *(o.rho for o in past)))

    return (yield from multistep(x, grid, noise, "eps", order, weights, last=last))


@solver(
    order=4,
    grid="karras",
    reference="diff-sampler, ipndm_v: PNDM, Liu et al. 2022 (2202.09778), for variable steps",
    formula="x' = first + α'·Σ c_j·(ε_j − ε), c_j of Adams–Bashforth with the steps taken",
    same='variant="exact": lms',
    when="diff-sampler and ComfyUI use this name. ipndm has less error in few evaluations.",
)
def ipndm_v(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    order: Literal[1, 2, 3, 4] = 4,
    variant: Literal["exact", "diff-sampler"] = "exact",
) -> Steps:
    """ipndm with the weights of the steps that are taken.

    `variant` "diff-sampler" has the weights of that program and of ComfyUI, which differ from order 3 on: a pair of
    parentheses is missing there. On mixtures their error in few evaluations is smaller all the same.
    """
    if variant == "exact":
        return (yield from lms(x, grid, noise, order=order))
    return (yield from multistep(x, grid, noise, "eps", order, _of_diff_sampler))


def _of_diff_sampler(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
    """The weights of diff-sampler. The last is that of ε itself: those of order 4 do not sum to the step."""
    rhos = [q.rho, p.rho, *(o.rho for o in past)]
    steps = [new - old for new, old in pairwise(rhos)]  # the newest first
    h, a, b, c = [*steps, 1.0, 1.0][:4]
    ab = a / b
    second = -h / a / 2
    if len(past) == 1:
        return (h * q.alpha * second,)
    third = h + a
    t3 = (1 - h / (3 * third) * (h * third) / (a * (a + b))) / 2
    if len(past) == 2:
        return tuple(h * q.alpha * w for w in (second - (1 + ab) * t3, t3 * ab))
    t4 = (1 - h / (3 * third)) / 2 + (1 - h / (2 * third)) * h / (6 * (third + b))
    t4 = t4 * (h * third * (third + b)) / (a * (a + b) * (a + b + c))
    far = a * (a + b) / (b * (b + c))
    weights = (
        second - (1 + ab) * t3 - (1 + ab + far) * t4,
        t3 * ab + (ab + far * (1 + b / c)) * t4,
        -t4 * far * ab,
    )
    return tuple(h * q.alpha * w for w in (*weights, t4 * far * (b / c - ab)))


EVEN_STEPS = ((), (-1 / 2,), (-16 / 12, 5 / 12), (-59 / 24, 37 / 24, -9 / 24))  # without the latest value's weight


def _even(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
    return tuple((q.sigma - q.alpha * p.rho) * c for c in EVEN_STEPS[len(past)])


@solver(
    order=2,
    grid="karras",
    aliases=("IPNDMScheduler",),
    reference="PNDM, Liu et al. 2022 (2202.09778), and DEIS (2204.13902), appendix: improved PNDM",
    formula="x' = first + α'(ρ' − ρ)·Σ c_j·(ε_j − ε), c_j of Adams–Bashforth with even steps",
    when="Order 3: little error in few evaluations, and on flows up to 30.",
)
def ipndm(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    order: Literal[1, 2, 3, 4] = 4,
    last: Literal["x0", "extrapolated"] = "x0",
) -> Steps:
    """Adams–Bashforth on ε with the weights of even steps on any grid: accurate in few evaluations.

    With `last` "extrapolated" the step to σ = 0 has this order too.
    """
    return (yield from multistep(x, grid, noise, "eps", order, _even, last=last))


@solver(
    order=2,
    grid="karras",
    aliases=("plms", "PNDMScheduler"),
    a1111="PLMS",
    reference="PNDM, Liu et al. 2022 (2202.09778), algorithm 2 without Runge–Kutta steps, as Stable Diffusion 1 has it",
    formula="ipndm of order 4, the first step heun's",
    same="PLMS",
    when="To match pictures of Stable Diffusion 1: on the grid leading, with last='extrapolated'. n steps cost n + 1.",
)
def pndm(x: Any, grid: Grid, noise: Any, *, last: Literal["x0", "extrapolated"] = "x0") -> Steps:
    """ipndm of order 4 with Heun's method for the first step: one evaluation more.

    With `last` "extrapolated" the step to σ = 0 is of order 4 too, as in diffusers.
    """
    return (yield from multistep(x, grid, noise, "eps", 4, _even, heun_first=True, last=last))
