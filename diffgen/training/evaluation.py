"""Measure a run: samples against pictures that were held out of its training, and its losses on those.

Every metric comes with two others that give it a scale: its floor, which real pictures of the training part reach in
place of the samples, and its ceiling, which noise reaches, or a network that always answers 0.

  sliced_wasserstein             between samples and held-out pictures, pixels in [-1, 1]
  frechet_distance               the same in the features of a small classifier, trained on the training part
  nearest_neighbour_accuracy     how often the nearest neighbour tells samples from held-out pictures
  density, coverage              whether samples look real, and whether all kinds of pictures are among them
  memorisation_ratio             distance to the nearest training picture, over that of held-out pictures
  classification_accuracy_score  of a classifier trained on the samples, on held-out pictures
  held_out_loss                  the loss of the training, at its fixed times and noise
  bits_per_dim                   the variational bound; bits_per_dim_ode: by the probability-flow ODE, on request
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffgen.devices import out_of_memory
from diffgen.diffusion.likelihood import bits_per_dim_ode, bound_term, prior_term
from diffgen.errors import InputError, InvalidOutput

from . import config as configuration
from .batches import evenly
from .data import BUNDLED, open_data
from .data.dataset import DataSet
from .evaluate_plan import EvaluationPlan
from .generate import RunGenerator
from .metrics import METRICS
from .pixels import PixelJob
from .real_pictures import Figures, RealPictures
from .run import diffusion_of

Progress = Callable[[int, int, str], None]

MOST_PAIRS = 16_384  # of times and pictures, for the variational bound
ODE_PICTURES, ODE_STEPS = 64, 200


@dataclass(frozen=True)
class DataParts:
    """The data of an evaluation: name, and how many pictures of each part are compared."""

    name: str
    train: int
    test: int


@dataclass(frozen=True)
class Judge:
    """The classifier of an evaluation: its task, "class" or "position", and its accuracy on held-out pictures."""

    task: str
    accuracy: float


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measures, and how."""

    run: str
    step: int  # of the checkpoint
    data: DataParts
    samples: int
    seed: int
    scheduler: str
    grid: str
    steps: int
    guidance: float
    metrics: dict[str, Figures]
    floor_deviation: dict[str, float]  # standard deviation of a floor over a few draws of real pictures
    better: dict[str, str]  # the direction in which each metric is better
    left_out: dict[str, str]  # why metrics are missing
    held_out_loss_quartiles: list[float]  # by quartile of t, small t first
    classifier: Judge
    notes: list[str]
    seconds: float
    files: list[str] = field(default_factory=list)  # what was written


def data_of(
    plan: EvaluationPlan, data: str | os.PathLike[str] | DataSet, progress: Callable[[int, int], None] | None = None
) -> DataSet:
    """Open the data as the run opened its own. Raises InputError if they are other data, or do not fit the run."""
    run, own = plan.run, plan.run.data
    if not isinstance(data, DataSet):
        config = configuration.parse(run.config, run.folder / "run.json").data
        options: dict[str, Any] = {"memory": config.memory, "progress": progress}
        if os.fspath(data) not in BUNDLED:
            size, channels = (config.size, config.channels) if plan.own_data else (tuple(own["size"]), own["channels"])
            options |= {"size": size, "channels": channels}
        data = open_data(data, **options)
    if plan.own_data and data.fingerprint != own["fingerprint"]:
        raise InputError(
            f"{run.name} was trained on other pictures: {own['name']}, {own['count']} of them; {data.name} has "
            f"{len(data)}",
            "give the data that it was trained on, or add --any-data",
        )
    for key, value in (
        ("size", list(data.size)),
        ("channels", data.channels),
        ("levels", data.levels),
        ("classes", data.classes),
    ):
        if value != own[key] and not (key == "classes" and own[key] is None):
            raise InputError(
                f"{data.name} does not fit {run.name}: its {key}: {_short(value)}; the run's: {_short(own[key])}"
            )
    return data


