"""Tuned grids for the finished model, kept where they also draw what is asked for; the best becomes its default.

    python samples/emoji/tune.py work/          # work/emoji -> work/emoji/grids/, its card.json; work/tune/

For each number of evaluations `diffgen tune` learns a grid at the model's guidance. It must come nearer to the
solution than every built-in grid, and the share of prompts that are answered right (as measure.py counts it, for the
same prompts and seeds) must not be below that of the three best built-in grids at as many evaluations. Those that pass
go into the model's folder, their figures under `tuned` in its card. Of those whose accuracy is at most 0.01 below that
of 25 steps on karras, its default becomes the one that comes nearest to the solution. What is finished lies in
work/tune/ and is not done again for the same model, number of prompts and way of searching.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch

from captions import names
from data import small
from export import DEFAULTS
from measure import ENGLISH, Pictures, draw_prompts

from diffgen.comparison.subjects import PipelineSubject, subject_of
from diffgen.comparison.tune import NotBetter, Settings, Tuner, as_json

if TYPE_CHECKING:
    from measure import Asked

SOLVER, EVALUATIONS = "dpmpp_2m", (4, 6, 8, 12)
ROOM = 0.01  # of accuracy, that the default may lose to many steps
SETTINGS = Settings(noises=24, iterations=120, batch=24)


class Accuracy:
    """How many of the same prompts are answered right, by whatever way of sampling; remembered in a file."""

    def __init__(self, work: Path, subject: PipelineSubject, card: dict, prompts: int, file: Path) -> None:
        draw = random.Random(0)
        self.subject, self.file, self.pictures = subject, file, Pictures(work, card)
        self.asked: list[Asked] = draw_prompts(self.pictures, names(work), ENGLISH, prompts, draw)
        self.seeds = [draw.randrange(2**32) for _ in self.asked]
        self.known: dict[str, float] = json.loads(file.read_text("utf-8")) if file.exists() else {}

    def __call__(self, steps: int, grid: str) -> float:
        key = f"{steps} {Path(grid).name}"
        if key not in self.known:
            right = 0
            for (k, text, _), seed in zip(self.asked, self.seeds, strict=True):
                options = {"steps": steps, "grid": grid, "scheduler": SOLVER, "guidance": self.subject.guidance}
                (made,) = self.subject.generator.generate(text, seed=seed, **options)
                right += self.pictures.nearest(small(made), str(self.pictures.styles[k])) == k
            self.known[key] = round(right / len(self.asked), 4)
            self.file.write_text(json.dumps(self.known, indent=1) + "\n", "utf-8")
            print(f"{key}: accuracy {self.known[key]} of {len(self.asked)} prompts", flush=True)
        return self.known[key]


def learned(tuner: Tuner, evaluations: int, file: Path) -> dict:
    """The content of the grid file, from the last time if it is there; {} where nothing better was found."""
    if not file.exists():
        began = time.monotonic()
        try:
            found = as_json(tuner.tune(evaluations))
        except NotBetter as error:
            print(f"{evaluations}: {error}", flush=True)
            found = "{}\n"
        file.write_text(found, "utf-8")
        print(f"{evaluations}: {(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    return json.loads(file.read_text("utf-8"))


def main(
    work: Path, evaluations: Sequence[int] = EVALUATIONS, prompts: int = 100, settings: Settings = SETTINGS
) -> None:
    folder, done = work / "emoji", work / "tune"
    card = json.loads((folder / "card.json").read_text("utf-8"))
    shutil.rmtree(folder / "grids", ignore_errors=True)
    card.pop("tuned", None)
    card["defaults"] |= {key: DEFAULTS[key] for key in ("steps", "scheduler", "grid")}
    write(folder, card)  # as it was before tuning, to be measured so
    subject, texts, (guidance,) = subject_of(str(folder), (), (), "auto", "auto", drawn=800)
    assert isinstance(subject, PipelineSubject)
    order = json.dumps({"model_hash": subject.model_hash, "prompts": prompts, "settings": vars(settings)}, indent=1)
    mark = done / "order.json"
    if not mark.exists() or mark.read_text("utf-8") != order:
        shutil.rmtree(done, ignore_errors=True)
        done.mkdir()
        mark.write_text(order, "utf-8")
    tuner = Tuner(subject, SOLVER, lambda seed: texts[seed % len(texts)], guidance, settings)
    accuracy = Accuracy(work, subject, card, prompts, done / "accuracy.json")
    many = accuracy(DEFAULTS["steps"], "karras")
    kept = []
    for n in sorted(evaluations):
        file = done / f"{SOLVER}-{n}.json"
        found = learned(tuner, n, file)
        if not found:
            continue
        errors = found["built_in"]["all"]
        rivals = {grid: accuracy(n, grid) for grid in sorted(errors, key=lambda grid: errors[grid])[:3]}
        said = {
            "grid": file.name,
            "evaluations": n,
            "guidance": guidance,
            "error": round(found["error"], 4),
            "error_built_in": round(found["built_in"]["error"], 4),
            "accuracy": accuracy(n, str(file)),
            "accuracy_built_in": max(rivals.values()),
            "prompts": len(accuracy.asked),
        }
        print(json.dumps(said), flush=True)
        if said["accuracy"] >= said["accuracy_built_in"]:
            kept.append(said)
            (folder / "grids").mkdir(exist_ok=True)
            shutil.copyfile(file, folder / "grids" / file.name)
    right = [said for said in kept if said["accuracy"] >= many - ROOM]
    if right:  # the grid says its number of steps; the card's is for whatever does not go with it
        card["defaults"]["grid"] = f"grids/{min(right, key=lambda said: said['error'])['grid']}"
    card["tuned"] = kept
    write(folder, card)
    print(f"{len(kept)} grids -> {folder / 'grids'}; defaults: {card['defaults']}")


def write(folder: Path, card: dict) -> None:
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--prompts", type=int, default=100, help="that the accuracies are measured with")
    parser.add_argument("--noises", type=int, default=SETTINGS.noises, help="to learn from")
    parser.add_argument("--iterations", type=int, default=SETTINGS.iterations)
    a = parser.parse_args()
    main(a.work, a.evaluations, a.prompts, replace(SETTINGS, noises=a.noises, iterations=a.iterations))
