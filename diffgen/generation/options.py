"""The options of generate: one row each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypedDict

from PIL import Image

Source = str | os.PathLike[str] | Image.Image


class Options(TypedDict, total=False):
    """What may be asked of pictures besides a prompt, by the names of the command's options; None is "not said"."""

    negative: str
    style: str | Sequence[str] | None
    prompt_syntax: str  # a1111 or plain
    clip_skip: int  # 1 is off
    count: int  # pictures of each prompt; picture i has seed + i
    seed: int | None  # random unless given
    seeds: str | Sequence[int] | None  # instead of seed and count: "0-7", "1,5,9"
    size: str | int | tuple[int, int] | None  # (width, height), "WxH", or the side of a square
    steps: int | None
    guidance: float | None
    guidance_rescale: float
    guidance_interval: str | Sequence[float] | None  # (from, to), shares of the steps
    scheduler: str | None
    grid: str | None
    batch_size: int
    image: Source | None  # a file, or a picture of Pillow
    strength: float | None
    mask: Source | None  # white is made anew
    outpaint: str | Sequence[int] | None  # (left, top, right, bottom) pixels
    controls: Sequence[str]  # TYPE=IMAGE[:SCALE]
    control_models: Sequence[str]  # [TYPE=]PATH
    loras: Sequence[str]  # PATH[:SCALE]
    embeddings: Sequence[str]  # WORD=FILE
    upscale: float | None
    upscale_mode: str | None  # lanczos (unless said) or latent
    upscale_strength: float | None
    refiner: str | None  # a model of the family sdxl-refiner
    variation_seed: int | None
    variation_strength: float | None
    tile: bool
    vae_tiling: bool
    safety: bool
    wildcards: Sequence[str] | None  # folders
    keep_steps: bool  # pictures come with what each evaluation predicted
    attention: str | Sequence[str] | None  # words whose cross-attention is wanted


# Options that a run has not, by what stands for "not asked for"; everything that is empty does too.
OTHERS = {
    "negative": "",
    "style": None,
    "clip_skip": 1,
    "guidance_rescale": 0.0,
    "guidance_interval": None,
    "variation_seed": None,
    "variation_strength": None,
    "tile": False,
    "image": None,
    "strength": None,
    "mask": None,
    "outpaint": None,
    "controls": None,
    "control_models": None,
    "upscale": None,
    "upscale_mode": None,
    "upscale_strength": None,
    "refiner": None,
    "loras": None,
    "embeddings": None,
    "attention": None,
}
