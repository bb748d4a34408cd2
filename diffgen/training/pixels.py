"""The job "pixels": a diffusion model of pixels, unconditional or by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import schedulers
from diffgen import networks as native
from diffgen.diffusion import GaussianDiffusion, guided
from diffgen.errors import InputError
from diffgen.images.pixels import to_pil

from .augment import Augmentation, changed, shifted, tinted
from .config import Config
from .data.dataset import Progress, TrainingData
from .diffusion_job import Choices, Denoiser, DiffusionJob
from .job import Autocast, Networks
from .seeds import WEIGHTS, mix


class PixelJob(DiffusionJob):
    """Data, network and loss of DDPM. Raises InputError for a configuration that does not fit the data."""

    uniforms = 3  # time, flip, dropped class
    clip_samples = True

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        where: str = "the configuration",
        *,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """`where` names the source of the configuration in errors; nothing is computed in advance on `device`."""
        super().__init__(config, data, where)
        self.area = data.size[0] * data.size[1]
        self.shape = (data.channels, *data.size)
        self.classes = data.classes if config.data.classes and data.labels is not None else None
        self.labels = None if self.classes is None else data.labels
        c = config.data
        self.augmentation = Augmentation(self.seed, crop=c.crop, colour=c.colour, augment=c.augment)
        self.network = self._network(where)
        self.networks: dict[str, nn.Module] = {"network": self.network}

    def _network(self, where: str) -> nn.Module:
        learned = self.config.diffusion.variance == "learned_range"
        channels, classes = self.data.channels, None if self.classes is None else len(self.classes)
        arguments = {"name": "unet", **self.config.network}
        if arguments["name"] == "unet":
            arguments.setdefault("width", 32 if self.area <= 16 * 16 else 64)
        if clash := sorted({"channels", "out_channels", "classes", "text_width", "augment"} & arguments.keys()):
            raise InputError(f"{where}: network.{clash[0]} follows from the data: leave it out")
        torch.manual_seed(mix(self.seed, WEIGHTS))
        derived = {"channels": channels, "out_channels": 2 * channels if learned else None, "classes": classes}
        if self.augmentation.numbers:
            derived["augment"] = self.augmentation.numbers
        try:
            return native.build(arguments | derived)
        except (ValueError, TypeError) as error:
            raise InputError(f"{where}: [network]: {error}") from error

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
        super().prepare(device, autocast)
        self.data = self.data.on(device)

    def process(self) -> GaussianDiffusion:
        return process_of(self.config, self.data.levels)

    def choose(self, k: int, u: Tensor) -> Choices:
        """{"flip": mirrored, "drop": without its class}, bool [B]; and what the augmentation draws"""
        flip = u[0] < 0.5 if self.config.data.flip else torch.zeros(self.batch, dtype=torch.bool)
        drawn = self.augmentation.draw(k, self.batch) if self.augmentation else {}
        return {"flip": flip, "drop": u[1] < self.config.diffusion.label_dropout, **drawn}

    def clean(self, indices: Tensor, choices: Choices | None = None) -> Tensor:
        x0 = self.data.to_float(self.data.pictures(indices).to(self.device))
        if choices is None:
            return x0
        x0 = torch.where(choices["flip"][:, None, None, None], x0.flip(3), x0)
        for name, change in (("shift", shifted), ("tint", tinted), ("changes", changed)):
            if name in choices:
                x0 = change(x0, choices[name])
        return x0

    def condition(
        self, networks: Networks, indices: Tensor, choices: Choices | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(classes LongTensor [b], their number where the class is dropped, or None without classes; changes [b, n] of
        the augmentation, or None)"""
        changes = None if choices is None else choices.get("changes")
        if self.labels is None or self.classes is None:
            return None, changes
        label = self.labels[indices].to(self.device)
        return label if choices is None else torch.where(choices["drop"], len(self.classes), label), changes

    def predict(
        self, networks: Networks, x: Tensor, t: Tensor, condition: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        label, changes = condition
        with self.autocast():
            more = {} if changes is None else {"changes": changes}
            return networks["network"](x, t, label, **more).float()

    def denoiser(self, networks: Networks, count: int) -> Denoiser:
        model: Any = networks["network"]
        if self.classes is not None:
            label = torch.arange(count, device=self.device) % len(self.classes)
            model = guided(model, label, torch.full_like(label, len(self.classes)), self.config.sample.guidance)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                return model(x, t).float()[:, : self.data.channels]

        return denoise

    def sample_names(self) -> Sequence[str]:
        """The class of each sample."""
        classes = self.classes
        return () if classes is None else [classes[i % len(classes)] for i in range(self.config.sample.count)]

    def pictures(self, x0: Tensor) -> list[Image.Image]:
        return to_pil(x0.float().cpu().numpy(), self.data.levels)


def process_of(config: Config, levels: int) -> GaussianDiffusion:
    """The process of a configuration. Raises ValueError for an invalid combination."""
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
