"""The conformance check for authors of solvers.

    from schedulers.testing import check_solver
    def test_mine():
        check_solver(my_solver)      # the decorated function, or its name

It checks what the native loop and diffusers' pipelines rely on. Whether the numbers are those of the paper is for the
author's own tests.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from schedulers.exact import Gaussian
from schedulers.grid import Grid
from schedulers.grids import build
from schedulers.noise import NoiseSchedule, Point
from schedulers.prediction import Denoised, target
from schedulers.registry import check_grid, info
from schedulers.scheduler import Scheduler
from schedulers.solver import SOLVERS, Solver, evaluation_points, run

PICTURE = 0.7  # every pixel of the only picture in the data below
SCHEDULES = (  # (noise, a prediction that works from its noisiest point)
    (NoiseSchedule.scaled_linear(), "epsilon"),
    (NoiseSchedule.scaled_linear().zero_terminal_snr(), "v_prediction"),  # begins at α = 0
    (NoiseSchedule.flow(shift=3.0), "flow_prediction"),  # begins at α = 0
    (NoiseSchedule.edm(), "sample"),
)


def check_solver(solver: str | Solver | Callable[..., Any]) -> None:
    """Check a solver (its function, its name or a `Solver`). Raises AssertionError with a line for each fault."""
    s = solver if isinstance(solver, Solver) else info(solver) if isinstance(solver, str) else _registered(solver)
    faults = []
    for check in CHECKS:
        if s.native_only and check in (_dry_run, _reads_nothing):
            continue
        if s.upwards and check in (_finds_the_picture, _order):
            continue
        try:
            faults += [f"{check.__name__.strip('_')}: {line}" for line in check(s)]
        except Exception as error:
            faults.append(f"{check.__name__.strip('_')}: {type(error).__name__}: {error}")
    assert not faults, "\n".join([f"{s.name} does not conform:", *faults])


def _registered(function: Callable[..., Any]) -> Solver:
    for s in SOLVERS.values():
        if s.function is function:
            return s
    raise AssertionError(f"{function!r} is not a solver: decorate it with schedulers.solver(…)")


def _declared(s: Solver) -> Iterator[str]:
    """The decorator's arguments, and the options: keywords with a default and a type."""
    if not inspect.isgeneratorfunction(s.function):
        yield "must be a generator function, which yields (state, point) and receives a Denoised"
    if not (s.order >= 1 and s.evaluations_per_step >= 1 and s.reference):
        yield "needs order >= 1, evaluations_per_step >= 1 and a reference"
    check_grid(s.grid)
    parameters = list(inspect.signature(s.function).parameters.values())
    if len([p for p in parameters if p.kind is not p.KEYWORD_ONLY]) != 3:
        yield "takes (x, grid, noise); all else must be keyword-only"
    for p in parameters[3:]:
        if p.default is p.empty or p.annotation is p.empty:
            yield f"the option {p.name} needs a default and a type"
    s.check(s.options)


def _dry_run(s: Solver) -> Iterator[str]:
    """Its evaluations have the same points for every state: a pipeline learns the times from a run on the number 0."""
    for noise, _ in SCHEDULES:
        for steps in (1, 2, 3, 10):
            grid = build(s.grid, noise, steps)
            dry = evaluation_points(s.function, grid)
            real: list[Point] = []
            _walk(s, grid, torch.full((2, 3), 5.0), on_evaluation=real.append)
            if real != dry:
                yield f"{steps} steps on {noise.name}: {len(dry)} evaluations in the dry run, then {len(real)} others"
                return


def _reads_nothing(s: Solver) -> Iterator[str]:
    """It reads no tensor back and branches on no value: on tensors without values that fails."""
    grid = build(s.grid, NoiseSchedule.scaled_linear(), 5)
    _walk(s, grid, torch.zeros(2, 3, device="meta"))
    return
    yield


