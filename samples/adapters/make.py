"""A textual inversion, a LoRA and a ControlNet for a model, from a folder of captioned pictures.

    python samples/adapters/make.py diffgen/models/bundled/emoji work/data samples/adapters

The folder is the one that samples/emoji/make.py leaves in its work folder. What is in OUT already is not made again, so
the same command goes on after it was stopped.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a second busy process would slow it down many times

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import control
import embedding
import lora
import torch
from model import Frozen

from diffgen.errors import DiffgenError, InputError
from diffgen.training.data import open_data

MADE: dict[str, Callable[..., None]] = {
    "dropling.safetensors": embedding.train,
    "delft.safetensors": lora.train,
    "canny": control.train,
}


def main(model: str, folder: str, out: Path, steps: int | None = None) -> None:
    """Make in `out` what is not there; each with so many steps, if said. Raises InputError."""
    missing = [name for name in MADE if not (out / name).exists()]
    if not missing:
        print(f"all there: {', '.join(str(out / name) for name in MADE)}")
        return
    data = open_data(folder, size=Frozen(model).side, channels=3)
    if data.captions is None:
        raise InputError(f"{folder} has no captions", "a metadata.jsonl beside the pictures captions them")
    out.mkdir(parents=True, exist_ok=True)
    for name in missing:
        begin, new = time.monotonic(), out / f"{name}.tmp"
        print(f"{name}: preparing pictures", file=sys.stderr, flush=True)
        shutil.rmtree(new, ignore_errors=True)
        torch.manual_seed(0)
        options: dict[str, Any] = {} if steps is None else {"steps": steps}
        MADE[name](Frozen(model), data, new, **options)
        new.rename(out / name)
        size = sum(file.stat().st_size for file in [out / name, *(out / name).glob("*")] if file.is_file())
        print(f"{out / name}: {size / 1e6:.2f} MB, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of Stable Diffusion 1: a diffusers folder, or emoji")
    parser.add_argument("data", help="pictures with a metadata.jsonl")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help="for a trial: so many for each, instead of its own number")
    a = parser.parse_args()
    try:
        main(a.model, a.data, a.out, a.steps)
    except DiffgenError as error:
        print(f"error: {error.message}", f"hint: {error.hint}" if error.hint else "", sep="\n", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
