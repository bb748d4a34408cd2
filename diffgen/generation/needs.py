"""What a model needs in memory, estimated from the headers of its files and its configurations, without torch."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffgen.devices import LARGE, main_memory
from diffgen.errors import InputError
from diffgen.models import families
from diffgen.models.gate import Checked, Tensor
from diffgen.models.gguf import BLOCKS
from diffgen.models.hub import size_text

# Values that a network holds at once, per position and channel of its widest layer; and a decoder, per pixel and
# channel of its layer of full resolution. benchmarks/fit.py counts 16 to 26, and 6 and 18: the rest is for the
# allocator, and for what the operations need inside.
ACTIVATIONS = 40
DECODER, DECODER_3D = 8, 24
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
BITS = {"int8": 8.25, "fp8": 8.25, "nf4": 4.5}  # of an element of a quantised matrix, with its scales
NF4_BITS, FLOAT8_BITS = 4.5, 8.0
TILE = 512  # pixels on a side, of a decoder's tile
# In names of matrices that no linear layer has
EMBEDDINGS = ("embed_tokens", "token_emb", "position_emb", "positional_emb", "shared.", "attention_bias")


@dataclass(frozen=True)
class Needs:
    """Memory in bytes, for one picture."""

    parts: Mapping[str, int]  # weights of each network, as they would be loaded
    activations: int  # of the network that predicts the noise
    decoder: int  # of the autoencoder
    device: str  # in words
    free: int  # of the device

    @property
    def weights(self) -> int:
        return sum(self.parts.values())

    @property
    def busiest(self) -> int:
        """The larger of what is needed beside the weights: activations are never held with those of the decoder."""
        return max(self.activations, self.decoder)

    @property
    def total(self) -> int:
        return self.weights + self.busiest


def needs(
    checked: Checked, size: tuple[int, int], dtype: str = "bfloat16", quantize: str = "none", *, guided: bool = True
) -> Needs:
    """What a picture of `size` (width, height) needs, everything on the device; `dtype` is that of the weights.

    Raises InputError for a configuration that is no network's.
    """
    parts = {
        name: sum(
            _bytes(key, tensor, dtype, quantize if name != "vae" else "none") for key, tensor in part.tensors.items()
        )
        for name, part in checked.components.items()
        if part.tensors
    }
    device, free = device_memory()
    vae = checked.components.get("vae")
    try:
        activations = int(_activations(checked, size, guided) * BYTES[dtype])
        decoder = 0 if vae is None else int(decoder_values(vae.config, size) * BYTES[dtype])
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{checked.folder}: the configuration of its network or VAE is incomplete") from error
    return Needs(parts, activations, decoder, device, free)


def report(checked: Checked, size: tuple[int, int], dtype: str = "auto", *, guided: bool = True) -> dict[str, Any]:
    """What a model needs at that size beside what the device has, and what it needs with each switch, in bytes."""
    if dtype == "auto":
        dtype = "bfloat16" if checked.network.parameters >= LARGE else "float32"
    plain = needs(checked, size, dtype, guided=guided)
    tile = min(size[0] * size[1], TILE**2) / (size[0] * size[1])
    largest = max(plain.parts.values())
    switches = {f"--quantize {kind}": needs(checked, size, dtype, kind, guided=guided).total for kind in BITS}
    switches["--vae-tiling"] = plain.weights + max(plain.activations, int(plain.decoder * tile))
    switches["--offload model"] = max(largest, plain.parts[checked.row.denoiser] + plain.activations, plain.decoder)
    switches["--offload sequential"] = plain.busiest
    return {
        "dtype": dtype,
        "size": list(size),
        "weights": dict(plain.parts),
        "activations": plain.activations,
        "decoder": plain.decoder,
        "total": plain.total,
        "with": switches,
        "device": plain.device,
        "free": plain.free,
    }


def in_words(memory: Mapping[str, Any]) -> str:
    """A report in a line: what is needed, what for, and what is free."""
    parts = memory["weights"] | {"activations": memory["activations"], "decoding": memory["decoder"]}
    width, height = memory["size"]
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    needed = f"about {size_text(memory['total'])} in {memory['dtype']} at {width}x{height} ({listed})"
    return f"{needed}; free: {size_text(memory['free'])} of {memory['device']}"


def advice(memory: Mapping[str, Any]) -> str | None:
    """Which switches make a model fit that does not; None if it fits."""
    if memory["total"] <= memory["free"]:
        return None
    fitting = [f"{flag} ({size_text(size)})" for flag, size in memory["with"].items() if size <= memory["free"]]
    hint = f"it fits with {' or '.join(fitting)}" if fitting else "no single switch makes it fit"
    return f"memory: {in_words(memory)}: {hint}"


def _bytes(name: str, tensor: Tensor, dtype: str, quantize: str) -> int:
    """The bytes of a tensor in memory: matrices of few bits stay as they are, others have the dtype's."""
    count = math.prod(tensor.shape)
    matrix = len(tensor.shape) == 2 and not any(word in name for word in EMBEDDINGS)
    if matrix and tensor.dtype == "NF4":
        return int(count * NF4_BITS / 8)
    if matrix and tensor.dtype.startswith("F8"):
        return int(count * FLOAT8_BITS / 8)
    elements, size = BLOCKS.get(tensor.dtype, (1, 0))
    if matrix and elements > 1:
        return count // elements * size
    return int(count * BITS[quantize] / 8) if matrix and quantize != "none" else count * BYTES[dtype]


