"""Which of diffusers' pipelines makes a picture, and what it is called with.

`classes` says which class does what for each family. It is used as it is, but for three things: guidance is
uncond + scale·(cond − uncond) below 1 too, only inside an interval of steps if one is asked for, and rescaled in every
way, not only where diffusers does it; and where a picture is the beginning, its latents and their noise are given to
the pipeline instead of being made by it. That lets every way start from latents of any number of channels and from
noise of our own choice. Inpainting is image to image whose latents outside the mask are replaced after each step by the
picture's own, at that step's noise: the lines that diffusers' inpainting pipelines have, for every family. Models that
read the mask (9 channels) use diffusers' own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffgen.diffusion.guidance import rescale as guidance_rescaled
from diffgen.models.families import guidance_is_input
from schedulers.scheduler import Scheduler

from ..classes import class_of
from .latents import Start, blend, packed, unpacked


class Way:
    """What is changed in diffusers' pipelines, as a base beside theirs."""

    start: Start | None = None
    guidance_is_input: bool = False
    interval: tuple[float, float] = (0.0, 1.0)
    position: float = 0.0  # of the coming evaluation, among all
    scheduler: Any
    _guidance_scale: float

    @property
    def guidance_scale(self) -> float:
        low, high = self.interval
        return self._guidance_scale if low <= self.position < high or high == 1 == self.position else 1.0

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1 and not self.guidance_is_input

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """In image to image: the given latents at the noise of the first time. Elsewhere what the pipeline does."""
        start = self.start
        if start is None:
            return super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        given = inspect.signature(super().prepare_latents).bind(*args, **kwargs).arguments  # type: ignore[misc]
        if given.get("add_noise", True) is False:  # a refiner goes on where another model stopped
            latents = start.clean
        elif start.pure:
            latents = start.noise * self.scheduler.init_noise_sigma
        else:
            latents = self.scheduler.add_noise(start.clean, start.noise, given["timestep"])
        if given.get("return_noise"):
            return latents, start.noise
        if hasattr(self, "_pack_latents"):
            height, width = latents.shape[-2:]
            ids = self._prepare_latent_image_ids(len(latents), height // 2, width // 2, latents.device, latents.dtype)  # type: ignore[attr-defined]
            return packed(self, latents), ids
        return latents


# What a pipeline is told besides its parts.
SETTINGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")


@functools.cache
def _class(name: str) -> type:
    import diffusers

    return type(name, (Way, getattr(diffusers, name)), {})


def pipeline_for(loaded: Any, family: str, way: str, **more: Any) -> Any:
    """The pipeline for a way, made of the parts of the loaded one. Raises UsageError if the family has none."""
    cls = _class(class_of(family, way))
    parts = loaded.components | more
    known = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    settings = {key: loaded.config[key] for key in SETTINGS if key in known and key in loaded.config}
    settings |= {key: False for key in ("requires_safety_checker", "add_watermarker") if key in known}
    pipeline = cls(**{key: value for key, value in parts.items() if key in known}, **settings)
    pipeline.set_progress_bar_config(disable=True)
    network = parts["unet" if "unet" in parts else "transformer"]
    pipeline.guidance_is_input = guidance_is_input(family, network.config)
    return pipeline


def watched(scheduler: Scheduler, watch: Callable[[int, float, Tensor], None] | None) -> Scheduler:
    """The scheduler, telling `watch(evaluation, t, x0)` of each prediction of the clean latents if there is one."""
    if watch is None:
        return scheduler
    step, count = scheduler.step, 0

    @functools.wraps(step)
    def told(model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = step(model_output, timestep, *args, **(kwargs | {"return_dict": True}))
        watch(count, float(timestep), result.pred_original_sample)
        count += 1
        return result if kwargs.get("return_dict", True) else (result.prev_sample, result.pred_original_sample)

    scheduler.step = told  # type: ignore[method-assign]
    return scheduler


@contextlib.contextmanager
def rescaling(pipeline: Any, share: float) -> Iterator[None]:
    """Inside, what was guided has the conditional prediction's standard deviation, by that share (`guidance.rescale`).

    Guided networks are asked for both predictions at once, the unconditional one first; others are left alone.
    """
    if not share:
        yield
        return
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    said: list[Tensor] = []
    step = pipeline.scheduler.step

    @functools.wraps(step)
    def rescaled(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(said[-1]) == 2 * len(model_output):
            model_output = guidance_rescaled(model_output, said[-1].chunk(2)[1], share)
        return step(model_output, *args, **kwargs)

    hook = network.register_forward_hook(lambda module, given, output: said.__setitem__(slice(None), [output[0]]))
    pipeline.scheduler.step = rescaled
    try:
        yield
    finally:
        hook.remove()


def strength_for(steps: int, strength: float) -> float:
    """The strength itself, or the least one with which diffusers walks a step: it rounds steps·strength down."""
    return strength if int(steps * strength) else min(1.0, 1.001 / steps)


def call(
    pipeline: Any,
    prompt: dict[str, Tensor],
    start: Start | None,
    noise: Tensor,
    *,
    size: tuple[int, int],
    steps: int,
    strength: float,
    guidance: float,
    generators: Sequence[torch.Generator],
    on_evaluation: Callable[[], None],
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    controls: Sequence[Any] = (),
    scales: Sequence[float] = (),
    masked: tuple[Tensor, Tensor] | None = None,
    **more: Any,
) -> Tensor:
    """Run the pipeline; clean latents [B, C, h, w].

    `prompt` holds the embeddings by the names of the call's arguments, [B, …]; `noise` is what text to image begins
    with, `start` what image to image does, at `strength`. `masked` is (latents [B, C, h, w] of the picture without
    what the mask frees, the mask [1, 1, H, W]) for a network that reads them.
    """
    width, height = size
    known = inspect.signature(pipeline.__call__).parameters
    pipeline.start, pipeline.interval, pipeline.position = start, interval, 0.0
    arguments: dict[str, Any] = {**prompt, **more}
    if start is None:
        arguments |= {"latents": packed(pipeline, noise)}
    else:
        arguments |= {"image": torch.zeros(1, 3, height, width), "strength": strength_for(steps, strength)}
    if masked is not None:
        arguments |= {"masked_image_latents": masked[0], "mask_image": masked[1]}
    if controls:
        one = len(controls) == 1
        arguments["image" if start is None else "control_image"] = controls[0] if one else list(controls)
        arguments["controlnet_conditioning_scale"] = scales[0] if one else list(scales)
    for key, value in (("width", width), ("height", height)):
        if key in known:
            arguments[key] = value

    def after(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_evaluation()
        times = pipe.scheduler.timesteps[-pipe.num_timesteps :]
        pipe.position = (i + 1) / len(times)
        if start is None or start.mask is None or masked is not None:
            return {}
        return {"latents": blend(pipe, start, times, i, tensors["latents"])}

    with rescaling(pipeline, rescale):
        latents = pipeline(
            **arguments,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=list(generators),
            output_type="latent",
            callback_on_step_end=after,
            return_dict=False,
        )[0]
    return unpacked(pipeline, latents, width, height)
