"""Time of scale_model_input + step at 1×4×64×64 on the CPU, for this package and diffusers.

    python benchmarks/scheduler_step.py [--rounds 20] [--json FILE]

Each round runs 50 steps of one and then of the other, so that both see the same load of the machine. The figure is the
median of all evaluations, in µs. The aim is a quarter of diffusers' time, at least 60 µs; for a stochastic solver, plus
the time to draw its noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import diffusers
import torch

import schedulers

STEPS = 50
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PAIRS: list[tuple[str, str, dict[str, Any]]] = [  # (ours, their class, its options)
    ("euler", "DDIMScheduler", {"clip_sample": False}),
    ("euler", "EulerDiscreteScheduler", {}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
    ("unipc", "UniPCMultistepScheduler", {}),
    ("lms", "LMSDiscreteScheduler", {}),
    ("deis", "DEISMultistepScheduler", {}),
    ("pndm", "PNDMScheduler", {"skip_prk_steps": True}),
    ("heun", "HeunDiscreteScheduler", {}),
    ("dpm2", "KDPM2DiscreteScheduler", {}),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("sa_solver", "SASolverScheduler", {}),
]


@torch.inference_mode()
def times(scheduler: Any) -> list[float]:
    """The seconds of each evaluation of a run."""
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(1, 4, 64, 64, generator=generator) for _ in range(2))
    scheduler.set_timesteps(STEPS)
    x = x * scheduler.init_noise_sigma
    seconds = []
    for t in scheduler.timesteps:
        start = time.perf_counter()
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
        seconds.append(time.perf_counter() - start)
    return seconds


def randn() -> float:
    """The seconds to draw one noise, the median of 200."""
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(200):
        start = time.perf_counter()
        torch.randn(1, 4, 64, 64, generator=generator)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rows, noise = [], randn() * 1e6
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads; medians in µs; one torch.randn takes {noise:.0f}")
    print(f"{'ours':<16} {'':>6}   {'theirs':<50} {'':>6} {'aim':>6}")
    for name, theirs, options in PAIRS:
        ours, other = schedulers.get(name), getattr(diffusers, theirs)(**TABLE, **options)
        measured: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.rounds):
            for seconds, scheduler in zip(measured, (ours, other), strict=True):
                seconds += times(scheduler)
        mine, their = (statistics.median(seconds) * 1e6 for seconds in measured)
        aim = max(their / 4, 60.0) + (noise if schedulers.info(name).stochastic else 0.0)
        label = " ".join([theirs, *(f"{k}={v}" for k, v in options.items())])
        rows.append({"ours": name, "microseconds": mine, "theirs": label, "their_microseconds": their, "aim": aim})
        print(f"{name:<16} {mine:6.0f}   {label:<50} {their:6.0f} {aim:6.0f}{'' if mine <= aim else '  above'}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
