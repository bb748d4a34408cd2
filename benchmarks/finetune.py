"""Fine-tuning, measured: agreement with diffusers and PEFT, resume after kills, memory.

python benchmarks/finetune.py agreement                # every family × kind of adapter, tiny random pipelines
python benchmarks/finetune.py kills PICTURES --times 20  # SIGKILL at random moments; the bytes at the end
python benchmarks/finetune.py memory PICTURES          # of the bundled model: with and without recomputation, …
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux", "flux2-klein-base", "z-image", "qwen-image")


def agreement() -> None:
    """The largest difference between hooks, and diffusers with PEFT, of the network's output."""
    import diffusers
    from PIL import Image
    from tiny import build

    from diffgen.pipelines.training.finetune_config import LoraConfig
    from diffgen.pipelines.training.lora import LoraJob
    from diffgen.pipelines.training.pictures import open_pictures
    from diffgen.training.config import parse

    print("family              kind  layers  difference")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "data").mkdir()
        Image.new("RGB", (32, 32), "red").save(work / "data/a.png")
        for family in FAMILIES:
            folder = build(work / family, family=family)
            for kind in ("lora", "dora"):
                tables = {"model": str(folder), "data": {"caption": "a red apple", "cache": False}}
                config = parse(tables | {"adapter": {"kind": kind, "rank": 3, "alpha": 6.0}}, "", LoraConfig)
                job = LoraJob(config, open_pictures(str(work / "data"), config, ""))
                job.prepare(torch.device("cpu"), contextlib.nullcontext)  # type: ignore[arg-type]
                adapted = job.networks["adapter"]
                with torch.no_grad():
                    for p in adapted.parameters():
                        p.add_(0.2 * torch.randn(p.shape))
                (file, data), *_ = job.products(adapted.state_dict()).items()
                (work / file).write_bytes(data)
                pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
                pipeline.load_lora_weights(work, weight_name=file)
                x, t = torch.randn(2, *job.coder.shape((32, 32))), torch.tensor([100, 700])
                with torch.no_grad():
                    inputs = job.inputs(job.networks, ["a red apple", None], (32, 32))
                    ours, theirs = (
                        job.predict(call, x, t, inputs) for call in (adapted, getattr(pipeline, job.row.denoiser))
                    )
                print(f"{family:18}  {kind}  {len(adapted.layers):6}  {(ours - theirs).abs().max():.1e}", flush=True)


def command(pictures: str, run: Path, *more: str) -> list[str]:
    options = ["--steps", "12", "--batch-size", "2", "--checkpoint-every", "2", "--device", "cpu", "--resume"]
    return [sys.executable, "-m", "diffgen", "finetune", "emoji", pictures, "-o", str(run), *options, *more]


def digest(run: Path) -> str:
    """SHA-256 of all that a run promises the same bytes of."""
    sha = hashlib.sha256()
    for path in sorted(run.rglob("*")):
        if path.is_file() and (path.suffix in (".safetensors", ".png") or path.name == "metrics.jsonl"):
            sha.update(path.relative_to(run).as_posix().encode() + path.read_bytes())
    return sha.hexdigest()


def kills(pictures: str, times: int, job: str) -> None:
    """Kill a training at random moments until it ends, `times` in all, and compare it with one that was let alone."""
    rng, left = random.Random(0), times
    more = ["--job", job, *(["--trigger", "<new>"] if job == "embedding" else [])]
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        began = time.monotonic()
        subprocess.run(command(pictures, whole, *more), check=True, capture_output=True)
        seconds, expected = time.monotonic() - began, digest(whole)
        same = killed = 0
        runs = 0
        while left > 0:
            run = Path(name) / f"run-{runs}"
            runs += 1
            while True:
                process = subprocess.Popen(command(pictures, run, *more), stderr=subprocess.DEVNULL)
                try:
                    process.wait(rng.uniform(0.3, 1.2) * seconds if left > 0 else None)
                    break
                except subprocess.TimeoutExpired:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                    killed, left = killed + 1, left - 1
            same += digest(run) == expected
        print(f"{job}: {killed} kills in {runs} runs, {same} of them with the bytes of one that was let alone")


def memory(pictures: str) -> None:
    """The parts of memory by --dry-run, with and without recomputation and moments in eight bits."""
    for name, train in (("plain", {}), ("recompute", {"recompute": True}), ("adamw8bit", {"optimizer": "adamw8bit"})):
        with tempfile.TemporaryDirectory() as folder:
            toml = Path(folder) / "c.toml"
            lines = [f"{key} = {json.dumps(value)}" for key, value in {"batch_size": 8, **train}.items()]
            toml.write_text("\n".join(["[train]", *lines]) + "\n")
            run = [sys.executable, "-m", "diffgen", "finetune", "emoji", pictures, "-o", f"{folder}/run", "--dry-run"]
            done = subprocess.run([*run, "--config", str(toml), "--json"], capture_output=True, text=True, check=True)
            parts: dict[str, Any] = json.loads(done.stdout)["result"]["bytes"]
            print(name, {key: f"{value / 2**20:.1f} MiB" for key, value in parts.items()}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("agreement", "kills", "memory"))
    parser.add_argument("pictures", nargs="?", help="a folder of captioned pictures")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--job", default="lora", choices=("lora", "embedding", "full", "control"))
    a = parser.parse_args()
    if a.what == "agreement":
        agreement()
    elif a.pictures is None:
        parser.error("name a folder of captioned pictures")
    elif a.what == "kills":
        kills(a.pictures, a.times, a.job)
    else:
        memory(a.pictures)
