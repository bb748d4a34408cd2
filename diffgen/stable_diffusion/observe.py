"""A quick look at latents while a picture is made: by the autoencoder where that is small, else by a linear fit."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffgen.images.pixels import to_pil

from .memory import Autoencoder

SMALL = 10_000_000  # parameters: an autoencoder that decodes in milliseconds
FIELDS, PLACES = 8, 32  # of the picture for the fit: colour fields along a side, latents along a side


class Sketch:
    """Pictures of latents, for looking at.

    A linear fit gives each place of the latents one colour: its channels times a matrix [C + 1, 3]. The matrix is the
    least-squares solution for a picture of colour fields and what the model's own autoencoder makes of it.
    """

    def __init__(self, coder: Autoencoder) -> None:
        self.coder = coder
        self.exact = sum(weight.numel() for weight in coder.vae.parameters()) < SMALL
        self._fit: Tensor | None = None

    @property
    def how(self) -> str:
        """What is shown, in words."""
        if self.exact:
            return "by the model's autoencoder"
        return "by a linear fit of the autoencoder's colours, one pixel for each place of the latents"

    def __call__(self, latent: Tensor) -> Image.Image:
        """The picture of clean latents [C, h, w]; what is not finite is grey."""
        if self.exact:
            pixels = self.coder.decode(latent[None])
        else:
            pixels = self.linear(latent)[None]
        return to_pil(pixels.nan_to_num(0).clamp(-1, 1).cpu().numpy())[0]

    def linear(self, latent: Tensor) -> Tensor:
        """The colours [3, h, w], in [-1, 1], of latents [C, h, w] by the fit."""
        if self._fit is None:
            self._fit = fit(self.coder)
        matrix = self._fit.to(latent.device)
        return torch.einsum("chw,cd->dhw", latent.float(), matrix[:-1]) + matrix[-1][:, None, None]


def fit(coder: Autoencoder) -> Tensor:
    """The matrix [C + 1, 3] from latents, and a one, to colours in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    scale = 2 ** (len(coder.vae.config.block_out_channels) - 1)
    side = PLACES * scale
    coarse = torch.rand(1, 3, FIELDS, FIELDS, generator=generator) * 2 - 1
    fields = functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)
    latents = coder.encode(fields, generator)[0].float().cpu()
    known = torch.cat([latents.flatten(1), torch.ones(1, PLACES * PLACES)]).T.double().numpy()
    wanted = functional.avg_pool2d(fields, scale)[0].flatten(1).T.double().numpy()
    return torch.from_numpy(np.linalg.lstsq(known, wanted, rcond=None)[0]).float()
