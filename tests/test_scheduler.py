"""A scheduler in a pipeline's loop equals its native loop: edits, rounding, mid-way starts, noise, errors."""

from __future__ import annotations

import copy
import json
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import schedulers
from schedulers import Grid, NoiseSchedule, NonFinite, Point, Scheduler, explicit
from schedulers.draws import Generators, normal
from schedulers.exact import Gaussian, Mixture
from schedulers.for_diffusers import DiffgenScheduler, for_diffusers, from_diffusers
from schedulers.solver import SOLVERS, Solver, matching_rest, solver
from schedulers.testing import check_solver

SD = NoiseSchedule.scaled_linear()
KINDS = {  # a noise schedule and a prediction
    "sd": (SD, "epsilon"),
    "zero_snr": (SD.zero_terminal_snr(), "v_prediction"),
    "flow": (NoiseSchedule.flow(3.0), "flow_prediction"),
}
INSIDE = [name for name in schedulers.names() if not schedulers.info(name).native_only]
MIXTURE = Mixture.random(0, elements=8, components=3)


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def start(s: Scheduler, batch: int = 3) -> Tensor:
    """The starting states of images of 2 channels and 2 x 2 pixels, image i from the seed i."""
    return s.start(normal((batch, 2, 2, 2), [torch.Generator().manual_seed(i) for i in range(batch)]))


def test_each_image_starts_from_its_own_noise_at_the_level_of_the_first_point() -> None:
    noise = normal((3, 2, 4), seeds(3))
    assert noise.dtype is torch.float32
    for row, generator in zip(noise, seeds(3), strict=True):
        assert torch.equal(row, torch.randn(2, 4, generator=generator))
    one = torch.Generator().manual_seed(0)
    assert torch.equal(normal((3, 2), one), torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    for kind in ("scaled_linear", "linear", "cosine"):  # variance preserving: not a bit changes
        assert torch.equal(schedulers.get("euler", noise=kind, prediction="v_prediction").start(noise), noise)
    s = schedulers.get("euler", noise=NoiseSchedule.edm(sigma_max=3.0), prediction="edm")
    torch.testing.assert_close(s.start(noise, 5), noise * math.sqrt(10))
    grid = s.grid(5)
    assert torch.equal(s.start(noise, grid[2:]), noise * math.hypot(1.0, grid[2].sigma))


def loop(s: Scheduler, network: Any, x: Tensor, begin: int = 0, generator: Generators = None) -> Tensor:
    """The loop of a pipeline, from evaluation `begin` on."""
    for t in s.timesteps[begin:]:
        output = network(s.scale_model_input(x, t), t.expand(len(x)))
        x = s.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipelines_loop_gives_what_the_native_one_gives(name: str, kind: str) -> None:
    noise, prediction = KINDS[kind]
    s = schedulers.get(name, noise=noise, prediction=prediction)
    network = MIXTURE.denoiser(noise, prediction)
    x = start(s)
    native = s.sample(network, x, 7, seeds(3))
    s.set_timesteps(7)
    assert len(s.timesteps) == s.nfe(7)
    torch.testing.assert_close(loop(s, network, x, generator=seeds(3)), native, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", INSIDE)
def test_each_update_is_recorded(name: str) -> None:
    s = schedulers.get(name)
    program = s.program(s.grid(5))
    assert program is not None
    assert program.points == s.evaluations(s.grid(5))
    assert all(math.isfinite(w) for update in program.updates for _, w in update)
    kept: set[Any] = set()
    for i, update in enumerate(program.updates):
        kept |= {("x", i), ("y", i), *(key for key, _, _ in program.draws[i])}
        assert {key for key, _ in update} <= kept
        kept -= set(program.done_with[i])
        assert len(kept) <= 10  # a bounded history
    assert not kept


def test_a_learned_variance_runs_unrecorded() -> None:
    s = schedulers.get("ddpm", variance="learned")
    mean = MIXTURE.denoiser(SD)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([mean(x, t), torch.tanh(x)], 1)

    s.set_timesteps(6)
    native = s.sample(network, start(s), 6, seeds(3))
    torch.testing.assert_close(loop(s, network, start(s), generator=seeds(3)), native)
    with pytest.raises(ValueError, match="needs an output of 4 channels"):
        s.sample(mean, start(s), 6)


# Begun mid-way


def test_begun_midway_however_a_solver_walks() -> None:
    """A solver that does not walk over `grid.pairs()` keeps its history too."""

    def walker(steps: Any) -> Any:
        def mine(x: Any, grid: Any, noise: Any) -> Any:
            before = None
            for p, q in steps(grid):
                d = yield x, p
                x = q.alpha * d.x0 + q.sigma * d.eps
                x = x if before is None else x + (d.eps - before) * (0.5 * (q.sigma - q.alpha * p.rho))
                before = d.eps
            return x

        return Solver("mine", mine, 1, 1, False, "karras", (), "mine", "none")

    results = []
    for steps in (lambda g: g.pairs(), pairwise, lambda g: [(g[i], g[i + 1]) for i in range(len(g) - 1)]):
        s = Scheduler(walker(steps), SD, "epsilon", "karras", {})
        s.set_timesteps(9)
        s.set_begin_index(4)
        results.append(loop(s, MIXTURE.denoiser(SD), start(s), 4))
    expected = s.sample(MIXTURE.denoiser(SD), start(s), s.grid(9)[4:])
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_goes_up_begins_at_the_picture() -> None:
    s = schedulers.get("ddim_inverse")
    s.set_timesteps(5)
    with pytest.raises(ValueError, match="begins at 0, not at 2"):
        s.set_begin_index(2)


@pytest.mark.parametrize("name", [name for name in INSIDE if name != "ddim_inverse"])
def test_begun_at_every_evaluation(name: str) -> None:
    s = schedulers.get(name)
    network = MIXTURE.denoiser(SD)
    s.set_timesteps(5)
    points = list(s._evaluations)
    clean = MIXTURE.draw(3, torch.Generator().manual_seed(1)).reshape(3, 2, 2, 2).float()
    for begin in range(len(points)):
        s.set_timesteps(5)
        s.set_begin_index(begin)
        x = s.add_noise(
            clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)), s.timesteps[begin].expand(3)
        )
        result = loop(s, network, x, begin, seeds(3))
        assert s._run is not None
        assert s._run.program is not None
        assert s._run.program.points == points[begin:]  # the times that the pipeline has
        assert result.isfinite().all()
        rest = matching_rest(s.solve, s.grid(5), points[begin:])
        if rest is not None and points[begin] == rest[0]:
            torch.testing.assert_close(result, s.sample(network, x, rest, seeds(3)), rtol=1e-3, atol=1e-4)


