"""What weights of few bits cost the bundled model: python benchmarks/quantize.py [--count N]

Pictures of the same prompts and seeds, with the linear layers of the UNet and the text encoder in each format. The
error is the root mean square over all pixels from 0 to 255; beside it stands the share of the weights' bytes that is
left. int8 and fp8 need torchao, Q8_0 and Q4_0 the package gguf.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import diffgen
from diffgen.models.gguf import BLOCKS
from diffgen.pipelines.weights import quantize
from diffgen.pipelines.weights.packed import Packed, pack

PROMPTS = ["a red apple", "a green frog", "a house", "a yellow star", "a fish", "a blue car", "a cat", "a tree"]


def in_blocks(kind: str) -> Callable[[Any], float]:
    """A function that packs the linear layers of a pipeline in a format of ggml."""

    def change(pipeline: Any) -> float:
        import gguf

        networks = [pipeline.components[name] for name in quantize.PARTS if pipeline.components.get(name) is not None]
        before = sum(map(quantize.weight_bytes, networks))
        for network in networks:
            for path, layer in list(network.named_modules()):
                if isinstance(layer, nn.Linear) and layer.in_features % BLOCKS[kind][0] == 0:
                    weight = layer.weight.detach().float().numpy()
                    data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
                    matrix = Packed(torch.from_numpy(data), kind, layer.in_features)
                    pack(network, {f"{path}.weight": (matrix, layer.weight.dtype)})
        return sum(map(quantize.weight_bytes, networks)) / before

    return change


def pictures(count: int, change: Callable[[Any], float] | None = None, seed: int = 0) -> tuple[np.ndarray, float]:
    """(pictures, the share of the weights' bytes that is left)."""
    generator: Any = diffgen.load("emoji", device="cpu")
    left = change(generator.pipeline) if change else 1.0
    return np.stack([np.asarray(one, float) for one in generator.generate(PROMPTS[:count], seed=seed)]), left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=len(PROMPTS), help="pictures")
    count = parser.parse_args().count
    exact, _ = pictures(count)
    others, _ = pictures(count, seed=9)
    print("| format | share of the bytes | error |\n|---|---|---|")
    ways: dict[str, Callable[[Any], float]] = {"Q8_0": in_blocks("Q8_0"), "Q4_0": in_blocks("Q4_0")}
    for kind in quantize.WAYS:
        if kind not in quantize.BY_TORCHAO or importlib.util.find_spec("torchao") is not None:
            ways[kind] = lambda pipeline, kind=kind: quantize.quantize(pipeline, kind)
    for kind, change in ways.items():
        made, left = pictures(count, change)
        print(f"| {kind} | {left:.0%} | {np.sqrt(((made - exact) ** 2).mean()):.2f} |", flush=True)
    print(f"| another seed, for scale | | {np.sqrt(((others - exact) ** 2).mean()):.2f} |")


if __name__ == "__main__":
    main()
