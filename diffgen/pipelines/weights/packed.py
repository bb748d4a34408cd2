"""Weights in few bits that stay so in memory: a linear layer decodes its matrix each time it computes.

A packed matrix is bytes [rows, bytes of a row], and each row can be decoded alone. So rows can be cut and joined as
those of any matrix. The formats are those of ggml (GGUF files), eight-bit floats with a scale, and NF4 of bitsandbytes
(Dettmers et al. 2023, QLoRA). A block of ggml's is code·scale, or code·scale − minimum; "K" formats have scales of
their own for groups of 16 or 32 codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffgen.models.gguf import BLOCKS

from .pieces import ROWWISE, Take

# The values of the sixteen codes: quantiles of a normal distribution (NF4), and those of ggml's non-linear formats.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
NF4_BLOCK = 64  # elements


@dataclass(frozen=True)
class Packed:
    """A matrix of few bits."""

    data: Tensor  # uint8 [rows, bytes of a row]
    format: str  # of DECODERS
    columns: int

    def decoded(self) -> Tensor:
        """The matrix in float32, [rows, columns]."""
        return decode(self.data, self.format, self.columns)

    def taken(self, take: Take) -> Packed | Tensor:
        """The part that `take` has of it: packed if that is whole rows, else decoded."""
        if getattr(take, "func", take) in ROWWISE:
            return replace(self, data=take(self.data).contiguous())
        return take(self.decoded())


def decode(data: Tensor, kind: str, columns: int) -> Tensor:
    """Decode bytes [rows, bytes of a row] of a format to float32 [rows, columns]."""
    size = BLOCKS.get(kind, (NF4_BLOCK, 4 + NF4_BLOCK // 2) if kind == "NF4" else (columns, 4 + columns))[1]
    return DECODERS[kind](data.reshape(-1, size)).reshape(len(data), columns)


# Blocks: bytes [n, bytes of a block] to float32 [n, elements of a block]


def _cut(x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return x.split([*sizes, x.shape[1] - sum(sizes)], dim=1)


def _half(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float16).float()


def _codes(x: Tensor, bits: int, run: int) -> Tensor:
    """Codes of few bits, [n, 8/bits · bytes]. A run of bytes has its lowest bits first, then its next higher ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    return (x.reshape(len(x), -1, 1, run) >> shifts[:, None] & (2**bits - 1)).reshape(len(x), -1)


