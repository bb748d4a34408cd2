"""Measure the cold start of `diffgen generate` and of a plain diffusers script on the same weights.

    python benchmarks/cold_start.py [--model emoji] [--rounds 5]

Each is a new process that makes one picture with 20 Euler steps and guidance 5. Each round runs both, so that a busy
machine slows both. The first round warms the disk cache and is not counted. Prints the medians, the minima, and their
ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from diffgen.models.find import find

PLAIN = """
import sys
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

folder, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
generator = torch.Generator().manual_seed(1)
pipe("a red apple", num_inference_steps=20, guidance_scale=5.0, generator=generator).images[0].save(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = str(find(args.model).folder)
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "picture.png")
        options = ["--steps", "20", "--guidance", "5", "--scheduler", "euler", "--seed", "1", "--overwrite", "-q"]
        ours = [sys.executable, "-m", "diffgen", "generate", "a red apple", "-m", folder, "-o", out, *options]
        commands = {"diffgen": ours, "diffusers": [sys.executable, "-c", PLAIN, folder, out]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(args.rounds + 1):
            for name, command in commands.items():
                if os.path.exists(out):
                    os.remove(out)
                elapsed = process_seconds(command)
                if not os.path.exists(out):
                    sys.exit(f"{name} wrote no picture")
                if i:
                    seconds[name].append(elapsed)
            if i:
                print(f"round {i}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()))
    for label, statistic in {"median": statistics.median, "fastest": min}.items():
        a, b = statistic(seconds["diffgen"]), statistic(seconds["diffusers"])
        print(f"{label}: diffgen {a:.2f} s, diffusers {b:.2f} s, ratio {a / b:.2f}")


def process_seconds(command: list[str]) -> float:
    """Run a process and return how long it took."""
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{command[:4]} failed:\n{process.stderr[-2000:]}")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
