"""The time from the keystroke to the first output, against what people would use instead, in turn.

    python benchmarks/start.py [--rounds 5] [--only help,list,inspect,error,run,bundled]

Each command is a new process. A round runs every process once, so that a busy machine slows all alike; the first round
warms the disk cache and is not counted. Prints medians and the ratio to the yardstick of the same round, of the
processor time (user and system) and of the clock.

    help, list, inspect, error   against `import typer`; `typer` is a Typer program with as many options as
                                 generate, which does nothing: what the parser alone costs
    run                          a picture of a tiny run of `diffgen train`, 3 steps, against `import torch`
    bundled                      20 guided Euler steps of the bundled model, against a plain diffusers script; `imports`
                                 is what that takes to import alone
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

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
IMPORTS = """
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
"""
PARSER = """
import typer
from typing import Annotated
app = typer.Typer()
def generate({options}) -> None:
    pass
app.command()(generate)
typer.main.get_command(app).main([], standalone_mode=False)
"""
Commands = dict[str, tuple[list[str], str]]  # {name: (command, name of its yardstick)}


def commands_of(scratch: Path) -> Commands:
    """The processes to compare."""

    def ours(*words: str) -> list[str]:
        return [sys.executable, "-m", "diffgen", *words]

    def script(text: str, *words: str) -> list[str]:
        return [sys.executable, "-c", text, *words]

    picture, folder, run = str(scratch / "picture.png"), str(find("emoji").folder), str(scratch / "run")
    options = ", ".join(f'o{i}: Annotated[str | None, typer.Option(help="Help.")] = None' for i in range(52))
    sampling = ["--steps", "20", "--guidance", "5", "--scheduler", "euler", "--seed", "1"]
    picture = str(scratch / "made.png")
    return {
        "import typer": (script("import typer"), ""),
        "help": (ours("--help"), "import typer"),
        "list": (ours("schedulers", "list"), "import typer"),
        "inspect": (ours("inspect", picture), "import typer"),
        "error": (ours("generate", "a", "--nope"), "import typer"),
        "typer": (script(PARSER.format(options=options)), "import typer"),
        "import torch": (script("import torch"), ""),
        "run": (
            ours("generate", "-m", run, "-o", picture, "--overwrite", "-q", "--seed", "1", "--steps", "3"),
            "import torch",
        ),
        "diffusers": (script(PLAIN, folder, picture), ""),
        "bundled": (ours("generate", "a red apple", "-o", picture, "--overwrite", "-q", *sampling), "diffusers"),
        "imports": (script(IMPORTS), "diffusers"),
    }


def prepare(scratch: Path) -> None:
    """A tiny run, and a picture to inspect."""
    train = ["train", "digits", "-o", str(scratch / "run"), "--steps", "2", "--batch-size", "4", "--config"]
    (scratch / "c.toml").write_text("[network]\nwidth = 8\nblocks = 1\n[sample]\ncount = 1\nsteps = 2\n")
    for words in (
        [*train, str(scratch / "c.toml")],
        ["generate", "a red apple", "--steps", "1", "--seed", "1", "-o", str(scratch / "made.png")],
    ):
        measure([sys.executable, "-m", "diffgen", *words], {0})


def measure(command: list[str], codes: set[int]) -> tuple[float, float]:
    """(processor seconds, seconds) of a process. Ends the program for an unexpected exit code."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode not in codes:
        sys.exit(f"{command[:6]} failed:\n{process.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in ("typer", "torch", "diffusers", "transformers")))
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        commands = commands_of(Path(scratch))
        if wanted := set(filter(None, arguments.only.split(","))):
            wanted |= {commands[name][1] for name in wanted}
            commands = {name: row for name, row in commands.items() if name in wanted}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for i in range(arguments.rounds + 1):
            for name, (command, _) in commands.items():
                measured = measure(command, {2} if name == "error" else {0})
                times[name] += [measured] * bool(i)
    print(f"{'':<14}{'CPU s':>8}{'s':>8}{'ratio of CPU':>14}{'ratio':>8}{'from':>7}{'to':>6}   against")
    for name, rows in times.items():
        cpu, wall = (statistics.median(column) for column in zip(*rows, strict=True))
        line = f"{name:<14}{cpu:8.2f}{wall:8.2f}"
        if yardstick := commands[name][1]:
            ratios = [
                [a / b for a, b in zip(row, other, strict=True)]
                for row, other in zip(rows, times[yardstick], strict=True)
            ]
            cpus = [ratio for ratio, _ in ratios]
            line += f"{statistics.median(cpus):14.2f}{statistics.median(ratio for _, ratio in ratios):8.2f}"
            line += f"{min(cpus):7.2f}{max(cpus):6.2f}   {yardstick}"
        print(line)


if __name__ == "__main__":
    main()
