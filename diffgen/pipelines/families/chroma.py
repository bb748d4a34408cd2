"""Chroma1: FLUX.1 without CLIP and without an input for the guidance; a small network makes all the modulations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgen.models.families import Family

from ..sampling.latents import CODECS
from ..weights.pieces import Pieces, keep
from . import Code, check_widths, flux

_TOKENS = CODECS["packed"]
_GUIDANCE = {"in_layer": "linear_1", "out_layer": "linear_2"}


def _layout(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """FLUX.1's, and the network that makes the modulations."""
    if not name.startswith("distilled_guidance_layer."):
        return flux.CODE.layout(name, config)
    name = re.sub(r"(norms\.\d+)\.scale$", r"\1.weight", name)
    return [(re.sub("in_layer|out_layer", lambda word: _GUIDANCE[word[0]], name), keep)]


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    channels, width = parts["vae"].config.latent_channels * family.patch**2, parts["text_encoder"].config.d_model
    check_widths(where, parts["transformer"].config, channels=channels, width=width)


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Any], size: tuple[int, int], guidance: float | None
) -> dict[str, Tensor]:
    """The mask leaves the first padding token in, as the model was trained."""
    return {"text": embeddings["prompt_embeds"], "mask": embeddings["prompt_embeds_mask"]}


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    count, _, height, width = x.shape
    text, tokens = inputs["text"], _TOKENS.pack(x)
    places = pipeline._prepare_latent_image_ids(count, height // 2, width // 2, x.device, x.dtype)
    every = torch.ones(count, tokens.shape[1], device=x.device, dtype=torch.bool)
    output: Tensor = pipeline.transformer(
        hidden_states=tokens,
        timestep=t / 1000,
        encoder_hidden_states=text,
        txt_ids=places.new_zeros(text.shape[1], 3),
        img_ids=places,
        attention_mask=torch.cat([inputs["mask"], every], 1),
        return_dict=False,
    )[0]
    return _TOKENS.unpack(output, height, width)


CODE = Code(
    layout=_layout,
    check=_check,
    inputs=_inputs,
    predict=_predict,
    words=f"{flux.CODE.words}|distilled_guidance_layer|in_proj|out_proj",
)
