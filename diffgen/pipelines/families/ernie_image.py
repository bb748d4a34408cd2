"""ERNIE-Image: a transformer that reads latents and the text of Ministral 3 as one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffgen.errors import InputError
from diffgen.models.families import Family

from . import Code, Inputs, flux2, qwen_image, z_image


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    flux2.check_vae(where, parts["vae"])
    transformer, width = parts["transformer"].config, parts["text_encoder"].config.hidden_size
    channels = parts["vae"].config.latent_channels * family.patch**2
    for what, needed, value in (
        ("in_channels", channels, transformer.in_channels),
        ("out_channels", channels, transformer.out_channels),
        ("patch_size", 1, transformer.patch_size),
        ("text_in_dim", width, transformer.text_in_dim),
        ("rope_axes_dim", transformer.hidden_size // transformer.num_attention_heads, sum(transformer.rope_axes_dim)),
    ):
        if value != needed:
            raise InputError(f"{where}: the transformer's {what} is {value}, the other parts need {needed}")


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Inputs]) -> Tensor:
    width = pipeline.transformer.config.text_in_dim
    texts, lengths = pipeline._pad_text(list(inputs["text"]), x.device, x.dtype, width)
    output: Tensor = pipeline.transformer(
        hidden_states=x, timestep=t, text_bth=texts, text_lens=lengths, return_dict=False
    )[0]
    return output


CODE = Code(layout=qwen_image.CODE.layout, check=_check, inputs=z_image.CODE.inputs, predict=_predict)
