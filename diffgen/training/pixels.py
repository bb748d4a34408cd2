"""The job "pixels": a diffusion model of pictures as they are, unconditional or by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import schedulers
from diffgen import networks
from diffgen.diffusion import GaussianDiffusion, ImportanceSampler, guided, offset_noise
from diffgen.errors import InputError, InvalidOutput
from diffgen.images.pixels import to_pil
from schedulers.draws import normal

from .batches import Order, held_out_draws, some, times
from .config import Config
from .data.dataset import DataSet
from .job import Autocast, Networks
from .seeds import SAMPLES, STEP, WEIGHTS, generator, mix


@dataclass(frozen=True)
class Draws:
    """What step k draws for the whole global batch of B."""

    t: Tensor  # LongTensor [B]
    weight: Tensor  # float32 [B], of importance-sampled times; else 1
    noise: Tensor  # float32 [B, C, H, W]
    flip: Tensor  # bool [B]: mirrored
    drop: Tensor  # bool [B]: without its class


class PixelJob:
    """Data, network and loss of DDPM. Raises UsageError and InputError for a configuration that fits no data."""

    def __init__(self, config: Config, data: DataSet, where: str = "the configuration") -> None:
        """`where` the configuration comes from: the file that errors name."""
        self.config, self.data = config, data
        self.area = data.size[0] * data.size[1]
        self.seed, self.batch = config.train.seed, config.train.batch_size
        self.train, test = data.split(config.data.held_out)
        self.test = some(test)
        self.indices = Order(self.train, self.batch, self.seed)
        self.classes = data.classes if config.data.classes and data.labels is not None else None
        try:
            self.diffusion = diffusion_of(config, data.levels)
            self.scheduler = scheduler_of(config, self.diffusion)
            self.network = self._network()
        except (ValueError, TypeError) as error:
            raise InputError(f"{where}: {error}") from error
        self.networks: dict[str, nn.Module] = {"network": self.network}
        self.importance = ImportanceSampler(self.diffusion.T) if config.diffusion.times == "importance" else None
        self._draws = lru_cache(maxsize=1)(self._draw)

    def _network(self) -> nn.Module:
        learned = self.config.diffusion.variance == "learned_range"
        channels, classes = self.data.channels, None if self.classes is None else len(self.classes)
        wanted = {"name": "unet", **self.config.network}
        if wanted["name"] == "unet":
            wanted.setdefault("width", 32 if self.area <= 16 * 16 else 64)
        if taken := sorted({"channels", "out_channels", "classes", "text_width"} & wanted.keys()):
            raise ValueError(f"network.{taken[0]} follows from the data: leave it out")
        torch.manual_seed(mix(self.seed, WEIGHTS))
        follows = {"channels": channels, "out_channels": 2 * channels if learned else None, "classes": classes}
        try:
            return networks.build(wanted | follows)
        except (ValueError, TypeError) as error:
            raise ValueError(f"[network]: {error}") from error

    def about(self) -> dict[str, Any]:
        return {
            "job": "pixels",
            "data": self.data.about() | {"classes": self.classes},
            "network": {"name": self.config.network.get("name", "unet"), **self.network.config},  # type: ignore[dict-item]
            "noise": {"name": self.config.diffusion.noise, "T": self.config.diffusion.T},
            "prediction": self.config.diffusion.prediction,
            "variance": self.config.diffusion.variance,
        }

    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        self.device, self.autocast = device, autocast
        self.images, self.labels = self.data.images, self.data.labels
        if fits(self.images, device):
            self.images = self.images.to(device)
        if self.classes is None:
            self.labels = None

    # A step

    def loss(self, networks: Networks, k: int, positions: slice) -> Tensor:
        """DDPM algorithm 1, lines 2 to 5, for these positions of the batch of step k."""
        draws, indices = self._draws(k), self.indices(k)[positions]
        x0 = self.pictures(indices)
        x0 = torch.where(draws.flip[positions, None, None, None], x0.flip(3), x0)
        label = self._label(indices, draws.drop[positions])
        t = draws.t[positions]
        losses = self.diffusion.loss(self._model(networks, label), x0, t, draws.noise[positions])
        if self.importance is not None:
            self.importance.update(t, losses.detach())
        return losses * draws.weight[positions]

    def _draw(self, k: int) -> Draws:
        c, T, B = self.config.diffusion, self.diffusion.T, self.batch
        on = self.device if self.device.type == "cuda" else torch.device("cpu")
        g = generator(self.seed, STEP, k, device=on)
        u, flip, drop = torch.rand(3, B, generator=g, device=on)
        weight = torch.ones_like(u)
        if self.importance is not None:
            t, weight = self.importance.sample(B, generator(self.seed, STEP, k))
        else:
            t = times(u, T, c.times == "stratified")
        noise = torch.randn(B, self.data.channels, *self.data.size, generator=g, device=on)
        if c.offset_noise:
            noise = offset_noise(noise, c.offset_noise, g)
        flips = flip < 0.5 if self.config.data.flip else torch.zeros(B, dtype=torch.bool)
        moved = (v.to(self.device) for v in (t, weight, noise, flips, drop < c.label_dropout))
        return Draws(*moved)

    def pictures(self, indices: Tensor) -> Tensor:
        """float32 [b, C, H, W] in [-1, 1], on the device."""
        return self.data.to_float(self.images[indices.to(self.images.device)].to(self.device))

    def _label(self, indices: Tensor, drop: Tensor) -> Tensor | None:
        if self.labels is None or self.classes is None:
            return None
        label = self.labels[indices].to(self.device)
        return torch.where(drop, len(self.classes), label)

    def _model(self, networks: Networks, label: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        def model(x: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                return networks["network"](x, t, label).float()

        return model

    # Seen from outside

    def held_out(self, networks: Networks) -> list[float]:
        if not len(self.test):
            return []
        quartiles = []
        shape = (len(self.test), self.data.channels, *self.data.size)
        for quarter in range(4):
            t, noise = held_out_draws(shape, self.diffusion.T, quarter)
            total = 0.0
            for part in torch.arange(shape[0]).split(64):
                indices = self.test[part]
                model = self._model(
                    networks, self._label(indices, torch.zeros(len(part), dtype=torch.bool).to(self.device))
                )
                x0, at, eps = self.pictures(indices), t[part].to(self.device), noise[part].to(self.device)
                total += self.diffusion.loss(model, x0, at, eps).sum().item()
            quartiles.append(total / shape[0])
        return quartiles

    def samples(self, networks: Networks) -> list[Image.Image]:
        s, g = self.config.sample, generator(self.seed, SAMPLES)
        shape = (s.count, self.data.channels, *self.data.size)
        x = self.scheduler.start(normal(shape, g, self.device), s.steps)
        model = networks["network"]
        if self.classes is not None:
            label = torch.arange(s.count, device=self.device) % len(self.classes)
            model = guided(model, label, torch.full_like(label, len(self.classes)), s.guidance)  # type: ignore[assignment]

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                return model(x, t).float()[:, : self.data.channels]

        try:
            x0 = self.scheduler.sample(denoiser, x, steps=s.steps, generators=g)
        except schedulers.NonFinite as error:
            raise InvalidOutput(f"training diverged: a picture of the grid is {error}") from error
        return to_pil(x0.float().cpu().numpy(), self.data.levels)

    def files(self) -> dict[str, bytes]:
        return {}

    def first_weights(self, folder: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
        raise InputError(f"{folder} is not a run", "begin with a run of this job, or with a .safetensors file")

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.importance is None else self.importance.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.importance is not None:
            self.importance.load_state_dict(state)


def diffusion_of(config: Config, levels: int) -> GaussianDiffusion:
    """The process that a configuration asks for. Raises ValueError where its parts do not go together."""
    c = config.diffusion
    objective = c.objective or ("hybrid" if c.variance == "learned_range" else "simple")
    if c.variance == "learned_range" and objective == "simple":
        raise ValueError('[diffusion]: objective = "simple" leaves a learned variance untrained: "hybrid" trains it')
    try:
        return GaussianDiffusion(
            schedulers.NoiseSchedule.named(c.noise, T=c.T),
            c.prediction,
            c.variance,
            objective=objective,
            weight=c.weight,
            vlb_weight=c.vlb_weight,
            levels=levels,
        )
    except ValueError as error:
        raise ValueError(f"[diffusion]: {error}") from error


def scheduler_of(config: Config, diffusion: GaussianDiffusion) -> schedulers.Scheduler:
    """What the grids are sampled with; x̂0 is kept in the pictures' range. Raises ValueError for an unknown name, and
    for a number of steps that it cannot do."""
    try:
        scheduler = schedulers.get(
            config.sample.scheduler, noise=diffusion.noise, prediction=diffusion.prediction, clip_sample=True
        )
        scheduler.grid(config.sample.steps)
        return scheduler
    except ValueError as error:
        raise ValueError(f"[sample]: scheduler: {error}") from error


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether the pictures are to lie on the device whole: half of the memory that is free there is enough."""
    if device.type != "cuda":
        return device.type != "cpu"
    return images.numel() <= torch.cuda.mem_get_info(device)[0] // 2
