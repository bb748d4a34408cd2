"""FLUX.1: a transformer of packed latents that takes the guidance as an input (dev) or uses none (schnell).

Kontext reads the tokens of a reference picture behind those of the one that it makes. Fill reads the picture with a
hole and the mask, Canny and Depth their map, as further channels of each token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffgen.errors import InputError, UsageError
from diffgen.models.families import Family

from ..sampling.latents import CODECS
from ..weights.pieces import Pieces, exchanged, keep, replaced, row_range, thirds
from . import Code, Control, check_transformer, summed

_pack = CODECS["packed"].pack
# The kinds of a ControlNet of several, by their numbers in InstantX's and Shakker's union models
UNION = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")

# The layout: black-forest-labs/flux src/flux/model.py and modules/layers.py

_NAMES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_DOUBLE_NORM = {
    "img_attn.norm.query_norm": "attn.norm_q.weight",
    "img_attn.norm.key_norm": "attn.norm_k.weight",
    "txt_attn.norm.query_norm": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm": "attn.norm_added_k.weight",
}
_SINGLE_NORM = {"norm.query_norm": "attn.norm_q.weight", "norm.key_norm": "attn.norm_k.weight"}


@dataclass(frozen=True)
class Blocks:
    """The original names of a network of double and single blocks, with those in diffusers."""

    names: Mapping[str, str]  # outside the blocks
    double: Mapping[str, str]  # inside a double block
    single: Mapping[str, str]
    norm_end: str | None = None  # how the name of a norm's weight ends; None: anyhow

    def originals(self, config: Mapping[str, Any], layers: Iterable[str]) -> Iterator[str]:
        """Every original name of a layer."""
        yield from (*self.names, "final_layer.adaLN_modulation.1")
        for kind, names in (("double", {**self.double, **_QKV}), ("single", {**self.single, "linear1": ""})):
            count = config["num_layers" if kind == "double" else "num_single_layers"]
            yield from (f"{kind}_blocks.{i}.{name}" for i in range(count) for name in names)

    def layout(self, name: str, config: Mapping[str, Any]) -> Pieces | None:
        """What a tensor of a file becomes; see `pieces`."""
        stem, _, end = name.rpartition(".")
        if stem == "final_layer.adaLN_modulation.1":
            return [(f"norm_out.linear.{end}", exchanged)]
        match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", name)
        if match is None:
            target = replaced(self.names, name)
            return None if target is None else [(target, keep)]
        double, inner = match[1] == "double", match[3]
        block = f"{'' if double else 'single_'}transformer_blocks.{match[2]}"
        stem = inner.rpartition(".")[0]
        if double and stem in _QKV:
            return thirds(*(f"{block}.{target}.{end}" for target in _QKV[stem]))
        place = (_DOUBLE_NORM if double else _SINGLE_NORM).get(stem) if self.norm_end in (None, end) else None
        place = place or replaced(self.double if double else self.single, inner)
        return None if place is None else [(f"{block}.{place}", keep)]


_BLOCKS = Blocks(_NAMES, _DOUBLE, _SINGLE, norm_end="scale")


def _layout(name: str, config: Mapping[str, Any]) -> Pieces | None:
    match = re.fullmatch(r"single_blocks\.(\d+)\.linear1\.([^.]+)", name)
    if match is None:
        return _BLOCKS.layout(name, config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    cuts = [functools.partial(row_range, i * width, (i + 1) * width if i < 3 else None) for i in range(4)]
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")  # the last is the hidden layer
    block = f"single_transformer_blocks.{match[1]}"
    return [(f"{block}.{target}.{match[2]}", cut) for target, cut in zip(names, cuts, strict=True)]


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    transformer = parts["transformer"].config
    if sum(transformer.axes_dims_rope) != transformer.attention_head_dim:
        raise InputError(f"{where}: axes_dims_rope {transformer.axes_dims_rope} do not make up attention_head_dim")
    vae = parts["vae"].config
    channels = vae.latent_channels * family.patch**2
    pixels = 4 ** (len(vae.block_out_channels) - 1) * family.patch**2  # of the mask, for each token
    read = {"mask": 2 * channels + pixels, "control": 2 * channels}.get(family.reads, channels)
    if transformer.in_channels != read or (transformer.out_channels or read) != channels:
        raise InputError(
            f"{where}: the transformer has {transformer.in_channels} channels in and {transformer.out_channels} out, "
            f"with this VAE {family.title} has {read} and {channels}"
        )
    check_transformer(
        where,
        transformer,
        channels=None,
        pooled=parts["text_encoder"].config.hidden_size,
        width=parts["text_encoder_2"].config.d_model,
    )


def _positions(pipeline: Any, count: int, height: int, width: int, like: Tensor) -> Tensor:
    """Where each of the patches of 2×2 latents is [h·w/4, 3], for latents [count, C, height, width]."""
    places: Tensor = pipeline._prepare_latent_image_ids(count, height // 2, width // 2, like.device, like.dtype)
    return places


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Any], size: tuple[int, int], guidance: float | None
) -> dict[str, Any]:
    text = embeddings["prompt_embeds"]
    width, height = (side // pipeline.vae_scale_factor for side in size)
    inputs: dict[str, Any] = {"text": text, "pooled": embeddings["pooled_prompt_embeds"]}
    inputs["positions"] = _positions(pipeline, len(text), height, width, text)  # no batch: [h·w/4, 3]
    for number, latents in enumerate(embeddings.get("references", ()), 1):
        places = _positions(pipeline, len(text), latents.shape[-2], latents.shape[-1], text)
        places[..., 0] = number
        inputs["positions"] = torch.cat([inputs["positions"], places])
        tokens = _pack(latents.expand(len(text), -1, -1, -1))
        inputs["references"] = torch.cat([inputs["references"], tokens], 1) if "references" in inputs else tokens
    if guidance is not None:
        inputs["guidance"] = torch.full((len(text),), guidance, device=text.device)
    if "masked" in embeddings:
        latents, mask = embeddings["masked"]
        holes = functional.pixel_unshuffle(mask.to(latents), pipeline.vae_scale_factor)
        inputs["channels"] = torch.cat([_pack(latents), _pack(holes).expand(len(latents), -1, -1)], 2)
    controls = embeddings.get("controls", ())
    if own := [control for control in controls if control.network is None]:
        inputs["channels"] = _pack(own[0].condition)
    if networks := [control for control in controls if control.network is not None]:
        inputs["controls"] = networks
    return inputs


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    def read(network: Any, **more: Any) -> Any:
        return network(
            timestep=t / 1000,
            guidance=inputs.get("guidance") if network.config.guidance_embeds else None,
            encoder_hidden_states=inputs["text"],
            pooled_projections=inputs["pooled"],
            txt_ids=inputs["positions"].new_zeros(inputs["text"].shape[1], 3),
            img_ids=inputs["positions"],
            return_dict=False,
            **more,
        )

    def residuals(control: Control) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        condition = control.for_batch(len(x)).to(x)
        hints = control.network.input_hint_block is not None
        blocks: tuple[list[Tensor] | None, list[Tensor] | None] = read(
            control.network,
            hidden_states=x,
            controlnet_cond=condition if hints else _pack(condition),
            controlnet_mode=_mode(control, len(x)),
            conditioning_scale=control.scale,
        )
        return blocks

    networks = inputs.get("controls", ())
    controls = [residuals(control) for control in networks]
    tokens = torch.cat([x, inputs["references"].to(x)], 1) if "references" in inputs else x
    tokens = torch.cat([tokens, inputs["channels"].to(x)], 2) if "channels" in inputs else tokens
    output: Tensor = read(
        pipeline.transformer,
        hidden_states=tokens,
        controlnet_block_samples=summed(double for double, _ in controls),
        controlnet_single_block_samples=summed(single for _, single in controls),
        controlnet_blocks_repeat=any(one.network.input_hint_block is not None for one in networks),
    )[0]
    return output[:, : x.shape[1]]


def _mode(control: Control, count: int) -> Tensor | None:
    """The number of a control's kind for a ControlNet of several kinds. Raises UsageError for one that it lacks."""
    if not control.network.union:
        return None
    if control.kind not in UNION:
        raise UsageError(f"--control {control.kind}: this ControlNet knows {', '.join(UNION)}")
    return torch.full((count, 1), UNION.index(control.kind), device=control.condition.device)


def _prepared(pipeline: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    count, _, height, width = latents.shape
    return pipeline.codec.pack(latents), _positions(pipeline, count, height, width, latents)


CODE = Code(
    layout=_layout,
    check=_check,
    inputs=_inputs,
    predict=_predict,
    prepared=_prepared,
    originals=_BLOCKS.originals,
    words=(
        "double_blocks|single_blocks|img_attn|txt_attn|img_mlp|txt_mlp|img_mod|txt_mod|img_in|txt_in|time_in|vector_in|"
        "guidance_in|in_layer|out_layer|final_layer|adaLN_modulation"
    ),
)
