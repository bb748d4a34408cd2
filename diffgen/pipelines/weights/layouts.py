"""The names of the original checkpoint layouts, and what each tensor is in diffusers' networks.

A layout says of every name in a file of which tensors of the network it is the source: under another name, one of
several parts of its rows (the original layouts keep queries, keys and values in one matrix), transposed, with its
halves exchanged. The tables are the public layouts of CompVis/stable-diffusion, Stability's generative-models and
sd3-ref, OpenCLIP and black-forest-labs/flux; the tests compare them with diffusers' own converters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Take = Callable[[Tensor], Tensor]
Pieces = list[tuple[str, Take]]  # [(name in the network, what it takes of the file's tensor)]
Layout = Callable[[str], Pieces]  # of a name in the file; empty for what belongs to another part or is not needed


def file_layout(family: str, part: str, config: Mapping[str, Any], names: Iterable[str]) -> Layout:
    """The layout of one part (unet, vae, text_encoder, …) in a single-file checkpoint of that family.

    `names` are the tensors in the file; a part whose prefix is on none of them is looked for without one, as in files
    that hold nothing else. What has the prefix and is not known keeps its name, which is then in no network.
    """
    kind, prefixes = _PARTS[family][part]
    prefix = _prefix(prefixes, names)
    return functools.partial(_pieces, _KINDS[kind], config, prefix)


def controlnet_layout(config: Mapping[str, Any], names: Iterable[str]) -> Layout:
    """The layout of a ControlNet in its original form: its names begin with control_model. or with nothing."""
    return functools.partial(_pieces, _controlnet, config, _prefix(("control_model.",), names))


def constants(family: str, part: str) -> dict[str, Take]:
    """Tensors of the network that no file of that layout holds, made from an empty one of the right shape.

    SD3's first CLIP is used without its projection (sd3-ref), which is the identity in diffusers' class.
    """
    if (family, part) == ("sd3", "text_encoder"):
        return {"text_projection.weight": lambda x: torch.eye(len(x))}
    return {}


_PARTS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {  # (kind, prefixes)
    "sd1": {
        "unet": ("unet", ("model.diffusion_model.",)),
        "vae": ("vae", ("first_stage_model.",)),
        "text_encoder": ("clip", ("cond_stage_model.transformer.",)),
    },
    "sd2": {
        "unet": ("unet", ("model.diffusion_model.",)),
        "vae": ("vae", ("first_stage_model.",)),
        "text_encoder": ("openclip-cut", ("cond_stage_model.model.",)),
    },
    "sdxl": {
        "unet": ("unet", ("model.diffusion_model.",)),
        "vae": ("vae", ("first_stage_model.",)),
        "text_encoder": ("clip", ("conditioner.embedders.0.transformer.",)),
        "text_encoder_2": ("openclip", ("conditioner.embedders.1.model.",)),
    },
    "sdxl-refiner": {
        "unet": ("unet", ("model.diffusion_model.",)),
        "vae": ("vae", ("first_stage_model.",)),
        "text_encoder_2": ("openclip", ("conditioner.embedders.0.model.",)),
    },
    "sd3": {
        "transformer": ("sd3", ("model.diffusion_model.",)),
        "vae": ("vae", ("first_stage_model.", "vae.")),
        "text_encoder": ("clip", ("text_encoders.clip_l.transformer.",)),
        "text_encoder_2": ("plain", ("text_encoders.clip_g.transformer.",)),
        "text_encoder_3": ("plain", ("text_encoders.t5xxl.transformer.",)),
    },
    "flux": {
        "transformer": ("flux", ("model.diffusion_model.",)),
        "vae": ("vae", ("first_stage_model.", "vae.")),
        "text_encoder": ("clip", ("text_encoders.clip_l.transformer.",)),
        "text_encoder_2": ("plain", ("text_encoders.t5xxl.transformer.",)),
    },
}


def _prefix(prefixes: Iterable[str], names: Iterable[str]) -> str:
    names = list(names)
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), "")


def _pieces(kind: Callable[[str, Any], Pieces | None], config: Mapping[str, Any], prefix: str, name: str) -> Pieces:
    if not name.startswith(prefix):
        return []
    found = kind(name.removeprefix(prefix), config)
    return [(name, keep)] if found is None else found


# What is taken of a tensor


def keep(x: Tensor) -> Tensor:
    return x


def _rows(part: int, parts: int, x: Tensor) -> Tensor:
    """One of several equal parts."""
    return x.chunk(parts)[part]


def _range(begin: int, end: int | None, x: Tensor) -> Tensor:
    return x[begin:end]


def _exchanged(x: Tensor) -> Tensor:
    """(shift, scale), as the original networks have it, to (scale, shift)."""
    return torch.cat(x.chunk(2)[::-1])


def _transposed(x: Tensor) -> Tensor:
    return x.mT


def _linear(x: Tensor) -> Tensor:
    """The matrix of a convolution over one pixel."""
    return x.flatten(1) if x.ndim > 2 and x[0, 0].numel() == 1 else x


def _thirds(*names: str) -> Pieces:
    return [(name, functools.partial(_rows, i, 3)) for i, name in enumerate(names)]


# Stable Diffusion 1, 2, XL: CompVis/stable-diffusion ldm/modules/diffusionmodules/openaimodel.py

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
    found = _replaced(_UNET, name)
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        i, rest = int(match[1]), match[2]
        found = f"mid_block.attentions.0.{rest}" if i == 1 else _resnet(f"mid_block.resnets.{i // 2}", rest)
    elif match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name):
        down, rest = match[1] == "input", match[4]
        if down and match[2] == "0":
            return None if found is None else [(found, keep)]
        i, j = divmod(int(match[2]) - down, level)
        block = f"{'down' if down else 'up'}_blocks.{i}"
        if re.fullmatch(r"(op|conv)\.(weight|bias)", rest):
            found = f"{block}.{'down' if down else 'up'}samplers.0.conv.{rest.split('.')[1]}"
        elif match[3] == "0":
            found = _resnet(f"{block}.resnets.{j}", rest)
        else:
            found = f"{block}.attentions.{j}.{rest}"
    return None if found is None else [(found, keep)]


def _resnet(block: str, rest: str) -> str | None:
    found = _replaced(_RESNET, rest)
    return None if found is None else f"{block}.{found}"


def _replaced(table: Mapping[str, str], name: str) -> str | None:
    """The name with its beginning replaced by the table: it ends with .weight or .bias."""
    stem, _, end = name.rpartition(".")
    return f"{table[stem]}.{end}" if stem in table else None


def _controlnet(name: str, config: Mapping[str, Any]) -> Pieces | None:
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


# The VAE: CompVis/latent-diffusion ldm/modules/diffusionmodules/model.py

_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _vae(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """The decoder's levels are counted from the small end in diffusers, from the large end in the original."""
    if name.startswith(("loss.", "model_ema.")):
        return []
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(weight|bias)", name):
        if match[2] not in _VAE_ATTENTION:
            return None
        return [(f"{match[1]}.mid_block.attentions.0.{_VAE_ATTENTION[match[2]]}.{match[3]}", _linear)]
    last = len(config["block_out_channels"]) - 1
    name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{last - int(m[1])}", name)
    for old, new in (
        (r"^encoder\.down\.(\d+)", r"encoder.down_blocks.\1"),
        (r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets."),
        (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ):
        name = re.sub(old, new, name)
    return [(name, keep)]


# Text encoders


def _clip(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """transformers' own names, without the projection that some files bring along and no model reads."""
    return [] if name == "text_projection.weight" else [(name, keep)]


def _plain(name: str, config: Mapping[str, Any]) -> Pieces | None:
    return [(name, keep)]


_OPENCLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPENCLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def _openclip(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """open_clip/src/open_clip/transformer.py."""
    if name == "logit_scale":
        return []
    if name == "text_projection":
        return [("text_projection.weight", _transposed)]
    if name in _OPENCLIP:
        return [(_OPENCLIP[name], keep)]
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if match is None:
        return None
    block = f"encoder.layers.{match[1]}"
    if inner := re.fullmatch(r"attn\.in_proj_(weight|bias)", match[2]):
        return _thirds(*(f"{block}.self_attn.{x}_proj.{inner[1]}" for x in "qkv"))
    found = _replaced(_OPENCLIP_BLOCK, match[2])
    return None if found is None else [(f"{block}.{found}", keep)]


def _openclip_cut(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """Stable Diffusion 2 reads the last layer but one, and diffusers has no more of it: no projection either."""
    last = f"transformer.resblocks.{config['num_hidden_layers']}."
    return [] if name == "text_projection" or name.startswith(last) else _openclip(name, config)


# Stable Diffusion 3: Stability-AI/sd3-ref mmditx.py

_SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_SD3_BLOCK = {
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
_SD3_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def _sd3(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """The last block gives its text no way on: its modulation has two parts, which diffusers keeps the other way."""
    if name == "pos_embed":
        return [("pos_embed.pos_embed", keep)]
    stem, _, end = name.rpartition(".")
    if stem == "final_layer.adaLN_modulation.1":
        return [(f"norm_out.linear.{end}", _exchanged)]
    match = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", stem)
    if match is None:
        found = _replaced(_SD3, name)
        return None if found is None else [(found, keep)]
    block, inner = f"transformer_blocks.{match[1]}", match[2]
    if inner in _SD3_QKV:
        return _thirds(*(f"{block}.{target}.{end}" for target in _SD3_QKV[inner]))
    if inner not in _SD3_BLOCK:
        return None
    last = int(match[1]) == config["num_layers"] - 1 and inner == "context_block.adaLN_modulation.1"
    return [(f"{block}.{_SD3_BLOCK[inner]}.{end}", _exchanged if last else keep)]


# Flux: black-forest-labs/flux src/flux/model.py and modules/layers.py

_FLUX = {
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
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_FLUX_DOUBLE_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_FLUX_DOUBLE_NORM = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_FLUX_SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
_FLUX_SINGLE_NORM = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}


def _flux(name: str, config: Mapping[str, Any]) -> Pieces | None:
    stem, _, end = name.rpartition(".")
    if stem == "final_layer.adaLN_modulation.1":
        return [(f"norm_out.linear.{end}", _exchanged)]
    match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", name)
    if match is None:
        found = _replaced(_FLUX, name)
        return None if found is None else [(found, keep)]
    double, inner = match[1] == "double", match[3]
    block = f"{'' if double else 'single_'}transformer_blocks.{match[2]}"
    stem = inner.rpartition(".")[0]
    if double and stem in _FLUX_DOUBLE_QKV:
        return _thirds(*(f"{block}.{target}.{end}" for target in _FLUX_DOUBLE_QKV[stem]))
    if not double and stem == "linear1":  # queries, keys, values, and the hidden layer
        width = config["num_attention_heads"] * config["attention_head_dim"]
        cuts = [functools.partial(_range, i * width, (i + 1) * width if i < 3 else None) for i in range(4)]
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        return [(f"{block}.{target}.{end}", cut) for target, cut in zip(names, cuts, strict=True)]
    found = (_FLUX_DOUBLE_NORM if double else _FLUX_SINGLE_NORM).get(inner)
    found = found or _replaced(_FLUX_DOUBLE if double else _FLUX_SINGLE, inner)
    return None if found is None else [(f"{block}.{found}", keep)]


_KINDS: dict[str, Callable[[str, Any], Pieces | None]] = {
    "unet": _unet,
    "vae": _vae,
    "clip": _clip,
    "plain": _plain,
    "openclip": _openclip,
    "openclip-cut": _openclip_cut,
    "sd3": _sd3,
    "flux": _flux,
}
