"""Latents: their layouts, where sampling starts, masks, and interpolation between noises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """Where sampling starts: standard normal noise [B, C, h, w] and, in image to image, clean latents of that shape.

    `mask` [B, 1, h, w] is 1 where latents are free and 0 where they follow the clean ones; None: all are free.
    `pure`: begin with the noise alone, without the picture. `masked`, for a network that reads the mask: (latents
    [B, C, h, w] of the picture without its free part, the mask [1, 1, H, W] in pixels).
    """

    noise: Tensor
    clean: Tensor | None = None
    mask: Tensor | None = None
    pure: bool = False
    masked: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Codec:
    """A layout of latents: between [B, C, h, w] and what a family's network reads."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]  # of the packed latents, for that h and w


def _pack(latents: Tensor) -> Tensor:
    """Patches of 2×2 latents as Flux reads them: [B, C, h, w] to [B, h·w/4, 4C]."""
    return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpack(latents: Tensor, height: int, width: int) -> Tensor:
    patches = latents.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


# By the names that a family's row has (`Family.latents`).
CODECS = {
    "plain": Codec(lambda latents: latents, lambda latents, height, width: latents),
    "packed": Codec(_pack, _unpack),
}


def blend(
    scheduler: Any, start: Start, times: Tensor, i: int, latents: Tensor, codec: Codec = CODECS["plain"]
) -> Tensor:
    """Latents after evaluation i, outside the mask replaced by the picture's own at the noise of the next time."""
    assert start.clean is not None
    assert start.mask is not None
    own = start.clean
    if i + 1 < len(times):
        own = scheduler.add_noise(own, start.noise, times[i + 1].reshape(1))
    own, mask = codec.pack(own), codec.pack(start.mask.expand(start.clean.shape))
    return (1 - mask) * own + mask * latents


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Interpolate between two noises on the sphere: `a` at share 0, `b` at 1; the norm stays between theirs.

    Shoemake 1985: sin((1−s)·θ)/sin θ · a + sin(s·θ)/sin θ · b, where θ is the angle between a and b.
    """
    if share in (0, 1):
        return b if share else a
    x, y = a.double().flatten(), b.double().flatten()
    angle = torch.arccos((x @ y / (x.norm() * y.norm())).clamp(-1, 1))
    if angle.sin() < 1e-6:
        mixed = (1 - share) * x + share * y
    else:
        mixed = (torch.sin((1 - share) * angle) * x + torch.sin(share * angle) * y) / angle.sin()
    return mixed.reshape(a.shape).to(a.dtype)


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask of latents from one of pixels [1, 1, H, W] in [0, 1]: free (1) where any of its pixels is half white."""
    return torch.nn.functional.adaptive_max_pool2d((mask >= 0.5).float(), (height, width))
