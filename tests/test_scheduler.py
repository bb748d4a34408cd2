"""A scheduler in a pipeline's loop equals its native loop: edits, rounding, the device, errors, copies."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from pipeline_loop import INSIDE, KINDS, MIXTURE, SD, loop, seeds, start
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import schedulers
from schedulers import Grid, NoiseSchedule, NonFinite, Point
from schedulers.exact import Gaussian


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
def test_half_precision_keeps_edits(mode: Any) -> None:
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

    with pytest.raises(NonFinite, match=r"not finite from evaluation 3 on, at t = 699, in image 1") as excinfo:
        s.sample(network, start(s), 10)
    assert (excinfo.value.step, excinfo.value.t, excinfo.value.images) == (3, 699, [1])
    assert isinstance(excinfo.value, ArithmeticError)
    assert len(calls) == 10  # read after the loop


# Schedules of other kinds


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
