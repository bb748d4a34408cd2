"""Train a textual inversion, a LoRA and a ControlNet for a model, on a folder of captioned pictures.

    python samples/adapters/make.py diffgen/models/bundled/emoji work/data samples/adapters

The data is a folder that samples/emoji/make.py leaves in its work folder. Files that exist in OUT are not trained
again, so the same command continues after an interruption.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not slow down other processes

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

ADAPTERS: dict[str, Callable[..., None]] = {
    "dropling.safetensors": embedding.train,
    "delft.safetensors": lora.train,
    "canny": control.train,
}


def main(model: str, folder: str, out: Path, steps: int | None = None) -> None:
    """Train the adapters that `out` lacks; `steps` replaces the number of steps of each. Raises InputError."""
    missing = [name for name in ADAPTERS if not (out / name).exists()]
    if not missing:
        print(f"all exist: {', '.join(str(out / name) for name in ADAPTERS)}")
        return
    data = open_data(folder, size=Frozen(model).side, channels=3)
    if data.captions is None:
        raise InputError(f"{folder} has no captions", "add a metadata.jsonl with captions to the folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in missing:
        start, new = time.monotonic(), out / f"{name}.tmp"
        print(f"{name}: preparing pictures", file=sys.stderr, flush=True)
        shutil.rmtree(new, ignore_errors=True)
        torch.manual_seed(0)
        options: dict[str, Any] = {} if steps is None else {"steps": steps}
        ADAPTERS[name](Frozen(model), data, new, **options)
        new.rename(out / name)
        size = sum(file.stat().st_size for file in [out / name, *(out / name).glob("*")] if file.is_file())
        print(f"{out / name}: {size / 1e6:.2f} MB, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Stable Diffusion 1 model: a diffusers folder, or emoji")
    parser.add_argument("data", help="a folder of pictures with a metadata.jsonl")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help="steps of each adapter, for a trial")
    a = parser.parse_args()
    try:
        main(a.model, a.data, a.out, a.steps)
    except DiffgenError as error:
        print(f"error: {error.message}", f"hint: {error.hint}" if error.hint else "", sep="\n", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
