"""Every scheduler in real diffusers pipelines with tiny random weights: parity with theirs, saving.

Guidance is off and the pictures stay latents: a run is only the network and the scheduler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

import schedulers
from schedulers import NoiseSchedule, Scheduler, explicit
from schedulers.for_diffusers import DiffgenScheduler, for_diffusers

SD = NoiseSchedule.scaled_linear()
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
INSIDE = [  # CFG++ has tests of its own
    name for name in schedulers.names() if not (schedulers.info(name).native_only or schedulers.info(name).cfg_pp)
]
STEPS = 4


@pytest.fixture(autouse=True)
def _quiet_and_off_the_record() -> Any:
    diffusers.utils.logging.set_verbosity_error()
    with torch.no_grad():
        yield


def tiny(make: Callable[..., Any], **config: Any) -> Any:
    torch.manual_seed(0)
    return make(**config).eval()


@cache
def vae(channels: int = 4) -> Any:
    return tiny(
        AutoencoderKL,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        sample_size=16,
        shift_factor=0.0,
    )


@cache
def unet(xl: bool) -> Any:
    more = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 20,
    }
    return tiny(
        UNet2DConditionModel,
        sample_size=8,
        in_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        **(more if xl else {}),
    )


@cache
def transformer() -> Any:
    return tiny(
        SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )


NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2 = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
NO_TEXT_3 = {**NO_TEXT_2, "text_encoder_3": None, "tokenizer_3": None}
NO_CHECK = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@cache
def pipeline(name: str) -> Any:
    cls = getattr(diffusers, f"{name}Pipeline")
    if name.startswith("StableDiffusion3"):
        flow = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = cls(vae=vae(16), transformer=transformer(), scheduler=flow, **NO_TEXT_3)
    elif name.startswith("StableDiffusionXL"):
        pipe = cls(vae=vae(), unet=unet(True), scheduler=diffusers.DDIMScheduler(**TABLE), **NO_TEXT_2)
    else:
        pipe = cls(vae=vae(), unet=unet(False), scheduler=diffusers.DDIMScheduler(**TABLE), **NO_TEXT, **NO_CHECK)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT = {"prompt_embeds": noise_of(1, 1, 3, 8)}
TEXT_XL = {**TEXT, "pooled_prompt_embeds": noise_of(2, 1, 8)}
LATENTS = noise_of(3, 1, 4, 8, 8)
LATENTS_16 = noise_of(3, 1, 16, 8, 8)
PICTURE = noise_of(4, 1, 3, 16, 16).clamp(-1, 1)
MASK = torch.zeros(1, 1, 16, 16)
MASK[..., :8] = 1
GENERATE = {"height": 16, "width": 16, "latents": LATENTS}
GENERATE_16 = {**GENERATE, "latents": LATENTS_16}
REPAINT = {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 16}

RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # the pipeline and its arguments
    "sd text": ("StableDiffusion", {**TEXT, **GENERATE}),
    "sd image": ("StableDiffusionImg2Img", {**TEXT, "image": PICTURE, "strength": 0.75}),
    "sd inpaint": ("StableDiffusionInpaint", {**TEXT, **REPAINT, "strength": 1.0}),
    "sd inpaint part": ("StableDiffusionInpaint", {**TEXT, **REPAINT, "strength": 0.5}),
    "xl text": ("StableDiffusionXL", {**TEXT_XL, **GENERATE}),
    "xl first part": ("StableDiffusionXL", {**TEXT_XL, **GENERATE, "denoising_end": 0.5}),
    "xl image": ("StableDiffusionXLImg2Img", {**TEXT_XL, "image": PICTURE, "strength": 0.75}),
    "xl second part": ("StableDiffusionXLImg2Img", {**TEXT_XL, "image": LATENTS, "denoising_start": 0.5}),
    "xl inpaint": ("StableDiffusionXLInpaint", {**TEXT_XL, **REPAINT, "strength": 0.75}),
    "sd3 text": ("StableDiffusion3", {**TEXT_XL, **GENERATE_16}),
    "sd3 text listed": ("StableDiffusion3", {**TEXT_XL, **GENERATE_16, "sigmas": [1.0, 0.8, 0.5, 0.2]}),
    "sd3 image": (
        "StableDiffusion3Img2Img",
        {**TEXT_XL, "image": PICTURE, "strength": 0.75, "height": 16, "width": 16},
    ),
    "sd3 inpaint": ("StableDiffusion3Inpaint", {**TEXT_XL, **REPAINT, "strength": 0.75}),
}
MIDWAY = {run for run in RUNS if run.endswith(("image", "part", "xl inpaint", "sd3 inpaint"))} - {"xl first part"}
KINDS = {"sd": "epsilon", "sd2": "v_prediction", "xl": "epsilon", "sd3": "flow_prediction"}


def scheduler(kind: str, name: str, **options: Any) -> Scheduler:
    noise = NoiseSchedule.flow(3.0) if kind == "sd3" else SD
    return schedulers.get(name, noise=noise, prediction=KINDS[kind], **options)


def call(run: str, s: Any, seed: int = 5, **changes: Any) -> Tensor:
    name, arguments = RUNS[run]
    pipe = pipeline(name)
    pipe.scheduler = s
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent", "return_dict": False}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{**settings, **arguments, "generator": generator, **changes})[0]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("run", RUNS)
def test_every_scheduler_runs_in_every_pipeline(run: str, name: str) -> None:
    s = scheduler(run.split()[0], name)
    if schedulers.info(name).upwards and run in MIDWAY:
        with pytest.raises(ValueError, match="from the picture to noise"):
            call(run, s)
        return
    received: list[float] = []
    network = transformer() if run.startswith("sd3") else unet(run.startswith("xl"))

    def note(module: Any, args: Any, kwargs: Any) -> None:
        received.append(float((kwargs["timestep"] if "timestep" in kwargs else args[1]).reshape(-1)[0]))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        result = call(run, s)
    finally:
        hook.remove()
    assert result.shape == (LATENTS_16 if run.startswith("sd3") else LATENTS).shape
    assert result.isfinite().all()
    assert s._run is not None
    assert s._run.program is not None
    expected = [p.t for p in s._run.program.points]
    if run == "xl first part":
        assert received == pytest.approx(expected[: len(received)])
        assert 0 < len(received) < len(expected)
    else:
        assert received == pytest.approx(expected)  # the network receives all times of the solver
    assert result.abs().max() > 0.1


@pytest.mark.parametrize("name", INSIDE)
def test_v_prediction(name: str) -> None:
    noise, prediction = schedulers.from_diffusers_config(
        diffusers.DDIMScheduler(**TABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True).config
    )
    s = schedulers.get(name, noise=noise, prediction=prediction)
    assert s.noise.noisiest.alpha == 0
    assert call("sd text", s).isfinite().all()


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("run", ["sd text", "sd3 text"])
def test_a_pipeline_gives_what_the_native_loop_gives(run: str, name: str) -> None:
    s = scheduler(run.split()[0], name)
    if run == "sd text":
        extra: dict[str, Any] = {"encoder_hidden_states": TEXT["prompt_embeds"]}
        network: Any = unet(False)
    else:
        extra = {
            "encoder_hidden_states": TEXT_XL["prompt_embeds"],
            "pooled_projections": TEXT_XL["pooled_prompt_embeds"],
        }
        network = transformer()
        s.generators = torch.Generator().manual_seed(5)  # this pipeline hands on none
    latents = LATENTS if run == "sd text" else LATENTS_16
    native = s.sample(
        lambda x, t: network(x, timestep=t, **extra).sample, latents, STEPS, torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(call(run, s), native, rtol=1e-3, atol=2e-4)


# Parity with diffusers' own classes


def own_table(theirs: Any) -> NoiseSchedule:
    """Their float32 table, so that only the algorithms are compared."""
    return NoiseSchedule.from_alphas_cumprod(theirs.alphas_cumprod.double())


PARITY = {
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, "euler", "linspace"),
    "euler karras": (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "linspace", "use_karras_sigmas": True},
        "euler",
        "karras",
    ),
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, "euler", "trailing"),
    "heun karras": (
        "HeunDiscreteScheduler",
        {"timestep_spacing": "linspace", "use_karras_sigmas": True},
        "heun",
        "karras",
    ),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, "dpmpp_2m", "trailing"),
    "euler ancestral": (
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "linspace"},
        "euler_ancestral",
        "linspace",
    ),
}


@pytest.mark.parametrize("choice", PARITY)
@pytest.mark.parametrize("run", ["sd text", "sd image", "sd inpaint part", "xl text", "xl image", "xl inpaint"])
def test_parity_in_pipelines(run: str, choice: str) -> None:
    theirs_name, options, name, grid = PARITY[choice]
    theirs = getattr(diffusers, theirs_name)(**TABLE, **options)
    steps = {"num_inference_steps": 8}
    expected = call(run, theirs, **steps)
    theirs.set_timesteps(8)
    points: Any = grid
    if theirs.timesteps.dtype == torch.int64:  # they round their times
        points = [float(t) for t in theirs.timesteps]
    ours = schedulers.get(name, noise=own_table(theirs), grid=points)
    ours.set_timesteps(8)
    start: dict[str, Any] = {}
    if run.endswith("text"):  # from pure noise: in the frame x/α theirs is σ·z, not √(σ² + 1)·z
        in_their_frame = (
            math.hypot(1, float(ours.sigmas[0])) if hasattr(theirs, "sigmas") and name != "dpmpp_2m" else 1.0
        )
        start = {"latents": LATENTS * float(theirs.init_noise_sigma) / in_their_frame}
    result = call(run, ours, **start, **steps)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("run", "theirs_name"),
    [
        ("sd3 text", "FlowMatchEulerDiscreteScheduler"),
        ("sd3 image", "FlowMatchEulerDiscreteScheduler"),
        ("sd3 inpaint", "FlowMatchEulerDiscreteScheduler"),
        ("sd3 text", "FlowMatchHeunDiscreteScheduler"),
        ("sd3 image", "FlowMatchHeunDiscreteScheduler"),  # not inpainting: its scale_noise moves the step index on
    ],
)
def test_parity_on_flows(run: str, theirs_name: str) -> None:
    """Compare at shift 1, because theirs applies a shift to its least σ twice."""
    theirs = getattr(diffusers, theirs_name)()
    ours = schedulers.get(theirs_name, noise="flow", prediction="flow_prediction", grid="linspace")
    result, expected = call(run, ours), call(run, theirs)
    assert (result - expected).abs().max() < 3e-5 * expected.abs().max()


def test_flow_shift_is_theirs_where_sigmas_are_given() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = scheduler("sd3", "euler", grid="karras")
    result, expected = call("sd3 text listed", ours), call("sd3 text listed", theirs)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_dynamic_shift_comes_from_the_pipeline() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    noise, prediction = schedulers.from_diffusers_config(theirs.config)
    ours = schedulers.get("euler", noise=noise, prediction=prediction)
    sigmas = [1 - k / STEPS for k in range(STEPS)]
    expected = call("sd3 text", theirs, sigmas=sigmas)
    torch.testing.assert_close(call("sd3 text", ours), expected, rtol=1e-3, atol=1e-4)


# What pipelines ask of a scheduler besides


def test_two_parts_are_one_run() -> None:
    """SDXL's base and refiner: denoising_start continues where denoising_end stops (one evaluation a step: the pipeline
    cuts by time, which halves a step of two)."""
    whole = call("xl text", scheduler("xl", "euler"), num_inference_steps=8)
    first = call("xl first part", scheduler("xl", "euler"), num_inference_steps=8)
    both = call("xl second part", scheduler("xl", "euler"), image=first, num_inference_steps=8)
    torch.testing.assert_close(both, whole, rtol=1e-3, atol=1e-4)


def test_eta_is_not_overwritten() -> None:
    """The pipeline sends its own eta = 0 to schedulers whose step takes one."""
    with_eta, without = scheduler("sd", "euler", eta=1.0), scheduler("sd", "euler")
    assert (call("sd text", with_eta) - call("sd text", without)).abs().max() > 0.1
    torch.testing.assert_close(
        call("sd text", with_eta), call("sd text", scheduler("sd", "euler_ancestral", grid="trailing"))
    )


def test_the_constructor_changes_nothing() -> None:
    s = scheduler("sd", "euler", clip_sample=True)
    before = dict(s.config)
    pipe = diffusers.StableDiffusionPipeline(vae=vae(), unet=unet(False), scheduler=s, **NO_TEXT, **NO_CHECK)
    assert pipe.scheduler is s
    assert (s.config, s.limits) == (before, {"clip_sample": 1.0})


@pytest.mark.parametrize("generators", [2, 1])
def test_pictures_of_a_batch(generators: int) -> None:
    """Picture j of a batch with its own generator is the picture alone."""
    s = scheduler("sd", "dpmpp_2m_sde")
    both = call(
        "sd text", s, prompt_embeds=TEXT["prompt_embeds"].repeat(2, 1, 1), latents=LATENTS.repeat(2, 1, 1, 1),
        generator=[torch.Generator().manual_seed(i) for i in (5, 6)],
    )  # fmt: skip
    alone = call("sd text", s, seed=6 if generators == 2 else 5)
    torch.testing.assert_close(both[generators - 1 :][:1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "s",
    [
        scheduler("sd", "dpmpp_2m", grid="karras"),
        scheduler("sd", "euler", eta=0.5, grid=explicit(sigmas=[14.0, 5.0, 1.0, 0.1])),
    ],
    ids=["karras", "explicit"],
)
def test_a_saved_pipeline_comes_back(s: Scheduler, tmp_path: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(), unet=unet(False), scheduler=for_diffusers(s), **NO_TEXT, **NO_CHECK
    )
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **NO_TEXT, **NO_CHECK)
    assert isinstance(loaded.scheduler, DiffgenScheduler)
    torch.testing.assert_close(call("sd text", loaded.scheduler), call("sd text", s))


def test_half_precision_in_a_pipeline() -> None:
    """The network in bfloat16: the result is within its rounding, the state is float32 all along."""
    s = scheduler("sd", "dpmpp_2m")
    exact = call("sd text", s)
    network = unet(False)
    try:
        network.to(torch.bfloat16)
        rounded = call("sd text", s, **{k: v.bfloat16() for k, v in {**TEXT, "latents": LATENTS}.items()})
    finally:
        network.to(torch.float32)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert s._run is not None
    assert s._run.state.dtype == torch.float32


# Pipelines with protocols of their own: at the same times the last states are diffusers'


@cache
def pixel_unet() -> Any:
    return tiny(
        diffusers.UNet2DModel,
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
    )


@cache
def kandinsky_unet() -> Any:
    return tiny(
        UNet2DConditionModel,
        sample_size=8,
        in_channels=4,
        out_channels=8,  # with a learned variance
        addition_embed_type="image",
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )


@cache
def movq() -> Any:
    return tiny(
        diffusers.VQModel,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        num_vq_embeddings=8,
        vq_embed_dim=4,
        norm_type="spatial",
    )


def last_state(pipe: Any, s: Any, **arguments: Any) -> Tensor:
    """The last state that `step` returned."""
    states = []
    step = s.step

    @functools.wraps(step)
    def noted(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        states.append(output[0])
        return output

    s.step = noted
    pipe.scheduler = s
    pipe.set_progress_bar_config(disable=True)
    pipe(**arguments, generator=torch.Generator().manual_seed(5))
    del s.step
    return states[-1]


def same_times(theirs: Any, name: str = "euler", **options: Any) -> Scheduler:
    times = [float(t) for t in theirs.timesteps]
    return schedulers.get(name, noise=own_table(theirs), grid=explicit(times=times), **options)


def test_kandinsky_slices_its_timesteps() -> None:
    """Kandinsky 2.2's image to image begins in the middle without set_begin_index."""
    theirs = diffusers.DDIMScheduler(**TABLE, timestep_spacing="trailing", clip_sample=False)
    pipe = diffusers.KandinskyV22Img2ImgPipeline(unet=kandinsky_unet(), scheduler=theirs, movq=movq())
    embeds = {"image_embeds": noise_of(1, 1, 8), "negative_image_embeds": noise_of(2, 1, 8)}
    arguments = {**embeds, "image": PICTURE, "height": 16, "width": 16, "num_inference_steps": 10, "output_type": "pt"}
    expected = last_state(pipe, theirs, **arguments, strength=0.2, guidance_scale=1.0)
    result = last_state(pipe, same_times(theirs), **arguments, strength=0.2, guidance_scale=1.0)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


