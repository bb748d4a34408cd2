"""What a family does in its own way, where its row in `diffgen/models/families.py` is not enough: a module each.

A row names its module. Nothing else does, so that a new family needs no edit here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgen.diffusion.guidance import guide
from diffgen.errors import InputError
from diffgen.models.families import FAMILIES, Family

from ..weights.pieces import Rename

Inputs = Tensor | list[Tensor]  # [B, …], or a list of B tensors of different lengths


@dataclass(frozen=True)
class Control:
    """A control picture as a network reads it."""

    network: Any  # the ControlNet; None: the denoiser itself reads the picture
    kind: str  # canny, depth, …
    condition: Tensor  # clean latents or pixels [B, C, h, w]
    scale: float

    def for_batch(self, count: int) -> Tensor:
        """The condition of `count` pictures, a multiple of B: guided outputs take two evaluations of each."""
        return self.condition.repeat(count // len(self.condition), 1, 1, 1)


def summed(residuals: Iterable[Sequence[Tensor] | None]) -> list[Tensor] | None:
    """The residuals of several ControlNets added up, block by block; None where there are none."""
    lists = [blocks for blocks in residuals if blocks]
    return [torch.stack(blocks).sum(0) for blocks in zip(*lists, strict=True)] if lists else None


@dataclass(frozen=True)
class Code:
    """A family's own functions. Every module here has one, `CODE`."""

    layout: Rename  # of the denoiser in single files
    # check(where, family, variant, parts): do the parts, and the settings of the row, fit together? Raises InputError,
    # which begins with `where`.
    check: Callable[[Path, Family, str | None, Mapping[str, Any]], None]
    # inputs(pipeline, embeddings, (width, height) in pixels, guidance or None): what the network reads besides x and t,
    # each [B, …]. The embeddings go by the names of the pipeline's arguments; guidance is that of a network which takes
    # it as an input.
    inputs: Callable[[Any, Mapping[str, Tensor], tuple[int, int], float | None], Mapping[str, Any]]
    # predict(pipeline, x, t, inputs): the network's output for x [B, …] at times t [B]
    predict: Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor]
    # prepared(pipeline, latents [B, C, h, w]): what prepare_latents of the family's image-to-image pipeline returns
    prepared: Callable[[Any, Tensor], Any] = lambda pipeline, latents: latents
    # guide(conditional, unconditional, scale): the guided output, each [B, …]
    guide: Callable[[Tensor, Tensor, float], Tensor] = guide
    # originals(configuration, diffusers' names of layers): possible original names of layers; `layout` tells which are
    originals: Callable[[Any, Iterable[str]], Iterable[str]] = lambda config, layers: layers
    words: str = ""  # a pattern: the pieces of the original names that have an underscore in them


def check_transformer(where: Path, transformer: Any, *, channels: int | None, pooled: int, width: int) -> None:
    """Does a transformer's configuration fit the latents' channels, unless they are None, and the encoders' widths?

    Raises InputError.
    """
    if channels is not None and (
        transformer.in_channels != channels or (transformer.out_channels or channels) != channels
    ):
        raise InputError(
            f"{where}: the transformer has {transformer.in_channels} channels in, the VAE makes {channels}"
        )
    if (needed := transformer.pooled_projection_dim) != pooled:
        raise InputError(
            f"{where}: the transformer reads a text summary of width {needed}, the encoders write {pooled}"
        )
    if (needed := transformer.joint_attention_dim) != width:
        raise InputError(f"{where}: the transformer reads texts of width {needed}, the encoders write {width}")


def check_widths(where: Path, transformer: Any, *, channels: int, width: int) -> None:
    """Does a transformer's configuration fit the channels that it reads and the width of its texts? Raises InputError.

    Its channels are `in_channels`, its texts' width `joint_attention_dim`.
    """
    if transformer.in_channels != channels:
        raise InputError(
            f"{where}: the transformer has {transformer.in_channels} channels in, the VAE makes {channels}"
        )
    if (needed := transformer.joint_attention_dim) != width:
        raise InputError(f"{where}: the transformer reads texts of width {needed}, the encoders write {width}")
    if sum(transformer.axes_dims_rope) != transformer.attention_head_dim:
        raise InputError(f"{where}: axes_dims_rope {transformer.axes_dims_rope} do not make up attention_head_dim")


@functools.cache
def code_of(family: str) -> Code:
    """The functions of a family, by the module that its row names."""
    code: Code = importlib.import_module(f"{__name__}.{FAMILIES[family].module}").CODE
    return code
