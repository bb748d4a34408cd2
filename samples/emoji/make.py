"""Run the whole recipe: data, autoencoder, diffusion model, export, tuned grids, measurements, card.

    pip install -e '.[recipe]' -c constraints.txt
    apt-get install fonts-noto-color-emoji libcairo2        # and npm, for the SVG pictures
    python samples/emoji/make.py samples/emoji/work

Both stages are jobs of `diffgen train`, with vae.toml and latents.toml, on a GPU if there is one. If the command is
stopped, run it again: it continues from the last checkpoint and skips finished stages. The model is work/emoji; copy it
to diffgen/models/bundled/emoji to ship it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not slow down other processes

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import card
import data
import export
import folder
import measure
import tune

HERE = Path(__file__).resolve().parent


def train(work: Path, name: str, config: Path, *options: str) -> None:
    """Run `diffgen train`. Raises SystemExit with its exit code if it is stopped or fails."""
    command = [sys.executable, "-m", "diffgen", "train", "data", "-o", name, "--config", str(config.resolve())]
    process = subprocess.run([*command, "--resume", *options], cwd=work, check=False)
    if process.returncode:
        raise SystemExit(process.returncode)


def main(
    work: Path,
    vae: Path,
    latents: Path,
    init: Path | None = None,
    prompts: int = 300,
    with_cost: bool = True,
    workers: int = 1,
    tuning: Mapping[str, Any] | None = None,
) -> None:
    """Run the stages that are not finished. Raises SystemExit if one fails.

    prompts  number of each kind that are measured, in `workers` processes
    tuning   arguments of `tune.main` that replace its defaults
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "data.npz").exists():
        data.build(work, 64)
    if not (work / "data" / "metadata.jsonl").exists():
        folder.main(work)
    if not (work / "emoji" / "card.json").exists():
        train(work, "vae", vae)
        train(work, "latents", latents, *(() if init is None else ("--init", str(init.resolve()))))
        export.main(work)
    if "tuned" not in json.loads((work / "emoji" / "card.json").read_text("utf-8")):
        tune.main(work, **(tuning or {}))
    if card.current_figures(work) is None:
        model = str(work.resolve() / "emoji")
        measure.main(work, model, prompts, prompts, 0, work / "measure", with_cost, workers)
    if "sha256" not in json.loads((work / "emoji" / "card.json").read_text("utf-8")):
        card.main(work, card.machine_name())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--vae", type=Path, default=HERE / "vae.toml", help="configuration of the autoencoder")
    parser.add_argument("--latents", type=Path, default=HERE / "latents.toml", help="configuration of the rest")
    parser.add_argument("--init", type=Path, help="a model's folder; the second stage starts from its weights")
    a = parser.parse_args()
    try:
        main(a.work, a.vae, a.latents, a.init, workers=measure.workers())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
