"""Latents: where sampling starts, packing, masks, and interpolation between noises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Start:
    """What an image to image begins with: clean latents and standard normal noise, both [B, C, h, w].

    `mask` [B, 1, h, w] is 1 where latents are free and 0 where they follow the clean ones; None: all are free.
    `pure`: begin with the noise alone, whatever is in the picture.
    """

    clean: Tensor
    noise: Tensor
    mask: Tensor | None = None
    pure: bool = False


def blend(pipeline: Any, start: Start, times: Tensor, i: int, latents: Tensor) -> Tensor:
    """Latents after evaluation i, outside the mask replaced by the picture's own at the noise of the next time."""
    own = start.clean
    if i + 1 < len(times):
        own = pipeline.scheduler.add_noise(own, start.noise, times[i + 1].reshape(1))
    mask = start.mask
    assert mask is not None
    if latents.ndim == 3:
        own, mask = packed(pipeline, own), packed(pipeline, mask.expand(start.clean.shape))
    return (1 - mask) * own + mask * latents


def packed(pipeline: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as Flux reads them, [B, h·w/4, 4C]; for other pipelines as they are."""
    if not hasattr(pipeline, "_pack_latents"):
        return latents
    return pipeline._pack_latents(latents, *latents.shape)


def unpacked(pipeline: Any, latents: Tensor, width: int, height: int) -> Tensor:
    """The reverse, for a picture of that size in pixels."""
    if latents.ndim != 3:
        return latents
    return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between two noises on the sphere: `a` at share 0, `b` at 1, and of their norms everywhere between.

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
    """A mask of pixels [1, 1, H, W] in [0, 1] as one of latents: free (1) where any of its pixels is half white."""
    return torch.nn.functional.adaptive_max_pool2d((mask >= 0.5).float(), (height, width))
