"""The job "control": a ControlNet for `generate --control KIND=IMAGE --control-model RUN` (Zhang et al. 2023)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from diffgen.errors import InputError
from diffgen.images import edges
from diffgen.training.job import Networks

from .finetune import Call, FineTune, Pick
from .finetune_config import ControlConfig

FOLDER = "controlnet"
MAPS = 1024  # that are kept in memory


class ControlJob(FineTune):
    """A copy of the UNet's encoder that reads a map; its outputs begin at zero."""

    config: ControlConfig

    def build(self) -> dict[str, nn.Module]:
        if "control" not in self.row.tasks:
            raise InputError(f"{self.where}: no ControlNets are trained for models of the family {self.checked.family}")
        c = self.config.control
        self.map_of: Callable[[int, int, bool], Tensor] = lru_cache(maxsize=MAPS)(self._map)
        widths = tuple(int(width) for width in c.hint)
        network = ControlNetModel.from_unet(self.base, conditioning_embedding_out_channels=widths)
        if not c.attention:
            blocks = len(network.config.block_out_channels)
            config = {key: value for key, value in network.config.items() if not key.startswith("_")}
            config |= {"down_block_types": ("DownBlock2D",) * blocks, "mid_block_type": "UNetMidBlock2D"}
            network = ControlNetModel(**config)
            network.load_state_dict(self.base.state_dict(), strict=False)  # the weights that both have
        self.network = network
        return {"controlnet": network}

    def _map(self, picture: int, crop: int, mirrored: bool) -> Tensor:
        """The map of a picture, uint8 [3, H, W]."""
        pixels = Image.fromarray(self.cut(picture, crop, mirrored).pixels)
        drawn = getattr(edges, self.config.control.kind)(pixels)
        return torch.from_numpy(np.array(drawn)).permute(2, 0, 1)

    def denoiser(self, networks: Networks, picks: Sequence[Pick]) -> Call:
        maps = torch.stack([self.map_of(pick.picture, pick.crop, pick.mirrored) for pick in picks])
        maps = maps.to(self.device, torch.float32) / 255

        def call(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Any:
            added = more.get("added_cond_kwargs")
            cond = maps.repeat(len(x) // len(maps), 1, 1, 1)
            if (size := [side * self.coder.factor for side in x.shape[-2:]]) != list(cond.shape[-2:]):
                cond = nn.functional.interpolate(cond, size)  # a sheet's pictures are squares
            down, middle = networks["controlnet"](
                x, t, encoder_hidden_states, cond, added_cond_kwargs=added, return_dict=False
            )
            return self.base(
                x,
                t,
                encoder_hidden_states=encoder_hidden_states,
                down_block_additional_residuals=[residual.to(x.dtype) for residual in down],
                mid_block_additional_residual=middle.to(x.dtype),
                **more,
            )

        return call

    def products(self, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
        config = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        tensors = {name: tensor.half().cpu().contiguous() for name, tensor in weights.items()}
        return {
            f"{FOLDER}/config.json": json.dumps({"_class_name": "ControlNetModel", **config}, indent=2).encode(),
            f"{FOLDER}/diffusion_pytorch_model.safetensors": save(tensors, {"format": "pt"}),
        }
