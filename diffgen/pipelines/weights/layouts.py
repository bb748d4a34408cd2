"""The layouts of single files: which tensor of the file each tensor of a diffusers network comes from.

Here are the layouts that families share (the VAE, the text encoders); those of denoisers stand in
`diffgen/pipelines/families/`. All are the public layouts of CompVis/stable-diffusion, Stability's generative-models
and sd3-ref, OpenCLIP and black-forest-labs/flux; the tests compare them with diffusers' own converters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from diffgen.models.families import FAMILIES

from ..families import code_of
from .pieces import Layout, Pieces, Rename, Take, keep, linear, replaced, thirds, transposed


def file_layout(family: str, part: str, config: Mapping[str, Any], names: Iterable[str]) -> Layout:
    """The layout of one part (unet, vae, text_encoder, …) in a single-file checkpoint of that family.

    `names` are the tensors in the file. Where none of them has the part's prefix, the part is looked for without one,
    as in files that hold nothing else. A tensor with the prefix and an unknown name keeps its name, which no network
    has.
    """
    place = FAMILIES[family].in_files[part]
    rename = code_of(family).layout if place.layout == "denoiser" else _SHARED[place.layout]
    prefixes = [prefix + place.inner for prefix in place.prefixes]
    return functools.partial(pieces_of, rename, config, first_prefix(prefixes, names))


def alone_layout(family: str, part: str, config: Mapping[str, Any], names: Iterable[str]) -> Layout | None:
    """The layout of a part in a file of its own: the original one, or that of folders, whichever its names are in.

    The shared layouts leave names of folders as they are, so that they read both.
    """
    row = FAMILIES[family]
    if part == row.denoiser:
        original = all(any(re.match(mark, name) for name in names) for mark in row.marks)
        return file_layout(family, part, config, names) if original else folder_layout("", config)
    if part in row.in_files:
        return file_layout(family, part, config, names)
    return folder_layout(row.parts[part].layout or ("vae" if part == "vae" else ""), config)


def folder_layout(layout: str, config: Mapping[str, Any]) -> Layout | None:
    """The layout of a network in a diffusers folder, by its name in the row; None: the network's own names."""
    return functools.partial(pieces_of, _SHARED[layout], config, "") if layout else None


def constants(family: str, part: str) -> dict[str, Take]:
    """The tensors of the network that no file of that layout holds, each made from an empty one of the right shape."""
    return {name: lambda x: torch.eye(len(x)) for name in FAMILIES[family].in_files[part].identities}


def first_prefix(prefixes: Iterable[str], names: Iterable[str]) -> str:
    """The first of the prefixes that a name has, or no prefix."""
    names = list(names)
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), "")


def pieces_of(rename: Rename, config: Mapping[str, Any], prefix: str, name: str) -> Pieces:
    """What the network has of the tensor of that name in the file."""
    if not name.startswith(prefix):
        return []
    pieces = rename(name.removeprefix(prefix), config)
    return [(name, keep)] if pieces is None else pieces


# The VAE: CompVis/latent-diffusion ldm/modules/diffusionmodules/model.py

_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _vae(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """The decoder's levels are counted from the small end in diffusers, from the large end in the original."""
    if name.startswith(("loss.", "model_ema.")):
        return []
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(weight|bias)", name):
        if match[2] not in _VAE_ATTENTION:
            return None
        return [(f"{match[1]}.mid_block.attentions.0.{_VAE_ATTENTION[match[2]]}.{match[3]}", linear)]
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


# The names of llama.cpp, in GGUF files
_LLAMA = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_T5 = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_LLAMA_T5_BLOCK = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}


def _t5(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """transformers' own names, or llama.cpp's."""
    if match := re.fullmatch(r"enc\.blk\.(\d+)\.(.+)", name):
        inside = replaced(_LLAMA_T5_BLOCK, match[2])
        return None if inside is None else [(f"encoder.block.{match[1]}.{inside}", keep)]
    return [(replaced(_LLAMA_T5, name) or name, keep)]


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
        return [("text_projection.weight", transposed)]
    if name in _OPENCLIP:
        return [(_OPENCLIP[name], keep)]
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if match is None:
        return None
    block = f"encoder.layers.{match[1]}"
    if inner := re.fullmatch(r"attn\.in_proj_(weight|bias)", match[2]):
        return thirds(*(f"{block}.self_attn.{x}_proj.{inner[1]}" for x in "qkv"))
    inside = replaced(_OPENCLIP_BLOCK, match[2])
    return None if inside is None else [(f"{block}.{inside}", keep)]


def _openclip_cut(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """Stable Diffusion 2 reads the penultimate layer, where diffusers' encoder ends: without the projection too."""
    last = f"transformer.resblocks.{config['num_hidden_layers']}."
    return [] if name == "text_projection" or name.startswith(last) else _openclip(name, config)


def _language(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """transformers' names of a language model, alone or in a larger model, without its last layer and its vision."""
    if re.match(r"(model\.)?(lm_head|visual|vision_tower|multi_modal_projector)\.", name):
        return []
    if "qwen" in str(config.get("model_type")):  # of others, llama.cpp exchanges rows of the queries
        if name == "output.weight":
            return []
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
            inside = replaced(_LLAMA_BLOCK, match[2])
            return None if inside is None else [(f"layers.{match[1]}.{inside}", keep)]
        name = replaced(_LLAMA, name) or name
    return [(re.sub(r"^(language_model\.)?(model\.)?(language_model\.)?", "", name), keep)]


_SHARED: dict[str, Rename] = {
    "vae": _vae,
    "clip": _clip,
    "plain": _plain,
    "t5": _t5,
    "openclip": _openclip,
    "openclip-cut": _openclip_cut,
    "language": _language,
}
