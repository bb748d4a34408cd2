"""FLUX.2: a transformer of tokens with four coordinates; klein reads Qwen3's layers, dev Mistral's and the guidance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgen.errors import InputError
from diffgen.models.families import Family

from . import Code, check_widths
from .flux import Blocks

LAYERS = 3  # of the text encoder, whose outputs are read side by side

# The layout: black-forest-labs/flux2 src/flux2/model.py

_NAMES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}

_BLOCKS = Blocks(_NAMES, _DOUBLE, _SINGLE)


def check_vae(where: Path, vae: Any) -> None:
    """Raise InputError unless the variances of a VAE's latents are above 0."""
    if bool((vae.bn.running_var <= 0).any()):
        raise InputError(f"{where}: the VAE's bn.running_var has variances that are not above 0")


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    check_vae(where, parts["vae"])
    check_widths(
        where,
        parts["transformer"].config,
        channels=parts["vae"].config.latent_channels * family.patch**2,
        width=parts["text_encoder"].config.hidden_size * LAYERS,
    )


def _places(count: int, height: int, width: int, number: int, like: Tensor) -> Tensor:
    """The coordinates [count, h·w, 4] of the tokens of a picture: its number (0 is the one that is made), y, x, 0."""
    axes = (torch.tensor([number]), torch.arange(height), torch.arange(width), torch.arange(1))
    return torch.cartesian_prod(*axes).expand(count, -1, -1).to(like.device)


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Any], size: tuple[int, int], guidance: float | None
) -> dict[str, Tensor]:
    text = embeddings["prompt_embeds"]
    count, length, _ = text.shape
    side = pipeline.vae_scale_factor * 2
    places = [_places(count, size[1] // side, size[0] // side, 0, text)]
    axes = (torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(length))
    inputs = {"text": text, "text_places": torch.cartesian_prod(*axes).expand(count, -1, -1).to(text.device)}
    if references := embeddings.get("references"):
        for i, latents in enumerate(references, 1):
            places.append(_places(count, latents.shape[-2], latents.shape[-1], 10 * i, text))
        inputs["references"] = torch.cat([x.expand(count, -1, -1, -1).flatten(2).mT for x in references], 1)
    inputs["places"] = torch.cat(places, 1)
    if guidance is not None and pipeline.transformer.config.guidance_embeds:
        inputs["guidance"] = torch.full((count,), guidance, device=text.device)
    return inputs


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    tokens = x.flatten(2).mT
    if "references" in inputs:
        tokens = torch.cat([tokens, inputs["references"].to(tokens)], 1)
    output: Tensor = pipeline.transformer(
        hidden_states=tokens,
        timestep=t / 1000,
        guidance=inputs.get("guidance"),
        encoder_hidden_states=inputs["text"],
        txt_ids=inputs["text_places"],
        img_ids=inputs["places"],
        return_dict=False,
    )[0]
    return output[:, : x.shape[-2] * x.shape[-1]].mT.reshape(x.shape)


CODE = Code(
    layout=_BLOCKS.layout,
    check=_check,
    inputs=_inputs,
    predict=_predict,
    originals=_BLOCKS.originals,
    words=(
        "double_blocks|single_blocks|img_attn|txt_attn|img_mlp|txt_mlp|img_in|txt_in|time_in|guidance_in|in_layer|"
        "out_layer|final_layer|adaLN_modulation|double_stream_modulation_img|double_stream_modulation_txt|"
        "single_stream_modulation"
    ),
)
