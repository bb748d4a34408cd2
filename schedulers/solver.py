"""What a solver is, and the loop that runs one.

A solver is a generator, written as in its paper. Its arguments are the starting state, the grid, and `noise(p, q)`,
which draws a standard normal for the interval p → q. Where it needs the network, it yields (x, point) and receives a
`Denoised`:

    @solver(order=1, reference="DDIM, Song et al. 2020, eq. 12")
    def euler(x, grid, noise):
        for p, q in grid.pairs():
            d = yield x, p
            x = q.alpha * d.x0 + q.sigma * d.eps
        return x

The state is the model's own x = α·x0 + σ·ε; nothing is divided by α. The number of yields is the number of function
evaluations (NFE). A solver must not branch on the values of x: inside diffusers it runs once on the number 0, to learn
the times of its evaluations. The step to σ = 0 is x' = x0, without noise.

Formulas use these symbols: x is the state, a prime marks the level at which the step ends, ρ = σ/α, λ = ln(α/σ),
h = λ' − λ, z is fresh noise, and "first" is the first-order step α'·x0 + σ'·ε.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from schedulers.grid import Grid
from schedulers.noise import NoiseSchedule, Point
from schedulers.prediction import Denoised

Steps = Generator[tuple[Any, Point], Denoised, Any]


@dataclass(frozen=True)
class Solver:
    """A solver's function, and what people need to know before they choose it."""

    name: str
    function: Callable[..., Steps]
    order: int  # of convergence with the default options, weak if stochastic; unipc: of its predictor
    evaluations_per_step: int
    stochastic: bool
    grid: str  # the default grid; see `grid_for`
    aliases: tuple[str, ...]  # names that other tools use
    a1111: str  # the label in AUTOMATIC1111's picture metadata
    reference: str
    formula: str = ""  # of one step
    same: str = ""  # names and options that are the same algorithm
    when: str = ""  # when to use it
    native_only: bool = False  # cannot run inside diffusers
    upwards: bool = False  # from a picture to noise: walks the grid the other way
    cfg_pp: bool = False  # reads `Denoised.unconditional`: the network gives its output without the prompt too
    options: dict[str, Any] = field(default_factory=dict)  # name: default

    def grid_for(self, noise: NoiseSchedule) -> str:
        """The default grid on this noise schedule.

        Ramps of σ/α leave a schedule that begins at pure noise or nearly so (flows, cosine, zero terminal SNR) in too
        large steps; beta57 takes their place there.
        """
        return "beta57" if self.grid in RAMPS and noise.noisiest.rho > PURE else self.grid

    @property
    def unlike_the_ode(self) -> str:
        """Why more evaluations do not bring its results to the solution of the probability-flow ODE; "" if they do."""
        reasons = {
            "draws noise": self.stochastic,
            "chooses its own number of evaluations": self.native_only,
            "goes from a picture to noise": self.upwards,
            "guides more in more steps (CFG++)": self.cfg_pp,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    @property
    def is_plugin(self) -> bool:
        """Whether another package defines it."""
        return not self.function.__module__.startswith("schedulers.solvers.")

    def check(self, options: dict[str, Any]) -> None:
        """Raise ValueError for a value that is not among an option's choices, or not a number ≥ 0."""
        hints = get_type_hints(self.function)
        for name, value in options.items():
            kind = hints.get(name)
            if get_origin(kind) is Literal:
                fits = value in get_args(kind) and not isinstance(value, float)
                allowed = ", ".join(map(repr, get_args(kind)))
            elif kind is int:
                fits, allowed = isinstance(value, int) and value >= 0, "a whole number from 0"
            elif kind is float:
                fits, allowed = isinstance(value, (int, float)) and 0 <= value < math.inf, "a number from 0"
            else:  # a type that only a plug-in knows
                continue
            if not fits or isinstance(value, bool):
                raise ValueError(f"{self.name}: {name} = {value!r} is not possible; allowed: {allowed}")


SOLVERS: dict[str, Solver] = {}
RAMPS = ("karras", "exponential")  # grids that `Solver.grid_for` replaces
PURE = 1000.0  # σ/α above which a schedule begins at pure noise


def solver(
    *,
    order: int,
    reference: str,
    evaluations_per_step: int = 1,
    stochastic: bool = False,
    grid: str = "trailing",
    aliases: tuple[str, ...] = (),
    a1111: str = "",
    formula: str = "",
    same: str = "",
    when: str = "",
    native_only: bool = False,
    upwards: bool = False,
    cfg_pp: bool = False,
) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    """Register a solver; its keyword-only parameters are its options. `Solver` describes the arguments."""

    def register(function: Callable[..., Steps]) -> Callable[..., Steps]:
        name = function.__name__
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        if name in SOLVERS and SOLVERS[name].function.__module__ != function.__module__:
            raise ValueError(f"the name {name!r} is taken, by {SOLVERS[name].function.__module__}")
        SOLVERS[name] = Solver(
            name=name,
            function=function,
            order=order,
            evaluations_per_step=evaluations_per_step,
            stochastic=stochastic,
            grid=grid,
            aliases=aliases,
            a1111=a1111 or name,
            reference=reference,
            formula=formula,
            same=same,
            when=when,
            native_only=native_only,
            upwards=upwards,
            cfg_pp=cfg_pp,
            options=options,
        )
        return function

    return register


def corrected(function: Callable[..., Steps], corrections: Sequence[Sequence[Any]]) -> Callable[..., Steps]:
    """A solver of one evaluation a step, with a learned correction of its coefficients.

    After evaluation i, g_i·x0_i + c_i1·(x0_i − x0_(i−1)) + c_i2·(x0_(i−1) − x0_(i−2)) + … is added to the state, with
    as many differences as the history has; zeros change nothing. `corrections` has a row (g_i, c_i1, c_i2, …) for each
    evaluation of the whole grid; a run that starts mid-way uses the last rows.
    """

    def steps(x: Any, grid: Grid, noise: Any) -> Steps:
        inner = function(x, grid, noise)
        past: list[Any] = []
        x, p = next(inner)
        for row in corrections[len(corrections) - (len(grid) - 1) :]:
            d = yield x, p
            past = [d.x0, *past[: len(row) - 1]]
            last = False
            try:
                x, p = inner.send(d)
            except StopIteration as stop:
                x, last = stop.value, True
            x = x + d.x0 * row[0]
            for c, newer, older in zip(row[1:], past, past[1:], strict=False):
                x = x + (newer - older) * c
            if last:
                return x
        raise ValueError("corrections are for solvers with one evaluation a step")

    return steps


def run(steps: Steps, denoise: Callable[[Any, Point], Denoised]) -> tuple[Any, int]:
    """Run a solver to its end, with `denoise(x, point)` at each evaluation: (its result, the number of evaluations)."""
    nfe = 0
    try:
        x, p = next(steps)
        while True:
            d = denoise(x, p)
            nfe += 1
            x, p = steps.send(d)
    except StopIteration as stop:
        return stop.value, nfe


def evaluation_points(function: Callable[..., Steps], grid: Grid) -> list[Point]:
    """The point of each evaluation of a solver on this grid, learned by running it on the number 0."""
    points: list[Point] = []

    def denoise(x: Any, p: Point) -> Denoised:
        points.append(p)
        return Denoised(0.0, 0.0, p, "epsilon") if p.alpha != 0 else Denoised(0.0, 0.0, p, "sample")

    run(function(0.0, grid, lambda p, q: 0.0), denoise)
    return points


def matching_rest(function: Callable[..., Steps], grid: Grid, points: Sequence[Point]) -> Grid | None:
    """The rest of the grid on which a solver evaluates exactly at `points`, the last of its run; None without one."""
    k = bisect_left(range(len(grid) - 1), -len(points), key=lambda k: -len(evaluation_points(function, grid[k:])))
    rest = grid[k:]
    return rest if len(rest) > 1 and evaluation_points(function, rest) == list(points) else None
