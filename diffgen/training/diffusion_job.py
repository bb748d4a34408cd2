"""The base of jobs that train a diffusion model: what step k draws, its loss, held-out losses, samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import schedulers
from diffgen.diffusion import GaussianDiffusion, ImportanceSampler, offset_noise
from diffgen.errors import InputError, InvalidOutput
from schedulers.draws import normal

from .batches import HELD_OUT_PICTURES, evenly, held_out_draws, prefetch, shuffle_of, times
from .data.dataset import TrainingData
from .job import Autocast, Job, Networks
from .seeds import SAMPLES, STEP, generator

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x, t) to the network's output
Choices = Mapping[str, Tensor]


@dataclass(frozen=True)
class Draws:
    """What step k draws for the global batch of B examples, on the device."""

    t: Tensor  # LongTensor [B]
    weight: Tensor  # float32 [B]: of importance-sampled times, else 1
    noise: Tensor  # float32 [B, C, h, w]
    choices: Choices  # the job's own, each [B]


class DiffusionJob(Job):
    """A `job.Job` for DDPM's algorithm 1; a subclass defines x0, the condition and the prediction.

    A subclass sets `networks`, `area` and `shape`, and calls `super().__init__` first for everything else. `config` has
    the tables data, diffusion, train and sample.
    """

    networks: dict[str, nn.Module]
    shape: tuple[int, int, int]  # (C, h, w) of an example
    uniforms = 1  # uniform numbers of an example: the first is for its time, `choose` gets the others
    clip_samples = False  # whether x̂0 is kept in [-1, 1] while sampling

    def __init__(self, config: Any, data: TrainingData, where: str) -> None:
        """`where` names the source of the configuration in errors. Raises InputError for invalid combinations."""
        self.config, self.data = config, data
        self.seed, self.batch = config.train.seed, config.train.batch_size
        self.train, test = data.split(config.data.held_out)
        self.test = evenly(test, HELD_OUT_PICTURES)
        self.indices = shuffle_of(config, data, self.train)
        try:
            self.diffusion = self.process()
            self.scheduler = self._scheduler()
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        self.importance = ImportanceSampler(self.diffusion.T) if config.diffusion.times == "importance" else None
        self._draws = lru_cache(maxsize=1)(self._draw)

    # What a job defines

    @abstractmethod
    def process(self) -> GaussianDiffusion:
        """The diffusion process of the configuration. Raises ValueError for an invalid combination."""

    @abstractmethod
    def choose(self, k: int, u: Tensor) -> Choices:
        """The job's own choices for the global batch of step k, each [B]: captions, flips, …; `u` [uniforms − 1, B] is
        uniform in [0, 1)."""

    @abstractmethod
    def clean(self, indices: Tensor, choices: Choices | None = None) -> Tensor:
        """The clean examples x0 of these pictures [b], float32 [b, C, h, w], on the device.

        `choices` are those of the pictures [b]; without them the pictures are as they are.
        """

    @abstractmethod
    def condition(self, networks: Networks, indices: Tensor, choices: Choices | None = None) -> Any:
        """What the network gets beside x and t for these pictures [b]; without `choices` nothing is dropped."""

    @abstractmethod
    def predict(self, networks: Networks, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The network's output for x [b, C, h, w] at times t [b], float32."""

    @abstractmethod
    def denoiser(self, networks: Networks, count: int) -> Denoiser:
        """The guided network for a sheet of `count` samples."""

    @abstractmethod
    def pictures(self, x0: Tensor) -> list[Image.Image]:
        """Pictures of sampled examples [N, C, h, w]."""

    # A step

    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        self.device, self.autocast = device, autocast

    def loss(self, networks: Networks, k: int, positions: slice) -> Tensor:
        """DDPM algorithm 1, lines 2 to 5, for these positions of the global batch of step k."""
        draws, indices = self._draws(k), self.indices(k)[positions]
        prefetch(self.data, self.indices, k, positions)
        choices = {name: values[positions] for name, values in draws.choices.items()}
        x0 = self.clean(indices, choices)
        model = self._model(networks, self.condition(networks, indices, choices))
        t = draws.t[positions]
        losses = self.diffusion.loss(model, x0, t, draws.noise[positions])
        if self.importance is not None:
            self.importance.update(t, losses.detach())
        return losses * draws.weight[positions]

    def _model(self, networks: Networks, condition: Any) -> Denoiser:
        return lambda x, t: self.predict(networks, x, t, condition)

    def _draw(self, k: int) -> Draws:
        c, T, B = self.config.diffusion, self.diffusion.T, self.batch
        on = self.device if self.device.type == "cuda" else torch.device("cpu")
        g = generator(self.seed, STEP, k, device=on)
        u = torch.rand(self.uniforms, B, generator=g, device=on)
        if self.importance is not None:
            t, weight = self.importance.sample(B, generator(self.seed, STEP, k))
        else:
            t, weight = times(u[0], T, c.times == "stratified"), torch.ones_like(u[0])
        noise = torch.randn(B, *self.shape, generator=g, device=on)
        if c.offset_noise:
            noise = offset_noise(noise, c.offset_noise, g)
        choices = {name: values.to(self.device) for name, values in self.choose(k, u[1:]).items()}
        return Draws(t.to(self.device), weight.to(self.device), noise.to(self.device), choices)

    # Seen from outside

    def held_out(self, networks: Networks) -> list[float]:
        if not len(self.test):
            return []
        shape, quartiles = (len(self.test), *self.shape), []
        for quarter in range(4):
            t, noise = held_out_draws(shape, self.diffusion.T, quarter)
            total = 0.0
            for part in torch.arange(len(self.test)).split(64):
                indices = self.test[part]
                model = self._model(networks, self.condition(networks, indices))
                x0 = self.clean(indices)
                losses = self.diffusion.loss(model, x0, t[part].to(self.device), noise[part].to(self.device))
                total += losses.sum().item()
            quartiles.append(total / len(self.test))
        return quartiles

    def samples(self, networks: Networks) -> list[Image.Image]:
        s, g = self.config.sample, generator(self.seed, SAMPLES)
        x = self.scheduler.start(normal((s.count, *self.shape), g, self.device), s.steps)
        try:
            x0 = self.scheduler.sample(self.denoiser(networks, s.count), x, steps=s.steps, generators=g)
        except schedulers.NonFinite as error:
            raise InvalidOutput(f"training diverged: a picture of the sheet is {error}") from error
        return self.pictures(x0)

    def _scheduler(self) -> schedulers.Scheduler:
        """The scheduler of the sheets. Raises ValueError for an unknown name or too many steps."""
        s = self.config.sample
        options: dict[str, Any] = {"clip_sample": True} if self.clip_samples else {}
        try:
            scheduler = schedulers.get(
                s.scheduler, noise=self.diffusion.noise, prediction=self.diffusion.prediction, **options
            )
            scheduler.grid(s.steps)
            if scheduler.solver.cfg_pp:
                raise ValueError(f"{scheduler.name} (CFG++) is for generate, not for sheets")
        except ValueError as error:
            raise ValueError(f"[sample]: scheduler: {error}") from error
        return scheduler

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.importance is None else self.importance.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.importance is not None:
            self.importance.load_state_dict(state)
