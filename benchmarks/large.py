"""A large model on the CPU, whole processes in turn: ours by default, ours in float32, and a plain diffusers script.

    python benchmarks/full_size.py sd15 FOLDER
    python benchmarks/large.py FOLDER [--size 512] [--steps 20] [--rounds 2]
    python benchmarks/large.py FOLDER --size 256 --parts     # one guided evaluation and one decoding, in each dtype

Each process loads the model, makes one picture with guided Euler steps, and writes it. Prints the medians of the
processor time and of the clock, the greatest memory of each process, and the ratios to diffusers.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PLAIN = """
import sys
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

folder, out, size, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
generator = torch.Generator().manual_seed(1)
pipe("a red apple", num_inference_steps=steps, guidance_scale=5.0, height=size, width=size,
     generator=generator).images[0].save(out)
"""


def measure(command: list[str]) -> tuple[float, float, float]:
    """(processor seconds, seconds, greatest memory in GB) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(errors.decode()[-2000:])
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start, usage.ru_maxrss / 1e6


def parts(folder: str, size: int) -> None:
    """Print the processor seconds of a guided evaluation of the UNet and of decoding, the least of two."""
    import torch

    import diffgen

    for dtype in ("float32", "bfloat16"):
        pipeline: Any = diffgen.load(folder, device="cpu", dtype=dtype).pipeline  # type: ignore[union-attr]
        x = torch.randn(2, 4, size // 8, size // 8).to(pipeline.unet.dtype)
        text = torch.randn(2, 77, pipeline.unet.config.cross_attention_dim).to(x.dtype)
        calls = {
            "guided evaluation": lambda p=pipeline, x=x, text=text: p.unet(x, torch.tensor(500), text),  # type: ignore[misc]
            "decoding": lambda p=pipeline, x=x: p.vae.decode(x[:1]),  # type: ignore[misc]
        }
        with torch.inference_mode():
            for name, call in calls.items():
                seconds = []
                for _ in range(3):
                    before = os.times()
                    call()
                    seconds.append(os.times().user + os.times().system - before.user - before.system)
                print(f"{dtype:<9} {size}x{size} {name:<18} {min(seconds[1:]):6.2f} CPU s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    if arguments.parts:
        parts(str(arguments.folder), arguments.size)
        return
    size, steps, folder = str(arguments.size), str(arguments.steps), str(arguments.folder)
    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/picture.png"
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
        ours += ["--size", size, "--steps", steps, "--guidance", "5", "--scheduler", "euler", "--seed", "1"]
        commands = {
            "diffgen": ours,
            "diffgen, float32": [*ours, "--dtype", "float32"],
            "diffusers": [sys.executable, "-c", PLAIN, folder, out, size, steps],
        }
        measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                measured[name].append(measure(command))
    print(f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers")))
    print(f"{size}x{size}, {steps} guided Euler steps, medians of {arguments.rounds}")
    peer = [statistics.median(column) for column in zip(*measured["diffusers"], strict=True)]
    for name, rows in measured.items():
        cpu, wall, memory = (statistics.median(column) for column in zip(*rows, strict=True))
        ratios = f"{cpu / peer[0]:.2f} of diffusers' CPU time, {wall / peer[1]:.2f} of its time"
        print(f"{name:<17} {cpu:7.1f} CPU s {wall:7.1f} s {memory:5.2f} GB   {ratios}")


if __name__ == "__main__":
    main()
