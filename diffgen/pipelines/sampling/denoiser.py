"""A loaded pipeline as the plain function (x, t) → output that the native solvers ask: counted, differentiable.

`generate` lets diffusers' pipelines call their networks. Comparing and tuning schedulers needs the network alone, its
guidance in it, and gradients by x and t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffgen.diffusion.guidance import guide
from diffgen.errors import UsageError
from diffgen.models.families import guidance_is_input

from .batch import SCHNELL_TOKENS
from .embed import embed

Network = Callable[[Tensor, Tensor], Tensor]


def denoiser(
    pipeline: Any, family: str, prompts: Sequence[str], guidance: float, size: tuple[int, int], negative: str = ""
) -> Network:
    """network(x [B, C, h, w], t [B]) for a batch that shows `prompts` [B], at `size` (width, height) in pixels.

    Flux's x are packed latents [B, h·w/4, 4C], as `ways.packed` makes them. Guidance other than 1 asks about both
    prompts in one batch of 2B, except where the network takes it as an input, or none at all.
    Raises UsageError for a family whose network is not read here.
    """
    if family == "unconditional":
        return lambda x, t: pipeline.unet(x, t, return_dict=False)[0]
    if family not in ("sd1", "sd2", "sdxl", "sd3", "flux"):
        raise UsageError(f"models of the family {family} are not read natively, only by generate")
    config = (pipeline.unet if "unet" in pipeline.components else pipeline.transformer).config
    inside = guidance_is_input(family, config)
    guided = guidance != 1 and not inside
    schnell = family == "flux" and not config.guidance_embeds
    length = SCHNELL_TOKENS if schnell else None
    unlike = {
        text: embed(pipeline, text, negative, guided=guided, t5_length=length).arguments()
        for text in dict.fromkeys(prompts)
    }
    read = [unlike[text] for text in prompts]
    if len({embedding["prompt_embeds"].shape for embedding in read}) > 1:
        raise UsageError("these prompts are not equally long for the model", "shorten the longest")
    conditions = {name: torch.cat([embedding[name] for embedding in read]).clone() for name in read[0]}
    positive = _inputs(pipeline, family, conditions, "", size, guidance if inside and not schnell else None)
    if not guided:
        return lambda x, t: _ask(pipeline, family, x, t, positive)
    opposite = _inputs(pipeline, family, conditions, "negative_", size, None)
    both = {name: torch.cat([opposite[name], positive[name]]) for name in positive}

    def network(x: Tensor, t: Tensor) -> Tensor:
        without, with_prompt = _ask(pipeline, family, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(with_prompt, without, guidance)

    return network


def _inputs(
    pipeline: Any, family: str, conditions: dict[str, Tensor], which: str, size: tuple[int, int], inside: float | None
) -> dict[str, Tensor]:
    """What the network reads besides x and t, each [B, …], but Flux's places [h·w/4, 3]."""
    text = conditions[f"{which}prompt_embeds"]
    found = {"text": text}
    if family in ("sdxl", "sd3", "flux"):
        found["pooled"] = conditions[f"{which}pooled_prompt_embeds"]
    if family == "flux":
        sides = (side // pipeline.vae_scale_factor // 2 for side in reversed(size))
        found["places"] = pipeline._prepare_latent_image_ids(len(text), *sides, text.device, text.dtype)
        if inside is not None:
            found["guidance"] = torch.full((len(text),), inside, device=text.device)
        return found
    if family == "sdxl":
        width, height = size
        where = (height, width, 0, 0, height, width)  # original size, crop, size: as the pipeline's defaults have it
        found["times"] = torch.tensor([where], dtype=text.dtype, device=text.device).repeat(len(text), 1)
    if inside is not None:
        scales = torch.full((len(text),), inside - 1.0)
        width = pipeline.unet.config.time_cond_proj_dim
        found["guidance"] = pipeline.get_guidance_scale_embedding(scales, embedding_dim=width).to(text)
    return found


def _ask(pipeline: Any, family: str, x: Tensor, t: Tensor, read: dict[str, Tensor]) -> Tensor:
    if family == "sd3":
        return pipeline.transformer(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=read["text"],
            pooled_projections=read["pooled"],
            return_dict=False,
        )[0]
    if family == "flux":
        return pipeline.transformer(
            hidden_states=x,
            timestep=t / 1000,
            guidance=read.get("guidance"),
            encoder_hidden_states=read["text"],
            pooled_projections=read["pooled"],
            txt_ids=read["places"].new_zeros(read["text"].shape[1], 3),
            img_ids=read["places"],
            return_dict=False,
        )[0]
    more: dict[str, Any] = {}
    if family == "sdxl":
        more["added_cond_kwargs"] = {"text_embeds": read["pooled"], "time_ids": read["times"]}
    return pipeline.unet(
        x,
        t,
        encoder_hidden_states=read["text"],
        timestep_cond=read.get("guidance"),
        return_dict=False,
        **more,
    )[0]