def test_ddim_pipeline() -> None:
    """Its constructor builds a DDIMScheduler, and says so; a scheduler that is set afterwards stays."""
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    with pytest.warns(UserWarning, match="DDIMPipeline does this in its constructor; set pipe.scheduler afterwards"):
        pipe = diffusers.DDIMPipeline(pixel_unet(), schedulers.get("dpmpp_2m", noise="linear"))
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    for eta in (0.0, 0.7):
        arguments = {"num_inference_steps": 5, "eta": eta, "output_type": "pt"}
        expected = last_state(pipe, theirs, **arguments)
        result = last_state(pipe, same_times(theirs, eta=eta), **arguments)
        assert (result - expected).abs().max() < 2e-5 * expected.abs().max()
    with pytest.raises(ValueError, match=r"the pipeline asks for eta = 0\.5, this scheduler has 0\.0"):
        last_state(pipe, schedulers.get("euler", noise="linear"), num_inference_steps=5, eta=0.5)


@pytest.mark.parametrize("run", ["LatentConsistencyModel", "LatentConsistencyModelImg2Img"])
def test_latent_consistency_pipelines(run: str) -> None:
    theirs = diffusers.LCMScheduler(**TABLE)
    network = tiny(
        UNet2DConditionModel,
        **{**unet(False).config, "time_cond_proj_dim": 8},
    )
    cls = getattr(diffusers, f"{run}Pipeline")
    pipe = cls(vae=vae(), unet=network, scheduler=theirs, **NO_TEXT, **NO_CHECK)
    picture = {"image": PICTURE, "strength": 0.8} if run.endswith("Img2Img") else {"height": 16, "width": 16}
    arguments = {**TEXT, **picture, "num_inference_steps": 3, "original_inference_steps": 20, "output_type": "latent"}
    expected = last_state(pipe, theirs, **arguments)
    ours = schedulers.get("lcm", noise=own_table(theirs))
    result = last_state(pipe, ours, **arguments)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


def test_flux_walks_the_chosen_grid() -> None:
    """Flux's image to image always passes a list of sigmas."""
    import tiny as pipelines

    torch.manual_seed(0)
    parts = pipelines.flux().components
    pipe = diffusers.FluxImg2ImgPipeline(**{k: parts[k] for k in ("scheduler", "vae", "text_encoder", "tokenizer",
                                         "text_encoder_2", "tokenizer_2", "transformer")})  # fmt: skip
    noise, prediction = schedulers.from_diffusers_config(pipe.scheduler.config)
    seen = {}
    for grid in ("trailing", "karras"):
        s = schedulers.get("euler", noise=noise, prediction=prediction, grid=grid)
        last_state(pipe, s, prompt="a red apple", image=PICTURE.repeat(1, 1, 2, 2), height=32, width=32,
                   num_inference_steps=4, strength=0.75, output_type="latent", max_sequence_length=16)  # fmt: skip
        assert s._grid is not None
        expected = schedulers.grids.build(grid, s._grid.noise, 4)
        assert s.timesteps.tolist() == pytest.approx([p.t for p in expected.points[:-1]])
        seen[grid] = s.timesteps.tolist()
    assert seen["trailing"] != seen["karras"]
