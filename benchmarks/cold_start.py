"""Cold start: `diffgen generate` and a plain diffusers script, in turn, as whole processes on the same weights.

    python benchmarks/cold_start.py [--model emoji] [--rounds 5]

Both make one picture with 20 Euler steps and guidance 5. Each round runs both, so that a slow spell of the machine
meets both; the first round warms the disk cache and is not counted. Prints the medians, the fastest, and their ratios.
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
        ours = [
            sys.executable,
            "-m",
            "diffgen",
            "generate",
            "a red apple",
            "-m",
            folder,
            "-o",
            out,
            "--overwrite",
            "-q",
        ]
        ours += ["--steps", "20", "--guidance", "5", "--scheduler", "euler", "--seed", "1"]
        commands = {"diffgen": ours, "diffusers": [sys.executable, "-c", PLAIN, folder, out]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(args.rounds + 1):
            for name, command in commands.items():
                if os.path.exists(out):
                    os.remove(out)
                taken = whole_process(command)
                if not os.path.exists(out):
                    sys.exit(f"{name} made no picture")
                if i:
                    seconds[name].append(taken)
            if i:
                print(f"round {i}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()))
    for what, of in {"median": statistics.median, "fastest": min}.items():
        ours_took, plain_took = of(seconds["diffgen"]), of(seconds["diffusers"])
        print(f"{what}: diffgen {ours_took:.2f} s, diffusers {plain_took:.2f} s, ratio {ours_took / plain_took:.2f}")


def whole_process(command: list[str]) -> float:
    """Seconds from the start of a process to its end."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[:4]} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
