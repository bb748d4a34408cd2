"""Stable Diffusion 3: a transformer that reads texts and latents side by side (MM-DiT)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgen.models.families import Family

from ..weights.pieces import Pieces, exchanged, keep, replaced, thirds
from . import Code, Control, check_transformer, summed

# The layout: Stability-AI/sd3-ref mmditx.py

_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def _layout(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """The text ends in the last block: its modulation there has two parts, which diffusers keeps in the other order."""
    if name == "pos_embed":
        return [("pos_embed.pos_embed", keep)]
    stem, _, end = name.rpartition(".")
    if stem == "final_layer.adaLN_modulation.1":
        return [(f"norm_out.linear.{end}", exchanged)]
    match = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", stem)
    if match is None:
        target = replaced(_NAMES, name)
        return None if target is None else [(target, keep)]
    block, inner = f"transformer_blocks.{match[1]}", match[2]
    if inner in _QKV:
        return thirds(*(f"{block}.{target}.{end}" for target in _QKV[inner]))
    if inner not in _BLOCK:
        return None
    last = int(match[1]) == config["num_layers"] - 1 and inner == "context_block.adaLN_modulation.1"
    return [(f"{block}.{_BLOCK[inner]}.{end}", exchanged if last else keep)]


def _originals(config: Mapping[str, Any], layers: Iterable[str]) -> Iterator[str]:
    yield from (*_NAMES, "final_layer.adaLN_modulation.1")
    yield from (f"joint_blocks.{i}.{name}" for i in range(config["num_layers"]) for name in (*_BLOCK, *_QKV))


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    transformer, t5 = parts["transformer"].config, parts.get("text_encoder_3")
    first, second = parts["text_encoder"].config, parts["text_encoder_2"].config
    clips, needed = first.hidden_size + second.hidden_size, transformer.joint_attention_dim
    check_transformer(
        where,
        transformer,
        channels=parts["vae"].config.latent_channels,
        pooled=first.projection_dim + second.projection_dim,
        width=clips if clips > needed else needed if t5 is None else t5.config.d_model,  # both CLIPs are padded to it
    )


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Tensor], size: tuple[int, int], guidance: float | None
) -> dict[str, Any]:
    inputs = {"text": embeddings["prompt_embeds"], "pooled": embeddings["pooled_prompt_embeds"]}
    return inputs | ({"controls": embeddings["controls"]} if "controls" in embeddings else {})


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    residuals = [_residuals(pipeline, control, x, t, inputs) for control in inputs.get("controls", ())]
    output: Tensor = pipeline.transformer(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=inputs["text"],
        pooled_projections=inputs["pooled"],
        block_controlnet_hidden_states=summed(residuals),
        return_dict=False,
    )[0]
    return output


def _residuals(pipeline: Any, control: Control, x: Tensor, t: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
    """A ControlNet's. Some were trained without the summary of the text and without the shift of the VAE's latents.

    That of the large SD3.5 reads no text, and the positions of the transformer.
    """
    config, vae = control.network.config, pipeline.vae.config
    pooled, condition = inputs["pooled"], control.for_batch(len(x))
    if config.force_zeros_for_pooled_projection:
        pooled, condition = torch.zeros_like(pooled), condition + vae.shift_factor * vae.scaling_factor
    if not config.use_pos_embed:
        control.network.pos_embed = pipeline.transformer.pos_embed
    residuals: list[Tensor] = control.network(
        hidden_states=x,
        controlnet_cond=condition.to(x),
        conditioning_scale=control.scale,
        encoder_hidden_states=None if config.joint_attention_dim is None else inputs["text"],
        pooled_projections=pooled,
        timestep=t,
        return_dict=False,
    )[0]
    return residuals


CODE = Code(
    layout=_layout,
    check=_check,
    inputs=_inputs,
    predict=_predict,
    originals=_originals,
    words=(
        "final_layer|adaLN_modulation|joint_blocks|context_block|x_block|context_embedder|x_embedder|t_embedder|"
        "y_embedder"
    ),
)