def _groups(codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """code·scale − minimum, each group of codes with its own."""
    grouped = codes.float().reshape(*scales.shape, -1)
    values = scales[..., None] * grouped
    return (values if minima is None else values - minima[..., None]).reshape(len(codes), -1)


def _high_bit(low: Tensor, high: Tensor) -> Tensor:
    return low | high << 4


def _q4_0(x: Tensor) -> Tensor:
    scale, codes = _cut(x, 2)
    return _half(scale) * (_codes(codes, 4, 16).float() - 8)


def _q4_1(x: Tensor) -> Tensor:
    scale, least, codes = _cut(x, 2, 2)
    return _half(scale) * _codes(codes, 4, 16).float() + _half(least)


def _q5_0(x: Tensor) -> Tensor:
    scale, high, low = _cut(x, 2, 4)
    return _half(scale) * (_high_bit(_codes(low, 4, 16), _codes(high, 1, 1)).float() - 16)


def _q5_1(x: Tensor) -> Tensor:
    scale, least, high, low = _cut(x, 2, 2, 4)
    return _half(scale) * _high_bit(_codes(low, 4, 16), _codes(high, 1, 1)).float() + _half(least)


def _q8_0(x: Tensor) -> Tensor:
    scale, codes = _cut(x, 2)
    return _half(scale) * codes.contiguous().view(torch.int8).float()


def _q2_k(x: Tensor) -> Tensor:
    groups, codes, scale, least = _cut(x, 16, 64, 2)
    return _groups(_codes(codes, 2, 32), _half(scale) * (groups & 15), _half(least) * (groups >> 4))


def _q3_k(x: Tensor) -> Tensor:
    high, low, groups, scale = _cut(x, 32, 64, 12)
    codes = (_codes(low, 2, 32) | _codes(high, 1, 32) << 2).float() - 4
    scales = _high_bit(_codes(groups[:, :8], 4, 8), _codes(groups[:, 8:], 2, 4)).float() - 32
    return _groups(codes, _half(scale) * scales)


def _six_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, minima) of eight groups, six bits each, in twelve bytes."""
    scales, minima, rest = x.split(4, dim=1)
    last_scales, last_minima = rest & 15 | scales >> 2 & 48, rest >> 4 | minima >> 2 & 48
    return torch.cat([scales & 63, last_scales], 1), torch.cat([minima & 63, last_minima], 1)


def _q4_k(x: Tensor) -> Tensor:
    scale, least, groups, codes = _cut(x, 2, 2, 12)
    scales, minima = _six_bits(groups)
    return _groups(_codes(codes, 4, 32), _half(scale) * scales, _half(least) * minima)


def _q5_k(x: Tensor) -> Tensor:
    scale, least, groups, high, low = _cut(x, 2, 2, 12, 32)
    scales, minima = _six_bits(groups)
    codes = _high_bit(_codes(low, 4, 32), _codes(high, 1, 32))
    return _groups(codes, _half(scale) * scales, _half(least) * minima)


def _q6_k(x: Tensor) -> Tensor:
    low, high, groups, scale = _cut(x, 128, 64, 16)
    codes = _high_bit(_codes(low, 4, 64), _codes(high, 2, 32)).float() - 32
    return _groups(codes, _half(scale) * groups.contiguous().view(torch.int8))


def _iq4_nl(x: Tensor) -> Tensor:
    scale, codes = _cut(x, 2)
    return _half(scale) * _values(NON_LINEAR, _codes(codes, 4, 16))


def _iq4_xs(x: Tensor) -> Tensor:
    scale, high, low, codes = _cut(x, 2, 2, 4)
    scales = _high_bit(_codes(low, 4, 1), _codes(high, 2, 1)).float() - 32
    return _groups(_values(NON_LINEAR, _codes(codes, 4, 16)), _half(scale) * scales)


def _nf4(x: Tensor) -> Tensor:
    largest, codes = _cut(x, 4)
    both = torch.stack([codes >> 4, codes & 15], 2).flatten(1)
    return largest.contiguous().view(torch.float32) * _values(NF4, both)


def _values(table: tuple[float, ...], codes: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.int()]


def _float8(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A row: its scale in float32, then the numbers."""

    def decode_rows(x: Tensor) -> Tensor:
        scale, numbers = _cut(x, 4)
        return scale.contiguous().view(torch.float32) * numbers.contiguous().view(dtype).float()

    return decode_rows


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "NF4": _nf4,
    "F8_E4M3": _float8(torch.float8_e4m3fn),
    "F8_E5M2": _float8(torch.float8_e5m2),
}


# Layers


class PackedLinear(nn.Module):
    """A linear layer with a packed matrix. `weight` is empty, and has the dtype that the layer computes in."""

    def __init__(self, layer: nn.Linear, matrix: Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.format = matrix.format
        self.packed: nn.Parameter | None = nn.Parameter(matrix.data, requires_grad=False)
        self.bias = layer.bias
        self.weight: Any = torch.empty(0, dtype=dtype, device=matrix.data.device)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.matrix().to(x.dtype), self.bias)

    def matrix(self) -> Tensor:
        """The matrix [out, in], as it is stored or in float32."""
        if self.packed is None:
            stored: Tensor = self.weight
            return stored
        return decode(self.packed, self.format, self.in_features)

    def unpack(self) -> None:
        """Keep the matrix in the dtype that the layer computes in from now on."""
        if self.packed is not None:
            weight = nn.Parameter(self.matrix().to(self.weight.dtype), requires_grad=False)
            del self.weight
            self.packed, self.weight = None, weight


def pack(network: nn.Module, matrices: dict[str, tuple[Packed, torch.dtype]]) -> None:
    """Replace linear layers by packed ones: {name of the weight: (its matrix, the dtype to compute in)}."""
    for name, (matrix, dtype) in matrices.items():
        path = name.removesuffix(".weight")
        owner, _, last = path.rpartition(".")
        layer = network.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        setattr(network.get_submodule(owner), last, PackedLinear(layer, matrix, dtype))


def packed_layers(network: nn.Module) -> Iterator[PackedLinear]:
    """The layers of a network that are still packed."""
    for module in network.modules():
        if isinstance(module, PackedLinear) and module.packed is not None:
            yield module


def unpack(network: nn.Module) -> None:
    """Keep every matrix of a network in the dtype that its layer computes in."""
    for layer in packed_layers(network):
        layer.unpack()
