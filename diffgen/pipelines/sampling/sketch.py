"""Preview latents: by the autoencoder if that is small, else by a linear fit."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffgen.images.pixels import to_pil

from .autoencoder import Autoencoder

SMALL = 10_000_000  # parameters: an autoencoder that decodes in milliseconds
FIELDS = (4, 8, 16, 32)  # colour fields along the side of each picture for the fit
PLACES = 32  # latents along that side


class Sketch:
    """Makes previews of latents.

    A linear fit gives each place of the latents one colour: its channels times a matrix [C + 1, 3]. The matrix is the
    least-squares solution for pictures of colour fields and what the model's own autoencoder makes of them.
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
        pixels = self.coder.decode(latent[None]) if self.exact else self.linear(latent)[None]
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
    scale = coder.factor
    latents, colours = [], []
    for fields in FIELDS:
        picture = functional.interpolate(_fields(fields, generator), (PLACES * scale, PLACES * scale))
        latents.append(coder.encode(picture, generator)[0].float().cpu().flatten(1))
        colours.append(functional.avg_pool2d(picture, scale)[0].flatten(1))
    inputs, targets = torch.cat(latents, 1), torch.cat(colours, 1)
    inputs = torch.cat([inputs, torch.ones(1, inputs.shape[1])])
    return torch.from_numpy(
        np.linalg.lstsq(inputs.T.double().numpy(), targets.T.double().numpy(), rcond=None)[0]
    ).float()


def _fields(count: int, generator: torch.Generator) -> Tensor:
    """Colours [1, 3, count, count]: 40 % white, 10 % black, 20 % corners of the cube, the others anywhere in it."""
    kind = torch.rand(1, 1, count, count, generator=generator)
    colours = torch.rand(1, 3, count, count, generator=generator) * 2 - 1
    colours = torch.where(kind < 0.7, colours.sign(), colours)
    colours = torch.where(kind < 0.5, -torch.ones_like(colours), colours)
    return torch.where(kind < 0.4, torch.ones_like(colours), colours)
