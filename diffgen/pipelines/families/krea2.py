"""Krea 2: a transformer that reads several layers of Qwen3-VL for each token of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffgen.errors import InputError
from diffgen.models.families import Family

from ..sampling.latents import CODECS
from . import Code, qwen_image

_TOKENS = CODECS["packed"]


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    qwen_image.check_vae(where, parts["vae"].config)
    transformer, encoder = parts["transformer"].config, parts["text_encoder"].config
    layers = parts.get("text_encoder_select_layers", LAYERS)
    if not isinstance(layers, list | tuple) or not all(0 <= layer <= encoder.num_hidden_layers for layer in layers):
        raise InputError(
            f"{where}: text_encoder_select_layers is {layers}, the text encoder has {encoder.num_hidden_layers} layers"
        )
    for what, needed, value in (
        ("patch_size", family.patch, parts.get("patch_size", family.patch)),
        ("the transformer's in_channels", parts["vae"].config.z_dim * family.patch**2, transformer.in_channels),
        ("the transformer's text_hidden_dim", encoder.hidden_size, transformer.text_hidden_dim),
        ("the transformer's num_text_layers", len(layers), transformer.num_text_layers),
    ):
        if value != needed:
            raise InputError(f"{where}: {what} is {value}, the other parts need {needed}")


LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # of the text encoder, unless model_index.json names others


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Any], size: tuple[int, int], guidance: float | None
) -> dict[str, Tensor]:
    return {"text": embeddings["prompt_embeds"], "mask": embeddings["prompt_embeds_mask"].bool()}


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    height, width = x.shape[-2:]
    length = inputs["text"].shape[1]
    output: Tensor = pipeline.transformer(
        hidden_states=_TOKENS.pack(x),
        encoder_hidden_states=inputs["text"],
        timestep=t / 1000,
        position_ids=pipeline.prepare_position_ids(length, height // 2, width // 2, x.device),
        encoder_attention_mask=inputs["mask"],
        return_dict=False,
    )[0]
    return _TOKENS.unpack(output, height, width)


CODE = Code(layout=qwen_image.CODE.layout, check=_check, inputs=_inputs, predict=_predict)