def _finds_the_picture(s: Solver) -> Iterator[str]:
    """If the data are one picture, the result is that picture: the step to σ = 0 is x' = x0 and adds no noise."""
    for noise, _ in SCHEDULES:
        for steps in (1, 2, 7):
            for begin in {0, steps // 2}:  # from the start, and mid-way, as image-to-image
                grid = build(s.grid, noise, steps)[begin:]
                x = grid[0].alpha * PICTURE + grid[0].sigma * torch.linspace(-1, 1, 6).reshape(2, 3)
                result = _walk(s, grid, x)
                if not isinstance(result, Tensor) or result.shape != x.shape or result.dtype != torch.float32:
                    yield f"the result must be a float32 tensor like the state, got {str(result)[:60]}"
                    return
                if not (result - PICTURE).abs().max() < 1e-3:
                    yield f"{steps} steps on {noise.name} from step {begin} give {float(result[0, 0]):g} for {PICTURE}"
                    return


def _takes_the_state_as_it_comes(s: Solver) -> Iterator[str]:
    """If a pipeline edits the state (inpainting), the solver continues from d.x, not from its own x."""
    grid = build(s.grid, NoiseSchedule.scaled_linear(), 5)
    edited = torch.full((2, 3), 2.0)
    results = [_walk(s, grid, start, edit=edited, deviation=0.5) for start in (edited, -edited)]
    if not torch.allclose(results[0], results[1], atol=1e-4):
        yield "the result depends on a state that was replaced before its evaluation"


def _random(s: Solver) -> Iterator[str]:
    """Noise comes only from noise(p, q), and only in a stochastic solver; image j is the same in every batch."""
    drawn: list[tuple[Point, Point]] = []

    def draw(p: Point, q: Point) -> float:
        drawn.append((p, q))
        return 0.0

    _walk(s, build(s.grid, NoiseSchedule.scaled_linear(), 5), torch.zeros(2, 3), noise=draw)
    if bool(drawn) != s.stochastic:
        yield f"declared stochastic={s.stochastic}, and draws noise {len(drawn)} times in 5 steps"
    if any(q.sigma == 0 for _, q in drawn):
        yield "draws noise for the step to σ = 0"
    scheduler = Scheduler(s, NoiseSchedule.scaled_linear(), "epsilon", s.grid, {})
    exact = Gaussian([0.3] * 8, 0.5).denoiser(scheduler.noise)
    network = (lambda x, t: (exact(x, t), exact(x, t) * 0.9)) if s.cfg_pp else exact
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))

    def sample(images: list[int]) -> Tensor:
        return scheduler.sample(network, x[images], 5, [torch.Generator().manual_seed(10 + j) for j in images])

    together = sample([0, 1, 2])
    if not torch.equal(together, sample([0, 1, 2])):
        yield "the same generators give two results"
    if not s.native_only and not torch.allclose(together[1:2], sample([1]), atol=1e-5):
        yield "an image depends on the other images of its batch"


def _order(s: Solver) -> Iterator[str]:
    """A deterministic solver's error on a Gaussian falls by the declared order minus ½ between 20 and 80 steps."""
    if s.stochastic or s.native_only:
        return
    gaussian, noise = Gaussian([0.3], 0.5), NoiseSchedule.scaled_linear()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (20, 80):
        grid = Grid(build("karras", noise, steps + 1).points[:-1], noise)  # the step to 0 has an error of its own
        result, nfe = run(
            s.function(x, grid, _no_noise),
            lambda state, p: _exact(state, p, *gaussian.denoise(state, p.alpha, p.sigma)),
        )
        clean = gaussian.solve(x, grid[0], grid[-1])
        errors.append((float((result - clean).abs().max()), nfe))
    (e1, n1), (e2, n2) = errors
    measured = math.log(e1 / e2) / math.log(n2 / n1)
    if not measured > s.order - 0.5:
        yield f"declared {s.order}, measured {measured:.2f}"


CHECKS = (_declared, _dry_run, _reads_nothing, _finds_the_picture, _takes_the_state_as_it_comes, _random, _order)


def _no_noise(p: Point, q: Point) -> Any:
    return 0.0


def _exact(x: Tensor, p: Point, x0: Any, eps: Any) -> Denoised:
    """The exact evaluation, with the prediction ε − x0, which works at every point."""
    return Denoised(x, target("flow_prediction", p, x0, eps), p, "flow_prediction")


def _walk(
    s: Solver,
    grid: Grid,
    x: Tensor,
    on_evaluation: Callable[[Point], Any] = lambda p: None,
    edit: Tensor | None = None,
    noise: Callable[[Point, Point], Any] | None = None,
    deviation: float = 0.0,
) -> Any:
    """Run the solver on data of one picture (± deviation); `edit` replaces the state of the first evaluation."""
    generator, count = torch.Generator().manual_seed(0), 0

    def draw(p: Point, q: Point) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device)

    def denoise(state: Tensor, p: Point) -> Denoised:
        nonlocal count
        on_evaluation(p)
        count += 1
        state = edit if edit is not None and count == 1 else state
        share = deviation**2 * p.alpha / ((p.alpha * deviation) ** 2 + p.sigma**2)
        x0 = PICTURE + (state - p.alpha * PICTURE) * share
        return _exact(state, p, x0, (state - p.alpha * x0) / p.sigma)

    return run(s.function(x, grid, noise or draw), denoise)[0]
