"""What pipelines and training scripts of diffusers expect of a scheduler, in plain loops and compared with theirs."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import schedulers
from schedulers import NoiseSchedule, Scheduler
from schedulers.draws import normal
from schedulers.exact import Mixture
from schedulers.for_diffusers import DiffgenScheduler, for_diffusers
from schedulers.protocol import StepOutput

SD = NoiseSchedule.scaled_linear()
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
INSIDE = [  # CFG++ has tests of its own
    name for name in schedulers.names() if not (schedulers.info(name).native_only or schedulers.info(name).cfg_pp)
]
FORWARD = [name for name in INSIDE if not schedulers.info(name).upwards]
MIXTURE = Mixture.random(0, elements=8, components=3)
NETWORK = MIXTURE.denoiser(SD)


def seeds(count: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def noise(seed: int = 0) -> Tensor:
    return normal((3, 2, 2, 2), [torch.Generator().manual_seed(seed + i) for i in range(3)])


def walk(s: Any, times: Any, x: Tensor, generator: Any = None) -> Tensor:
    """The loop of a pipeline over these times."""
    extra = {} if generator is None else {"generator": generator}
    for t in times:
        x = s.step(NETWORK(s.scale_model_input(x, t), torch.as_tensor(t).expand(3)), t, x, **extra).prev_sample
    return x


# Configurations


@pytest.mark.parametrize(
    ("theirs", "noise", "prediction"),
    [
        (
            diffusers.DDIMScheduler(**TABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True),
            SD.zero_terminal_snr(),
            "v_prediction",
        ),
        (diffusers.DDPMScheduler(), NoiseSchedule.linear(), "epsilon"),
        (diffusers.EulerDiscreteScheduler(**TABLE, prediction_type="sample"), SD, "sample"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), NoiseSchedule.flow(3.0), "flow_prediction"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9),
            NoiseSchedule.flow(dynamic={"max_shift": 0.9}),
            "flow_prediction",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_from_config_reads_the_configuration_of_other_classes(
    theirs: Any, noise: NoiseSchedule, prediction: str
) -> None:
    for config in (theirs.config, {**theirs.config, "_class_name": type(theirs).__name__}):
        s = DiffgenScheduler.from_config(config, solver="heun", grid="karras")
        assert (s.name, s.grid_name, s.noise, s.prediction) == ("heun", "karras", noise, prediction)
        again = DiffgenScheduler.from_config(s.config)
        assert (again.name, again.grid_name, again.noise, again.prediction) == ("heun", "karras", noise, prediction)
        assert again.config == s.config
    assert DiffgenScheduler.from_config(theirs.config).name == "euler"


def test_from_pretrained_reads_a_folder_of_another_class(tmp_path: Any) -> None:
    diffusers.DDIMScheduler(**TABLE, prediction_type="v_prediction").save_pretrained(tmp_path)
    s = DiffgenScheduler.from_pretrained(tmp_path, solver="unipc", options={"order": 3})
    assert (s.name, s.options, s.noise, s.prediction) == ("unipc", {"order": 3}, SD, "v_prediction")


def test_from_config_refuses_a_model_that_is_not_supported() -> None:
    with pytest.raises(ValueError, match="prediction_type 'trigflow' is not supported"):
        DiffgenScheduler.from_config({**diffusers.DDIMScheduler(**TABLE).config, "prediction_type": "trigflow"})
    with pytest.raises(ValueError, match="beta_schedule None is not supported"):
        DiffgenScheduler.from_config(diffusers.SCMScheduler().config)


def test_from_config_keeps_limits_and_foreign_keys() -> None:
    theirs = diffusers.DDIMScheduler(**TABLE, clip_sample_range=2.0, steps_offset=1)
    s = DiffgenScheduler.from_config(theirs.config)
    assert s.limits == {"clip_sample": 2.0}
    assert s.config.steps_offset == 1
    with pytest.warns(UserWarning, match="built from the configuration of euler on trailing"):
        back = diffusers.DDIMScheduler.from_config(s.config)
    assert (back.config.clip_sample_range, back.config.steps_offset) == (2.0, 1)
    dynamic = diffusers.DDPMScheduler(**TABLE, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)
    assert DiffgenScheduler.from_config(dynamic.config).limits == {"thresholding": 0.9, "sample_max_value": 2.0}
    with pytest.warns(UserWarning, match="not solver, grid and options"):
        assert not diffusers.DDIMScheduler.from_config(schedulers.get("euler").config).config.clip_sample


def test_a_plain_scheduler_is_rebuilt_from_its_configuration() -> None:
    s = schedulers.get("unipc", order=3, noise=NoiseSchedule.edm(0.01, 50.0, 1.0), prediction="edm_v", grid=[0.9, 0.1])
    again = DiffgenScheduler.from_config(s.config)
    assert (again.options, again.noise, again.prediction) == (s.options, s.noise, s.prediction)
    assert again.points == s.points


@pytest.mark.parametrize("make", [lambda s: s, for_diffusers], ids=["plain", "saved form"])
def test_register_to_config_takes_effect(make: Any, tmp_path: Any) -> None:
    """The training scripts of diffusers set the prediction so."""
    s = make(schedulers.get("euler"))
    s.register_to_config(prediction_type="v_prediction")
    assert (s.prediction, s.config.prediction_type) == ("v_prediction", "v_prediction")
    x, output = noise(), noise(9)
    expected = schedulers.get("euler", prediction="v_prediction")
    for each in (s, expected):
        each.set_timesteps(4)
    t = s.timesteps[0]
    assert torch.equal(s.step(output, t, x)[0], expected.step(output, t, x)[0])
    s.register_to_config(rescale_betas_zero_snr=True)
    assert s.noise == SD.zero_terminal_snr()
    s.register_to_config(timestep_spacing="leading")  # says nothing of the noise
    assert s.noise == SD.zero_terminal_snr()
    with pytest.raises(ValueError, match="prediction_type 'trigflow'"):
        s.register_to_config(prediction_type="trigflow")
    if isinstance(s, DiffgenScheduler):
        s.save_pretrained(tmp_path)
        again = DiffgenScheduler.from_pretrained(tmp_path)
        assert (again.prediction, again.noise) == ("v_prediction", SD.zero_terminal_snr())


# Where a run begins


@pytest.mark.parametrize("name", FORWARD)
def test_sliced_timesteps_begin_where_their_first_time_is(name: str) -> None:
    s = schedulers.get(name)
    s.set_timesteps(6)
    per = s.order
    begin = 2 * per
    x = s.add_noise(noise(5), noise(6), s.timesteps[begin].expand(3))
    s.set_begin_index(begin)
    expected = walk(s, s.timesteps[begin:], x, seeds())
    s.set_timesteps(6)
    assert s.begin_index is None
    assert torch.equal(walk(s, s.timesteps[begin:], x, seeds()), expected)
    assert s.step_index == len(s.timesteps)
    s.set_timesteps(6)
    assert torch.equal(walk(s, s.timesteps[begin:].clone(), x, seeds()), expected)  # another tensor, the same times
    s.set_timesteps(6)
    assert torch.equal(walk(s, s.timesteps[begin:].tolist(), x, seeds()), expected)


def test_sliced_timesteps_are_diffusers() -> None:
    theirs = diffusers.DDIMScheduler(**TABLE, timestep_spacing="trailing", clip_sample=False)
    ours = schedulers.get("euler", noise=NoiseSchedule.from_alphas_cumprod(theirs.alphas_cumprod.double()))
    x = noise()
    for s in (theirs, ours):
        s.set_timesteps(10)
    torch.testing.assert_close(walk(ours, ours.timesteps[8:], x), walk(theirs, theirs.timesteps[8:], x))


def test_the_place_is_known_without_reading_the_device() -> None:
    s = schedulers.get("dpmpp_2m")
    s.set_timesteps(8)
    view = s.timesteps[5:][1]
    s.timesteps = torch.empty_like(s.timesteps).copy_(s.timesteps)
    with pytest.raises(RuntimeError, match="read"):  # another tensor of a device must be read …
        _ = schedulers.protocol.index_of_value(float(Unreadable(view)), [1.0])
    assert schedulers.protocol.index_of_view(view, s.timesteps) is None
    assert schedulers.protocol.index_of_view(s.timesteps[5:][1], s.timesteps) == 6  # … a view need not be


class Unreadable:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __float__(self) -> float:
        raise RuntimeError("read from the device")


def test_a_time_that_is_none_of_the_timesteps_is_refused() -> None:
    s = schedulers.get("euler", grid="trailing")
    s.set_timesteps(10)
    with pytest.raises(ValueError, match=r"the time 450 is not among the timesteps, which are 999, 899, …, 99"):
        s.step(noise(), 450, noise())


def test_a_time_out_of_turn_is_refused() -> None:
    s = schedulers.get("dpmpp_2m")
    s.set_timesteps(6)
    x = s.step(noise(), s.timesteps[0], noise())[0]
    with pytest.raises(RuntimeError, match=r"evaluation 3, and the run is at evaluation 1. Call set_begin_index\(3\)"):
        s.step(noise(), s.timesteps[3], x)
    s.set_begin_index(3)
    s.step(noise(), s.timesteps[3], x)


def test_a_second_loop_starts_anew() -> None:
    s = schedulers.get("dpmpp_2m")
    s.set_timesteps(5)
    results = [walk(s, s.timesteps, noise()) for _ in range(2)]
    assert torch.equal(*results)


def test_inversion_begins_at_the_picture() -> None:
    s = schedulers.get("ddim_inverse")
    s.set_timesteps(5)
    with pytest.raises(ValueError, match="begins at 0, not at 2"):
        s.step(noise(), s.timesteps[2:][0], noise())


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_in_the_middle_of_a_run_goes_on(name: str, duplicate: Any) -> None:
    s = schedulers.get(name)
    s.set_timesteps(6)
    half = len(s.timesteps) // 2
    x = walk(s, s.timesteps[:half], s.start(noise()), seeds())
    other = duplicate(s)
    results = [walk(each, each.timesteps[half:], x, seeds()) for each in (other, s)]
    assert torch.equal(*results)


def test_a_run_without_a_program_is_not_copied() -> None:
    s = schedulers.get("ddpm", variance="learned")
    s.set_timesteps(4)
    copy.deepcopy(s).step(torch.zeros(1, 4, 2, 2), s.timesteps[0], torch.zeros(1, 2, 2, 2))
    s.step(torch.zeros(1, 4, 2, 2), s.timesteps[0], torch.zeros(1, 2, 2, 2))
    with pytest.raises(TypeError, match="cannot be copied in the middle of a run"):
        copy.deepcopy(s)


# Which grid is walked


@pytest.mark.parametrize("grid", ["karras", "beta_t", "trailing"])
def test_a_default_ramp_only_gives_the_number_of_steps(grid: str) -> None:
    """Pipelines of flows pass 1, …, 1/n where their caller chose nothing."""
    s = schedulers.get("dpmpp_2m", noise=NoiseSchedule.flow(3.0), prediction="flow_prediction", grid=grid)
    s.set_timesteps(7)
    expected = s.timesteps
    for ramp in (torch.linspace(1.0, 1 / 7, 7), torch.linspace(1, 0, 8)[:-1].tolist(), [1 - k / 7 for k in range(7)]):
        s.set_timesteps(sigmas=ramp)
        torch.testing.assert_close(s.timesteps, expected, rtol=0, atol=0)
        assert (s.num_inference_steps, s.grid_name) == (7, grid)
    written = [1.0, 0.8, 0.5, 0.2]
    s.set_timesteps(sigmas=written)
    assert s.sigmas[:-1].tolist() == pytest.approx([s.noise.shifted(u) for u in written])
    s.set_timesteps(sigmas=[1.0, 0.5], timesteps=[1000, 400])  # with times for the network it is a list
    assert s.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0])
    assert s.timesteps.tolist() == [1000, 400]


def test_a_list_of_the_user_must_fit_the_number_of_steps_of_a_pipeline() -> None:
    listed = schedulers.explicit(sigmas=[1.0, 0.7, 0.1])
    s = schedulers.get("euler", noise="flow", prediction="flow_prediction", grid=listed)
    s.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    assert s.sigmas.tolist() == pytest.approx([1.0, 0.7, 0.1, 0.0])
    with pytest.raises(ValueError, match="has 3 steps, not 4"):
        s.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(("n", "original", "strength"), [(4, 50, 1.0), (3, 50, 0.8), (8, 20, 0.7), (1, 50, 0.5)])
def test_the_times_of_latent_consistency_models(n: int, original: int, strength: float) -> None:
    theirs, ours = diffusers.LCMScheduler(original_inference_steps=original), schedulers.get("lcm")
    theirs.set_timesteps(n, original_inference_steps=original, strength=strength)
    ours.set_timesteps(n, original_inference_steps=original, strength=strength)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    if original == 50:  # diffusers' default
        ours.set_timesteps(n, original_inference_steps=None if strength < 1 else 50, strength=strength)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()


def test_more_steps_than_distilled_times_are_refused() -> None:
    with pytest.raises(ValueError, match=r"30 steps of 50 times · strength 0.5 \(25\) are not possible"):
        schedulers.get("lcm").set_timesteps(30, original_inference_steps=50, strength=0.5)
    flow = schedulers.get("lcm", noise="flow", prediction="flow_prediction")
    with pytest.raises(ValueError, match=r"are not possible on NoiseSchedule\.flow"):
        flow.set_timesteps(4, original_inference_steps=50)


# What else is asked


def test_the_attributes_of_a_table() -> None:
    theirs, ours = diffusers.DDPMScheduler(**TABLE), schedulers.get("ddpm")
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-4, atol=1e-7)
    assert torch.equal(ours.timesteps, theirs.timesteps.to(torch.int64))
    assert len(ours) == len(theirs) == 1000
    assert float(ours.final_alpha_cumprod) == 1
    assert (ours.num_inference_steps, ours.begin_index, ours.step_index) == (None, None, None)
    assert ours.config.variance_type == "fixed_small"
    assert schedulers.get("ddpm", variance="learned").config.variance_type == "learned"
    x, z, t = noise(), noise(7), torch.tensor([3, 500, 999])
    torch.testing.assert_close(ours.get_velocity(x, z, t), theirs.get_velocity(x, z, t), rtol=1e-4, atol=1e-5)
    assert ours.get_velocity(x.half(), z.half(), t).dtype == torch.float16
    for name in ("alphas_cumprod", "betas"):
        assert not hasattr(schedulers.get("euler", noise="flow", prediction="flow_prediction"), name)
        assert not hasattr(DiffgenScheduler(noise={"name": "flow"}, prediction="flow_prediction"), name)


@pytest.mark.parametrize(
    ("theirs", "noise", "prediction"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), NoiseSchedule.flow(3.0), "flow_prediction"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            NoiseSchedule.flow(dynamic={}),
            "flow_prediction",
        ),
        (diffusers.EulerDiscreteScheduler(**TABLE), SD, "epsilon"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_timesteps_and_sigmas_before_set_timesteps(theirs: Any, noise: NoiseSchedule, prediction: str) -> None:
    """The training scripts for Stable Diffusion 3 and Flux index these lists."""
    ours = schedulers.get("euler", noise=noise, prediction=prediction)
    torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps.float(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(ours.sigmas[:1000], theirs.sigmas[:1000], rtol=1e-4, atol=1e-6)
    assert (len(ours.sigmas), float(ours.sigmas[-1])) == (1001, 0.0)
    if prediction == "flow_prediction":
        assert ours.config.base_image_seq_len == 256


def test_timesteps_of_edm_before_set_timesteps() -> None:
    """T levels of the karras grid. (diffusers lists T + 1 of them.)"""
    s = schedulers.get("euler", noise=NoiseSchedule.edm(), prediction="edm", grid="karras")
    assert s.sigmas[:-1].tolist() == pytest.approx([s.noise.level(p) for p in s.grid(1000).points[:-1]])
    torch.testing.assert_close(s.timesteps, s.sigmas[:-1].log() / 4)


def test_times_are_whole_where_they_are_those_of_a_table() -> None:
    s = schedulers.get("euler", grid="trailing")
    s.set_timesteps(10)
    assert s.timesteps.dtype == torch.int64
    assert s.alphas_cumprod[s.timesteps].shape == (10,)
    s.set_timesteps(7)
    assert s.timesteps.dtype == torch.float32
    flow = schedulers.get("euler", noise="flow", prediction="flow_prediction")
    flow.set_timesteps(10)
    assert flow.timesteps.dtype == torch.float32


def test_places_of_times() -> None:
    theirs, s = diffusers.HeunDiscreteScheduler(**TABLE), schedulers.get("heun", grid="trailing")
    s.set_timesteps(3)
    theirs.set_timesteps(3)
    assert s.index_for_timestep(s.timesteps[2:][0]) == 2
    assert s.index_for_timestep(float(s.timesteps[1])) == theirs.index_for_timestep(theirs.timesteps[1]) == 2
    assert s.index_for_timestep(5.0, [10.0, 5.0]) == 1
    assert float(s.previous_timestep(s.timesteps[0])) == float(s.timesteps[1])
    assert int(s.previous_timestep(s.timesteps[-1])) == -1


def test_the_output_of_a_step_behaves_as_diffusers() -> None:
    s, theirs = schedulers.get("euler", grid="trailing"), diffusers.DDIMScheduler(**TABLE, timestep_spacing="trailing")
    for each in (s, theirs):
        each.set_timesteps(5)
    ours, other = (each.step(noise(), each.timesteps[0], noise(3)) for each in (s, theirs))
    assert isinstance(ours, StepOutput)
    assert [*ours.keys()] == [*other.keys()] == ["prev_sample", "pred_original_sample"]
    assert ours["prev_sample"] is ours.prev_sample is ours[0] is ours.to_tuple()[0]
    assert ours[1] is ours.pred_original_sample
    assert len(ours[:2]) == 2
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again.prev_sample, ours.prev_sample)
    assert isinstance(again, dict)


def test_settings_that_pipelines_pass_to_step() -> None:
    def step(s: Scheduler, i: int = 0, **settings: Any) -> None:
        s.set_timesteps(5)
        s.step(noise(), s.timesteps[i], noise(), **settings)

    step(schedulers.get("euler"), eta=0.0, use_clipped_model_output=None)  # what DDIMPipeline passes
    step(schedulers.get("euler", eta=0.5), eta=0.5, use_clipped_model_output=True)
    step(schedulers.get("euler", clip_sample=True), use_clipped_model_output=True)
    step(schedulers.get("euler"), prev_timestep=799)
    step(schedulers.get("euler"), i=4, prev_timestep=None)
    for s, settings, says in (
        (
            schedulers.get("euler"),
            {"eta": 0.5},
            r"eta = 0.5, this scheduler has 0.0: set it with schedulers.get\('euler'",
        ),
        (schedulers.get("heun"), {"eta": 0.5}, "this scheduler has None: its solver has no eta"),
        (schedulers.get("euler", clip_sample=True), {"use_clipped_model_output": False}, "must be True or None"),
        (schedulers.get("euler"), {"prev_timestep": 599}, r"evaluation 2, not the next one \(1\)"),
    ):
        with pytest.raises(ValueError, match=says):
            step(s, **settings)
    with pytest.raises(TypeError, match="step does not take variance_noise: this pipeline needs"):
        step(schedulers.get("euler"), variance_noise=noise())


def test_compatible_classes() -> None:
    s = for_diffusers(schedulers.get("euler"))
    assert {diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler} <= {*s.compatibles}


def test_own_preconditioning_of_a_pipeline_is_refused() -> None:
    """`StableDiffusionLatentUpscalePipeline` scales a noise level with `scale_model_input`."""
    s = schedulers.get("euler", prediction="sample")
    s.set_timesteps(4)
    with pytest.raises(NotImplementedError, match="applies EDM's preconditioning itself"):
        s.scale_model_input(s.sigmas[0], s.timesteps[0])


def test_c_in_belongs_to_the_time() -> None:
    """With EDM's preconditioning a sliced run scales its input at its own first level."""
    edm = NoiseSchedule.edm()
    s = schedulers.get("euler", noise=edm, prediction="edm")
    s.set_timesteps(8)
    sigma = float(s.sigmas[3])
    assert float(s.scale_model_input(torch.ones(1), s.timesteps[3:][0])) == pytest.approx(1 / math.hypot(sigma, 0.5))
