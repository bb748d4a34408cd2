"""Train the autoencoder of scenes, and measure it.

    python samples/emoji/scenes_vae.py work/ -o work/scenes-vae              # trains; call it again to resume
    python samples/emoji/scenes_vae.py work/ -o work/scenes-vae --measure    # dB by kind and by place, as JSON

The job is the product's own "autoencoder", on scenes that are made as they are read. It begins with the layers of a
smaller autoencoder that have the same shapes, by default those of the bundled model; `--from-scratch` begins without.
Another network: `--channels 24,48,128,128 --latent 8`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a second busy process would slow it down many times

import argparse
import contextlib
import json
import re
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from scenes import KINDS, WHERE, Painter, draw, held_out_scenes

import diffgen
from diffgen.images.sheet import sheet
from diffgen.models.find import find
from diffgen.pipelines.training.parts import read_autoencoder
from diffgen.training import config as configuration
from diffgen.training.data.procedural import ProceduralData
from diffgen.training.listener import Listener

HERE = Path(__file__).resolve().parent
SEED, COUNT, LAST = 1, 1_000_000, 256  # of the scenes: the last ones are not trained on
MIXTURE = {"single": 0.08, "colour": 0.16, "count": 0.15, "pair": 0.15, "size": 0.06, "place": 0.4}


def scenes_data(work: Path, names: Sequence[str] | None = None) -> ProceduralData:
    """A million scenes of these things, or of all, without held-out combinations."""
    painter = Painter(work / "sprites.npz")
    return ProceduralData(
        lambda i: painter.array(draw(SEED, i, mixture=MIXTURE, names=names)),
        COUNT,
        name="emoji scenes 3",
        held_out=LAST,
    )


def warm(own: dict[str, torch.Tensor], folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """(weights, how many tensors came from the folder): those of a smaller autoencoder where names and shapes agree.

    Its decoder's levels are counted from the pictures' side, so that the finest goes to the finest.
    """
    vae, _ = read_autoencoder(folder)
    theirs = vae.state_dict()
    levels = 1 + max(int(m[1]) for key in own if (m := re.match(r"decoder\.up_blocks\.(\d+)", key)))
    more = levels - len(vae.config.block_out_channels)

    def shifted(match: re.Match[str]) -> str:
        return f"decoder.up_blocks.{int(match[1]) + more}"

    moved = {re.sub(r"^decoder\.up_blocks\.(\d+)", shifted, key): tensor for key, tensor in theirs.items()}
    fits = {key: moved[key] for key, tensor in own.items() if key in moved and moved[key].shape == tensor.shape}
    return {**own, **fits}, len(fits)


class Screen(Listener):
    """Lines on the standard output."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    warn = note

    def losses(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)


@contextlib.contextmanager
def until_signal() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT or SIGTERM has come."""
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _: signals.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def initial_weights(work: Path, name: str, network: dict[str, Any], folder: Path) -> Path:
    """A weights file to begin with: `warm` applied to a fresh network."""
    levels = len(network["block_out_channels"])
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, **network
    )
    weights, count = warm(vae.state_dict(), folder)
    path = work / f"{name}-init.safetensors"
    save_file({f"vae.{key}": tensor.contiguous() for key, tensor in weights.items()}, path)
    print(f"{count} of {len(weights)} tensors from {folder.name}", flush=True)
    return path


def train(work: Path, run: Path, tables: dict[str, Any], init: Path | None, names: Sequence[str] | None = None) -> Any:
    """Train, or continue a run. `init` is an autoencoder's folder to begin with."""
    first = None
    if init is not None and not (run / "run.json").exists():
        first = initial_weights(work, run.name, tables["network"], init)
    return diffgen.train(
        scenes_data(work, names),
        run,
        config=tables,
        resume=True,
        init=first,
        listener=Screen(),
        stopping=until_signal(),
    )


# Measurements


