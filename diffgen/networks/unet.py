"""The UNet (Ho et al. 2020, with the blocks of Dhariwal & Nichol 2021).

    first ── blocks ── shrink ── blocks ── middle ── blocks ── grow ── blocks ── last
              H × W             H/2 × W/2                               H × W

Each block on the way up also reads the output of a part on the way down, the last one first (skip connections).
Activations have their channels last in memory, which is fastest for convolutions; weights keep their layout. Under
autocast, convolutions and attention run in bfloat16, normalisation and SiLU in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Condition, as_list, attend, check_call, check_common, check_whole, pad, split_heads, zeroed


class GroupNorm(nn.GroupNorm):
    """Group Normalization (Wu & He 2018) in float32 or float64: up to 32 groups of at least four channels."""

    def __init__(self, channels: int) -> None:
        most = max(1, min(32, channels // 4))
        super().__init__(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels)

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        y = F.group_norm(x.to(exact), self.num_groups, self.weight.to(exact), self.bias.to(exact), self.eps)
        return y.to(self.weight.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the condition scales and shifts between them (ADM's adaptive group norm)."""

    def __init__(self, into: int, out: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(into)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * out)
        self.norm2 = GroupNorm(out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Attention of every pixel to all pixels and, in a network that reads text, to its tokens too (GLIDE)."""

    def __init__(self, channels: int, head_width: int, text_width: int | None) -> None:
        super().__init__()
        self.head_width = head_width
        inner = max(1, channels // head_width) * head_width
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * inner)
        self.text = None
        if text_width is not None:
            self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, 2 * inner))
        self.out = zeroed(nn.Linear(inner, channels))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        B, C, H, W = x.shape
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        q, k, v = split_heads(self.qkv(pixels), 3, self.head_width)
        if self.text is not None:
            text_k, text_v = split_heads(self.text(context), 2, self.head_width)
            k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
        return x + self.out(attend(q, k, v)).reshape(B, H, W, C).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A residual block and, on the levels that have it, attention."""

    def __init__(self, residual: ResidualBlock, attention: Attention | None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
        x = self.residual(x, c)
        return x if self.attention is None else self.attention(x, context)


class Shrink(nn.Module):
    """Halve the size with a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
        return self.conv(x)


class Grow(nn.Module):
    """Double the size: repeat every pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """A UNet for pictures of any size: it pads them to a size that can be halved, and crops the output.

    channels, out_channels   of the pictures and of the output: None is the same, 2·channels for a learned variance
    width                    channels of the first level; level i has width·multipliers[i] at 1/2^i of the size
    blocks                   on each level on the way down; one more on the way up
    attention                whether a level has attention after each block; the middle always has it
    head_width               channels of an attention head
    dropout                  in each residual block, drawn from torch's global generator
    classes                  number of classes, or None
    text_width               of the text's tokens, or None
    augment                  numbers that say how a picture was augmented, or 0

    `config` has all arguments as JSON values. Raises ValueError for a wrong value.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[bool] = (False, True, True),
        head_width: int = 32,
        dropout: float = 0.0,
        classes: int | None = None,
        text_width: int | None = None,
        augment: int = 0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels,
            "out_channels": channels if out_channels is None else out_channels,
            "width": width,
            "multipliers": as_list("multipliers", multipliers),
            "blocks": blocks,
            "attention": as_list("attention", attention),
            "head_width": head_width,
            "dropout": dropout,
            "classes": classes,
            "text_width": text_width,
            **({"augment": augment} if augment else {}),
        }
        _check_arguments(self.config)
        condition = 4 * width
        levels = [(width * multiplier, here) for multiplier, here in zip(multipliers, attention, strict=True)]

        def block(into: int, out: int, has_attention: bool) -> Block:
            residual = ResidualBlock(into, out, condition, dropout)
            return Block(residual, Attention(out, head_width, text_width) if has_attention else None)

        self.condition = Condition(width, condition, classes, augment)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, now, skips = nn.ModuleList(), width, [width]  # current channels, and those of the skip connections
        for level, (out, here) in enumerate(levels):
            if level:
                self.down.append(Shrink(now))
                skips.append(now)
            for _ in range(blocks):
                self.down.append(block(now, out, here))
                now = out
                skips.append(now)
        self.middle = nn.ModuleList([block(now, now, True), block(now, now, False)])
        self.up = nn.ModuleList()
        for level, (out, here) in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                self.up.append(block(now + skips.pop(), out, here))
                now = out
            if level:
                self.up.append(Grow(now))
        self.norm = GroupNorm(now)
        self.last = zeroed(nn.Conv2d(now, self.config["out_channels"], 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        context: Tensor | None = None,
        changes: Tensor | None = None,
    ) -> Tensor:
        """The output [B, out_channels, H, W] for pictures x [B, channels, H, W] at times t [B], integers or floats.

        `label` is a LongTensor [B]; the null class is the value `classes`, or None. A network that reads text needs
        `context` [B, L, text_width]. `changes` [B, augment] says how pictures were
        augmented; None: not at all. Raises ValueError for a wrong shape or dtype.
        """
        check_call(self.config, x, t, label, context, changes)
        H, W = x.shape[2:]
        x = pad(x, 2 ** (len(self.config["multipliers"]) - 1)).contiguous(memory_format=torch.channels_last)
        c = F.silu(self.condition(t, label, changes))
        x = self.first(x)
        skips = [x]
        for part in self.down:
            x = part(x, c, context)
            skips.append(x)
        for part in self.middle:
            x = part(x, c, context)
        for part in self.up:
            if isinstance(part, Block):
                x = torch.cat([x, skips.pop()], dim=1)
            x = part(x, c, context)
        return self.last(F.silu(self.norm(x)))[:, :, :H, :W]


def _check_arguments(config: dict[str, Any]) -> None:
    """Raise ValueError for an argument of `UNet` that doesn't fit."""
    check_common(config)
    check_whole("blocks", config["blocks"], 1, 64)
    check_whole("head_width", config["head_width"], 1, 1024)
    multipliers, attention = config["multipliers"], config["attention"]
    check_whole("the number of levels (multipliers)", len(multipliers), 1, 8)
    for multiplier in multipliers:
        check_whole("a multiplier", multiplier, 1, 64)
    if len(attention) != len(multipliers) or not all(type(one) is bool for one in attention):
        raise ValueError(f"attention must be a true or false for each of {len(multipliers)} levels; got {attention}")
    if config["width"] % 2:
        raise ValueError(f"width must be even, got {config['width']}")
