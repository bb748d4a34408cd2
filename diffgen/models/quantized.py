"""Weights of few bits in safetensors files: which tensors make up one weight, and what is refused.

- Eight-bit floats with a scale: `x.weight` (F8) with `x.scale_weight` or `x.weight_scale` (F32, one number or one for
  each row).
- NF4 of bitsandbytes: `x.weight` (U8, two codes a byte) with `x.weight.absmax`, …, and a small JSON document,
  `x.weight.quant_state.bitsandbytes__nf4`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffgen.errors import InputError

FLOAT8 = ("F8_E4M3", "F8_E5M2")
WHOLE = ("U8", "I8")  # only as a part of a weight
SCALES = ("scale_weight", "weight_scale")
IGNORED = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale)")  # marks, and scales of what a layer reads
LAYOUT = re.compile(r"(.*)\.comfy_quant")
STATE = ".quant_state.bitsandbytes__nf4"
MAX_STATE = 4096  # bytes
BLOCK = 64  # elements of NF4 that share a scale
NUNCHAKU = re.compile(r"(.*\.)?(qweight|wscales|proj_down|smooth_factor(_orig)?)")
# quant_method of a config.json: why it is not read
REFUSED = {
    "nunchaku": "Nunchaku's kernels are code that comes from a hub; use a GGUF, fp8 or NF4 file instead",
    "torchao": "its files hold Python objects; load the full model with --quantize",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry in the header of a weights file."""

    dtype: str  # one of gate.DTYPES, of gguf.TYPES, or NF4
    shape: tuple[int, ...]
    companions: tuple[str, ...] = ()  # the tensors of the file that belong to it: see joined


Read = Callable[[str], bytes]  # the bytes of a tensor of the file, by its name


def joined(path: Path, tensors: Mapping[str, Tensor], read: Read) -> dict[str, Tensor]:
    """The tensors of a file, those that make up one weight as one. Raises InputError for a kind that is not read."""
    weights = dict(tensors)
    for name in tensors:
        if IGNORED.fullmatch(name):
            del weights[name]
        elif match := LAYOUT.fullmatch(name):
            del weights[name]
            _check_layout(path, name, _document(path, name, tensors[name], read), f"{match[1]}.weight" in tensors)
        elif name.endswith(STATE):
            _join_nf4(path, name.removesuffix(STATE), tensors, weights, read)
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT8 and name.endswith("weight"):
            stem = name.removesuffix("weight")
            if scale := next((stem + end for end in SCALES if stem + end in tensors), None):
                _check_scale(path, scale, tensors[scale], tensor)
                del weights[scale]
                weights[name] = replace(tensor, companions=(scale,))
    for name, tensor in weights.items():
        if tensor.dtype in WHOLE:
            if any(NUNCHAKU.fullmatch(other) for other in tensors):
                raise InputError(f"{path}: a Nunchaku (SVDQuant) file, which is not read", REFUSED["nunchaku"])
            hint = "read here: fp8 with scales, NF4 of bitsandbytes, GGUF"
            raise InputError(f"{path}: the tensor {name!r} has whole numbers ({tensor.dtype}) without a scale", hint)
    return weights


def check_method(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for a config.json that says its weights are quantised in a way that is not read."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return
    method = str(settings.get("quant_method", "")).lower()[:40]
    if method == "bitsandbytes" and settings.get("load_in_4bit") is True:
        return
    reason = next((why for word, why in REFUSED.items() if word in method), "NF4 of bitsandbytes is read")
    raise InputError(f"{path}: weights quantised by {method or 'an unnamed method'!r} are not read", reason)


def _check_layout(path: Path, name: str, document: Mapping[str, Any], known: bool) -> None:
    if not known or document.get("format") not in ("float8_e4m3fn", "float8_e5m2"):
        raise InputError(f"{path}: {name!r} has the format {str(document.get('format'))[:40]!r}", "read here: fp8")


def _check_scale(path: Path, name: str, scale: Tensor, weight: Tensor) -> None:
    if scale.dtype != "F32" or math.prod(scale.shape) not in (1, weight.shape[0]):
        raise InputError(f"{path}: {name!r} is no number in F32, nor one for each row of {list(weight.shape)}")


def _document(path: Path, name: str, tensor: Tensor, read: Read) -> dict[str, Any]:
    """The JSON object in the bytes of a tensor."""
    if tensor.dtype != "U8" or math.prod(tensor.shape) > MAX_STATE:
        raise InputError(f"{path}: {name!r} is no JSON of at most {MAX_STATE} bytes")
    try:
        document = json.loads(read(name).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {name!r} is broken JSON") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: {name!r} is no JSON object")
    return document


def _join_nf4(path: Path, name: str, tensors: Mapping[str, Tensor], weights: dict[str, Tensor], read: Read) -> None:
    """Replace the tensors of one weight by one of the shape that its JSON says, if their sizes agree with it."""
    document = _document(path, name + STATE, tensors[name + STATE], read)
    codes, shape = tensors.get(name), document.get("shape")
    where = f"{path}: the tensor {name!r}"
    whole = isinstance(shape, list) and all(type(side) is int and 0 < side < 2**31 for side in shape)
    if codes is None or codes.dtype != "U8" or not whole or not shape or len(shape) != 2:
        raise InputError(f"{where} has no matrix of codes with a shape in its JSON")
    if document.get("quant_type") != "nf4" or document.get("blocksize") != BLOCK:
        raise InputError(f"{where} is not NF4 in blocks of {BLOCK}")
    count = math.prod(shape)
    blocks = -(-count // BLOCK)
    parts = {"absmax": blocks, "quant_map": 16}
    if nested := f"{name}.nested_absmax" in tensors:
        offset = document.get("nested_offset")
        finite = isinstance(offset, int | float) and math.isfinite(offset)
        if document.get("nested_blocksize") != 256 or not finite:
            raise InputError(f"{where} has scales that are not in blocks of 256 with an offset")
        parts |= {"nested_absmax": -(-blocks // 256), "nested_quant_map": 256}
    companions = [f"{name}.{part}" for part in parts]
    for part, length in parts.items():
        tensor = tensors.get(f"{name}.{part}")
        dtype = "U8" if part == "absmax" and nested else "F32"
        if tensor is None or tensor.dtype != dtype or math.prod(tensor.shape) != length:
            raise InputError(f"{where} has no {part} of {length} numbers in {dtype}")
    if math.prod(codes.shape) * 2 != count + count % 2:
        raise InputError(f"{where} has {math.prod(codes.shape)} bytes, its shape {shape} needs {-(-count // 2)}")
    for companion in (*companions, name + STATE):
        del weights[companion]
    weights[name] = replace(codes, dtype="NF4", shape=tuple(shape), companions=(*companions, name + STATE))
