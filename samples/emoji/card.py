"""The last stage: write the figures into the model's card, and copy the licences of its pictures.

    python samples/emoji/card.py work/            # work/emoji/card.json, README.md and LICENSE-*

It reads work/measure.json (by measure.py), the runs work/vae and work/latents, and work/emoji/card.json: what export.py
wrote, and the figures of tuned grids by tune.py (`tuned`, a list of objects with `grid` and its measurements). If the
second stage started from existing weights, describe their training:

    python samples/emoji/card.py work/ --began-with "an earlier run of this recipe" --pictures-before 192000 --minutes-before 62
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

import numpy as np
import torch
from captions import KINDS, STYLED
from measure import what_is_measured

from diffgen.models.find import find
from diffgen.models.info import defaults_in_words, info
from diffgen.training.run import Run, read_run

FLUENT = """Fluent Emoji (https://github.com/microsoft/fluentui-emoji), Copyright (c) Microsoft Corporation, packaged as
fluentui-emoji on npm by Mohammad Abu Mattar. Both are under this licence:

"""
NOTO_LICENCE = Path("/usr/share/doc/fonts-noto-color-emoji/copyright")
README = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: [en, zh]
tags: [diffgen, emoji]
---
# emoji

A small, complete Stable Diffusion model (CLIP tokenizer and text encoder, UNet, autoencoder), {megabytes:.1f} MB in float16. It draws
{concepts} things in the styles noto, flat and modern, at 64x64 pixels, from their English and Chinese names.
All of it was trained from scratch.

    diffgen generate "a red apple" "octopus, flat style" "红苹果，扁平风格"
    diffgen models info emoji --json      # all the names

## Data

{pictures} pictures of {concepts} concepts. `noto`: Debian's `fonts-noto-color-emoji` (SIL Open Font License 1.1, LICENSE-noto).
`flat` and `modern`: Microsoft's Fluent Emoji, from npm's `fluentui-emoji` 1.3.0 (MIT, LICENSE-fluent). Names: PyPI's `emoji`
(BSD, LICENSE-emoji) and, with the CLDR keywords, npm's `emojibase-data` 17.0.0 (MIT, LICENSE-emojibase). Of near-duplicate
pictures, one was kept.

{held_out} pictures were never trained on (`held_out` in card.json): a tenth of the (concept, style) pairs of concepts with all three
styles. The UNet saw no mirrored pictures, because mirroring changes the meaning of arrows, clocks, text and many faces. The
autoencoder, which reads no captions, saw half of them mirrored.

Captions: a name (English {name:.0%}, Chinese {zh:.0%}) or a keyword ({keyword:.0%}, {zh_keyword:.0%}), {styled:.0%} with the style; {empty:.0%} are empty.

## Training

The recipe is `samples/emoji`: `diffgen train` with vae.toml, then with latents.toml ({steps} steps), seed {seed}. Autoencoder: {vae_steps} steps of
{vae_batch} pictures, with L1, gradient and L2 losses and a small KL term. UNet and text encoder were trained together:
{own} pictures in steps of {batch}, {prediction}, {noise} schedule, AdamW at {learning_rate:g}, a moving average of the weights.
{start}Hardware: {machine}; {vae_minutes} minutes for the autoencoder, {minutes} for the UNet and text encoder{energy}.

## Figures

`python samples/emoji/measure.py work/ --prompts {prompts} --held-out {pairs} --seed {measure_seed}`
(its docstring defines the figures). Distances are at 16x16 RGB, values 0 to 255. Accuracies have 95 % intervals.

| what | value |
|---|---|
{figures}

Defaults: {defaults}.
{tuned}
## Limits

It is an icon model: a prompt gives the picture that it learned for that name, with small errors{memory}.
For words that it has not seen, it guesses (`diffgen` warns about them). It does not understand sentences, count, or combine
things. Faces, people and letters are blurred. Do not expect new designs: its purpose is to run every feature on a real model.

`diffgen models verify emoji` compares the files with the hashes in card.json.
"""
STARTED = "They started from {what}"
INCLUDED = ", trained on {pictures} pictures in {minutes} minutes, which this card includes.\n"
EXCLUDED = ", whose own training is not included.\n"
MEMORY = """
({learned:.0%} of its pictures are nearest to the training picture of their prompt; their distance to it is {ratio:.2f} of that
of unseen pictures to their nearest, {ratio_unlike:.2f} if only other concepts count: drawing errors, not new designs)"""
RIGHT = "the nearest picture of the style is the right one"
KIND = {"name": "names", "keyword": "keywords", "zh": "names", "zh_keyword": "keywords"}
RATIOS = "{ratio:.2f} ({ratio_held_out_prompts:.2f}; {copies:.2f})"

WATTS = 10  # a core of a server CPU with its share of memory and power supply, estimated
GPU_WATTS = 500  # a large GPU under load, estimated


def rows(measured: dict) -> str:
    """The rows of the table of figures, from measure.json."""
    spread, distance = measured["diversity"], measured["sliced_wasserstein"]
    table = [
        (f"{one['prompts']} {what}: {RIGHT}", "{:.3f} ({:.3f} to {:.3f})".format(one["accuracy"], *one["interval"]))
        for key, what in (
            ("english", "English prompts (training captions with a style)"),
            ("chinese", "Chinese prompts (training captions with a style)"),
            ("held_out", "prompts of held-out (concept, style) pairs"),
        )
        if (one := measured.get(key))
    ]
    for key, language in (("english", "English"), ("chinese", "Chinese")):
        shares = ", ".join(f"{KIND[kind]} {value:.2f}" for kind, value in measured[key]["by_kind"].items())
        table.append((f"{language} prompts by kind", shares))
    if one := measured.get("held_out"):
        styles = ", ".join(f"{style} {value:.2f}" for style, value in one["by_style"].items())
        table.append(
            (
                "held-out pairs by style; baseline: copy the concept's picture in another style",
                f"{styles}; {one['copying']:.2f}",
            )
        )
    if one := measured.get("autoencoder"):
        table.append(
            (f"autoencoder, PSNR on the {one['pictures']} held-out pictures", f"{one['psnr_held_out_db']:.1f} dB")
        )
    table.append(
        (
            "mean distance between two seeds of a prompt (between two prompts)",
            "{of_one_prompt} ({of_two_prompts})".format(**spread),
        )
    )
    table.append(
        ("sliced Wasserstein distance to the data (floor, ceiling)", "{value} ({floor}, {ceiling})".format(**distance))
    )
    if one := measured.get("memorisation"):
        table.append(("memorisation ratio (held-out prompts; copies)", RATIOS.format(**one)))
        table.append(
            ("the same, with unseen pictures compared only with other concepts", "{ratio_unlike:.2f}".format(**one))
        )
        table.append(("pictures nearest to the training picture of their prompt", "{learned:.3f}".format(**one)))
    if one := measured.get("cost"):
        table.append(
            (
                f"one picture with two threads (cores: {one['cores']}); peak memory",
                "{seconds} s; {peak_mib} MiB".format(**one),
            )
        )
    return "\n".join(f"| {what} | {value} |" for what, value in table)


def grids(tuned: list[dict]) -> str:
    """A table of the tuned grids and their measurements, or an empty text."""
    if not tuned:
        return ""
    keys = list(dict.fromkeys(key for one in tuned for key in one))
    lines = [keys, ["---"] * len(keys), *([one.get(key, "") for key in keys] for one in tuned)]
    cells = [[cell if ".json" in cell else cell.replace("_", " ") for cell in map(str, line)] for line in lines]
    table = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    return f"\nTuned grids (`samples/emoji/tune.py`):\n\n{table}\n"


def machine_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", about.read_text()) if about.exists() else []
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"


def minutes(run: Path) -> float:
    """Minutes that a run took over all its starts, from its timing.jsonl."""
    seconds = [json.loads(line)["seconds"] for line in (run / "timing.jsonl").read_text().splitlines()]
    ends = [a for a, b in zip(seconds, [*seconds[1:], 0.0], strict=True) if b < a]  # each start begins at 0
    return sum(ends) / 60


@dataclass(frozen=True)
class Before:
    """The training behind the weights that the second stage started from."""

    what: str = ""
    pictures: int = 0
    minutes: float = 0.0


def initial_weights(run: Run, before: Before) -> dict | None:
    """The card's entry on the initial weights, with their hash from run.json; None if they were random."""
    init = json.loads((run.folder / "run.json").read_text("utf-8")).get("init")
    if init is None and not before.what:
        return None
    what = before.what or f"the weights of {init['file']}"
    digest = {} if init is None else {"sha256": init["sha256"]}
    return {"what": what, "pictures": before.pictures, "minutes": round(before.minutes), **digest}


def current_figures(work: Path) -> dict | None:
    """measure.json; None if it does not exist, or is of other weights or other defaults."""
    file, folder = work / "measure.json", work / "emoji"
    if not file.exists():
        return None
    figures = json.loads(file.read_text("utf-8"))
    card = json.loads((folder / "card.json").read_text("utf-8"))
    return figures if figures["of"] == what_is_measured(folder, card) else None


def copy_licences(work: Path, folder: Path) -> None:
    """Copy the licences of the pictures and names into a model's folder."""
    packages = work / "npm" / "node_modules"
    shutil.copyfile(NOTO_LICENCE, folder / "LICENSE-noto")
    (folder / "LICENSE-fluent").write_text(
        FLUENT + (packages / "fluentui-emoji" / "LICENSE").read_text("utf-8"), "utf-8"
    )
    for file in files("emoji") or ():
        if file.name.startswith("LICENSE"):
            shutil.copyfile(str(file.locate()), folder / "LICENSE-emoji")
    shutil.copyfile(packages / "emojibase-data" / "LICENSE", folder / "LICENSE-emojibase")


def write_card(folder: Path, card: dict) -> None:
    """Write card.json, with the hashes of the other files."""
    card["sha256"] = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("card.json", "README.md")
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main(work: Path, machine: str, watts: float | None = None, before: Before = Before()) -> None:
    """Write the card. `watts`: the machine's power while training, estimated if None."""
    folder, vae, latents = work / "emoji", read_run(work / "vae"), read_run(work / "latents")
    newest = latents.latest()
    if newest is None:
        raise SystemExit(f"{latents.folder} has no checkpoint")
    copy_licences(work, folder)
    card = json.loads((folder / "card.json").read_text("utf-8"))
    figures = current_figures(work)
    if figures is None:
        raise SystemExit(f"{work / 'measure.json'} is missing, or of other weights or defaults: measure again")
    initial = initial_weights(latents, before)
    own = int(newest.name) * latents.config["train"]["batch_size"]
    time = {"vae": minutes(vae.folder), "latents": minutes(latents.folder) + before.minutes}
    hours = sum(time.values()) / 60
    if watts is None:
        watts = GPU_WATTS if torch.cuda.is_available() else WATTS * (os.cpu_count() or 1)
    energy = {"kwh": round(watts * hours / 1000, 3), "watts": watts, "estimated": True}
    card |= {
        "trained_on_images": own + before.pictures,
        "recipe": "samples/emoji: vae.toml, latents.toml",
        "seed": latents.config["train"]["seed"],
        "hardware": machine,
        "hours": round(hours, 2),
        "energy": energy,
        "began_with": initial,
    }
    card["figures"] = {
        **card.get("figures", {}),
        "accuracy": figures["english"]["accuracy"],
        "accuracy_prompts": figures["english"]["prompts"],
        "accuracy_chinese": figures["chinese"]["accuracy"],
        **({"accuracy_held_out": figures["held_out"]["accuracy"]} if "held_out" in figures else {}),
        **({"psnr_held_out_db": figures["autoencoder"]["psnr_held_out_db"]} if "autoencoder" in figures else {}),
        "pictures_trained_on": card["trained_on_images"],
        "training_minutes": round(sum(time.values())),
        **{k: figures[k] for k in ("diversity", "sliced_wasserstein", "memorisation", "cost") if k in figures},
    }
    start = "" if initial is None else (STARTED + (INCLUDED if before.pictures else EXCLUDED)).format(**initial)
    text = README.format(
        megabytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6,
        concepts=len(card["concepts"]),
        pictures=len(np.load(work / "data.npz")["names"]),
        held_out=len(card["held_out"]),
        **KINDS,
        styled=STYLED,
        empty=latents.config["diffusion"]["caption_dropout"],
        seed=card["seed"],
        vae_steps=vae.config["train"]["steps"],
        vae_batch=vae.config["train"]["batch_size"],
        own=own,
        steps=latents.config["train"]["steps"],
        batch=latents.config["train"]["batch_size"],
        prediction=latents.prediction,
        noise=latents.noise["name"],
        learning_rate=latents.config["train"]["learning_rate"],
        start=start,
        machine=machine,
        vae_minutes=round(time["vae"]),
        minutes=round(time["latents"]),
        energy="; about {kwh} kWh, estimated at {watts:.0f} W".format(**energy),
        prompts=figures["english"]["prompts"],
        pairs=figures.get("held_out", {}).get("prompts", 0),
        measure_seed=figures["seed"],
        figures=rows(figures),
        defaults=", ".join(f"{name} {value}" for name, value in defaults_in_words(info(find(str(folder)))).items()),
        tuned=grids(card.get("tuned", [])),
        memory=MEMORY.format(**figures["memorisation"]) if "memorisation" in figures else "",
    )
    (folder / "README.md").write_text(text, "utf-8")
    write_card(folder, card)
    print(f"wrote {folder / 'card.json'} and {folder / 'README.md'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--machine", default=machine_name(), help="the training hardware")
    parser.add_argument(
        "--watts",
        type=float,
        help=f"power of the machine while training [{WATTS} for each core of a CPU; {GPU_WATTS} for a GPU]",
    )
    parser.add_argument("--began-with", default="", help="the weights that the second stage started from, in words")
    parser.add_argument("--pictures-before", type=int, default=0, help="pictures that those weights were trained on")
    parser.add_argument("--minutes-before", type=float, default=0.0, help="minutes that those weights were trained")
    a = parser.parse_args()
    main(a.work, a.machine, a.watts, Before(a.began_with, a.pictures_before, a.minutes_before))
