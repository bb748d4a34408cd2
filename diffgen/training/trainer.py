"""One step of training, for any `Job`: gradient, clipping, AdamW, averages; and all of it into files and back.

    trainer = Trainer(job, Train(steps=100), Ranks("cpu"))
    for k in range(100):
        trainer.step(k)

From a step to its arithmetic:

    Trainer.step(k)            loss, backward, clip, optimizer, averages
      Job.loss(k, positions)   of a diffusion model: DiffusionJob.loss
        DiffusionJob._draw(k)  t, noise and the job's choices, from the generator (seed, k)
        Shuffle(k)             which pictures
        Job.clean, .condition  x0, and the class or the caption
        GaussianDiffusion.loss(model, x0, t, noise)
          q_sample             x_t = α·x0 + σ·ε                              (DDPM eq. 4)
          model(x_t, t)        the network: Job.predict
          simple_loss          mean of (output − target)²                    (DDPM eq. 14)
            prediction.target  a·x0 + b·ε, by what the network predicts
      Average.update(k + 1)    EDM2's power function

What step k draws depends on (seed, k) alone, so a checkpoint holds weights, moments and averages, and no state of a
generator or of the data. Losses stay on the device until they are written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffgen.errors import InputError, InvalidOutput

from . import checkpoint
from .config import Train
from .ema import Average
from .job import Job, Networks
from .optimizers import OPTIMIZERS
from .parallel import Ranks, gathered, local, part
from .precision import fast_attention, fast_dtype
from .seeds import DROPOUT, mix


class Trainer:
    """A job's networks with their optimizer, their averages, and the losses that are not yet logged."""

    def __init__(self, job: Job, config: Train, ranks: Ranks) -> None:
        self.job, self.config, self.ranks, self.device = job, config, ranks, ranks.device
        self.dtype = fast_dtype(config.precision, self.device, job.area)
        job.prepare(self.device, self.autocast)
        for network in job.networks.values():
            network.to(self.device).train()
            if config.compile:
                network.compile()
        self.networks = ranks.wrap(job.networks, config.parallel)
        self.weights = {name: p for name, p in self._named("named_parameters") if p.requires_grad}
        self.optimizer = OPTIMIZERS[config.optimizer].make(self._groups(), config)
        self.averages = [Average(self.weights, length) for length in config.ema]
        self.segments: tuple[int, ...] = ()  # where earlier segments of the run ended
        self.losses: list[Tensor] = []  # not yet logged: this rank's part of the mean over the batch
        self.gradients: list[Tensor] = []  # not yet logged: norms before clipping

    @property
    def parameters(self) -> int:
        """The number of trained weights."""
        return sum(p.numel() for p in self.weights.values())

    @property
    def precision(self) -> str:
        """The name of the dtype of the forward passes."""
        return str(self.dtype).removeprefix("torch.")

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters by network, each with the factor of its learning rate. Raises InputError for another name."""
        if wrong := sorted(self.config.rates.keys() - self.job.networks.keys()):
            raise InputError(
                f"train.rates: no network {wrong[0]!r} is trained", f"there are {', '.join(self.job.networks)}"
            )
        groups = []
        for name, network in self.job.networks.items():
            factor, trained = self.config.rates.get(name, 1.0), [p for p in network.parameters() if p.requires_grad]
            if type(factor) not in (int, float) or not 0 <= factor <= 100:
                raise InputError(f"train.rates: {name} is {factor!r}, not a number from 0 to 100")
            if trained:
                groups.append({"params": trained, "factor": float(factor), "lr": 0.0})
        return groups

    def _named(self, method: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of all networks; the network's name is a prefix if there are several."""
        for name, network in self.job.networks.items():
            prefix = "" if len(self.job.networks) == 1 else f"{name}."
            tensors = getattr(network, method)()
            for key, tensor in tensors.items() if isinstance(tensors, dict) else tensors:
                yield prefix + key, tensor

    def step(self, k: int) -> Tensor:
        """Update the weights once: step k = 0, 1, …. Returns this rank's part of the loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(k) * group["factor"]
        batch, parts, total = self.config.batch_size, self.config.accumulate, torch.zeros((), device=self.device)
        for i in range(parts):
            torch.manual_seed(mix(self.config.seed, DROPOUT, k, self.ranks.rank, i))
            with self.ranks.gradients(self.networks, last=i == parts - 1):
                loss = self.job.loss(self.networks, k, self.ranks.share(batch, i, parts)).sum() / batch
                (loss * self.ranks.world).backward()  # the ranks' gradients are averaged
            total += loss.detach()
        self.gradients.append(nn.utils.clip_grad_norm_(self.weights.values(), self.config.clip or math.inf))
        self.losses.append(total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update(k + 1)
        return total

    def learning_rate(self, k: int) -> float:
        """The learning rate of step k: it rises linearly over `warmup` steps, is constant, and falls to 0 over the last
        part, `decay`, by cosine or linearly.

        Where a finished run was continued, each segment of a falling schedule has a warm-up and a fall of its own.
        """
        begin, end = 0, self.config.steps
        if self.config.schedule != "constant":
            begin = max((step for step in self.segments if step <= k), default=0)
            end = min((step for step in self.segments if step > k), default=end)
        up, done = min(1.0, (k - begin + 1) / max(1, self.config.warmup)), (k - begin) / (end - begin)
        done = max(0.0, 1 - (1 - done) / self.config.decay) if self.config.decay < 1 else done
        down = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done}
        return self.config.learning_rate * up * down[self.config.schedule]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of the job's forward passes: autocast to bfloat16 where that is fast."""
        if self.dtype == torch.float32:
            yield
        else:
            with torch.autocast(self.device.type, self.dtype), fast_attention(self.device):
                yield

    @contextlib.contextmanager
    def evaluating(self, average: Average | None = None) -> Iterator[Networks]:
        """The networks in evaluation mode, without gradients; with the weights of an average, if one is given."""
        own = [local(p.detach()) for p in self.weights.values()]
        backup = [p.clone() for p in own] if average else []
        for network in self.job.networks.values():
            network.eval()
        try:
            with torch.no_grad():
                if average:
                    torch._foreach_copy_(own, average.values)
                yield self.job.networks
        finally:
            if average:
                torch._foreach_copy_(own, backup)
            for network in self.job.networks.values():
                network.train()

    def check(self, step: int) -> dict[str, list[float]]:
        """The losses and gradient norms that are not yet logged. Raises InvalidOutput if one is not finite."""
        if not self.losses:
            return {"loss": [], "gradient_norm": []}
        losses = self.ranks.total(torch.stack(self.losses))
        values = {"loss": losses.tolist(), "gradient_norm": torch.stack([*map(_full, self.gradients)]).tolist()}
        first = step - len(losses) + 1
        # the total is on rank 0 now: the next call must not add the ranks' parts again
        self.losses = list(losses if self.ranks.main else torch.zeros_like(losses))
        for i, numbers in enumerate(zip(*values.values(), strict=True)):
            for name, number in zip(values, numbers, strict=True):
                if not math.isfinite(number):
                    raise InvalidOutput(
                        f"training diverged: the {name.replace('_', ' ')} is {number} at step {first + i}",
                        "lower train.learning_rate, or raise train.warmup; checkpoints before that step are sound",
                    )
        return values

    def take_losses(self, step: int) -> dict[str, list[float]]:
        """`check`, and forget them, as they are logged now."""
        values = self.check(step)
        self.losses, self.gradients = [], []
        return values

    def model(self) -> dict[str, Tensor]:
        """All weights of the networks by name, complete on every rank."""
        return {name: gathered(p, local(p.detach())) for name, p in self._named("state_dict")}

    @torch.no_grad()
    def load_model(self, weights: dict[str, Tensor]) -> None:
        """Replace all weights of the networks."""
        for name, tensor in self._named("state_dict"):
            local(tensor).copy_(part(tensor, weights[name]))

    def files(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by file and name; complete on every rank."""
        files = {"model": (model := self.model())}
        for i, average in enumerate(self.averages):
            averaged = {
                name: gathered(p, value).to(p.dtype)
                for (name, p), value in zip(self.weights.items(), average.values, strict=True)
            }
            files["ema" if i == 0 else f"ema-{average.length:g}"] = model | averaged
        moments = {
            f"{slot}.{name}": _stored(gathered(p, local(value)) if value.shape == p.shape else value)
            for name, p in self.weights.items()
            for slot, value in self.optimizer.state[p].items()
            if slot != "step"
        }
        return files | {"optimizer": moments | {f"job.{key}": value for key, value in self.job.state_dict().items()}}

    @torch.no_grad()
    def restore(self, folder: Path, state: dict[str, Any]) -> int:
        """Load a checkpoint, given its state.json; returns its step. Raises InputError."""
        step = int(state["step"])
        for p in self.weights.values():
            self.optimizer.state[p] = {
                "step": torch.tensor(float(step), device=p.device),
                **OPTIMIZERS[self.config.optimizer].slots(p),
            }
        expected = self.files()
        files = {
            name: checkpoint.read_weights(folder / f"{name}.safetensors", tensors) for name, tensors in expected.items()
        }
        self.load_model(files["model"])
        for average, name in zip(self.averages, list(expected)[1:-1], strict=True):
            for value, key in zip(average.values, self.weights, strict=True):
                value.copy_(part(self.weights[key], files[name][key]))
        for name, p in self.weights.items():
            for slot, value in self.optimizer.state[p].items():
                if slot != "step":
                    stored = files["optimizer"][f"{slot}.{name}"]
                    local(value).copy_(part(p, stored) if value.shape == p.shape else stored)
        of_job = {k.removeprefix("job."): v for k, v in files["optimizer"].items() if k.startswith("job.")}
        self.job.load_state_dict(of_job)
        pending = torch.tensor(state["pending"]["loss"], device=self.device)
        self.losses = list(pending if self.ranks.main else torch.zeros_like(pending))
        self.gradients = list(torch.tensor(state["pending"]["gradient_norm"], device=self.device))
        return step


def _stored(state: Tensor) -> Tensor:
    """State as a checkpoint holds it: whole numbers of eight bits, which weights files have not, as float16."""
    return state.half() if state.dtype == torch.uint8 else state


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
