"""Encode pictures to latents and decode them, tiled or in float32 where that is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional

from diffgen.devices import out_of_memory
from diffgen.errors import OutOfMemory
from diffgen.models.families import Family

from ..sizes import LEVELS
from .memory import HINT, release


def vae_dtype(vae: Any, family: Family, dtype: torch.dtype, offload: str) -> torch.dtype:
    """The autoencoder's dtype: the model's; float32 for Stable Diffusion XL, whose VAE overflows in float16."""
    narrow = dtype == torch.float16 and family.vae_overflows and vae.config.force_upcast
    return torch.float32 if narrow or offload in ("sequential", "group") else dtype


@dataclass(frozen=True)
class Space:
    """How the latents of a class of autoencoders differ from [B, C, h, w] that are shifted and scaled."""

    patch: int = 1  # its latents on a side that are one place of ours, normalised by its running statistics
    frames: bool = False  # it reads and writes films: an axis of time behind the channels
    sampled: bool = True  # pictures become samples of the encoder's posterior, not its mean


SPACES = {
    "AutoencoderKLFlux2": Space(patch=2, sampled=False),
    "AutoencoderKLQwenImage": Space(frames=True),
}


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
        self.space = SPACES.get(type(vae).__name__, Space())
        channels = (1, -1, 1, 1)
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        self._mean = None if mean is None else torch.tensor(mean).reshape(channels)
        self._deviation = None if deviation is None else torch.tensor(deviation).reshape(channels)
        if self.space.patch > 1:
            self._mean = vae.bn.running_mean.reshape(channels)
            self._deviation = (vae.bn.running_var + config.batch_norm_eps).sqrt().reshape(channels)
        self._shift, self._scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        if self.vae.dtype != dtype:
            self.vae.to(dtype)
        if tiling:
            self._tile()
        else:
            self.vae.disable_tiling()

    @property
    def factor(self) -> int:
        """How many pixels on a side one place of the latents stands for."""
        levels = next(self.vae.config[key] for key in LEVELS if key in self.vae.config)
        return int(2 ** (len(levels) - 1) * self.space.patch)

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """[C, h, w] of the latents of a picture of that (width, height) in pixels."""
        channels = self.vae.config.get("latent_channels") or self.vae.config.z_dim
        return channels * self.space.patch**2, size[1] // self.factor, size[0] // self.factor

    def encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents [1, C, h, w] of one picture [1, 3, H, W] in [-1, 1].

        They are a sample of the encoder's posterior, or its mean: without a generator, and where the class says so.
        """
        films = pixels.unsqueeze(2) if self.space.frames else pixels
        parameters = self._run(lambda x: self.vae.encode(x).latent_dist.parameters, films).float()
        posterior = DiagonalGaussianDistribution(parameters.squeeze(2) if self.space.frames else parameters)
        sampled = self.space.sampled and generator is not None
        latents = functional.pixel_unshuffle(
            posterior.sample(generator) if sampled else posterior.mode(), self.space.patch
        )
        if self._mean is not None and self._deviation is not None:
            latents = (latents - self._mean.to(latents)) / self._deviation.to(latents)
        return (latents - self._shift) * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        """The picture [1, 3, H, W], float32, of clean latents [1, C, h, w]; it may hold nan."""
        x = latents.float() / self._scale
        if self._mean is not None and self._deviation is not None:
            x = x * self._deviation.to(x) + self._mean.to(x)
        x = functional.pixel_shuffle(x + self._shift, self.space.patch)
        if not self.space.frames:
            return self._run(lambda z: self.vae.decode(z, return_dict=False)[0], x).float()
        return self._run(lambda z: self.vae.decode(z, return_dict=False)[0], x.unsqueeze(2)).float().squeeze(2)

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
