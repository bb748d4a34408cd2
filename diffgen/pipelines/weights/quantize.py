"""Weights in eight bits by torchao, an optional package (`pip install diffgen[quantize]`).

Each row of a linear layer's matrix becomes int8 with a scale; it is multiplied in the layer's own dtype (weight-only
int8). Convolutions and the autoencoder stay as they are.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from diffgen.errors import InputError

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def check() -> None:
    """Raise InputError without the package, with the command that installs it."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError("weights in eight bits need the package torchao", "pip install torchao")


@torch.inference_mode(False)
def quantize(pipeline: Any) -> float:
    """Quantise the linear layers of a loaded pipeline in place; returns the remaining share of its bytes, 0 to 1.

    LoRAs must be merged before. Raises InputError without the package.
    """
    check()
    for name in ("torchao", "torch.utils._pytree"):  # they report kernels for other devices, and each other
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    networks = [part for name in PARTS if (part := pipeline.components.get(name)) is not None]
    before = sum(map(_bytes, networks))
    for network in networks:
        quantize_(network, Int8WeightOnlyConfig(version=2))
    return sum(map(_bytes, networks)) / before


def _bytes(network: torch.nn.Module) -> int:
    return sum(_size(weight) for weight in network.parameters())


def _size(weight: Any) -> int:
    if hasattr(weight, "qdata"):  # torchao's: whole numbers and a scale for each row
        return weight.qdata.nbytes + weight.scale.nbytes
    return weight.nbytes
