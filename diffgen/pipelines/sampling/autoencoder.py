"""Encode pictures to latents and decode them, tiled or in float32 where that is needed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from diffgen.devices import out_of_memory
from diffgen.errors import OutOfMemory
from diffgen.models.families import Family

from .memory import HINT, release


def vae_dtype(vae: Any, family: Family, dtype: torch.dtype, offload: str) -> torch.dtype:
    """The autoencoder's dtype: the model's; float32 for Stable Diffusion XL, whose VAE overflows in float16."""
    narrow = dtype == torch.float16 and family.vae_overflows and vae.config.force_upcast
    return torch.float32 if narrow or offload == "sequential" else dtype


class Autoencoder:
    """A pipeline's autoencoder, one picture at a time.

    `tiling`: it works in tiles. `float32`: it computes in float32 although the model is in half precision. Both stay
    once they were needed. Without `may_tile` it never works in tiles, because their seams would show.
    """

    def __init__(
        self, vae: Any, dtype: torch.dtype, device: torch.device, tiling: bool = False, may_tile: bool = True
    ) -> None:
        self.vae, self.device, self.may_tile = vae, device, may_tile
        self.tiling = self.float32 = False
        config = vae.config
        channels = (1, -1, 1, 1)
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        self._mean = None if mean is None else torch.tensor(mean).reshape(channels)
        self._deviation = None if deviation is None else torch.tensor(deviation).reshape(channels)
        self._shift = config.get("shift_factor") or 0.0
        if self.vae.dtype != dtype:
            self.vae.to(dtype)
        if tiling:
            self._tile()
        else:
            self.vae.disable_tiling()

    @property
    def factor(self) -> int:
        """How many pixels on a side one place of the latents stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """[C, h, w] of the latents of a picture of that (width, height) in pixels."""
        return self.vae.config.latent_channels, size[1] // self.factor, size[0] // self.factor

    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Latents [1, C, h, w] of one picture [1, 3, H, W] in [-1, 1], sampled from the encoder's posterior."""
        posterior = self._run(lambda x: self.vae.encode(x).latent_dist.parameters, pixels)
        latents = DiagonalGaussianDistribution(posterior.float()).sample(generator)
        if self._mean is not None and self._deviation is not None:
            latents = (latents - self._mean.to(latents)) / self._deviation.to(latents)
        return (latents - self._shift) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """The picture [1, 3, H, W], float32, of clean latents [1, C, h, w]; it may hold nan."""
        x = latents.float() / self.vae.config.scaling_factor
        if self._mean is not None and self._deviation is not None:
            x = x * self._deviation.to(x) + self._mean.to(x)
        return self._run(lambda z: self.vae.decode(z, return_dict=False)[0], x + self._shift).float()

    def _run(self, function: Any, x: Tensor) -> Tensor:
        """function(x) in the autoencoder's dtype: in tiles where memory runs out, in float32 where it overflows."""
        result = self._try(function, x)
        if not result.isfinite().all() and self.vae.dtype != torch.float32 and x.isfinite().all():
            self.vae.to(torch.float32)
            self.float32 = True
            result = self._try(function, x)
        return result

    def _try(self, function: Any, x: Tensor) -> Tensor:
        try:
            with out_of_memory():
                return function(x.to(device=self.device, dtype=self.vae.dtype))
        except OutOfMemory as error:
            if self.tiling or not self.may_tile:
                raise OutOfMemory(error.message, HINT) from error
        release()
        self._tile()
        with out_of_memory():
            return function(x.to(device=self.device, dtype=self.vae.dtype))

    def _tile(self) -> None:
        self.tiling = True
        self.vae.enable_tiling()
