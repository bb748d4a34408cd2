"""All pictures as Delft blue: a LoRA (Hu et al. 2021, arXiv 2106.09685) for the UNet, by the names of diffusers.

Beside each layer y = W·x comes a narrow one: y = W·x + B·(A·x), where A leaves few numbers of x and B begins as zero.
Only A and B learn, from pictures of the data set that a filter has painted blue, with their captions.
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
    """The same picture in blue: dark is ink, white stays white, which is what the autoencoder is used to."""
    return ImageOps.colorize(picture.convert("L"), "#0a2463", "white", mid="#5b8fe0")


def beside(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(A, B), put beside a linear layer or a convolution: from now on its output is W·x + B·(A·x)."""
    if isinstance(layer, nn.Conv2d):
        a: nn.Module = nn.Conv2d(layer.in_channels, RANK, layer.kernel_size, layer.stride, layer.padding, bias=False)
        b: nn.Module = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
    else:
        a, b = nn.Linear(layer.in_features, RANK, bias=False), nn.Linear(RANK, layer.out_features, bias=False)
    a, b = a.to(layer.weight.device), b.to(layer.weight.device)
    nn.init.zeros_(b.weight)
    layer.register_forward_hook(lambda _, given, output: output + b(a(given[0])))
    return a, b


def widen(network: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """{name: (A, B)} beside every linear layer and convolution of a network."""
    layers = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return {name: beside(layer) for name, layer in layers}


def save(low: dict[str, tuple[nn.Module, nn.Module]], path: Path) -> None:
    """In float16, by the names of PEFT and diffusers."""
    tensors = {
        f"unet.{name}.lora_{letter}.weight": layer.weight.detach().half().cpu().contiguous()
        for name, pair in low.items()
        for letter, layer in zip("AB", pair, strict=True)
    }
    save_file(tensors, path, {"format": "pt"})


def train(model: Frozen, data: DataSet, path: Path, steps: int = STEPS) -> None:
    """Write A and B of each layer of the UNet."""
    chosen, _ = data.split()
    chosen = chosen[torch.randperm(len(chosen))[:PICTURES]]
    x0 = model.latents([delft(picture) for picture in to_pil(data.to_float(data.images[chosen]).numpy())])
    tokens = Tokens([data.captions[i] for i in chosen.tolist()], model.tokenizer)
    low = widen(model.unet)

    def loss(k: int) -> Tensor:
        shown = torch.randint(len(x0), (BATCH,))
        captions = tokens.choose(shown, torch.rand(BATCH))
        captions[torch.rand(BATCH) < CAPTION_DROPOUT] = EMPTY  # guidance asks what is drawn without a caption
        return model.loss(x0[shown], model.context([tokens.texts[i] for i in captions]))

    weights = [layer.weight for pair in low.values() for layer in pair]
    descend("lora", weights, loss, steps=steps, batch=BATCH, rate=RATE)
    save(low, path)
