"""Schedulers in a pipeline's loop: noise schedules, an exact model, starting states and the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import schedulers
from schedulers import NoiseSchedule, Scheduler
from schedulers.draws import Generators, normal
from schedulers.exact import Mixture

SD = NoiseSchedule.scaled_linear()
KINDS = {  # a noise schedule and a prediction
    "sd": (SD, "epsilon"),
    "zero_snr": (SD.zero_terminal_snr(), "v_prediction"),
    "flow": (NoiseSchedule.flow(3.0), "flow_prediction"),
}
INSIDE = [  # CFG++ has tests of its own
    name for name in schedulers.names() if not (schedulers.info(name).native_only or schedulers.info(name).cfg_pp)
]
MIXTURE = Mixture.random(0, elements=8, components=3)


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def start(s: Scheduler, batch: int = 3) -> Tensor:
    """The starting states of images of 2 channels and 2 x 2 pixels, image i from the seed i."""
    return s.start(normal((batch, 2, 2, 2), [torch.Generator().manual_seed(i) for i in range(batch)]))


def loop(s: Scheduler, network: Any, x: Tensor, begin: int = 0, generator: Generators = None) -> Tensor:
    """The loop of a pipeline, from evaluation `begin` on."""
    for t in s.timesteps[begin:]:
        output = network(s.scale_model_input(x, t), t.expand(len(x)))
        x = s.step(output, t, x, generator=generator, return_dict=False)[0]
    return x
