"""How good a run is: its samples against pictures that were held out of its training, and what it says of those.

    found = evaluate("runs/digits", "digits")
    found["metrics"]["nearest_neighbour_accuracy"]         # {"value": 0.53, "floor": 0.52, "ceiling": 1.0}

Every metric comes with two others that give it a scale: its floor, which real pictures of the training part reach in
place of the samples, and its ceiling, which noise reaches, or a network that knows nothing.

  sliced_wasserstein             between samples and held-out pictures, pixels in [-1, 1]
  frechet_distance               the same in the features of a small classifier, trained on the training part
  nearest_neighbour_accuracy     how often samples and held-out pictures are told apart by their nearest neighbour
  density, coverage              is it like real pictures, and are all kinds of them there
  memorisation_ratio             distance to the nearest training picture, over that of held-out pictures
  classification_accuracy_score  of a classifier trained on the samples, on held-out pictures
  held_out_loss                  the loss of the training, at its fixed times and noise
  bits_per_dim                   the variational bound; bits_per_dim_ode: by the probability-flow ODE, if asked for
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from .evaluate_plan import EvaluationPlan, make_evaluation_plan
from .generate import RunGenerator
from .metrics import METRICS
from .pixels import PixelJob
from .reference import Reference
from .run import diffusion_of

Progress = Callable[[int, int, str], None]

MOST_PAIRS = 16_384  # of a time and a picture, for the variational bound
ODE_PICTURES, ODE_STEPS = 64, 200


def evaluate(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | DataSet,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The figures of a run: `metrics` {name: {value, floor, ceiling}}, and how they were made.

    data     what the run was trained on, a name or a folder as for `train`, or open already
    options  samples  how many; 1000 with classes, which they have in the proportion of the data, else 500
             seed     picture i has seed + i
             steps, guidance, scheduler, grid  how they are made; unless given, as `generate` would
             batch_size
             any_data  take other data of the same size, channels, levels and classes too
             bits, ode  whether bits per dimension are found by the variational bound, and by the ODE
    `progress(done, total, text)` counts pictures that the network is asked about.
    Raises UsageError (a number or name), InputError (a run or data that are wrong or do not go together), OutOfMemory,
    InvalidOutput (a sample is not finite).
    """
    plan = make_evaluation_plan(run, **options)
    return Evaluation(plan, data_of(plan, data), device).result(progress)


def data_of(
    plan: EvaluationPlan, data: str | os.PathLike[str] | DataSet, progress: Callable[[int, int], None] | None = None
) -> DataSet:
    """The data, read as the run read its own. Raises InputError where they are not the run's, or do not fit it."""
    run, said = plan.run, plan.run.data
    if not isinstance(data, DataSet):
        config = configuration.parse(run.config, run.folder / "run.json").data
        like: dict[str, Any] = {"memory": config.memory, "progress": progress}
        if os.fspath(data) not in BUNDLED:
            size, channels = (
                (config.size, config.channels) if plan.own_data else (tuple(said["size"]), said["channels"])
            )
            like |= {"size": size, "channels": channels}
        data = open_data(data, **like)
    if plan.own_data and data.fingerprint != said["fingerprint"]:
        raise InputError(
            f"{run.name} was trained on other pictures: {said['name']}, {said['count']} of them; {data.name} has "
            f"{len(data)}",
            "give the data that it was trained on, or add --any-data",
        )
    for what, has, wants in (
        ("size", list(data.size), said["size"]),
        ("channels", data.channels, said["channels"]),
        ("levels", data.levels, said["levels"]),
        ("classes", data.classes, said["classes"]),
    ):
        if has != wants and not (what == "classes" and wants is None):
            raise InputError(
                f"{data.name} does not fit {run.name}: its {what}: {_short(has)}; the run's: {_short(wants)}"
            )
    return data


