"""Tune grids for the trained model, keep those that do not lose accuracy, and make the best one its default.

    python samples/emoji/tune.py work/          # work/emoji -> work/emoji/grids/, its card.json; work/tune/

For each number of evaluations, `diffgen tune` learns a grid at the model's guidance scale. The grid must be nearer to
the solution than every built-in grid. Its accuracy (as in measure.py, for the same prompts and seeds) must not be below
that of the three best built-in grids with as many evaluations. Grids that pass go into the model's folder, and their
figures into its card, under `tuned`. Of those whose accuracy is at most 0.01 below that of 25 steps on karras, the one
nearest to the solution becomes the default. Finished results are kept in work/tune/ and reused for the same model,
number of prompts and settings.
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

from diffgen.comparison.search import NotBetter, Settings, Tuner, as_json
from diffgen.comparison.subjects import PipelineSubject, subject_of

if TYPE_CHECKING:
    from measure import Query

SOLVER, EVALUATIONS = "dpmpp_2m", (4, 6, 8, 12)
TOLERANCE = 0.01  # accuracy that the default may lose against 25 steps
SETTINGS = Settings(noises=24, iterations=120, batch=24)


class Accuracy:
    """The accuracy of a grid, always on the same prompts and seeds; cached in a file."""

    def __init__(self, work: Path, subject: PipelineSubject, card: dict, prompts: int, file: Path) -> None:
        draw = random.Random(0)
        self.subject, self.file, self.pictures = subject, file, Pictures(work, card)
        self.queries: list[Query] = draw_prompts(self.pictures, names(work), ENGLISH, prompts, draw)
        self.seeds = [draw.randrange(2**32) for _ in self.queries]
        self.cache: dict[str, float] = json.loads(file.read_text("utf-8")) if file.exists() else {}

    def __call__(self, steps: int, grid: str) -> float:
        key = f"{steps} {Path(grid).name}"
        if key not in self.cache:
            right = 0
            for (k, text, _), seed in zip(self.queries, self.seeds, strict=True):
                options = {"steps": steps, "grid": grid, "scheduler": SOLVER, "guidance": self.subject.guidance}
                (image,) = self.subject.generator.generate(text, seed=seed, **options)
                right += self.pictures.nearest(small(image), str(self.pictures.styles[k])) == k
            self.cache[key] = round(right / len(self.queries), 4)
            self.file.write_text(json.dumps(self.cache, indent=1) + "\n", "utf-8")
            print(f"{key}: accuracy {self.cache[key]} of {len(self.queries)} prompts", flush=True)
        return self.cache[key]


def learned(tuner: Tuner, evaluations: int, file: Path) -> dict:
    """Tune a grid, unless `file` has it: the file's content, or {} if no better grid exists."""
    if not file.exists():
        start = time.monotonic()
        try:
            text = as_json(tuner.tune(evaluations))
        except NotBetter as error:
            print(f"{evaluations}: {error}", flush=True)
            text = "{}\n"
        file.write_text(text, "utf-8")
        print(f"{evaluations}: {(time.monotonic() - start) / 60:.0f} minutes", flush=True)
    return json.loads(file.read_text("utf-8"))


def main(
    work: Path, evaluations: Sequence[int] = EVALUATIONS, prompts: int = 100, settings: Settings = SETTINGS
) -> None:
    folder, results = work / "emoji", work / "tune"
    card = json.loads((folder / "card.json").read_text("utf-8"))
    shutil.rmtree(folder / "grids", ignore_errors=True)
    card.pop("tuned", None)
    card["defaults"] |= {key: DEFAULTS[key] for key in ("steps", "scheduler", "grid")}
    write(folder, card)  # without tuned grids, for the comparison
    subject, texts, (guidance,) = subject_of(str(folder), (), (), "auto", "auto", drawn=800)
    assert isinstance(subject, PipelineSubject)
    settings_json = json.dumps(
        {"model_hash": subject.model_hash, "prompts": prompts, "settings": vars(settings)}, indent=1
    )
    settings_file = results / "order.json"
    if not settings_file.exists() or settings_file.read_text("utf-8") != settings_json:
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        settings_file.write_text(settings_json, "utf-8")
    tuner = Tuner(subject, SOLVER, lambda seed: texts[seed % len(texts)], guidance, settings)
    accuracy = Accuracy(work, subject, card, prompts, results / "accuracy.json")
    baseline = accuracy(DEFAULTS["steps"], "karras")
    kept = []
    for n in sorted(evaluations):
        file = results / f"{SOLVER}-{n}.json"
        grid_file = learned(tuner, n, file)
        if not grid_file:
            continue
        errors = grid_file["built_in"]["all"]
        rivals = {grid: accuracy(n, grid) for grid in sorted(errors, key=lambda grid: errors[grid])[:3]}
        figures = {
            "grid": file.name,
            "evaluations": n,
            "guidance": guidance,
            "error": round(grid_file["error"], 4),
            "error_built_in": round(grid_file["built_in"]["error"], 4),
            "accuracy": accuracy(n, str(file)),
            "accuracy_built_in": max(rivals.values()),
            "prompts": len(accuracy.queries),
        }
        print(json.dumps(figures), flush=True)
        if figures["accuracy"] >= figures["accuracy_built_in"]:
            kept.append(figures)
            (folder / "grids").mkdir(exist_ok=True)
            shutil.copyfile(file, folder / "grids" / file.name)
    candidates = [figures for figures in kept if figures["accuracy"] >= baseline - TOLERANCE]
    if candidates:  # the grid has its number of steps; the card's applies where the grid does not fit
        card["defaults"]["grid"] = f"grids/{min(candidates, key=lambda figures: figures['error'])['grid']}"
    card["tuned"] = kept
    write(folder, card)
    print(f"{len(kept)} grids -> {folder / 'grids'}; defaults: {card['defaults']}")


def write(folder: Path, card: dict) -> None:
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--prompts", type=int, default=100, help="number of prompts for the accuracies")
    parser.add_argument("--noises", type=int, default=SETTINGS.noises, help="number of noises to learn from")
    parser.add_argument("--iterations", type=int, default=SETTINGS.iterations)
    a = parser.parse_args()
    main(a.work, a.evaluations, a.prompts, replace(SETTINGS, noises=a.noises, iterations=a.iterations))