def test_begun_inside_a_step() -> None:
    """A start at the second evaluation of Heun's first step: first order to the next beginning, here the same point."""
    s = schedulers.get("heun", grid="trailing")
    network, grid = MIXTURE.denoiser(SD), s.grid(3)
    s.set_timesteps(3)
    assert s._evaluations == [grid[0], grid[1], grid[1], grid[2], grid[2]]
    s.set_begin_index(1)
    x = start(s)
    result = loop(s, network, x, 1)
    torch.testing.assert_close(result, s.sample(network, x, grid[1:]), rtol=1e-4, atol=1e-5)


def test_begin_index_out_of_range() -> None:
    s = schedulers.get("euler")
    s.set_timesteps(5)
    with pytest.raises(ValueError, match="the grid has 5 evaluations, it cannot begin at number 5"):
        s.set_begin_index(5)


# What the pipeline does to the state


@pytest.mark.parametrize("name", INSIDE)
def test_edits_between_steps_are_honoured(name: str) -> None:
    """A state replaced before the first evaluation has no effect; one put in before the last decides the result."""
    s = schedulers.get(name, grid="trailing")
    network = Gaussian([0.2] * 8, 0.5).denoiser(SD)
    s.set_timesteps(4)
    last = len(s.timesteps) - 1

    def edited(at: int, begin: Tensor, edit: Tensor) -> Tensor:
        s.set_begin_index(0)
        x, generators = begin, seeds(3)
        for i, t in enumerate(s.timesteps):
            x = edit if i == at else x
            x = s.step(network(x, t.expand(3)), t, x, generator=generators, return_dict=False)[0]
        return x

    x = start(s)
    torch.testing.assert_close(edited(0, x, -x), edited(0, 2 * x, -x))
    assert (edited(last, x, x) - edited(last, x, -x)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "unipc"])