def _activations(checked: Checked, size: tuple[int, int], guided: bool) -> int:
    positions = size[0] * size[1] // scale_factor(checked) ** 2
    width, positions = widest(checked.row, checked.network.config, positions)
    two = guided and not checked.guidance_is_input and not checked.row.native
    return ACTIVATIONS * positions * width * (1 + two)


def widest(row: families.Family, config: Mapping[str, Any], positions: int) -> tuple[int, int]:
    """(channels, positions) of the widest layer of a network that reads latents of so many positions.

    The configuration is not checked yet: what it does not say is 0.
    """
    if levels := _numbers(config.get("block_out_channels")):
        return levels[0], positions
    width = next((n for key in ("dim", "hidden_size") for n in _numbers(config.get(key))), 0)
    width = width or math.prod(_numbers([config.get("num_attention_heads"), config.get("attention_head_dim")]) or [0])
    return width, positions // row.patch**2


def scale_factor(checked: Checked) -> int:
    """Pixels of a side of a latent."""
    vae = checked.components.get("vae")
    levels = [] if vae is None else _numbers(vae.config.get("block_out_channels") or vae.config.get("dim_mult"))
    return 2 ** (len(levels) - 1) if levels else 1 if vae is None else 8


def decoder_values(vae: Mapping[str, Any], size: tuple[int, int]) -> int:
    """Values that an autoencoder of this configuration holds at once while it decodes a picture of that size."""
    pixels = size[0] * size[1]
    if base := _numbers(vae.get("base_dim")):
        return DECODER_3D * pixels * base[0]
    return DECODER * pixels * next(iter(_numbers(vae.get("block_out_channels"))), 0)


def _numbers(value: Any) -> list[int]:
    """A whole number of a configuration, or a list of them, within reason; else none."""
    values = value if isinstance(value, list) else [value]
    return values if len(values) < 10 and all(type(n) is int and 0 < n < 2**20 for n in values) else []


def device_memory() -> tuple[str, int]:
    """(the default device in words, its free bytes): the first GPU of NVIDIA, else main memory."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle, memory, name = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)(), ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0:
            nvml.nvmlDeviceGetName(handle, name, 96)
            if nvml.nvmlDeviceGetMemoryInfo(handle, memory) == 0:
                return name.value.decode("utf-8", "replace"), int(memory[1])
    except (OSError, AttributeError):  # no driver
        pass
    return "main memory", main_memory()
