"""Train a LoRA (Hu et al. 2021, arXiv 2106.09685) for the UNet that draws everything in Delft blue.

Each layer y = W·x becomes y = W·x + B·(A·x). A maps x to a low rank, and B starts at zero. Only A and B are trained, on
captioned pictures of the data set that a filter has coloured blue.
"""

from __future__ import annotations

from pathlib import Path

import torch
from model import Frozen, descend
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn

from diffgen.images.pixels import to_pil
from diffgen.pipelines.training.captions import EMPTY, Tokens
from diffgen.training.data.dataset import DataSet

PICTURES, RANK = 512, 4
CAPTION_DROPOUT = 0.1
STEPS, BATCH, RATE = 300, 16, 2e-3


def delft(picture: Image.Image) -> Image.Image:
    """The picture in blue. White stays white, because the autoencoder was trained on white backgrounds."""
    return ImageOps.colorize(picture.convert("L"), "#0a2463", "white", mid="#5b8fe0")


def add_low_rank(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Add (A, B) to a linear layer or a convolution: its output becomes W·x + B·(A·x)."""
    if isinstance(layer, nn.Conv2d):
        a: nn.Module = nn.Conv2d(layer.in_channels, RANK, layer.kernel_size, layer.stride, layer.padding, bias=False)
        b: nn.Module = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
    else:
        a, b = nn.Linear(layer.in_features, RANK, bias=False), nn.Linear(RANK, layer.out_features, bias=False)
    a, b = a.to(layer.weight.device), b.to(layer.weight.device)
    nn.init.zeros_(b.weight)
    layer.register_forward_hook(lambda _, inputs, output: output + b(a(inputs[0])))
    return a, b


def widen(network: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Add (A, B) to every linear layer and convolution of a network: {name: (A, B)}."""
    layers = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return {name: add_low_rank(layer) for name, layer in layers}


def save(low: dict[str, tuple[nn.Module, nn.Module]], path: Path) -> None:
    """Write the layers in float16, with the names of PEFT and diffusers."""
    tensors = {
        f"unet.{name}.lora_{letter}.weight": layer.weight.detach().half().cpu().contiguous()
        for name, pair in low.items()
        for letter, layer in zip("AB", pair, strict=True)
    }
    save_file(tensors, path, {"format": "pt"})


def train(model: Frozen, data: DataSet, path: Path, steps: int = STEPS) -> None:
    """Train A and B of each layer of the UNet, and write them."""
    chosen, _ = data.split()
    chosen = chosen[torch.randperm(len(chosen))[:PICTURES]]
    x0 = model.latents([delft(picture) for picture in to_pil(data.to_float(data.images[chosen]).numpy())])
    tokens = Tokens([data.captions[i] for i in chosen.tolist()], model.tokenizer)
    low = widen(model.unet)

    def loss(k: int) -> Tensor:
        batch = torch.randint(len(x0), (BATCH,))
        captions = tokens.choose(batch, torch.rand(BATCH))
        captions[torch.rand(BATCH) < CAPTION_DROPOUT] = EMPTY  # guidance also evaluates the UNet without a caption
        return model.loss(x0[batch], model.context([tokens.texts[i] for i in captions]))

    weights = [layer.weight for pair in low.values() for layer in pair]
    descend("lora", weights, loss, steps=steps, batch=BATCH, rate=RATE)
    save(low, path)
