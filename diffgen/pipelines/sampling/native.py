"""Sample by our own loop, for families whose row says so: text to image, image to image and inpainting in one.

diffusers' pipelines of these families differ in what they call guidance, in the layouts of their latents and in the
ways that they have. Their networks do not: here the pipeline embeds the prompt, its network is a function of (x, t)
(see denoiser.py) in the row's layout of latents. Image to image begins later on the same grid, from the picture at
that noise; inpainting keeps the picture's own latents outside the mask after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .denoiser import network_of
from .latents import Start, blend
from .pipeline import Settings, strength_for


def sample(
    pipeline: Any,
    embeddings: Mapping[str, Any],
    start: Start,
    settings: Settings,
    *,
    strength: float,
    generators: Sequence[torch.Generator],
    on_evaluation: Callable[[], None],
) -> Tensor:
    """Clean latents [B, C, h, w], float32. The arguments are those of `pipeline.call`."""
    scheduler, device, dtype = pipeline.scheduler, start.noise.device, pipeline.transformer.dtype
    scheduler.set_timesteps(settings.steps, device)
    first = 0
    if start.clean is not None:  # as diffusers' get_timesteps counts
        share = settings.steps * strength_for(settings.steps, strength)
        first = int(max(settings.steps - share, 0)) * scheduler.order
    times = scheduler.timesteps[first:]
    scheduler.set_begin_index(first)
    codec, (height, width) = pipeline.codec, start.noise.shape[-2:]
    if start.masked is not None:
        embeddings = {**embeddings, "masked": start.masked}
    low, high = settings.interval
    done = 0

    pair = scheduler.solver.cfg_pp

    def guided() -> bool:
        return low <= done / len(times) < high

    network = network_of(
        pipeline,
        pipeline.family,
        embeddings,
        settings.guidance,
        settings.size,
        guidance_is_input=pipeline.guidance_is_input,
        rescale=settings.rescale,
        guided_at=guided,
        pair=pair,
    )
    if start.clean is None or start.pure:
        x = start.noise * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(start.clean, start.noise, times[:1])
    x = codec.pack(x)
    for i, t in enumerate(times):
        outputs = network(x.to(dtype), t.expand(len(x)))
        output, without = outputs if pair else (outputs, None)
        x = scheduler.step(output, t, x, generator=list(generators), return_dict=False, without=without)[0]
        if start.mask is not None and start.masked is None:
            x = blend(scheduler, start, times, i, x, codec)
        done += 1
        on_evaluation()
    pipeline.maybe_free_model_hooks()
    return codec.unpack(x, height, width)
