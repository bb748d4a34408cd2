"""Z-Image: a transformer that reads the text and the latents as one sequence. It is told how clean the picture is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgen.errors import InputError
from diffgen.models.families import Family

from ..weights.pieces import Pieces, keep, thirds
from . import Code, Inputs

# The layout: Tongyi-MAI/Z-Image src/zimage/transformer.py, with queries, keys and values in one matrix

_NAMES = {
    "attention.out.": "attention.to_out.0.",
    "attention.q_norm.": "attention.norm_q.",
    "attention.k_norm.": "attention.norm_k.",
}


def _layout(name: str, config: Mapping[str, Any]) -> Pieces | None:
    if name.startswith("norm_final."):
        return []  # in some files, read by no network
    if match := re.fullmatch(r"(.+\.attention)\.qkv\.(weight|bias)", name):
        return thirds(*(f"{match[1]}.to_{x}.{match[2]}" for x in "qkv"))
    name = re.sub(r"^(x_embedder|final_layer)\.", r"all_\1.2-1.", name)
    for original, ours in _NAMES.items():
        name = name.replace(original, ours)
    return [(name, keep)]


def _originals(config: Mapping[str, Any], layers: Iterable[str]) -> Iterator[str]:
    for layer in layers:
        fused = re.sub(r"\.attention\.to_[qkv]$", ".attention.qkv", layer)
        yield fused.replace(".attention.to_out.0", ".attention.out")


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    transformer, channels = parts["transformer"].config, parts["vae"].config.latent_channels
    if list(transformer.all_patch_size) != [family.patch] or list(transformer.all_f_patch_size) != [1]:
        raise InputError(f"{where}: the transformer's patches are {transformer.all_patch_size}, read here: [2]")
    if transformer.siglip_feat_dim is not None:
        raise InputError(f"{where}: the transformer reads pictures beside the text (Omni), which is not supported")
    if transformer.in_channels != channels:
        raise InputError(f"{where}: the transformer has {transformer.in_channels} channels, the VAE {channels}")
    width = parts["text_encoder"].config.hidden_size
    if (needed := transformer.cap_feat_dim) != width:
        raise InputError(f"{where}: the transformer reads texts of width {needed}, the encoder writes {width}")


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Tensor], size: tuple[int, int], guidance: float | None
) -> dict[str, Inputs]:
    texts, masks = embeddings["prompt_embeds"], embeddings["prompt_embeds_mask"]
    return {"text": [text[mask] for text, mask in zip(texts, masks, strict=True)]}


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Inputs]) -> Tensor:
    outputs = pipeline.transformer(
        list(x.unsqueeze(2).unbind()), (1000 - t) / 1000, list(inputs["text"]), return_dict=False
    )[0]
    return -torch.stack(outputs).squeeze(2)


CODE = Code(
    layout=_layout,
    check=_check,
    inputs=_inputs,
    predict=_predict,
    originals=_originals,
    words=(
        "adaLN_modulation|feed_forward|noise_refiner|context_refiner|x_embedder|t_embedder|cap_embedder|final_layer|"
        "to_q|to_k|to_v|to_out|q_norm|k_norm"
    ),
)
