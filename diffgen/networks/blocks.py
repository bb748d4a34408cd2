"""What the UNet and the DiT share: the embedding of time and class, attention, and the checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def waves(values: Tensor, width: int) -> Tensor:
    """Attention Is All You Need, section 3.5: values [N] as waves of lengths 2π to 2π·10,000, float32 [N, width]."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=values.device) * (-math.log(10_000.0) / half))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Condition(nn.Module):
    """The embedding of a picture's time, of its class and of how it was augmented, as one vector [B, out]."""

    def __init__(self, width: int, out: int, classes: int | None, augment: int) -> None:
        super().__init__()
        self.width = width
        self.into, self.out = nn.Linear(width, out), nn.Linear(out, out)
        self.label = None if classes is None else nn.Embedding(classes + 1, out)  # the last one is the null class
        self.augment = nn.Linear(augment, out, bias=False) if augment else None

    def forward(self, t: Tensor, label: Tensor | None, changes: Tensor | None) -> Tensor:
        c = self.out(F.silu(self.into(waves(t, self.width).to(self.into.weight.dtype))))
        if self.augment is not None and changes is not None:  # without changes, zeros: pictures as they are
            c = c + self.augment(changes.to(c.dtype))
        if self.label is None:
            return c
        if label is None:
            label = torch.full(t.shape, self.label.num_embeddings - 1, device=t.device)
        return c + self.label(label)


def split_heads(tokens: Tensor, parts: int, head_width: int) -> tuple[Tensor, ...]:
    """[B, N, parts·heads·head_width] as `parts` tensors [B, heads, N, head_width]."""
    B, N, _ = tokens.shape
    return tokens.reshape(B, N, parts, -1, head_width).permute(2, 0, 3, 1, 4).unbind()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v for q [B, heads, N, d] and k, v [B, heads, M, d], as [B, N, heads·d].

    It uses torch's fused kernel, with one exception: training in bfloat16 on a CPU uses three plain operations, because
    the backward pass of the fused kernel takes two to seven times as long there (torch 2.13). If N·M is large, the
    matrix would need too much memory, so the fused kernel runs then too.
    """
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= 2**20:
        out = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).softmax(dim=3) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def zeroed(layer: Layer) -> Layer:
    """The layer with every weight set to 0, so that its output is 0 at first."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


def pad(x: Tensor, factor: int) -> Tensor:
    """x [B, C, H, W] with its last row and column repeated until `factor` divides both sizes."""
    H, W = x.shape[2:]
    return F.pad(x, (0, -W % factor, 0, -H % factor), mode="replicate") if H % factor or W % factor else x


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raise ValueError unless the value is an int in this range."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number, {low} to {high}; got {value!r}")


def check_common(config: dict[str, Any]) -> None:
    """Check the arguments that both networks have. Raises ValueError."""
    for name, high in {"channels": 1024, "out_channels": 2048, "width": 8192}.items():
        check_whole(name, config[name], 1, high)
    for name, high in {"classes": 1_000_000, "text_width": 16_384}.items():
        if config[name] is not None:
            check_whole(name, config[name], 1, high)
    check_whole("augment", config.get("augment", 0), 0, 64)
    dropout = config["dropout"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number, 0 to less than 1; got {dropout!r}")


def check_call(
    config: dict[str, Any],
    x: Tensor,
    t: Tensor,
    label: Tensor | None,
    context: Tensor | None,
    changes: Tensor | None,
) -> None:
    """Check the shapes and dtypes of a network's inputs. Raises ValueError.

    The values of labels are checked only on a CPU: on another device the check would wait for it.
    """
    C, classes, width = config["channels"], config["classes"], config["text_width"]
    if x.ndim != 4 or x.shape[1] != C or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"pictures must be floating point [B, {C}, H, W], got {x.dtype} {list(x.shape)}")
    B = len(x)
    if t.shape != (B,) or t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"times must be numbers [{B}], got {t.dtype} {list(t.shape)}")
    if label is not None:
        if classes is None:
            raise ValueError("this network has no classes: label must be None")
        if label.dtype != torch.int64 or label.shape != (B,):
            raise ValueError(f"labels must be a LongTensor [{B}], got {label.dtype} {list(label.shape)}")
        if label.device.type == "cpu" and not 0 <= int(label.min()) <= int(label.max()) <= classes:
            extent = f"{int(label.min())} to {int(label.max())}"
            raise ValueError(f"labels must lie in 0 to {classes} ({classes} is the null class), got {extent}")
    numbers = config.get("augment", 0)
    if changes is not None and (not numbers or changes.shape != (B, numbers)):
        expected = f"[{B}, {numbers}]" if numbers else "None: this network is not told of them"
        raise ValueError(f"changes must be {expected}, got {list(changes.shape)}")
    if width is None and context is not None:
        raise ValueError("this network reads no text: context must be None")
    if width is not None and (context is None or context.ndim != 3 or (len(context), context.shape[2]) != (B, width)):
        shape = "none" if context is None else str(list(context.shape))
        raise ValueError(f"this network reads text: context must be [{B}, L, {width}], got {shape}")


def as_list(name: str, values: Sequence[Any]) -> list[Any]:
    """A sequence as a list. Raises ValueError for anything else."""
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{name} must be a list, got {values!r}")
    return list(values)
