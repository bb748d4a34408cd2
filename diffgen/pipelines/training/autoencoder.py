"""The job "autoencoder": pictures to latents and back (AutoencoderKL), the first stage of latent diffusion."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from diffgen.errors import InputError
from diffgen.images.pixels import to_pil
from diffgen.training.batches import HELD_OUT_PICTURES, evenly, prefetch, shuffle_of
from diffgen.training.data.dataset import Progress, TrainingData
from diffgen.training.job import Autocast, Job, Networks
from diffgen.training.seeds import HELD_OUT, STEP, WEIGHTS, generator, mix

from .config import AutoencoderConfig
from .parts import arguments, build, fitting, read_autoencoder

ORDERS = list(itertools.permutations(range(3)))  # of the channels


class Coder(nn.Module):
    """An autoencoder as one forward pass, with the noise of the latents as an argument."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction [B, 3, H, W], mean KL divergence of each picture's latents from a standard normal [B])."""
        posterior = self.vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        y = self.vae.decode(mean + (0.5 * logvar).exp() * noise, return_dict=False)[0]
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return y.float(), kl.flatten(1).mean(1)


class AutoencoderJob(Job):
    """Data, network and loss of an autoencoder. Raises InputError for a configuration that does not fit the data."""

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        config: AutoencoderConfig,
        data: TrainingData,
        where: str = "the configuration",
        *,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """`where` names the source of the configuration in errors; nothing is computed in advance on `device`."""
        self.config, self.data = config, data
        side = square(data, where)
        self.area = side * side
        self.seed, self.batch = config.train.seed, config.train.batch_size
        self.train, test = data.split(config.data.held_out)
        self.test = evenly(test, HELD_OUT_PICTURES)
        self.indices = shuffle_of(config, data, self.train)
        network = {**AutoencoderConfig().network, **config.network}
        levels = len(network["block_out_channels"]) if isinstance(network["block_out_channels"], list | tuple) else 0
        derived = {
            "in_channels": 3,
            "out_channels": 3,
            "sample_size": side,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
        self.about_network = arguments(AutoencoderKL, network, derived, where)
        shrinks = 2 ** max(0, levels - 1)
        if side % shrinks:
            raise InputError(
                f"{where}: {levels} levels halve a side of {side} pixels {levels - 1} times: not a whole number"
            )
        torch.manual_seed(mix(self.seed, WEIGHTS))
        vae = build("AutoencoderKL", self.about_network, where)
        self.networks: dict[str, nn.Module] = {"vae": Coder(vae)}
        self.latents = (vae.config.latent_channels, side // shrinks, side // shrinks)
        self._draws = lru_cache(maxsize=1)(self._draw)

    def about(self) -> dict[str, Any]:
        return {"job": "autoencoder", "data": self.data.about(), "network": self.about_network}

    def first_weights(self, folder: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
        vae, _ = read_autoencoder(folder)
        weights = {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
        return fitting(folder, weights, own)

    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        self.device, self.autocast = device, autocast
        self.data = self.data.on(device)

    def loss(self, networks: Networks, k: int, positions: slice) -> Tensor:
        """Reconstruction (L1, L2, L1 of the gradients) and KL divergence, each with its weight."""
        noise, flip, shift, channels = (values[positions] for values in self._draws(k))
        x = self.clean(self.indices(k)[positions])
        prefetch(self.data, self.indices, k, positions)
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        x = shifted(x, shift)
        x = x.gather(1, channels[:, :, None, None].expand_as(x))
        with self.autocast():
            y, kl = networks["vae"](x, noise)
        return self.distance(x, y) + self.config.loss.kl * kl

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """[B]: the configured losses of reconstructions y of pictures x."""
        c, d = self.config.loss, y - x
        edges = d.diff(dim=2).abs().flatten(1).mean(1) + d.diff(dim=3).abs().flatten(1).mean(1)
        return c.l1 * d.abs().flatten(1).mean(1) + c.l2 * d.square().flatten(1).mean(1) + c.gradient * edges

    def _draw(self, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What step k draws for the global batch: noise, flip, shift by (rows, columns), order of the channels."""
        c, g, n = self.config.data, generator(self.seed, STEP, k), self.batch
        flip, move, permute = torch.rand(3, n, generator=g)
        shift = torch.randint(-c.shift, c.shift + 1, (n, 2), generator=g) * (move < 0.5)[:, None]
        order = torch.tensor(ORDERS)[torch.randint(len(ORDERS), (n,), generator=g) * (permute < c.permute)]
        noise = torch.randn(n, *self.latents, generator=g)
        flips = (flip < 0.5) & c.flip
        return tuple(values.to(self.device) for values in (noise, flips, shift, order))  # type: ignore[return-value]

    def clean(self, indices: Tensor) -> Tensor:
        """float32 [b, 3, H, W] in [-1, 1], on the device."""
        return self.data.to_float(self.data.pictures(indices).to(self.device))

    def held_out(self, networks: Networks) -> list[float]:
        """The loss of the reconstruction, without the KL divergence."""
        if not len(self.test):
            return []
        noise, total = torch.randn(len(self.test), *self.latents, generator=generator(HELD_OUT)), 0.0
        for part in torch.arange(len(self.test)).split(64):
            x = self.clean(self.test[part])
            with self.autocast():
                y, _ = networks["vae"](x, noise[part].to(self.device))
            total += self.distance(x, y).sum().item()
        return [total / len(self.test)]

    def samples(self, networks: Networks) -> list[Image.Image]:
        """Held-out pictures, or training pictures without those, each followed by its reconstruction."""
        indices = (self.test if len(self.test) else self.train)[: self.config.sample.count]
        pictures = []
        for part in indices.split(16):
            x = self.clean(part)
            with self.autocast():
                y, _ = networks["vae"](x, torch.zeros(len(part), *self.latents, device=self.device))
            pictures.append(torch.stack([x, y], 1).flatten(0, 1).clamp(-1, 1).cpu())
        return to_pil(torch.cat(pictures).numpy())

    def sample_names(self) -> Sequence[str]:
        return ("picture", "decoded") * self.config.sample.count


def square(data: TrainingData, where: str) -> int:
    """The side of the pictures. Raises InputError if they are not squares."""
    height, width = data.size
    if height != width:
        raise InputError(f"{where}: the pictures have {width}x{height} pixels, not squares", "set data.size")
    return height


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    """Move each picture [B, C, H, W] by its (rows, columns), LongTensor [B, 2]; edge pixels fill the gap."""
    for dim, by in zip((2, 3), shift.unbind(1), strict=True):
        n = x.shape[dim]
        at = (torch.arange(n, device=x.device) - by[:, None]).clamp(0, n - 1)
        x = x.gather(dim, (at[:, None, :, None] if dim == 2 else at[:, None, None, :]).expand_as(x))
    return x
