"""One step of training, for any `Job`: gradient, clipping, AdamW, averages; and all of it into files and back.

    trainer = Trainer(job, Train(steps=100), Ranks("cpu"))
    for k in range(100):
        trainer.step(k)

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

from diffgen.errors import InvalidOutput

from . import checkpoint
from .config import Train
from .ema import Average
from .job import Job, Networks
from .parallel import Ranks, gathered, local, part
from .precision import fast_attention, fast_dtype
from .seeds import DROPOUT, mix

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter


class Trainer:
    """A job's networks and what trains them: the optimizer, the averages, the losses that are not yet written."""

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
        self.optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.averages = [Average(self.weights, length) for length in config.ema]
        self.losses: list[Tensor] = []  # since they were last written: this rank's part of the mean over the batch
        self.gradients: list[Tensor] = []  # and the norms, before they were clipped

    def _named(self, method: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all networks; a single one goes without its own name."""
        for name, network in self.job.networks.items():
            prefix = "" if len(self.job.networks) == 1 else f"{name}."
            found = getattr(network, method)()
            for key, tensor in found.items() if isinstance(found, dict) else found:
                yield prefix + key, tensor

    def step(self, k: int) -> Tensor:
        """Step k = 0, 1, …: one update of the weights. Returns the loss (this rank's part), still on the device."""
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(k)
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
        """Up in a line over `warmup` steps, then constant; in the last part, `decay`, down to 0 by cosine or line."""
        up, done = min(1.0, (k + 1) / max(1, self.config.warmup)), k / self.config.steps
        done = max(0.0, 1 - (1 - done) / self.config.decay) if self.config.decay < 1 else done
        down = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done}
        return self.config.learning_rate * up * down[self.config.schedule]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """What the job runs its forward passes in: bfloat16, where it is fast."""
        if self.dtype == torch.float32:
            yield
        else:
            with torch.autocast(self.device.type, self.dtype), fast_attention(self.device):
                yield

    @contextlib.contextmanager
    def evaluating(self, average: Average | None = None) -> Iterator[Networks]:
        """The networks as they are to be looked at; with an average's weights for their own, if one is given."""
        own = [local(p.detach()) for p in self.weights.values()]
        kept = [p.clone() for p in own] if average else []
        for network in self.job.networks.values():
            network.eval()
        try:
            with torch.no_grad():
                if average:
                    torch._foreach_copy_(own, average.values)
                yield self.job.networks
        finally:
            if average:
                torch._foreach_copy_(own, kept)
            for network in self.job.networks.values():
                network.train()

    def recent(self, step: int) -> dict[str, list[float]]:
        """Losses and norms of the steps since they were last written. Raises InvalidOutput where one is not finite."""
        if not self.losses:
            return {"loss": [], "gradient_norm": []}
        losses = self.ranks.total(torch.stack(self.losses))
        said = {"loss": losses.tolist(), "gradient_norm": torch.stack([*map(_full, self.gradients)]).tolist()}
        first = step - len(losses) + 1
        # what was added up once is not added up again
        self.losses = list(losses if self.ranks.main else torch.zeros_like(losses))
        for i, values in enumerate(zip(*said.values(), strict=True)):
            for name, value in zip(said, values, strict=True):
                if not math.isfinite(value):
                    raise InvalidOutput(
                        f"training diverged: the {name.replace('_', ' ')} is {value} at step {first + i}",
                        "lower train.learning_rate, or raise train.warmup; what was saved before that step is sound",
                    )
        return said

    def model(self) -> dict[str, Tensor]:
        """All weights of the networks by name, whole on every rank."""
        return {name: gathered(p, local(p.detach())) for name, p in self._named("state_dict")}

    @torch.no_grad()
    def load_model(self, held: dict[str, Tensor]) -> None:
        """Replace all weights of the networks."""
        for name, tensor in self._named("state_dict"):
            local(tensor).copy_(part(tensor, held[name]))

    def files(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file and name, all of it on every rank."""
        files = {"model": (model := self.model())}
        for i, average in enumerate(self.averages):
            averaged = {
                name: gathered(p, value).to(p.dtype)
                for (name, p), value in zip(self.weights.items(), average.values, strict=True)
            }
            files["ema" if i == 0 else f"ema-{average.length:g}"] = model | averaged
        moments = {
            f"{slot}.{name}": gathered(p, local(self.optimizer.state[p][slot]))
            for name, p in self.weights.items()
            for slot in MOMENTS
        }
        return files | {"optimizer": moments | {f"job.{key}": value for key, value in self.job.state_dict().items()}}

    @torch.no_grad()
    def restore(self, folder: Path, state: dict[str, Any]) -> int:
        """Take everything back from a checkpoint, whose state has been read; its step. Raises InputError."""
        step = int(state["step"])
        for p in self.weights.values():
            self.optimizer.state[p] = {
                "step": torch.tensor(float(step), device=p.device),
                **{slot: torch.zeros_like(p) for slot in MOMENTS},
            }
        expected = self.files()
        held = {name: checkpoint.read(folder / f"{name}.safetensors", tensors) for name, tensors in expected.items()}
        self.load_model(held["model"])
        for average, name in zip(self.averages, list(expected)[1:-1], strict=True):
            for value, key in zip(average.values, self.weights, strict=True):
                value.copy_(part(self.weights[key], held[name][key]))
        for name, p in self.weights.items():
            for slot in MOMENTS:
                local(self.optimizer.state[p][slot]).copy_(part(p, held["optimizer"][f"{slot}.{name}"]))
        of_job = {k.removeprefix("job."): v for k, v in held["optimizer"].items() if k.startswith("job.")}
        self.job.load_state_dict(of_job)
        pending = torch.tensor(state["pending"]["loss"], device=self.device)
        self.losses = list(pending if self.ranks.main else torch.zeros_like(pending))
        self.gradients = list(torch.tensor(state["pending"]["gradient_norm"], device=self.device))
        return step


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