def test_an_edit_in_place_and_a_new_tensor_are_the_same(name: str) -> None:
    network = MIXTURE.denoiser(SD)
    results = []
    for in_place in (True, False):
        s = schedulers.get(name)
        s.set_timesteps(6)
        x = start(s)
        for i, t in enumerate(s.timesteps):
            x = s.step(network(x, t.expand(3)), t, x, return_dict=False)[0]
            if i == 2:
                x = x.mul_(0.5) if in_place else x * 0.5
        results.append(x)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc", "heun", "lms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_float32_state(name: str, dtype: torch.dtype) -> None:
    """With the same outputs the state equals that of a float32 loop, bit for bit; the pipeline gets its rounding."""
    s, states = schedulers.get(name), []
    x = start(s).to(dtype)
    for kind in (torch.float32, dtype):
        s.set_timesteps(12)
        answers = torch.randn(len(s.timesteps), *x.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        result = x.to(kind)
        for t, answer in zip(s.timesteps, answers, strict=True):
            result = s.step(answer.to(kind), t, result, return_dict=False)[0]
        assert s._run is not None
        assert (result.dtype, s._run.state.dtype) == (kind, torch.float32)
        assert torch.equal(result, s._run.state.to(kind))
        states.append(s._run.state)
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_half_precision_takes_edits_over(mode: Any) -> None:
    """Edits, in place or in a copy, take effect; elements without an edit stay unrounded."""
    s, results = schedulers.get("dpmpp_2m"), []
    for edit in (lambda x: x[1:].fill_(0.25), lambda x: x[1:].copy_(torch.full_like(x[1:], 0.25)), lambda x: None):
        s.set_timesteps(12)
        with mode():
            x = start(s).half()
            for i, t in enumerate(s.timesteps):
                x = s.step(x * 0.5, t, x)[0]
                if i == 8:
                    x = x.clone()
                    edit(x)
                elif i == 3:
                    edit(x)
        results.append(x)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][0], results[2][0])
    assert not torch.isclose(results[0][1:], results[2][1:], rtol=0.1).any()


# Randomness

STOCHASTIC = [name for name in INSIDE if schedulers.info(name).stochastic]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    s = schedulers.get(name)
    network = MIXTURE.denoiser(SD)
    s.set_timesteps(5)
    x = start(s, 4)
    batch = loop(s, network, x, generator=seeds(4))
    s.set_timesteps(5)
    alone = loop(s, network, x[2:3], generator=seeds(4)[2:3])
    torch.testing.assert_close(batch[2:3], alone, rtol=1e-5, atol=1e-5)
    s.set_timesteps(5)
    one = loop(s, network, x[2:3], generator=seeds(4)[2])  # one generator, not a list
    assert torch.equal(alone, one)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_last_step_adds_no_noise(name: str) -> None:
    s = schedulers.get(name)
    x0 = torch.linspace(-1, 1, 24).reshape(3, 2, 2, 2)
    s.set_timesteps(4)
    p = s._evaluations[-1]
    s.set_begin_index(len(s.timesteps) - 1)
    result = loop(s, lambda x, t: (x - p.alpha * x0) / p.sigma, p.alpha * x0 + p.sigma, len(s.timesteps) - 1, seeds(3))
    tolerance = 1e-5 if name != "lcm" else 1e-3  # its c_skip is not quite 0
    torch.testing.assert_close(result, x0, rtol=tolerance, atol=tolerance)


def test_generators_must_be_as_many_as_images() -> None:
    s = schedulers.get("ddpm")
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        s.sample(MIXTURE.denoiser(SD), start(s), 4, seeds(2))


# The device


