"""Augmentation of training pictures: crops, colour, and the changes of ADA, of which the network is told.

A crop or a change of colour may show in the samples: use it where the data could look like that. The changes of ADA
(Karras et al. 2020, "Training GANs with Limited Data", appendix B) go further, so the network gets their numbers as a
condition; samples are made with zeros, which stand for a picture as it is (EDM, Karras et al. 2022, appendix F.2).

Everything about position i of step k is drawn from the generator (seed, k), the same numbers whichever changes are on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .seeds import AUGMENT, generator

NUMBERS = 10  # that tell the network of the changes: see `changes_of`
UNIFORMS, NORMALS = 14, 8


class Augmentation:
    """What a configuration's `data.crop`, `data.colour` and `data.augment` do."""

    def __init__(self, seed: int, *, crop: int = 0, colour: float = 0.0, augment: float = 0.0) -> None:
        """
        crop     the largest shift in pixels
        colour   the largest relative change of brightness, contrast and saturation
        augment  the probability of each of ADA's changes
        """
        self.seed, self.crop, self.colour, self.augment = seed, crop, colour, augment

    @property
    def numbers(self) -> int:
        """How many numbers the network is told."""
        return NUMBERS if self.augment else 0

    def __bool__(self) -> bool:
        return bool(self.crop or self.colour or self.augment)

    def draw(self, k: int, batch: int) -> dict[str, Tensor]:
        """{"shift": int64 [B, 2], "tint": float32 [B, 3], "changes": float32 [B, NUMBERS]} for the batch of step k,
        those that are on."""
        g = generator(self.seed, AUGMENT, k)
        u, n = torch.rand(UNIFORMS, batch, generator=g), torch.randn(NORMALS, batch, generator=g)
        drawn = {}
        if self.crop:
            drawn["shift"] = (u[:2] * (2 * self.crop + 1)).long().sub(self.crop).T.contiguous()
        if self.colour:
            drawn["tint"] = ((2 * u[2:5] - 1) * self.colour).T.contiguous()
        if self.augment:
            drawn["changes"] = changes_of(u[5:], n, self.augment)
        return drawn


def changes_of(u: Tensor, n: Tensor, p: float) -> Tensor:
    """ADA's changes, float32 [B, NUMBERS], each with probability p, from uniform [9, B] and normal numbers [8, B].

    mirrored (0 or 1), rotation (cos − 1, sin), log2 of the scale, log2 of the aspect, shift (x, y) in parts of the
    side, brightness, log2 of the contrast, log2 of the saturation. All are 0 for a picture as it is.
    """
    on = (u[:8] < p).float()
    angle = on[1] * (2 * u[8] - 1) * math.pi
    columns = [
        (u[0] < p / 2).float(),
        angle.cos() - 1,
        angle.sin(),
        on[2] * 0.2 * n[0],
        on[3] * 0.2 * n[1],
        on[4] * 0.125 * n[2],
        on[4] * 0.125 * n[3],
        on[5] * 0.2 * n[4],
        on[6] * 0.5 * n[5],
        on[7] * n[6],
    ]
    return torch.stack(columns, dim=1)


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    """Move each picture [B, C, H, W] by its (rows, columns), int64 [B, 2]; mirrored pixels fill the gap."""
    for dim, by in zip((2, 3), shift.unbind(1), strict=True):
        side = x.shape[dim]
        at = (torch.arange(side, device=x.device) - by[:, None]) % (2 * side)
        at = torch.where(at < side, at, 2 * side - 1 - at)
        x = x.gather(dim, (at[:, None, :, None] if dim == 2 else at[:, None, None, :]).expand_as(x))
    return x


def tinted(x: Tensor, tint: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in [-1, 1] with brightness, contrast and saturation changed by `tint` [B, 3].

    Brightness is added, contrast is relative to grey, saturation to the picture's own grey. A fourth channel, which is
    opacity, and a single channel's saturation stay as they are. Results are clipped to [-1, 1].
    """
    return _coloured(x, tint[:, 0], 1 + tint[:, 1], 1 + tint[:, 2]).clamp(-1, 1)


def changed(x: Tensor, changes: Tensor) -> Tensor:
    """Pictures [B, C, H, W] with ADA's changes [B, NUMBERS]; mirrored pixels fill what comes from outside."""
    mirrored, cos, sin, scale, aspect, right, down = changes[:, :7].unbind(1)
    cos = cos + 1
    wide, tall = 2 ** -(scale + aspect), 2 ** -(scale - aspect)  # from a place in the result to its source
    sign, ratio = 1 - 2 * mirrored, x.shape[2] / x.shape[3]  # the grid's unit is half a side, in both directions
    affine = torch.stack(
        [
            torch.stack([sign * wide * cos, sign * wide * sin * ratio, -2 * right], dim=1),
            torch.stack([-tall * sin / ratio, tall * cos, -2 * down], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    geometry = (changes[:, :7] != 0).any(1)
    x = torch.where(geometry[:, None, None, None], moved, x)  # untouched pictures keep their bits
    brightness, contrast, saturation = changes[:, 7:].unbind(1)
    coloured = _coloured(x, brightness, 2**contrast, 2**saturation)
    return torch.where((changes[:, 7:] != 0).any(1)[:, None, None, None], coloured, x)


def _coloured(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Add the brightness, multiply by the contrast, multiply the distance from grey by the saturation; each [B]."""
    colours, opacity = (x[:, :3], x[:, 3:]) if x.shape[1] == 4 else (x, x[:, :0])
    colours = colours * contrast[:, None, None, None] + brightness[:, None, None, None]
    if colours.shape[1] == 3:
        grey = colours.mean(1, keepdim=True)
        colours = grey + (colours - grey) * saturation[:, None, None, None]
    return torch.cat([colours, opacity], dim=1)
