"""Adjust diffusers' pipelines and call them.

A family's row says which class does what. The class is used as it is, with three changes. Guidance is
uncond + scale·(cond − uncond) below 1 too, applies only inside an interval of steps, and is rescaled for every task.
Where a picture is the start, the pipeline gets its latents and their noise instead of making them; so every task starts
from latents of any number of channels and from noise of our choice. Inpainting is image to image whose latents outside
the mask are replaced after each step by the picture's own, at that step's noise: the lines that diffusers' inpainting
pipelines have, for every family. Models that read the mask (9 channels) use diffusers' own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import diffusers
import torch
from torch import Tensor

from diffgen.diffusion.guidance import rescale as guidance_rescaled
from diffgen.generation.options import Options
from diffgen.models.families import FAMILIES, Family, class_of, guidance_is_input
from schedulers.scheduler import Scheduler

from ..families import code_of
from ..weights.load import assemble
from .latents import CODECS, Codec, Start, blend


class Adjusted:
    """What is changed in diffusers' pipelines, as a base beside theirs."""

    family: Family
    codec: Codec
    guidance_is_input: bool
    start: Start
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
        """In image to image: the start's latents at the noise of the first time. Else the pipeline's own."""
        start = self.start
        if start.clean is None:
            return super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        arguments = inspect.signature(super().prepare_latents).bind(*args, **kwargs).arguments  # type: ignore[misc]
        if arguments.get("add_noise", True) is False:  # a refiner continues where another model stopped
            latents = start.clean
        elif start.pure:
            latents = start.noise * self.scheduler.init_noise_sigma
        else:
            latents = self.scheduler.add_noise(start.clean, start.noise, arguments["timestep"])
        if arguments.get("return_noise"):
            return latents, start.noise
        return code_of(self.family.name).prepared(self, latents)


@functools.cache
def _class(name: str) -> type:
    return type(name, (Adjusted, getattr(diffusers, name)), {})


def pipeline_for(loaded: Any, family: str, task: str, **more: Any) -> Any:
    """The pipeline for a task, made of the parts of the loaded one.

    `more` are parts that the loaded pipeline lacks, such as `controlnet`. Raises UsageError for an unsupported task.
    """
    row, parts = FAMILIES[family], loaded.components | more
    settings = {key: loaded.config[key] for key in row.settings if key in loaded.config}
    name = class_of(family, task)
    # Where our own loop samples, a pipeline only embeds prompts.
    cls = getattr(diffusers, row.pipelines[0]) if row.samples_natively(task) else _class(name)
    pipeline = assemble(cls, row, parts, settings)
    pipeline.family, pipeline.codec = row, CODECS[row.latents]
    pipeline.guidance_is_input = guidance_is_input(family, parts[row.denoiser].config)
    return pipeline


def watched(scheduler: Scheduler, watch: Callable[[int, float, Tensor], None] | None) -> Scheduler:
    """The scheduler; it calls `watch(evaluation, t, x0)`, if given, with each prediction of the clean latents."""
    if watch is None:
        return scheduler
    step, count = scheduler.step, 0

    @functools.wraps(step)
    def observed(model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = step(model_output, timestep, *args, **(kwargs | {"return_dict": True}))
        watch(count, float(timestep), result.pred_original_sample)
        count += 1
        return result if kwargs.get("return_dict", True) else (result.prev_sample, result.pred_original_sample)

    scheduler.step = observed  # type: ignore[method-assign]
    return scheduler


@contextlib.contextmanager
def guided_outputs(pipeline: Any, share: float) -> Iterator[None]:
    """Inside, the scheduler's step gets what only the network's own outputs tell about the guided one.

    Guided outputs get the conditional prediction's standard deviation, by `share` (`guidance.rescale`). A scheduler
    that needs it also gets the prediction without the prompt. A guided network evaluates both predictions at once, the
    unconditional one first. Outputs without guidance stay, and are both.
    """
    pair = pipeline.scheduler.solver.cfg_pp
    if not share and not pair:
        yield
        return
    network = pipeline.components[pipeline.family.denoiser]
    last: list[Tensor] = []  # the network's last output
    step = pipeline.scheduler.step

    @functools.wraps(step)
    def informed(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        without = model_output
        if len(last[-1]) == 2 * len(model_output):
            unconditional, conditional = last[-1].chunk(2)
            without = unconditional if pipeline.guidance_scale != 1 else model_output
            model_output = guidance_rescaled(model_output, conditional, share) if share else model_output
        return step(model_output, *args, **kwargs, **({"without": without} if pair else {}))

    hook = network.register_forward_hook(lambda module, inputs, output: last.__setitem__(slice(None), [output[0]]))
    pipeline.scheduler.step = informed
    try:
        yield
    finally:
        hook.remove()


def strength_for(steps: int, strength: float) -> float:
    """The strength itself, or the least one with which diffusers walks a step: it rounds steps·strength down."""
    return strength if int(steps * strength) else min(1.0, 1.001 / steps)


@dataclass(frozen=True)
class Settings:
    """How a pipeline samples."""

    size: tuple[int, int]  # (width, height) in pixels
    steps: int
    guidance: float
    options: Options  # the checked values of a plan
    controls: Sequence[Any] = ()  # the ControlNets' pictures, of the size of the result
    scales: Sequence[float] = ()  # how strong each of them is

    @property
    def rescale(self) -> float:
        """The share of `guidance.rescale`."""
        return self.options["guidance_rescale"]

    @property
    def interval(self) -> tuple[float, float]:
        """The part of the steps with guidance."""
        return cast(tuple[float, float], self.options["guidance_interval"])


def call(
    pipeline: Any,
    embeddings: Mapping[str, Tensor],
    start: Start,
    settings: Settings,
    *,
    strength: float,
    generators: Sequence[torch.Generator],
    on_evaluation: Callable[[], None],
    **more: Any,
) -> Tensor:
    """Run a pipeline that `pipeline_for` made; clean latents [B, C, h, w].

    `embeddings` go by the names of the call's arguments, [B, …]. Image to image runs at `strength`.
    """
    width, height = settings.size
    parameters = inspect.signature(pipeline.__call__).parameters
    pipeline.start, pipeline.interval, pipeline.position = start, settings.interval, 0.0
    arguments: dict[str, Any] = {**embeddings, **more}
    if start.clean is None:
        arguments["latents"] = pipeline.codec.pack(start.noise)
    else:
        strength = strength_for(settings.steps, strength)
        arguments |= {"image": torch.zeros(1, 3, height, width), "strength": strength}
    if start.masked is not None:
        arguments["masked_image_latents"], arguments["mask_image"] = start.masked
    if settings.controls:
        one = len(settings.controls) == 1
        name = "image" if start.clean is None else "control_image"
        arguments[name] = settings.controls[0] if one else list(settings.controls)
        arguments["controlnet_conditioning_scale"] = settings.scales[0] if one else list(settings.scales)
    for key, value in (("width", width), ("height", height)):
        if key in parameters:
            arguments[key] = value

    def after(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_evaluation()
        times = pipe.scheduler.timesteps[-pipe.num_timesteps :]
        pipe.position = (i + 1) / len(times)
        if start.mask is None or start.masked is not None:
            return {}
        return {"latents": blend(pipe.scheduler, start, times, i, tensors["latents"], pipe.codec)}

    with guided_outputs(pipeline, settings.rescale):
        latents = pipeline(
            **arguments,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=list(generators),
            output_type="latent",
            callback_on_step_end=after,
            return_dict=False,
        )[0]
    result: Tensor = pipeline.codec.unpack(latents, *start.noise.shape[-2:])
    return result
