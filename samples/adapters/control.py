"""Pictures that follow edges: a ControlNet (Zhang et al. 2023, arXiv 2302.05543) for the maps of Canny.

It is the UNet's encoder once more. It reads the noisy latents and, through a few convolutions, the map; what it says
goes through convolutions that begin as zero into the UNet, which stays as it is. Left out are the encoder's attentions:
that halves it, and what the caption means the UNet knows by itself.

The model has seen its pictures so often that a caption alone says where the edges are. So each picture is turned,
stretched and moved, and half of the captions are empty: then only the map can tell.
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
HINT = (16, 32, 64, 96)  # widths of the convolutions that read the map, each of which halves its sides but the first
CAPTION_DROPOUT = 0.5
STEPS, BATCH, RATE = 900, 32, 1e-3


def moved(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Turned, stretched, moved and sometimes mirrored, on white."""
    width, height = picture.size
    angle = math.radians(rng.uniform(-45, 45))
    wide, high = rng.uniform(0.5, 1.05) * rng.choice((-1, 1)), rng.uniform(0.5, 1.05)
    x, y = width * (0.5 + rng.uniform(-0.15, 0.15)), height * (0.5 + rng.uniform(-0.15, 0.15))
    cos, sin = math.cos(angle), math.sin(angle)
    # From a place in the new picture to one in the old: minus (x, y), turned back, unstretched, plus the middle.
    a, b, c, d = cos / wide, sin / wide, -sin / high, cos / high
    there = (a, b, width / 2 - a * x - b * y, c, d, height / 2 - c * x - d * y)
    return picture.transform(picture.size, Image.Transform.AFFINE, there, Image.Resampling.BICUBIC, fillcolor="white")


def controlnet_for(unet: Any) -> ControlNetModel:
    """A ControlNet with the weights of the UNet's encoder, its attentions left out."""
    own, blocks = unet.config, len(unet.config.block_out_channels)
    network = ControlNetModel(
        in_channels=own.in_channels,
        down_block_types=("DownBlock2D",) * blocks,
        mid_block_type="UNetMidBlock2D",
        block_out_channels=own.block_out_channels,
        layers_per_block=own.layers_per_block,
        cross_attention_dim=own.cross_attention_dim,
        attention_head_dim=own.attention_head_dim,
        norm_num_groups=own.norm_num_groups,
        flip_sin_to_cos=own.flip_sin_to_cos,
        freq_shift=own.freq_shift,
        conditioning_embedding_out_channels=HINT,
    )
    network.load_state_dict(unet.state_dict(), strict=False)  # what both have
    return network


def train(model: Frozen, data: DataSet, folder: Path, steps: int = STEPS) -> None:
    """Write the ControlNet, as a diffusers folder in float16."""
    rng = random.Random(0)
    chosen, _ = data.split()
    chosen = chosen[torch.randperm(len(chosen))[:PICTURES]]
    pictures = [moved(picture, rng) for picture in to_pil(data.to_float(data.images[chosen]).numpy())]
    x0 = model.latents(pictures)
    maps = torch.from_numpy(np.stack([np.asarray(canny(picture)) for picture in pictures])).permute(0, 3, 1, 2)
    tokens = Tokens([data.captions[i] for i in chosen.tolist()], model.tokenizer)
    network = controlnet_for(model.unet).to(model.device)

    def loss(k: int) -> Tensor:
        shown = torch.randint(len(x0), (BATCH,))
        captions = tokens.choose(shown, torch.rand(BATCH))
        captions[torch.rand(BATCH) < CAPTION_DROPOUT] = EMPTY
        edges = maps[shown].to(model.device) / 255

        def control(x: Tensor, t: Tensor, context: Tensor) -> Any:
            return network(x, t, context, edges, return_dict=False)

        return model.loss(x0[shown], model.context([tokens.texts[i] for i in captions]), control=control)

    descend("control", network.parameters(), loss, steps=steps, batch=BATCH, rate=RATE)
    network.half().save_pretrained(folder)
