"""Stable Diffusion 1, 2, XL and its refiner: UNets that read the text by cross-attention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgen.errors import InputError
from diffgen.models.families import Family

from ..weights.pieces import Pieces, keep, replaced
from . import Code

# The layout: CompVis/stable-diffusion ldm/modules/diffusionmodules/openaimodel.py

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _unet(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """Blocks are counted through in the original, level by level in diffusers: layers_per_block + 1 make a level."""
    level = config["layers_per_block"] + 1
    target = replaced(_UNET, name)
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        i, rest = int(match[1]), match[2]
        target = f"mid_block.attentions.0.{rest}" if i == 1 else _resnet(f"mid_block.resnets.{i // 2}", rest)
    elif match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name):
        down, rest = match[1] == "input", match[4]
        if down and match[2] == "0":
            return None if target is None else [(target, keep)]
        i, j = divmod(int(match[2]) - down, level)
        block = f"{'down' if down else 'up'}_blocks.{i}"
        if re.fullmatch(r"(op|conv)\.(weight|bias)", rest):
            target = f"{block}.{'down' if down else 'up'}samplers.0.conv.{rest.split('.')[1]}"
        elif match[3] == "0":
            target = _resnet(f"{block}.resnets.{j}", rest)
        else:
            target = f"{block}.attentions.{j}.{rest}"
    return None if target is None else [(target, keep)]


def _originals(config: Mapping[str, Any], layers: Iterable[str]) -> Iterator[str]:
    """Every block of the original with every name that a layer has inside one."""
    yield from _UNET
    inner = {layer.split(".attentions.")[1].partition(".")[2] for layer in layers if ".attentions." in layer}
    blocks = len(config["block_out_channels"]) * (config["layers_per_block"] + 2)
    places = [f"{side}_blocks.{i}.{j}" for side in ("input", "output") for i in range(blocks) for j in range(3)]
    for place in (*places, *(f"middle_block.{j}" for j in range(3))):
        yield from (f"{place}.{name}" for name in (*sorted(inner), *_RESNET, "op", "conv"))


def _resnet(block: str, rest: str) -> str | None:
    target = replaced(_RESNET, rest)
    return None if target is None else f"{block}.{target}"


def controlnet_layout(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """lllyasviel/ControlNet cldm/cldm.py: the UNet's first half, its outputs, and a stack of convolutions (hint)."""
    stem, _, end = name.rpartition(".")
    if match := re.fullmatch(r"zero_convs\.(\d+)\.0", stem):
        return [(f"controlnet_down_blocks.{match[1]}.{end}", keep)]
    if stem == "middle_block_out.0":
        return [(f"controlnet_mid_block.{end}", keep)]
    if match := re.fullmatch(r"input_hint_block\.(\d+)", stem):
        i, last = int(match[1]) // 2, 2 * len(config["conditioning_embedding_out_channels"]) - 1
        place = {0: "conv_in", last: "conv_out"}.get(i, f"blocks.{i - 1}")
        return [(f"controlnet_cond_embedding.{place}.{end}", keep)]
    return None if name.startswith("output_blocks.") else _unet(name, config)


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    unet, latent = parts["unet"].config, parts["vae"].config.latent_channels
    more = latent + 1 if variant == "inpaint" else 0  # the masked picture and the mask
    if unet.in_channels != latent + more or unet.out_channels != latent:
        raise InputError(
            f"{where}: the UNet has {unet.in_channels} channels in and {unet.out_channels} out, the VAE has {latent}"
        )
    encoders = [parts[name].config for name in ("text_encoder", "text_encoder_2") if name in parts]
    width = sum(encoder.hidden_size for encoder in encoders)
    expected = unet.cross_attention_dim
    if {width} != (set(expected) if isinstance(expected, list | tuple) else {expected}):
        raise InputError(f"{where}: the UNet reads texts of width {expected}, the encoder writes {width}")
    xl = "text_encoder_2" in parts
    supported = {
        "addition_embed_type": "text_time" if xl else None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
    }
    for key, value in supported.items():
        if unet.get(key) != value:
            raise InputError(f"{where}: the UNet needs another input than {family.name} gives ({key} = {unet[key]!r})")
    if xl:
        numbers = 5 if family.is_refiner else 6  # size, crop, and target size or (refiner) aesthetic score
        written = encoders[-1].projection_dim + numbers * unet.addition_time_embed_dim
        if written != (expected := unet.projection_class_embeddings_input_dim):
            raise InputError(
                f"{where}: the UNet reads {expected} numbers about the text and the size, it gets {written}"
            )


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Tensor], size: tuple[int, int], guidance: float | None
) -> dict[str, Tensor]:
    text = embeddings["prompt_embeds"]
    inputs = {"text": text}
    if "pooled_prompt_embeds" in embeddings:  # XL
        width, height = size
        sizes = (height, width, 0, 0, height, width)  # original size, crop, target size: the pipeline's defaults
        inputs["pooled"] = embeddings["pooled_prompt_embeds"]
        inputs["sizes"] = torch.tensor([sizes], dtype=text.dtype, device=text.device).repeat(len(text), 1)
    if guidance is not None:
        scales = torch.full((len(text),), guidance - 1.0)
        channels = pipeline.unet.config.time_cond_proj_dim
        inputs["guidance"] = pipeline.get_guidance_scale_embedding(scales, embedding_dim=channels).to(text)
    return inputs


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    more: dict[str, Any] = {}
    if "pooled" in inputs:
        more["added_cond_kwargs"] = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]}
    output: Tensor = pipeline.unet(
        x,
        t,
        encoder_hidden_states=inputs["text"],
        timestep_cond=inputs.get("guidance"),
        return_dict=False,
        **more,
    )[0]
    return output


CODE = Code(
    layout=_unet,
    check=_check,
    inputs=_inputs,
    predict=_predict,
    originals=_originals,
    words=(
        "input_blocks|middle_block|output_blocks|in_layers|emb_layers|out_layers|skip_connection|transformer_blocks|"
        "proj_in|proj_out|to_q|to_k|to_v|to_out|time_embed|label_emb"
    ),
)
