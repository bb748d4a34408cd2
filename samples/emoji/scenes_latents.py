"""Train a model of scenes: a UNet and a text encoder on the latents of the autoencoder of `scenes_vae.py`.

    python samples/emoji/scenes_latents.py work/ -o work/gate --things 59 --steps 4000     # trains; again to resume
    diffgen models export work/gate work/gate-model
    python samples/emoji/judge.py work/ -o work/judge-gate.json --model work/gate-model --things 59

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 samples/emoji/scenes_latents.py …        # two processes

The networks begin with the weights of the bundled model: it knows the things at half of the side, and its latents are
almost those of the autoencoder of scenes, which began with its autoencoder. `--init FOLDER` begins with another model,
`--from-scratch` with none.

Scenes come in the order of their numbers, a window at a time, so a curriculum is a function of the number: with
`--curriculum`, the first `FIRST` parts of the run show one thing a scene more often. `--jitter 0` keeps all things in
their slots.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a second busy process would slow it down many times

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import captions as captions_of_concepts
import numpy as np
import torch
from data import HELD_OUT
from diffusers import UNet2DConditionModel
from places import SIDE
from scenes import (
    CHINESE_COLOURS,
    CHINESE_STYLES,
    COUNTS,
    MIXTURE,
    RELATIONS,
    SIZES,
    STYLES,
    WHERE,
    Painter,
    Scene,
    alone,
    article,
    captions,
    draw,
    things,
)
from scenes_vae import Screen, until_signal
from tokenizer import build_tokenizer

import diffgen
from diffgen.models.find import find
from diffgen.training import config as configuration
from diffgen.training.data.dataset import Captions
from diffgen.training.data.procedural import ProceduralData

HERE = Path(__file__).resolve().parent
SEED, COUNT, LAST = 4, 4_000_000, 256  # of the scenes: the last ones are not trained on
FIRST = 0.4
EASY = {"single": 0.35, "colour": 0.35, "count": 0.08, "pair": 0.1, "size": 0.06, "place": 0.06}
LENGTH = 32  # tokens of a prompt, including start and end


def texts() -> list[str]:
    """Pieces of captions with every word and every Chinese character of the grammar."""
    pieces = [*CHINESE_COLOURS, *CHINESE_COLOURS.values(), *SIZES, *SIZES.values(), *RELATIONS, "的", "一", "a", "an"]
    pieces += [word for pair in (*COUNTS.values(), *WHERE.values()) for word in pair]
    pieces += [form.format(a="", b="") for form in RELATIONS.values()]
    pieces += [f"a, {style} style" for style in STYLES] + [f"，{word}风格" for word in CHINESE_STYLES.values()]
    for thing in things().values():
        pieces += [article(thing.name), thing.plural, f"一{thing.measure}{thing.chinese}"]
    return pieces


def scenes_data(
    work: Path,
    names: Sequence[str] | None,
    jitter: float,
    first: int = 0,
    places: bool = True,
    singles: float = 0.0,
) -> ProceduralData:
    """Scenes with their captions.

    names    the things; all unless given
    first    the number of scenes, at the beginning, that are of the easy mixture
    singles  part of the pictures that show any concept alone, with all its names and keywords (work/singles.npz)
    """
    painter = Painter(work / "sprites.npz")
    mixtures = [{kind: share for kind, share in m.items() if places or kind != "place"} for m in (EASY, MIXTURE)]
    alone_painter, pairs = Painter({}), [("", "")]
    if singles:
        alone_painter, table = Painter(work / "singles.npz"), captions_of_concepts.names(work)
        held_out = {f"{style}/{concept}" for concept, style in held_out_singles()}
        keys = sorted(alone_painter.sprites.keys() - held_out)
        pairs = [(concept, style) for style, _, concept in (key.partition("/") for key in keys)]

    def single(i: int) -> tuple[str, str] | None:
        """(concept, style) of picture i, if it shows a concept alone."""
        rng = np.random.default_rng((SEED, i, 1))
        return pairs[rng.integers(len(pairs))] if rng.random() < singles else None

    def scene(i: int) -> Scene:
        return draw(SEED, i, mixture=mixtures[i >= first], names=names, jitter=jitter)

    def picture(i: int) -> np.ndarray:
        if pair := single(i):
            return alone_painter.array(alone(*pair, SEED, i, jitter))
        return painter.array(scene(i))

    def describe(i: int) -> Captions:
        if pair := single(i):
            return tuple(captions_of_concepts.mixture(pair[0], table[pair[0]], pair[1]).items())
        return tuple(captions(scene(i).description).items())

    name = f"emoji scenes: {len(names or things())} things, jitter {jitter:g}, {first} easy, places {places}"
    if singles:
        name += f", {singles:g} of {len(pairs)} singles"
    return ProceduralData(picture, COUNT, name=name, held_out=LAST, describe=describe)


def held_out_singles() -> list[tuple[str, str]]:
    """The (concept, style) pairs of held_out.json, without those of the things that compose: scenes show them."""
    composed = {thing.concept for thing in things().values()}
    pairs = json.loads(HELD_OUT.read_text("utf-8"))
    return [(concept, style) for concept, style in pairs if concept not in composed]


def train(
    work: Path,
    run: Path,
    tables: dict[str, Any],
    init: Path | None,
    *,
    names: Sequence[str] | None = None,
    jitter: float = 1.0,
    curriculum: bool = False,
    places: bool = True,
    singles: float = 0.0,
    device: str = "auto",
) -> Any:
    """Train, or continue a run. `init` is a model's folder to begin with; `scenes_data` describes the data."""
    tokenizer = work / "scenes-tokenizer"
    if not tokenizer.exists() and os.environ.get("RANK", "0") == "0":
        build_tokenizer(every_caption(work), tokenizer, LENGTH)
    tables["text"]["tokenizer"] = str(tokenizer)
    steps, batch = tables["train"]["steps"], tables["train"]["batch_size"]
    first = int(FIRST * steps * batch / tables["data"]["repeats"]) if curriculum else 0
    data = scenes_data(work, names, jitter, first, places, singles)
    if init is not None:
        init = (
            None
            if (run / "run.json").exists()
            else first_model(init, tables["network"], SIDE // 8, work / f"{run.name}-init")
        )
    return diffgen.train(
        data, run, config=tables, resume=True, init=init, device=device, listener=Screen(), stopping=until_signal()
    )


def every_caption(work: Path) -> list[str]:
    """The captions of all concepts, and pieces of those of scenes: all words and characters."""
    return [*texts(), *captions_of_concepts.every(captions_of_concepts.names(work))]


def first_model(folder: Path, network: dict[str, Any], side: int, out: Path) -> Path:
    """Write a model's folder with another UNet to `out`: it has the layers of the model's UNet that have the same names
    and shapes, and fresh ones. The other parts are the model's."""
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=side,
        in_channels=theirs.config.in_channels,
        out_channels=theirs.config.out_channels,
        cross_attention_dim=theirs.config.cross_attention_dim,
        **network,
    )
    own, known = unet.state_dict(), theirs.state_dict()
    fits = {name: known[name] for name, tensor in own.items() if name in known and known[name].shape == tensor.shape}
    unet.load_state_dict({**own, **fits})
    print(f"{len(fits)} of {len(own)} tensors of the UNet from {folder.name}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("unet", "grids", "card.json"))
    unet.save_pretrained(out / "unet")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the run")
    parser.add_argument("--config", type=Path, default=HERE / "scenes-latents.toml")
    parser.add_argument("--autoencoder", type=Path, help="a run or a folder [work/scenes-vae]")
    parser.add_argument("--things", type=int, help="only the first so many things")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--jitter", type=float, default=1.0)
    parser.add_argument("--curriculum", action="store_true")
    parser.add_argument("--no-places", action="store_true")
    parser.add_argument("--singles", type=float, default=0.0, help="part of the pictures that show any concept alone")
    parser.add_argument("--noise", help="the noise schedule [as configured]")
    parser.add_argument("--init", type=Path, help="a model's folder to begin with [the bundled model]")
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tables = configuration.read_toml(a.config)
    if a.steps:
        tables["train"]["steps"] = a.steps
    if a.noise:
        tables["diffusion"]["noise"] = a.noise
    tables["autoencoder"] = str(a.autoencoder or a.work / "scenes-vae")
    print(train(
        a.work, a.out, tables, None if a.from_scratch else a.init or find("emoji").folder,
        names=list(things())[: a.things] if a.things else None, jitter=a.jitter, curriculum=a.curriculum,
        places=not a.no_places, singles=a.singles, device=a.device,
    ))  # fmt: skip