class Evaluation:
    """One evaluation: `result()` computes it; `samples`, `labels` and `real` remain for inspection."""

    def __init__(self, plan: EvaluationPlan, data: DataSet, device: str = "auto") -> None:
        """Raises UsageError for a missing device, InputError for an invalid checkpoint or too few pictures."""
        self.plan, self.run, self.data = plan, plan.run, data
        self.config = configuration.parse(self.run.config, self.run.folder / "run.json")
        self.real = RealPictures(data, self.config.data.held_out, plan.own_data)
        self.by_class = self.run.data["classes"] is not None
        self.labels: Tensor | None = None
        if self.by_class:
            assert data.labels is not None
            share = data.labels[self.real.train_index].bincount(minlength=len(self.run.data["classes"]))
            self.labels = in_proportion(share, len(self.plan))
            self.plan = replace(self.plan, labels=tuple(self.labels.tolist()))
        self.generator = RunGenerator(self.plan.model, device)
        self.process = diffusion_of(self.run)
        self.device = self.generator.device

    def result(self, progress: Progress | None = None) -> EvaluationResult:
        """The result, without files. `progress(done, total, text)` counts pictures that the network evaluates.

        Raises InvalidOutput if a sample is not finite, OutOfMemory.
        """
        began = time.perf_counter()
        tick = Ticks(self._costs(), progress)
        with out_of_memory():
            self.samples = self._sample(tick)
            tick.next("distances", 0)
            real = self.real.measure(self.samples, self.labels)
            metrics, left_out = dict(real.metrics), dict(real.left_out)
            if not self.by_class:
                left_out["classification_accuracy_score"] = "the run has no classes"
            metrics["held_out_loss"], quartiles = self._held_out(tick)
            if self.plan.bits:
                metrics["bits_per_dim"] = self._bits(self._bound, tick)
            if self.plan.ode:
                metrics["bits_per_dim_ode"] = self._bits(self._ode, tick)
        for name in [name for name, figures in metrics.items() if not figures.finite]:
            del metrics[name]
            left_out[name] = "it is not finite"
        plan = self.plan
        return EvaluationResult(
            run=self.run.name,
            step=self.generator.step,
            data=DataParts(self.data.name, len(self.real.train), len(self.real.test)),
            samples=len(plan),
            seed=plan.seed,
            scheduler=plan.scheduler,
            grid=plan.grid,
            steps=plan.steps,
            guidance=plan.guidance,
            metrics={name: metrics[name] for name in METRICS if name in metrics},
            floor_deviation={name: value for name, value in real.floor_deviation.items() if value is not None},
            better={name: metric.better for name, metric in METRICS.items() if name in metrics},
            left_out=left_out,
            held_out_loss_quartiles=quartiles,
            classifier=Judge(self.real.task, self.real.classifier_accuracy),
            notes=[*self.real.notes, *self.generator.notes],
            seconds=round(time.perf_counter() - began, 3),
        )

    def _costs(self) -> int:
        """The number of network evaluations, counted by picture."""
        nfe, bits = self.plan.steps, 2 * (self._pairs + len(self._parts[0])) * self.plan.bits
        ode = 4 * ODE_PICTURES * min(ODE_STEPS, self.process.T - 1) * self.plan.ode
        return len(self.plan) * nfe + 8 * len(self._parts[0]) + bits + ode

    def _sample(self, tick: Ticks) -> Tensor:
        """The samples as values uint8 [N, C, H, W], as their files would have them."""
        tick.next("samples", len(self.plan) * self.plan.steps)
        arrays = []
        for picture in self.generator.pictures(self.plan, tick.part):
            if picture.image is None:
                raise picture.error or InvalidOutput("no picture")
            arrays.append(np.asarray(picture.image))
        pixels = torch.from_numpy(np.stack(arrays))
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return (pixels.float() * ((self.data.levels - 1) / 255)).round().to(torch.uint8)

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """Numbers of held-out pictures, and of as many training pictures."""
        test = self.real.test_index
        return test, evenly(self.real.train_index, len(test))

    def _held_out(self, tick: Ticks) -> tuple[Figures, list[float]]:
        """(the loss of the average on held-out and on training pictures, and of a network that answers 0; the first by
        quartile of t)"""
        with torch.random.fork_rng(devices=[]):
            job = PixelJob(self.config, self.data, str(self.run.folder / "run.json"))
        job.prepare(self.device, contextlib.nullcontext)
        network = {"network": self.generator.network}
        silent = {"network": Silent(self.run.network.get("out_channels") or self.data.channels)}
        with torch.inference_mode():
            tick.next("held-out loss", 4 * len(job.test))
            quartiles, zero = job.held_out(network), job.held_out(silent)
            tick.next("held-out loss", 4 * len(job.test))
            job.test = evenly(self.real.train_index, len(job.test))
            train = job.held_out(network)
        return Figures(*map(statistics.fmean, (quartiles, train, zero))), quartiles

    def _bits(self, method: Callable[[Tensor, Ticks], float], tick: Ticks) -> Figures:
        """Bits per dimension of held-out pictures, of training pictures, and of the uniform distribution."""
        test, train = (method(part, tick) for part in self._parts)
        return Figures(test, train, math.log2(self.data.levels))

    @property
    def _pairs(self) -> int:
        return min(MOST_PAIRS, 16 * len(self.plan))

    @torch.inference_mode()
    def _bound(self, part: Tensor, tick: Ticks) -> float:
        """The mean variational bound of these pictures: L_0 and L_T of all, each of L_1 … L_{T-1} of a few."""
        n, T = len(part), self.process.T
        pairs = self._pairs if T > 1 else 0
        tick.next("bits per dimension", n + pairs)
        generator = torch.Generator().manual_seed(0)
        u = torch.rand(pairs, generator=generator)
        t = 1 + ((torch.arange(pairs) + u) * ((T - 1) / max(1, pairs))).long().clamp_(max=T - 2)
        times = torch.cat([torch.zeros(n, dtype=torch.int64), t])
        which = torch.cat([torch.arange(n), torch.arange(pairs) % n])
        terms = []
        for at, number in zip(times.split(self.plan.batch_size), which.split(self.plan.batch_size), strict=True):
            x0, model = self._inputs(part[number])
            at = at.to(self.device)
            noise = torch.randn(x0.shape, generator=generator).to(self.device)
            x_t = self.process.q_sample(x0, at, noise)
            terms.append(
                bound_term(self.process, model(x_t, at), x0, x_t, at, self.data.levels, clip=(-1, 1)).double().cpu()
            )
            tick.by(len(at))
        every = torch.cat(terms)
        prior = prior_term(self.process, self.data.to_float(self.data.pictures(part))).double().mean()
        middle = (T - 1) * every[n:].mean() if pairs else 0
        return float(every[:n].mean() + middle + prior)

    def _ode(self, part: Tensor, tick: Ticks) -> float:
        """The mean bits per dimension of a few of these pictures by the probability-flow ODE."""
        part = evenly(part, ODE_PICTURES)
        steps = min(ODE_STEPS, self.process.T - 1)
        tick.next("bits per dimension by the ODE", 2 * len(part) * steps)
        generator, bits = torch.Generator().manual_seed(0), []
        for batch in part.split(self.plan.batch_size):
            x0, model = self._inputs(batch)
            bits.append(
                bits_per_dim_ode(
                    self.process, model, x0, generator, levels=self.data.levels, steps=steps or None, probes=1
                )
            )
            tick.by(2 * len(batch) * steps)
        return float(torch.cat(bits).double().mean())

    def _inputs(self, indices: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """(pictures [b, C, H, W] in [-1, 1] on the device, the network conditioned on their classes)"""
        x0 = self.data.to_float(self.data.pictures(indices)).to(self.device)
        labels = self.data.labels[indices].tolist() if self.by_class and self.data.labels is not None else None
        return x0, self.generator.denoiser(labels, 1.0)


class Ticks:
    """Counts towards a total over several stages."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.finished, self.length, self.done, self.text = 0, 0, 0, ""

    def next(self, text: str, length: int) -> None:
        """Begin the next stage, of that length."""
        self.finished += self.length
        self.length, self.done, self.text = length, 0, text
        self._report()

    def by(self, count: int) -> None:
        self.done += count
        self._report()

    def part(self, done: int, total: int) -> None:
        self.done = self.length * done // max(1, total)
        self._report()

    def _report(self) -> None:
        if self.progress is not None:
            done = self.finished + self.done
            self.progress(done, max(done, self.total), self.text)


class Silent(nn.Module):
    """A network that always returns 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return x.new_zeros(x.shape[0], self.channels, *x.shape[2:])


def in_proportion(counts: Tensor, total: int) -> Tensor:
    """LongTensor [total]: classes in the proportions of `counts`, rounded by the largest remainders."""
    exact = counts.double() * (total / counts.sum())
    shares = exact.floor().long()
    shares[(exact - shares).argsort(descending=True, stable=True)[: total - int(shares.sum())]] += 1
    return torch.arange(len(counts)).repeat_interleave(shares)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"
