"""Train a ControlNet (Zhang et al. 2023, arXiv 2302.05543) for Canny edge maps.

A ControlNet is a copy of the UNet's encoder. It reads the noisy latents and, through a few convolutions, the edge map.
Its outputs are added to the frozen UNet through convolutions that start at zero. This one has no attention layers,
which halves its size: the UNet itself reads the caption.

The model has seen its pictures so often that a caption alone determines the edges. So each picture is rotated, scaled
and moved, and half of the captions are empty: then only the map shows where the edges are.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from model import Frozen, descend
from PIL import Image
from torch import Tensor

from diffgen.images.edges import canny
from diffgen.images.pixels import to_pil
from diffgen.pipelines.training.captions import EMPTY, Tokens
from diffgen.training.data.dataset import DataSet

PICTURES = 2000
HINT = (16, 32, 64, 96)  # widths of the convolutions that read the map; all but the first halve its sides
CAPTION_DROPOUT = 0.5
STEPS, BATCH, RATE = 900, 32, 1e-3


def transformed(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture rotated, scaled, moved and sometimes mirrored, on white."""
    width, height = picture.size
    angle = math.radians(rng.uniform(-45, 45))
    wide, high = rng.uniform(0.5, 1.05) * rng.choice((-1, 1)), rng.uniform(0.5, 1.05)
    x, y = width * (0.5 + rng.uniform(-0.15, 0.15)), height * (0.5 + rng.uniform(-0.15, 0.15))
    cos, sin = math.cos(angle), math.sin(angle)
    # From a position in the new picture to one in the old: subtract (x, y), rotate and scale back, add the centre.
    a, b, c, d = cos / wide, sin / wide, -sin / high, cos / high
    matrix = (a, b, width / 2 - a * x - b * y, c, d, height / 2 - c * x - d * y)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white")


def controlnet_for(unet: Any) -> ControlNetModel:
    """A ControlNet with the weights of the UNet's encoder, without its attention layers."""
    config, blocks = unet.config, len(unet.config.block_out_channels)
    network = ControlNetModel(
        in_channels=config.in_channels,
        down_block_types=("DownBlock2D",) * blocks,
        mid_block_type="UNetMidBlock2D",
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        conditioning_embedding_out_channels=HINT,
    )
    network.load_state_dict(unet.state_dict(), strict=False)  # the weights that both have
    return network


def train(model: Frozen, data: DataSet, folder: Path, steps: int = STEPS) -> None:
    """Train the ControlNet, and write it as a diffusers folder in float16."""
    rng = random.Random(0)
    chosen, _ = data.split()
    chosen = chosen[torch.randperm(len(chosen))[:PICTURES]]
    pictures = [transformed(picture, rng) for picture in to_pil(data.to_float(data.images[chosen]).numpy())]
    x0 = model.latents(pictures)
    maps = torch.from_numpy(np.stack([np.asarray(canny(picture)) for picture in pictures])).permute(0, 3, 1, 2)
    tokens = Tokens([data.captions[i] for i in chosen.tolist()], model.tokenizer)
    network = controlnet_for(model.unet).to(model.device)

    def loss(k: int) -> Tensor:
        batch = torch.randint(len(x0), (BATCH,))
        captions = tokens.choose(batch, torch.rand(BATCH))
        captions[torch.rand(BATCH) < CAPTION_DROPOUT] = EMPTY
        edges = maps[batch].to(model.device) / 255

        def control(x: Tensor, t: Tensor, context: Tensor) -> Any:
            return network(x, t, context, edges, return_dict=False)

        return model.loss(x0[batch], model.context([tokens.texts[i] for i in captions]), control=control)

    descend("control", network.parameters(), loss, steps=steps, batch=BATCH, rate=RATE)
    network.half().save_pretrained(folder)
