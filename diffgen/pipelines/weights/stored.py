"""Read tensors as files hold them: plain ones as tensors, matrices of few bits packed."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffgen.errors import InputError
from diffgen.models import gguf, quantized
from diffgen.models.gate import Component
from diffgen.models.gate import Tensor as Entry

from .packed import NF4, NF4_BLOCK, Packed, decode

MAPPED = 2**27  # bytes
PLAIN = {  # of GGUF
    "F32": torch.float32,
    "F16": torch.float16,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
}

Get = Callable[[str], Tensor]  # a tensor of the files, by its name


def stored(component: Component, names: Container[str]) -> Iterator[tuple[Path, str, Tensor | Packed]]:
    """(file, name, value) of each of these tensors in the component's files, one at a time."""
    tensors = component.tensors or {}
    for path in component.weights:
        with path.open("rb") as file:
            is_gguf = file.read(4) == gguf.MAGIC
        if is_gguf:
            yield from _from_gguf(path, names)
            continue
        for name, tensor in _from_safetensors(path, names):
            yield path, name, _joined(name, tensor, tensors[name], _getter(component))


def _from_gguf(path: Path, names: Container[str]) -> Iterator[tuple[Path, str, Tensor | Packed]]:
    with path.open("rb") as file:
        spans = gguf.read_spans(file, path)
        for name, span in sorted(spans.items(), key=lambda item: item[1].begin):
            if name not in names:
                continue
            file.seek(span.begin)
            data = torch.frombuffer(bytearray(file.read(span.bytes)), dtype=torch.uint8)
            if span.dtype in PLAIN:
                yield path, name, data.view(PLAIN[span.dtype]).reshape(span.shape)
                continue
            columns = span.shape[-1]
            elements, size = gguf.BLOCKS[span.dtype]
            rows = data.reshape(-1, columns // elements * size)
            matrix = Packed(rows, span.dtype, columns)
            yield path, name, matrix if len(span.shape) == 2 else matrix.decoded().reshape(span.shape)


def _from_safetensors(path: Path, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """An open file keeps every page in memory that was read from it. So it is opened anew after each MAPPED bytes."""
    with safe_open(path, framework="pt", device="cpu") as file:
        wanted = [name for name in file.keys() if name in names]  # noqa: SIM118 (not a dictionary)
    while wanted:
        read = 0
        with safe_open(path, framework="pt", device="cpu") as file:
            while wanted and read < MAPPED:
                name = wanted.pop(0)
                tensor = file.get_tensor(name)
                read += tensor.nbytes
                yield name, tensor
                del tensor


def _getter(component: Component) -> Get:
    def get(name: str) -> Tensor:
        for path in component.weights:
            with safe_open(path, framework="pt", device="cpu") as file:
                if name in file.keys():  # noqa: SIM118 (not a dictionary)
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
        raise InputError(f"{component.folder}: the tensor {name!r} is missing")  # the files changed since the check

    return get


def _joined(name: str, tensor: Tensor, entry: Entry, get: Get) -> Tensor | Packed:
    """The value of a weight, which several tensors may make up: see `quantized.joined`."""
    if entry.dtype == "NF4":
        return _nf4(name, tensor, entry, get)
    if entry.dtype not in quantized.FLOAT8:
        return tensor
    scale = get(entry.companions[0]).float() if entry.companions else torch.ones(1)
    if tensor.ndim != 2:
        return tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
    rows = scale.reshape(-1, 1).expand(len(tensor), 1).contiguous()
    return Packed(torch.cat([rows.view(torch.uint8), tensor.view(torch.uint8)], 1), entry.dtype, tensor.shape[1])


def _nf4(name: str, codes: Tensor, entry: Entry, get: Get) -> Tensor | Packed:
    """QLoRA, section 3: a scale for each block of 64, which may itself be a code of eight bits with a scale for 256."""
    rows, columns = entry.shape
    largest = get(f"{name}.absmax")
    if not torch.equal(get(f"{name}.quant_map"), torch.tensor(NF4)):
        raise InputError(f"the tensor {name!r} has codes of other values than NF4's")
    if f"{name}.nested_absmax" in entry.companions:
        state = json.loads(bytes(get(name + quantized.STATE)))
        scales = get(f"{name}.nested_absmax").repeat_interleave(256)[: len(largest)]
        largest = get(f"{name}.nested_quant_map")[largest.int()] * scales + state["nested_offset"]
    data = torch.zeros(len(largest) * NF4_BLOCK // 2, dtype=torch.uint8)
    data[: codes.numel()] = codes.flatten()
    blocks = torch.cat([largest.float()[:, None].view(torch.uint8), data.reshape(len(largest), -1)], 1)
    if columns % NF4_BLOCK == 0:
        return Packed(blocks.reshape(rows, -1), "NF4", columns)
    return decode(blocks, "NF4", NF4_BLOCK).flatten()[: rows * columns].reshape(rows, columns)
