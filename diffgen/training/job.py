"""What a job is: it owns the data, the networks and the loss; the loop owns everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

Networks = Mapping[str, nn.Module]  # as they are to be called: with torchrun they are wrapped
Autocast = Callable[[], AbstractContextManager[Any]]  # what the networks' forward passes run in


class Job(Protocol):
    """Something to train. `training.pixels.PixelJob` is the one that `diffgen train` builds unless told otherwise."""

    networks: dict[str, nn.Module]  # every parameter that requires a gradient is trained
    area: int  # pixels of an example, or elements of one channel of its latents

    def about(self) -> dict[str, Any]:
        """What run.json says beside the configuration and the versions: job, data, network, …; JSON values."""
        ...

    def files(self) -> dict[str, bytes]:
        """What the run's folder holds beside run.json, by relative name with /: what its model needs and no training
        changes (a tokenizer, the autoencoder of latents)."""
        ...

    def first_weights(self, folder: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to begin with, from a folder that is no run; `own` are those that the networks have, by name.

        Raises InputError for a folder that this job cannot begin with.
        """
        ...

    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        """Called once, before the first loss: what the job keeps for itself (data, frozen networks) goes there."""
        ...

    def loss(self, networks: Networks, k: int, positions: slice) -> Tensor:
        """The loss of each example [b] at these positions of the global batch of step k, float32, on the device.

        A pure function of (seed, k, position), weights aside, but for layers that draw from torch's global generators,
        which the loop seeds. Nothing in it may read a value back from the device.
        """
        ...

    def held_out(self, networks: Networks) -> list[float]:
        """Losses on data that is not trained on, always the same examples, times and noise: one for each quartile of
        the times, small times first; of a job without times, one. Empty without such data."""
        ...

    def samples(self, networks: Networks) -> list[Image.Image]:
        """Pictures, always from the same noise."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the job has learnt beside the networks, for a checkpoint; empty where there is nothing."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
