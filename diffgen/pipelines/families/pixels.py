"""Unconditional diffusion: a UNet that makes pixels of noise and reads nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffgen.errors import InputError
from diffgen.models.families import Family

from . import Code


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    unet = parts["unet"].config
    if unet.in_channels != unet.out_channels or unet.class_embed_type or unet.num_class_embeds:
        raise InputError(f"{where}: the UNet is not one that makes a picture of noise and nothing else")


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Tensor], size: tuple[int, int], guidance: float | None
) -> dict[str, Tensor]:
    return {}


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = pipeline.unet(x, t, return_dict=False)[0]
    return output


CODE = Code(layout=lambda name, config: None, check=_check, inputs=_inputs, predict=_predict)