class Reads(TorchDispatchMode):
    """Fails if a tensor is read back: .item(), float(), bool(), a copy to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert str(func) not in {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"}, str(
            func
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("limits", [{}, {"clip_sample": True}])
def test_nothing_is_read_back(name: str, limits: dict[str, Any]) -> None:
    s = schedulers.get(name, **limits)
    s.set_timesteps(4)
    x, t = torch.zeros(2, 4, 2, 2, device="meta"), torch.zeros((), device="meta")  # without values: reading one raises
    for _ in range(2):
        s.set_begin_index(0)
        for _ in s.timesteps:
            x = s.step(x, t, s.scale_model_input(x, t), generator=seeds(2), return_dict=False)[0]
    s.add_noise(x, x, t.expand(2))
    with Reads():
        s.sample(lambda x, t: x * 0.1, start(s), 4, seeds(3), callback=lambda i, p, d: None)


def test_non_finite_output_is_named() -> None:
    s = schedulers.get("dpmpp_2m", grid="trailing")
    calls: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        output = torch.zeros_like(x)
        if len(calls) == 4:
            output[1, 0, 0, 0] = math.nan
        return output

    with pytest.raises(NonFinite, match=r"not finite from evaluation 3 on, at t = 699, in image 1") as caught:
        s.sample(network, start(s), 10)
    assert (caught.value.step, caught.value.t, caught.value.images) == (3, 699, [1])
    assert isinstance(caught.value, ArithmeticError)
    assert len(calls) == 10  # read after the loop


# Schedules of other kinds


def test_edm_scales_its_input_and_is_diffusers() -> None:
    theirs = diffusers.EDMEulerScheduler(sigma_data=0.7)
    noise, prediction = schedulers.from_diffusers_config({"_class_name": "EDMEulerScheduler", **theirs.config})
    s = schedulers.get("euler", noise=noise, prediction=prediction, grid="karras")
    states: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        states.append(x)
        return torch.sin(x + t.reshape(-1, 1, 1, 1))

    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)) * theirs.init_noise_sigma
    expected = from_diffusers(theirs).sample(network, x, 8)
    assert s.init_noise_sigma == pytest.approx(theirs.init_noise_sigma)
    torch.testing.assert_close(s.sample(network, x, 8), expected, rtol=1e-4, atol=1e-4)
    s.set_timesteps(8)
    torch.testing.assert_close(loop(s, network, x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[8], states[0])
    torch.testing.assert_close(s.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)


def test_a_flow_that_depends_on_the_resolution() -> None:
    noise = NoiseSchedule.flow(dynamic={})
    s = schedulers.get("euler", noise=noise, prediction="flow_prediction")
    assert (s.config.use_dynamic_shifting, s.config.get("max_image_seq_len"), s.config.use_flow_sigmas) == (
        True,
        4096,
        True,
    )
    with pytest.raises(ValueError, match="mu is needed"):
        s.set_timesteps(4)
    with pytest.raises(ValueError, match="at_resolution"):
        s.sample(lambda x, t: x, torch.zeros(1, 4), 4)
    s.set_timesteps(4, mu=1.0)
    assert s.timesteps.tolist() == pytest.approx([1000 * noise.with_mu(1.0).shifted(u) for u in (1, 0.75, 0.5, 0.25)])
    fixed = schedulers.get("euler", noise="flow", prediction="flow_prediction")
    fixed.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)  # a pipeline that always passes it
    assert fixed.timesteps.tolist() == [1000, 500]
    assert fixed.sigmas.tolist() == [1, 0.5, 0]


def test_lists_in_the_place_of_steps() -> None:
    s = schedulers.get("euler", grid="karras")
    s.set_timesteps(timesteps=[999, 500, 3])
    assert s.timesteps.tolist() == [999, 500, 3]
    s.set_timesteps(sigmas=[10.0, 1.0, 0.0])
    assert s.sigmas.tolist() == pytest.approx([10, 1, 0])
    s.set_timesteps(sigmas=[10.0, 1.0], timesteps=[990, 400])
    assert s.timesteps.tolist() == [990, 400]
    s.set_timesteps(5)
    assert s.timesteps[-1] == 0


@pytest.mark.parametrize(
    ("kind", "sigma"), [("sd", 1.0), ("zero_snr", 1.0), ("flow", 1.0), ("edm", math.hypot(80.0, 1.0))]
)
def test_the_starting_noise(kind: str, sigma: float) -> None:
    noise, prediction = {**KINDS, "edm": (NoiseSchedule.edm(), "edm")}[kind]
    assert schedulers.get("euler", noise=noise, prediction=prediction).init_noise_sigma == pytest.approx(sigma)


def test_noise_is_added_as_diffusers_adds_it() -> None:
    x, z = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0, 400, 999])
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    torch.testing.assert_close(
        schedulers.get("euler").add_noise(x, z, t), theirs.add_noise(x, z, t), rtol=1e-5, atol=1e-5
    )
    flow = schedulers.get("euler", noise="flow", prediction="flow_prediction")
    mixed = flow.scale_noise(x, torch.tensor([250.0]), z)
    torch.testing.assert_close(mixed, 0.75 * x + 0.25 * z)
    assert flow.scale_noise(x.half(), torch.tensor([250.0]), z.half()).dtype == torch.float16


def test_noise_is_added_at_the_level_where_other_times_are_told() -> None:
    """A tuned grid in image-to-image: the state is at its level, whatever time the network receives."""
    s = schedulers.get("euler", grid=explicit(sigmas=[10.0, 2.0, 0.5], model_times=[980, 600, 300]))
    s.set_timesteps(3)
    s.set_begin_index(1)
    x, z = torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    assert float(s.add_noise(x, z, s.timesteps[1:2])[0, 0, 0, 0]) == pytest.approx(5**-0.5)
    s.step(z, s.timesteps[1], x)
    assert float(s.add_noise(x, z, s.timesteps[2:])[0, 0, 0, 0]) == pytest.approx(1.25**-0.5)


def test_a_grid_that_carries_gradients() -> None:
    """The error of a run has a derivative by the noise levels of its evaluations, and by the model times."""
    network = MIXTURE.denoiser(SD)
    s = schedulers.get("dpmpp_2m")
    x = start(s)

    def error(lams: Tensor) -> Tensor:
        inner = [SD.at(lam=lam) for lam in lams]
        return s.sample(network, x, Grid([SD.noisiest, *inner, Point(0.0, 1.0, 0.0)], SD)).square().sum()

    lams = torch.tensor([-1.5, -0.3, 0.8], dtype=torch.float64, requires_grad=True)
    error(lams).backward()
    assert lams.grad is not None
    for i in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[i] = 1e-2
        numeric = float(error(lams.detach() + shift) - error(lams.detach() - shift)) / 2e-2
        assert float(lams.grad[i]) == pytest.approx(numeric, rel=0.05, abs=0.02)


# What is wrong


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda s: s.set_timesteps(0), ValueError, "at least 1; got 0"),
        (lambda s: s.set_timesteps(), ValueError, "needs num_inference_steps, timesteps or sigmas"),
        (lambda s: s.set_timesteps(timesteps=[5000]), ValueError, r"\[0, 999\], got 5000"),
        (lambda s: s.step(torch.zeros(1, 4), 0, torch.zeros(1, 4)), RuntimeError, "before set_timesteps"),
        (lambda s: s.sample(lambda x, t: x, torch.zeros(1, 4), 0), ValueError, "at least 1; got 0"),
        (lambda s: s.sample(lambda x, t: x, torch.zeros(1, 4), 2000), ValueError, "2000 steps are too many"),
        (lambda s: schedulers.get("dpm_adaptive").set_timesteps(5), ValueError, "it only runs natively"),
        (lambda s: schedulers.get("dpm_adaptive").nfe(5), ValueError, "it only runs natively"),
    ],
)
def test_errors(act: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        act(schedulers.get("euler"))


def test_stepped_too_often() -> None:
    s = schedulers.get("heun")
    s.set_timesteps(3)
    x = loop(s, MIXTURE.denoiser(SD), start(s))
    with pytest.raises(RuntimeError, match=r"more often than the grid has evaluations \(5\)"):
        s.step(x, s.timesteps[-1], x)


def test_copies_are_on_their_own() -> None:
    s = schedulers.get("dpmpp_2m")
    network = MIXTURE.denoiser(SD)
    s.set_timesteps(6)
    x = start(s)
    for t in s.timesteps[:3]:
        x = s.step(network(x, t.expand(3)), t, x).prev_sample
    other = copy.deepcopy(s)
    other.set_timesteps(4)
    loop(other, network, start(other))
    for t in s.timesteps[3:]:
        x = s.step(network(x, t.expand(3)), t, x)[0]
    torch.testing.assert_close(x, s.sample(network, start(s), 6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_pickled(kind: str) -> None:
    noise, prediction = KINDS[kind]
    s = schedulers.get("euler", noise=noise, prediction=prediction, eta=0.5, clip_sample=2.0)
    s.set_timesteps(4)
    other = pickle.loads(pickle.dumps(s))
    assert other.noise == s.noise
    assert torch.equal(other.timesteps, s.timesteps)
    results = [loop(one, MIXTURE.denoiser(noise, prediction), start(s), generator=seeds(3)) for one in (s, other)]
    assert torch.equal(results[0], results[1])


# Diffusers, both ways

SAVED = {
    "plain": {"name": "dpmpp_2m", "grid": "karras"},
    "options": {"name": "euler", "eta": 0.5, "clip_sample": True},
    "times": {"name": "unipc", "order": 3, "grid": [999, 600, 10]},
    "told": {"name": "heun", "grid": explicit(sigmas=[10.0, 1.0], model_times=[900, 500])},
    "table": {"name": "euler", "noise": NoiseSchedule.from_betas([0.1, 0.2, 0.3]), "grid": "linspace"},
    "zero_snr": {"name": "euler", "noise": SD.zero_terminal_snr(), "prediction": "v_prediction"},
    "flow": {"name": "heun", "noise": NoiseSchedule.flow(3.0), "prediction": "flow_prediction"},
    "dynamic": {
        "name": "euler",
        "noise": NoiseSchedule.flow(dynamic={"max_shift": 2.0}),
        "prediction": "flow_prediction",
    },
    "edm": {"name": "edm", "noise": NoiseSchedule.edm(0.01, 50.0, 1.0), "prediction": "edm_v"},
}


@pytest.mark.parametrize("choice", SAVED.values(), ids=SAVED)
def test_saved_and_loaded(choice: dict[str, Any], tmp_path: Path) -> None:
    s = schedulers.get(**choice)
    for_diffusers(s).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DiffgenScheduler"
    again = DiffgenScheduler.from_pretrained(tmp_path)
    assert isinstance(again, Scheduler)
    assert (again.name, again.options, again.limits, again.noise, again.prediction, again.grid_name, again.config) == (
        s.name, s.options, s.limits, s.noise, s.prediction, s.grid_name, for_diffusers(s).config,
    )  # fmt: skip
    steps = getattr(s.points, "steps", 3)
    for each in (s, again):
        each.set_timesteps(steps, mu=1.0)
    torch.testing.assert_close(again.timesteps, s.timesteps, rtol=0, atol=0)
    assert again.init_noise_sigma == s.init_noise_sigma


@pytest.mark.parametrize(
    "noise",
    [SD, SD.zero_terminal_snr(), NoiseSchedule.linear(), NoiseSchedule.cosine(), NoiseSchedule.from_betas([0.1, 0.9])],
    ids=repr,
)
def test_a_scheduler_of_diffusers_from_the_configuration(noise: NoiseSchedule) -> None:
    """`DDIMScheduler.from_config(pipe.scheduler.config)` has the noise and the prediction of the model."""
    s = schedulers.get("heun", noise=noise, prediction="v_prediction")
    for config in (s.config, for_diffusers(s).config):
        theirs = diffusers.DDIMScheduler.from_config(config)
        expected = torch.tensor(noise.alphas_cumprod, dtype=torch.float32)
        torch.testing.assert_close(theirs.alphas_cumprod, expected, rtol=1e-3, atol=1e-7)
        assert theirs.config.prediction_type == "v_prediction"
        read, prediction = schedulers.from_diffusers_config(config)
        assert read.alphas_cumprod == pytest.approx(noise.alphas_cumprod)
        assert prediction == "v_prediction"
    again = DiffgenScheduler.from_config(for_diffusers(s).config)
    assert (again.name, again.noise, again.options) == (s.name, s.noise, s.options)


def test_a_flow_of_diffusers_from_the_configuration() -> None:
    flow = schedulers.get("heun", noise=NoiseSchedule.flow(3.0), prediction="flow_prediction")
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(flow.config).config.shift == 3.0
    assert diffusers.UniPCMultistepScheduler.from_config(flow.config).config.flow_shift == 3.0
    assert schedulers.from_diffusers_config(flow.config) == (flow.noise, "flow_prediction")


def test_a_function_cannot_be_saved() -> None:
    s = schedulers.get("euler", grid=lambda noise, n: [noise.at(t=999.0 - 10 * k) for k in range(n)])
    assert s.grid(3)[1].t == 989
    with pytest.raises(ValueError, match="is a function, which cannot be saved"):
        for_diffusers(s)


@pytest.mark.parametrize(
    ("theirs", "name", "options"),
    [
        ("DDIMScheduler", "euler", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("EulerDiscreteScheduler", "euler", {"timestep_spacing": "trailing"}),
        ("HeunDiscreteScheduler", "heun", {"timestep_spacing": "trailing"}),
        ("DDPMScheduler", "ddpm", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("FlowMatchEulerDiscreteScheduler", "euler", {"shift": 1.0}),
    ],
)
def test_a_scheduler_of_diffusers_in_the_native_loop(theirs: str, name: str, options: dict[str, Any]) -> None:
    flow = theirs.startswith("Flow")
    table = {} if flow else {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    foreign = from_diffusers(getattr(diffusers, theirs)(**table, **options))
    kind = {"noise": "flow", "prediction": "flow_prediction", "grid": "linspace"} if flow else {"grid": "trailing"}
    ours = schedulers.get(name, **kind)
    network = MIXTURE.denoiser(ours.noise, ours.prediction)
    assert foreign.nfe(10) == ours.nfe(10)
    z = start(ours) / ours.init_noise_sigma
    expected = foreign.sample(network, foreign.start(z, 10), 10, seeds(3))
    # theirs begins with σ·z where the state's deviation is √(σ² + 1): 0.2 % of the first state
    torch.testing.assert_close(ours.sample(network, ours.start(z, 10), 10, seeds(3)), expected, rtol=0.02, atol=0.02)


# The conformance check


@pytest.mark.parametrize("name", schedulers.names())
def test_every_solver_conforms(name: str) -> None:
    check_solver(name)


def broken(kind: str, stochastic: bool = False, order: int = 1) -> Any:
    """An euler solver with one fault."""

    def function(x: Any, grid: Any, noise: Any, *, flag: int = 1) -> Any:
        for i, (p, q) in enumerate(grid.pairs()):
            mine = x
            d = yield x, p
            x = q.alpha * d.x0 + q.sigma * d.eps
            if kind == "own state" and q.sigma != 0:
                x = (q.sigma / p.sigma) * mine + (q.alpha - q.sigma * p.alpha / p.sigma) * d.x0
            if kind == "divides by alpha":
                x = (d.x / p.alpha + (q.rho - p.rho) * d.eps) * q.alpha
            if kind == "reads a value" and float(x if isinstance(x, float) else x.sum()) > 1e9:
                x = x * 1.0
            if kind == "asks by value" and not isinstance(x, float) and i == 0:
                d = yield x, q if q.sigma != 0 else p
            if kind == "last noise":
                x = x + noise(p, q) * (q.sigma + 0.1)
            if kind == "own noise" and not isinstance(x, float):
                x = x + torch.randn(x.shape, device=x.device) * q.sigma
            if kind == "undeclared noise" and q.sigma != 0:
                x = x + noise(p, q) * 0.1
            if kind == "couples images" and not isinstance(x, float) and q.sigma != 0:
                x = x + x.mean() * 0.01
            if kind == "float64" and not isinstance(x, float):
                x = x.double()
            if kind == "lags" and q.sigma != 0:
                x = x * 1.01
        return None if kind == "returns nothing" else x

    function.__name__ = f"broken_{kind.replace(' ', '_')}"
    return solver(order=order, reference="none", stochastic=stochastic)(function)


@pytest.mark.parametrize(
    ("kind", "extra", "says"),
    [
        ("divides by alpha", {}, "finds_the_picture: "),
        ("reads a value", {}, "reads_nothing: "),
        ("asks by value", {}, "dry_run: "),
        ("last noise", {"stochastic": True}, "random: draws noise for the step to σ = 0"),
        ("own noise", {}, "random: the same generators give two results"),
        ("undeclared noise", {}, "random: declared stochastic=False, and draws noise 4 times"),
        ("nothing at all", {"stochastic": True}, "random: declared stochastic=True, and draws noise 0 times"),
        ("couples images", {}, "random: an image depends on the other images of its batch"),
        ("float64", {}, "must be a float32 tensor"),
        ("returns nothing", {}, "must be a float32 tensor"),
        ("lags", {}, "order: declared 1, measured"),
        ("nothing at all", {"order": 2}, "order: declared 2, measured"),
        ("own state", {}, "takes_the_state_as_it_comes: "),
    ],
)
def test_what_is_broken_does_not_conform(kind: str, extra: dict[str, Any], says: str) -> None:
    function = broken(kind, **extra)
    try:
        with pytest.raises(AssertionError) as caught:
            check_solver(function)
    finally:
        del SOLVERS[function.__name__]
    assert says in str(caught.value), str(caught.value)


def test_what_is_no_solver_does_not_conform() -> None:
    with pytest.raises(AssertionError, match="decorate it"):
        check_solver(lambda x, grid, noise: x)
