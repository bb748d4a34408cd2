"""Pictures per second of processor time: different prompts one by one, and in batches, in turn.

    python benchmarks/batches.py [--model emoji] [--prompts 8] [--sizes 1,8,auto] [--rounds 5] [--steps 12]

One process holds the model. A round makes the pictures of all prompts at each batch size; the first round warms up and
is not counted. The ratio is that of the same round. Without --steps and --size the model's own are used.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import Any

import torch

import diffgen
from diffgen.loading import make_plan

PROMPTS = [
    f"a {colour} {thing}" for thing in ("apple", "cat", "house", "star") for colour in ("red", "blue", "green", "")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--sizes", default="1,8,auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int)
    arguments = parser.parse_args()
    generator: Any = diffgen.load(arguments.model, device=arguments.device)
    prompts = (PROMPTS * arguments.prompts)[: arguments.prompts]
    options = {"seed": 1, "steps": arguments.steps, "size": arguments.size}
    sizes = arguments.sizes.split(",")
    seconds: dict[str, list[tuple[float, float]]] = {size: [] for size in sizes}
    for i in range(arguments.rounds + 1):
        for size in sizes:
            plan = make_plan(generator.model, prompts, batch_size=size, **options)
            before, start = os.times(), time.perf_counter()
            pictures = list(generator.pictures(plan))
            after = os.times()
            cpu = after.user + after.system - before.user - before.system
            seconds[size] += [(cpu / len(pictures), (time.perf_counter() - start) / len(pictures))] * bool(i)
    machine = torch.cuda.get_device_name() if generator.device.type == "cuda" else platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {generator.dtype}")
    print(f"{len(prompts)} prompts, medians of {arguments.rounds} rounds, per picture")
    for size, rows in seconds.items():
        cpu, wall = (statistics.median(column) for column in zip(*rows, strict=True))
        faster = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(seconds[sizes[0]], rows, strict=True)]
        by_cpu, by_wall = ([row[column] for row in faster] for column in (0, 1))
        print(
            f"batch {size:>4}: {cpu:.3f} CPU s, {wall:.3f} s; {statistics.median(by_cpu):.2f} times per CPU s "
            f"({min(by_cpu):.2f} to {max(by_cpu):.2f}), {statistics.median(by_wall):.2f} per second"
        )


if __name__ == "__main__":
    main()