def decibels(decoded: np.ndarray, true: np.ndarray) -> np.ndarray:
    """PSNR of each picture, uint8 [N, 3, H, W]."""
    square = (decoded.astype(np.float32) - true).reshape(len(true), -1)
    return 10 * np.log10(255**2 / np.maximum(1e-9, (square**2).mean(1)))


@torch.no_grad()
def through(vae: Any, pictures: np.ndarray) -> np.ndarray:
    """Pictures decoded from the means of their latents, uint8 [N, 3, H, W]."""
    parts = []
    for part in torch.from_numpy(pictures).split(16):
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(vae.encode(part / 127.5 - 1).latent_dist.mean)[0]
        parts.append(((y.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts).numpy()


def test_scenes(each: int) -> dict[str, list[Any]]:
    """Scenes by kind, places by name: with held-out combinations where there are lists of them."""
    scenes: dict[str, list[Any]] = {"single": [draw(2, k, mixture={"single": 1}) for k in range(each)]}
    for kind in KINDS[1:-1]:
        scenes[kind] = held_out_scenes(kind, each)
    every = held_out_scenes("place", 1000)
    for place in WHERE:
        scenes[place] = [scene for scene in every if scene.description.place == place][:each]
    return scenes


def grid_strength(decoded: np.ndarray, true: np.ndarray) -> float:
    """How much more the error jumps at every 8th column and row than elsewhere: 1 is no grid."""
    error = (decoded.astype(np.float32) - true).mean(1)
    jumps = [np.abs(np.diff(error, axis=axis)).mean((0, 3 - axis)) for axis in (1, 2)]
    at = np.arange(127) % 8 == 7
    return float(statistics.fmean(j[at].mean() / max(1e-6, j[~at].mean()) for j in jumps))


def measure(work: Path, path: Path, each: int, picture: Path | None) -> dict[str, Any]:
    painter, (vae, _) = Painter(work / "sprites.npz"), read_autoencoder(path)
    figures: dict[str, Any] = {}
    rows, decoded_all, true_all = [], [], []
    for name, scenes in test_scenes(each).items():
        true = np.stack([painter.array(scene) for scene in scenes])
        decoded = through(vae, true)
        values = decibels(decoded, true)
        figures[name] = {"db": round(float(values.mean()), 2), "lowest": round(float(values.min()), 2), "n": len(true)}
        decoded_all.append(decoded)
        true_all.append(true)
        pairs = np.stack([true[:5], decoded[:5]], 1).reshape(-1, *true.shape[1:]).transpose(0, 2, 3, 1)
        rows.append([Image.fromarray(p) for p in pairs])
    places = [figures[place]["db"] for place in WHERE]
    others = [figures[kind]["db"] for kind in KINDS[:-1]]
    figures["mean"] = round(statistics.fmean([*others, statistics.fmean(places)]), 2)
    figures["lowest place"] = min(places)
    figures["grid"] = round(grid_strength(np.concatenate(decoded_all), np.concatenate(true_all)), 3)
    if picture:
        sheet(rows).save(picture)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the run; with --measure also a model's folder")
    parser.add_argument("--config", type=Path, default=HERE / "scenes-vae.toml")
    parser.add_argument("--channels", help="block_out_channels, with commas")
    parser.add_argument("--latent", type=int, help="latent_channels")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--init", type=Path, help="an autoencoder's run or folder [the bundled model]")
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--each", type=int, default=32, help="scenes of each kind and place that are measured")
    parser.add_argument("--sheet", type=Path, help="scenes, each beside what the autoencoder makes of it")
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if a.measure:
        print(json.dumps(measure(a.work, a.out, a.each, a.sheet), indent=1))
        raise SystemExit
    tables = configuration.read_toml(a.config)
    if a.channels:
        tables["network"]["block_out_channels"] = [int(n) for n in a.channels.split(",")]
    if a.latent:
        tables["network"]["latent_channels"] = a.latent
    if a.steps:
        tables["train"]["steps"] = a.steps
    print(train(a.work, a.out, tables, None if a.from_scratch else a.init or find("emoji").folder))
