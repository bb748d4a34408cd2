"""On a GPU, in one run of at most ten minutes: speed against diffusers, and whether the pictures are right.

    python benchmarks/gpu.py [--models sd15,sdxl] [--compiled] [--minutes 10]
    python benchmarks/gpu.py --tiny --device cpu      # the same steps with the bundled model, to test this script

The models have random weights at full size, and are written to a temporary folder first. Speed: seconds for a picture
by ours, by a plain diffusers pipeline in the same dtype and, with --compiled, by one with its network and its decoder
compiled; batches of 1 and 16; the median of three rounds in turn after one that is not counted. Checks: the picture of
the CPU, different prompts in one batch, offloading, eight bits, and a batch that does not fit. Parts that do not fit
into --minutes are named as left out. Training has its own script: benchmarks/train.py --device cuda.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

import diffgen
from diffgen.errors import DiffgenError
from diffgen.loading import make_plan
from diffgen.models.find import find

sys.path.insert(0, str(Path(__file__).parent))
from full_size import write

MODELS = {"sd15": (512, 50, 0.55), "sdxl": (1024, 30, 1.5)}  # (side, steps, the aim for one picture in seconds)
PROMPTS = ["a red apple", "a blue house", "a green cat", "a star"]
GUIDANCE = 5.0


class Clock:
    """Counts the minutes that are left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def allows(self, what: str, seconds: float) -> bool:
        """Whether a part of about so many seconds still fits; prints its name if not."""
        fits = time.monotonic() + seconds < self.end
        if not fits:
            print(f"left out for lack of time: {what}", flush=True)
        return fits


def timed(function: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def theirs(folder: Path, dtype: torch.dtype, device: torch.device, compiled: bool) -> Any:
    """A diffusers pipeline, as people write it."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet.to(memory_format=torch.channels_last), mode="max-autotune")
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="max-autotune")
    return pipeline


def speed(name: str, folder: Path, size: int, steps: int, device: torch.device, compiled: bool, clock: Clock) -> None:
    ours: Any = diffgen.load(str(folder), device=str(device))
    peers = {"diffusers": theirs(folder, ours.dtype, device, False)}
    if compiled:
        peers["diffusers, compiled"] = theirs(folder, ours.dtype, device, True)
    for count in (1, 16):
        prompts = (PROMPTS * count)[:count]
        options: dict[str, Any] = {"steps": steps, "guidance": GUIDANCE, "scheduler": "euler", "size": size, "seed": 1}
        plan = make_plan(ours.model, prompts, batch_size=count, **options)
        calls: dict[str, Callable[[], Any]] = {"diffgen": lambda plan=plan: list(ours.pictures(plan))}  # type: ignore[misc]
        for peer, pipeline in peers.items():
            calls[peer] = lambda pipeline=pipeline, prompts=prompts: pipeline(  # type: ignore[misc]
                prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, height=size, width=size
            )
        first = max(timed(call, device) for call in calls.values())
        if not clock.allows(f"{name}, batch {count}", 3 * len(calls) * first):
            continue
        rounds = [{peer: timed(call, device) for peer, call in calls.items()} for _ in range(3)]
        for peer in calls:
            seconds = [one[peer] / count for one in rounds]
            ratio = statistics.median(one[peer] / one["diffgen"] for one in rounds)
            print(
                f"{name:<6} {size}x{size} {steps} steps batch {count:>2} {peer:<19} "
                f"{statistics.median(seconds):7.3f} s a picture ({min(seconds):.3f} to {max(seconds):.3f}), "
                f"{ratio:5.2f} times ours",
                flush=True,
            )


def distance(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def check(device: torch.device, model: str = "emoji") -> None:
    """Compare the pictures of the device with those of the CPU, in float32; print what differs by how much."""
    options: dict[str, Any] = {"seed": 3, "steps": 8, "scheduler": "euler"}
    expected = diffgen.load(model, device="cpu", dtype="float32").generate(PROMPTS, **options)

    def report(what: str, images: list[Any], bound: int) -> None:
        worst = max(distance(a, b) for a, b in zip(images, expected, strict=True))
        print(f"{what:<44} at most {worst:>3} of 255 from the CPU's{'' if worst <= bound else '  WRONG'}", flush=True)

    def loaded(**how: str) -> Any:
        return diffgen.load(model, **({"device": str(device), "dtype": "float32"} | how))

    report("float32", loaded().generate(PROMPTS, **options), 2)
    report("four prompts in a batch", loaded().generate(PROMPTS, batch_size=4, **options), 2)
    report("bfloat16", loaded(dtype="bfloat16").generate(PROMPTS, **options), 64)
    for how in ({"offload": "model"}, {"offload": "sequential"}, {"quantize": "int8"}):
        name = " ".join(how.values())
        try:
            report(name, loaded(**how).generate(PROMPTS, **options), 64 if "quantize" in how else 2)
        except DiffgenError as error:
            print(f"{name:<44} not here: {error.message}", flush=True)
    if device.type == "cuda":
        generator = loaded()
        generator.generate(PROMPTS[0], **options)
        torch.cuda.empty_cache()
        room = torch.cuda.memory_reserved() + 2**28
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(device).total_memory)
        try:
            report(
                "a batch of 256 that does not fit", generator.generate(PROMPTS * 64, batch_size=256, **options)[:4], 2
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="sd15,sdxl")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device, clock = torch.device(arguments.device), Clock(arguments.minutes)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    check(device)
    if arguments.tiny:
        speed("emoji", find("emoji").folder, 64, 2, device, arguments.compiled, clock)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models.split(","):
            size, steps, aim = MODELS[model]
            if clock.allows(model, 90):
                speed(model, write(model, Path(scratch) / model), size, steps, device, arguments.compiled, clock)
                print(f"{model}: the aim is {aim} s for one picture on an H100, and 1.6 times diffusers' speed")


if __name__ == "__main__":
    main()
