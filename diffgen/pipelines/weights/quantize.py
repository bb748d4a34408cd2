"""Make the weights of linear layers smaller: in eight bits by torchao (`pip install diffgen[quantize]`), in four here.

int8: each row of a matrix has a scale. fp8: so too, with eight-bit floats (E4M3). nf4: each 64 values have a scale, and
one of sixteen values (QLoRA). A layer computes in its own dtype. Convolutions and the autoencoder stay as they are, and
so do matrices that a file holds in few bits. fp8-storage: the layers of the denoiser, convolutions too, are kept in
eight-bit floats without scales by diffusers, and are converted when they compute.

Four bits are our own, since bitsandbytes looks for kernels on a hub, and torchao's are whole bytes on a CPU.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn

from diffgen.errors import InputError

from .packed import NF4, NF4_BLOCK, Packed, pack

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
BY_TORCHAO = ("int8", "fp8")
WAYS = {
    "int8": "eight bits",
    "fp8": "eight-bit floats",
    "nf4": "four bits",
    "fp8-storage": "eight-bit floats, unscaled",
}  # in words


def check(kind: str) -> None:
    """Raise InputError without the package that a way needs, with the command that installs it."""
    if kind in BY_TORCHAO and importlib.util.find_spec("torchao") is None:
        raise InputError(f"--quantize {kind} needs the package torchao", "pip install torchao; nf4 needs none")


@torch.inference_mode(False)
def quantize(pipeline: Any, kind: str = "int8") -> float:
    """Quantise the linear layers of a loaded pipeline in place; returns the remaining share of its bytes, 0 to 1.

    LoRAs must be merged before. Raises InputError without the package.
    """
    check(kind)
    networks = [part for name in PARTS if (part := pipeline.components.get(name)) is not None]
    before = sum(map(weight_bytes, networks))
    for network in networks:
        if kind in BY_TORCHAO:
            _with_torchao(network, kind)
        elif kind == "nf4":
            _in_nf4(network)
        elif hasattr(network, "enable_layerwise_casting"):  # not the text encoders
            network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=network.dtype)
    return sum(map(weight_bytes, networks)) / before


def _with_torchao(network: nn.Module, kind: str) -> None:
    for name in ("torchao", "torch.utils._pytree"):  # they report kernels for other devices, and each other
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig())


def _in_nf4(network: nn.Module) -> None:
    layers = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    for path, layer in layers:
        if layer.in_features % NF4_BLOCK == 0:
            matrix = Packed(nf4(layer.weight), "NF4", layer.in_features)
            pack(network, {f"{path}.weight": (matrix, layer.weight.dtype)})


def nf4(weight: Tensor) -> Tensor:
    """A matrix [rows, columns] in the format NF4 of `packed`. QLoRA, section 3: the nearest of sixteen values."""
    blocks = weight.detach().float().reshape(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks / largest.clamp_min(torch.finfo().tiny), (values[1:] + values[:-1]) / 2)
    pairs = codes.to(torch.uint8).reshape(len(blocks), -1, 2)
    data = torch.cat([largest.view(torch.uint8), pairs[..., 0] << 4 | pairs[..., 1]], 1)
    return data.reshape(len(weight), -1)


def weight_bytes(network: nn.Module) -> int:
    """The bytes that the weights of a network take."""
    return sum(_size(weight) for weight in network.parameters())


def _size(weight: Any) -> int:
    if hasattr(weight, "qdata"):  # torchao's: numbers of eight bits and a scale for each row
        bytes_: int = weight.qdata.nbytes + weight.scale.nbytes
        return bytes_
    return int(weight.nbytes)
