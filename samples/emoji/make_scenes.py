"""Run the whole recipe of a model of scenes: data, autoencoder, diffusion model, export, figures, card.

    pip install -e '.[recipe]' -c constraints.txt
    apt-get install fonts-noto-color-emoji libcairo2        # and npm, for the SVG pictures
    python samples/emoji/make_scenes.py samples/emoji/work

Both stages are the product's own jobs, with scenes-vae.toml and scenes-latents.toml, on scenes that are made as they
are read. They begin with the bundled model. If the command is stopped, run it again: it continues from the last
checkpoint and skips finished stages. The model is work/scenes-model; its card has the judge's figures.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not slow down other processes

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import captions
import card
import data
import export
import judge
import scenes
import scenes_latents
import scenes_vae
import sprites
from places import SIDE
from tokenizer import pieces

from diffgen.models.find import find
from diffgen.training import config as configuration
from diffgen.training.run import read_run

HERE = Path(__file__).resolve().parent
DEFAULTS = {"steps": 20, "guidance": 3.0, "scheduler": "dpmpp_2m"}
SINGLES = 0.35  # part of the pictures that show any concept alone


def about(work: Path, names: Sequence[str] | None) -> dict[str, Any]:
    """The model's card, without figures."""
    words = {word for text in scenes_latents.every_caption(work) for word in pieces(text)}
    return {
        "schema": "diffgen.card/1",
        "licence": export.LICENCE,
        "resolution": SIDE,
        "styles": list(scenes.STYLES),
        "held_out": [list(pair) for pair in scenes_latents.held_out_singles()],
        "defaults": DEFAULTS,
        "concepts": sorted(captions.names(work)),
        "words": sorted(word for word in words if any(map(str.isalnum, word))),
        "compositions": scenes.compositions(names),
    }


def finished(result: Any) -> None:
    if not result.finished:
        raise SystemExit(130)


def main(
    work: Path, vae: Path, latents: Path, names: Sequence[str] | None = None, count: int = 200, init: Path | None = None
) -> None:
    """Run the stages that are not finished. Raises SystemExit if one is stopped.

    names  the things that compose; all unless given
    count  prompts of each group that are judged
    init   a model's folder to begin with; the bundled one unless given
    """
    work.mkdir(parents=True, exist_ok=True)
    model, init = work / "scenes-model", init or find("emoji").folder
    if not (work / "data.npz").exists():
        data.build(work, 64)
    if not (work / "sprites.npz").exists():
        sprites.build(work)
    if not (work / "singles.npz").exists():
        sprites.build_singles(work)
    finished(scenes_vae.train(work, work / "scenes-vae", configuration.read_toml(vae), init, names))
    tables = configuration.read_toml(latents) | {"autoencoder": str(work / "scenes-vae")}
    finished(scenes_latents.train(work, work / "scenes", tables, init, names=names, singles=SINGLES))
    if not (model / "card.json").exists():
        every = scenes_latents.every_caption(work)
        export.write(work / "scenes", work / "scenes-tokenizer", model, about(work, names), every)
    facts = json.loads((model / "card.json").read_text("utf-8"))
    if "sha256" not in facts:
        painter = scenes.Painter(work / "sprites.npz")
        groups = judge.groups(count, names)

        def make(group: Sequence[scenes.Scene]) -> Sequence[Any]:
            return judge.generated(str(model), [scenes.english(scene.description) for scene in group])

        facts["figures"] = judge.figures(judge.Judge(painter, names), groups, make)
        facts["seed"] = read_run(work / "scenes").config["train"]["seed"]
        facts["recipe"] = "samples/emoji: scenes-vae.toml, scenes-latents.toml"
        (model / "README.md").write_text(f"# Scenes\n\n{judge.table(facts['figures'])}\n", "utf-8")
        card.copy_licences(work, model)
        card.write_card(model, facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--vae", type=Path, default=HERE / "scenes-vae.toml", help="configuration of the autoencoder")
    parser.add_argument("--latents", type=Path, default=HERE / "scenes-latents.toml", help="configuration of the rest")
    parser.add_argument("--init", type=Path, help="a model's folder to begin with [the bundled model]")
    a = parser.parse_args()
    main(a.work, a.vae, a.latents, init=a.init)
