"""A small DiT (Peebles & Xie 2023): a transformer over patches; the condition scales, shifts and gates its blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Condition, attend, check_call, check_common, check_whole, pad, split_heads, waves, zeroed


def positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """2-D sine-cosine positions [rows·columns, width] (MAE, appendix A): half of the width for the row, half for the
    column. They are computed, not learned, so that pictures of any size have them."""
    down = waves(torch.arange(rows, device=device), width // 2)
    along = waves(torch.arange(columns, device=device), width // 2)
    return torch.cat([down.repeat_interleave(columns, dim=0), along.repeat(rows, 1)], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A layer norm with the condition's shift and scale [B, 1, C] instead of learned ones; x [B, N, C]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[2:], eps=1e-6), 1 + scale)


class DiTBlock(nn.Module):
    """Attention and a two-layer perceptron; adaLN-Zero: every gate starts at 0, so the block starts as the identity."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)
        q, k, v = split_heads(self.qkv(modulate(x, shift1, scale1)), 3, self.head_width)
        x = torch.addcmul(x, gate1, self.out(attend(q, k, v)))
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2)))


class DiT(nn.Module):
    """A transformer for pictures of any size: it pads to whole patches and crops the output.

    channels, out_channels   of the pictures and of the output: None is the same, 2·channels for a learned variance
    patch                    side of a patch in pixels; each patch becomes one token
    width, depth             of a token; number of blocks
    heads                    of attention
    dropout                  in each perceptron, drawn from torch's global generator
    classes                  number of classes, or None
    text_width               of the text's tokens, or None; they come before the patches ("in-context conditioning")
    augment                  numbers that say how a picture was augmented, or 0

    `config` has all arguments as JSON values. Raises ValueError for a wrong value.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        patch: int = 2,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        dropout: float = 0.0,
        classes: int | None = None,
        text_width: int | None = None,
        augment: int = 0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels,
            "out_channels": channels if out_channels is None else out_channels,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "dropout": dropout,
            "classes": classes,
            "text_width": text_width,
            **({"augment": augment} if augment else {}),
        }
        _check_arguments(self.config)
        out_channels = self.config["out_channels"]
        self.condition = Condition(width, width, classes, augment)
        self.first = nn.Conv2d(channels, width, patch, stride=patch)
        self.text = None
        if text_width is not None:
            self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads, dropout) for _ in range(depth))
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.last = zeroed(nn.Linear(width, patch * patch * out_channels))

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
        B, _, H, W = x.shape
        patch = self.config["patch"]
        c = F.silu(self.condition(t, label, changes))
        x = self.first(pad(x, patch))
        rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        x = x + positions(rows, columns, x.shape[2], x.device).to(x.dtype)
        if self.text is not None:
            x = torch.cat([self.text(context), x], dim=1)
        for block in self.blocks:
            x = block(x, c)
        x = x[:, -rows * columns :]
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=2)
        patches = self.last(modulate(x, shift, scale)).reshape(B, rows, columns, patch, patch, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, columns * patch)[:, :, :H, :W]


def _check_arguments(config: dict[str, Any]) -> None:
    """Raise ValueError for an argument of `DiT` that doesn't fit."""
    check_common(config)
    check_whole("patch", config["patch"], 1, 64)
    check_whole("depth", config["depth"], 1, 256)
    check_whole("heads", config["heads"], 1, 256)
    if config["width"] % 4 or config["width"] % config["heads"]:
        raise ValueError(f"width must be a multiple of 4 and of {config['heads']} heads, got {config['width']}")