class Evaluation:
    """One evaluation: `result()` is made once, and then `samples`, `labels` and `real` are there to be looked at."""

    def __init__(self, plan: EvaluationPlan, data: DataSet, device: str = "auto") -> None:
        """Raises UsageError for a device that is not there, InputError for a wrong checkpoint or too few pictures."""
        self.plan, self.run, self.data = plan, plan.run, data
        self.config = configuration.parse(self.run.config, self.run.folder / "run.json")
        self.real = Reference(data, self.config.data.held_out, plan.own_data)
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

    def result(self, progress: Progress | None = None) -> dict[str, Any]:
        """All that `evaluate` returns. `progress(done, total, text)` counts pictures that the network is asked about.

        Raises InvalidOutput if a sample is not finite, OutOfMemory.
        """
        began = time.perf_counter()
        tick = Ticks(self._costs(), progress)
        with out_of_memory():
            self.samples = self._sample(tick)
            tick.next("distances", 0)
            found, spread, left_out = self.real.measure(self.samples, self.labels)
            if not self.by_class:
                left_out["classification_accuracy_score"] = "the run knows no classes"
            found["held_out_loss"], quartiles = self._held_out(tick)
            if self.plan.bits:
                found["bits_per_dim"] = self._bits(self._bound, tick)
            if self.plan.ode:
                found["bits_per_dim_ode"] = self._bits(self._ode, tick)
        for name in [name for name, figures in found.items() if not all(map(math.isfinite, figures.values()))]:
            del found[name]
            left_out[name] = "it is not finite"
        plan = self.plan
        return {
            "run": self.run.name,
            "step": self.generator.step,
            "data": {"name": self.data.name, "train": len(self.real.train), "test": len(self.real.test)},
            "samples": len(plan),
            "seed": plan.seed,
            "scheduler": plan.scheduler,
            "grid": plan.grid,
            "steps": plan.steps,
            "guidance": plan.guidance,
            "metrics": {name: found[name] for name in METRICS if name in found},
            "floor_deviation": {name: value for name, value in spread.items() if value is not None},
            "better": {name: metric.better for name, metric in METRICS.items() if name in found},
            "left_out": left_out,
            "held_out_loss_quartiles": quartiles,
            "classifier": {"task": self.real.task, "accuracy": self.real.classifier_accuracy},
            "notes": [*self.real.notes, *self.generator.damaged],
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _costs(self) -> int:
        """How many pictures the network will be asked about, one by one."""
        nfe, bits = self.plan.steps, 2 * (self._pairs + len(self._parts[0])) * self.plan.bits
        ode = 4 * ODE_PICTURES * min(ODE_STEPS, self.process.T - 1) * self.plan.ode
        return len(self.plan) * nfe + 8 * len(self._parts[0]) + bits + ode

    def _sample(self, tick: Ticks) -> Tensor:
        """Values uint8 [N, C, H, W] of the pictures, as their files would have them."""
        tick.next("samples", len(self.plan) * self.plan.steps)
        made = []
        for picture in self.generator.pictures(self.plan, tick.part):
            if picture.image is None:
                raise picture.error or InvalidOutput("no picture")
            made.append(np.asarray(picture.image))
        pixels = torch.from_numpy(np.stack(made))
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return (pixels.float() * ((self.data.levels - 1) / 255)).round().to(torch.uint8)

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """Numbers of held-out pictures, and of as many training pictures."""
        test = self.real.test_index
        return test, evenly(self.real.train_index, len(test))

    def _held_out(self, tick: Ticks) -> tuple[dict[str, float], list[float]]:
        """(the loss of the average, on training pictures, of a network that answers 0; the first by quartile of t)"""
        with torch.random.fork_rng(devices=[]):
            job = PixelJob(self.config, self.data, str(self.run.folder / "run.json"))
        job.prepare(self.device, contextlib.nullcontext)
        network = {"network": self.generator.network}
        silent = {"network": Silent(self.run.network.get("out_channels") or self.data.channels)}
        with torch.inference_mode():
            tick.next("held-out loss", 4 * len(job.test))
            quartiles, nothing = job.held_out(network), job.held_out(silent)
            tick.next("held-out loss", 4 * len(job.test))
            job.test = evenly(self.real.train_index, len(job.test))
            train = job.held_out(network)
        value, floor, ceiling = map(statistics.fmean, (quartiles, train, nothing))
        return {"value": value, "floor": floor, "ceiling": ceiling}, quartiles

    def _bits(self, how: Callable[[Tensor, Ticks], float], tick: Ticks) -> dict[str, float]:
        """Of held-out pictures, of training pictures, and of a model that knows nothing."""
        test, train = (how(part, tick) for part in self._parts)
        return {"value": test, "floor": train, "ceiling": math.log2(self.data.levels)}

    @property
    def _pairs(self) -> int:
        return min(MOST_PAIRS, 16 * len(self.plan))

    @torch.inference_mode()
    def _bound(self, part: Tensor, tick: Ticks) -> float:
        """The mean variational bound of these pictures: L_0 and L_T of all, L_1 … L_{T-1} each of a few in turn."""
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
            x0, model = self._asked(part[number])
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
        part = evenly(part, ODE_PICTURES)
        steps = min(ODE_STEPS, self.process.T - 1)
        tick.next("bits per dimension by the ODE", 2 * len(part) * steps)
        generator, found = torch.Generator().manual_seed(0), []
        for some in part.split(self.plan.batch_size):
            x0, model = self._asked(some)
            found.append(
                bits_per_dim_ode(
                    self.process, model, x0, generator, levels=self.data.levels, steps=steps or None, probes=1
                )
            )
            tick.by(2 * len(some) * steps)
        return float(torch.cat(found).double().mean())

    def _asked(self, some: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """(pictures [b, C, H, W] in [-1, 1] on the device, the network that is told their classes)"""
        x0 = self.data.to_float(self.data.pictures(some)).to(self.device)
        labels = self.data.labels[some].tolist() if self.by_class and self.data.labels is not None else None
        return x0, self.generator.denoiser(labels, 1.0)


class Ticks:
    """Counts towards a known total, through stages."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.begun, self.length, self.done, self.text = 0, 0, 0, ""

    def next(self, text: str, length: int) -> None:
        """The stage before is over; one of that length begins."""
        self.begun += self.length
        self.length, self.done, self.text = length, 0, text
        self._tell()

    def by(self, count: int) -> None:
        self.done += count
        self._tell()

    def part(self, done: int, total: int) -> None:
        self.done = self.length * done // max(1, total)
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            done = self.begun + self.done
            self.progress(done, max(done, self.total), self.text)


class Silent(nn.Module):
    """A network that always answers 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return x.new_zeros(x.shape[0], self.channels, *x.shape[2:])


def in_proportion(counts: Tensor, total: int) -> Tensor:
    """LongTensor [total]: class i as often as counts[i] has it of their sum, rounded by the largest remainders."""
    exact = counts.double() * (total / counts.sum())
    shares = exact.floor().long()
    shares[(exact - shares).argsort(descending=True, stable=True)[: total - int(shares.sum())]] += 1
    return torch.arange(len(counts)).repeat_interleave(shares)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"
