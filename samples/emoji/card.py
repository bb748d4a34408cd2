"""The last stage: write the figures into the finished model's card, and put the licences of its pictures beside it.

    python samples/emoji/card.py work/            # work/emoji/card.json, README.md and LICENSE-*

It reads work/measure.json (by measure.py), the runs work/vae and work/latents, and what work/emoji/card.json says already:
what export.py wrote, and figures of tuned grids if tune.py has put some there (`tuned`, a list of tables with the keys
`grid` and whatever was measured). What the weights that the second stage began with had behind them, only you know:

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

A complete small Stable Diffusion (CLIP tokenizer and text encoder, UNet, autoencoder), {megabytes:.1f} MB in float16. It draws
{concepts} things in the styles noto, flat and modern, at 64x64 pixels, by their English and Chinese names. Nothing in it was
trained elsewhere.

    diffgen generate "a red apple" "octopus, flat style" "红苹果，扁平风格"
    diffgen models info emoji --json      # all the names

## Data

{pictures} pictures of {concepts} concepts: `noto` from Debian's `fonts-noto-color-emoji` (SIL Open Font License 1.1, LICENSE-noto),
`flat` and `modern` are Microsoft's Fluent Emoji, from npm's `fluentui-emoji` 1.3.0 (MIT, LICENSE-fluent). Names from PyPI's `emoji`
(BSD, LICENSE-emoji) and, with the CLDR keywords, npm's `emojibase-data` 17.0.0 (MIT, LICENSE-emojibase). Of nearly identical
pictures one was kept. {held_out} of the pictures, a tenth of the (concept, style) pairs of concepts that have all three, were never
trained on: `held_out` in card.json. No picture with a caption is mirrored: arrows, clocks, text and many
faces would mean something else; the autoencoder, which reads none, learned from half of them mirrored.
Captions: a name (English {name:.0%}, Chinese {zh:.0%}) or a keyword ({keyword:.0%}, {zh_keyword:.0%}), {styled:.0%} with the style; {empty:.0%} were empty.

## Training

`samples/emoji`, which is `diffgen train` with vae.toml and then latents.toml ({steps} steps), seed {seed}. Autoencoder: {vae_steps} steps of
{vae_batch} pictures, L1 + gradient + L2 and a small KL term; the held-out pictures trained nothing. UNet and text encoder together:
{own} pictures in steps of {batch}, {prediction}, {noise} schedule, AdamW at {learning_rate:g}, a moving average of the weights.
{began}Trained on: {machine}; {vae_minutes} minutes for the autoencoder, {minutes} for the rest{energy}.

## Figures

`python samples/emoji/measure.py work/ --prompts {prompts} --held-out {pairs} --seed {measure_seed}`, whose first lines say how; distances at
16x16 RGB, values 0 to 255; accuracies with their intervals of 95 %.

| what | value |
|---|---|
{figures}

Defaults: {defaults}.
{tuned}
## What it cannot do

It is an icon model: a prompt gives back the picture it learned for that name, a little off{memory}.
Words that it never saw leave it guessing (`diffgen` names them in a warning). No sentences, no counting, no combining of things; faces,
people and letters come out blurred. Do not expect new designs from it: it is here so that every feature has something real to
run on.

`diffgen models verify emoji` compares the files with the hashes in card.json.
"""
BEGAN = "They began with {what}"
COUNTED = ", trained with {pictures} pictures in {minutes} minutes, which this card counts in.\n"
MEMORY = """
({learned:.0%} of its pictures are nearer to the very picture learned than to any other; their distance to it is {ratio:.2f} of that of
unseen pictures to theirs, {ratio_unlike:.2f} of that to pictures of other things: errors of drawing, not new designs)"""
RIGHT = "nearest of all pictures of the style is the right one"
KIND = {"name": "names", "keyword": "keywords", "zh": "names", "zh_keyword": "keywords"}
RATIOS = "{ratio:.2f} ({ratio_held_out_prompts:.2f}; {copies:.2f})"

WATTS = 10  # of a core of a server's processor, its share of memory and power supply included: an estimate
GPU_WATTS = 500  # of a large GPU at work: an estimate


def rows(measured: dict) -> str:
    """The lines of the table, from measure.json."""
    spread, distance = measured["diversity"], measured["sliced_wasserstein"]
    found = [
        (f"{one['prompts']} {what}: {RIGHT}", "{:.3f} ({:.3f} to {:.3f})".format(one["accuracy"], *one["interval"]))
        for key, what in (
            ("english", "English prompts drawn from the captions with a style"),
            ("chinese", "Chinese prompts drawn from the captions with a style"),
            ("held_out", "prompts of held-out (concept, style) pairs"),
        )
        if (one := measured.get(key))
    ]
    for key, language in (("english", "English"), ("chinese", "Chinese")):
        shares = ", ".join(f"{KIND[kind]} {value:.2f}" for kind, value in measured[key]["by_kind"].items())
        found.append((f"of the {language} ones by kind", shares))
    if one := measured.get("held_out"):
        styles = ", ".join(f"{style} {value:.2f}" for style, value in one["by_style"].items())
        found.append(
            ("held-out pairs by style; of the thing's own picture in another style", f"{styles}; {one['copying']:.2f}")
        )
    if one := measured.get("autoencoder"):
        found.append(
            (f"autoencoder, PSNR on the {one['pictures']} held-out pictures", f"{one['psnr_held_out_db']:.1f} dB")
        )
    found.append(
        (
            "mean distance of two seeds of a prompt (of two prompts)",
            "{of_one_prompt} ({of_two_prompts})".format(**spread),
        )
    )
    found.append(
        ("sliced Wasserstein distance to the data (floor, ceiling)", "{value} ({floor}, {ceiling})".format(**distance))
    )
    if one := measured.get("memorisation"):
        found.append(("memorisation ratio (of prompts held out; of copies)", RATIOS.format(**one)))
        found.append(("the same, unseen pictures compared with other things alone", "{ratio_unlike:.2f}".format(**one)))
        found.append(("nearer to the picture learned than to any other trained on", "{learned:.3f}".format(**one)))
    if one := measured.get("cost"):
        found.append(
            (
                f"one picture with two threads (cores: {one['cores']}); peak memory",
                "{seconds} s; {peak_mib} MiB".format(**one),
            )
        )
    return "\n".join(f"| {what} | {value} |" for what, value in found)


def grids(tuned: list[dict]) -> str:
    """A table of the tuned grids, with whatever was measured of them; nothing if there are none."""
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
    """How long a run took, all its starts together, by its timing.jsonl."""
    seconds = [json.loads(line)["seconds"] for line in (run / "timing.jsonl").read_text().splitlines()]
    ends = [a for a, b in zip(seconds, [*seconds[1:], 0.0], strict=True) if b < a]  # each start counts from 0
    return sum(ends) / 60


@dataclass(frozen=True)
class Before:
    """What the weights that the second stage began with had behind them."""

    what: str = ""
    pictures: int = 0
    minutes: float = 0.0


def began_with(run: Run, before: Before) -> dict | None:
    """The same for the card, with the hash that run.json has; None for a run that began with random weights."""
    init = json.loads((run.folder / "run.json").read_text("utf-8")).get("init")
    if init is None and not before.what:
        return None
    what = before.what or f"the weights of {init['file']}"
    hashed = {} if init is None else {"sha256": init["sha256"]}
    return {"what": what, "pictures": before.pictures, "minutes": round(before.minutes), **hashed}


def measured(work: Path) -> dict | None:
    """What measure.py found of the model as it is; None if that is of other weights or other defaults, or not there."""
    file, folder = work / "measure.json", work / "emoji"
    if not file.exists():
        return None
    found = json.loads(file.read_text("utf-8"))
    card = json.loads((folder / "card.json").read_text("utf-8"))
    return found if found["of"] == what_is_measured(folder, card) else None


def main(work: Path, machine: str, watts: float | None = None, before: Before = Before()) -> None:
    """`watts`: of the machine while training; an estimate is made unless it is said."""
    folder, vae, latents = work / "emoji", read_run(work / "vae"), read_run(work / "latents")
    newest = latents.latest()
    if newest is None:
        raise SystemExit(f"{latents.folder} has no checkpoint")
    packages = work / "npm" / "node_modules"
    shutil.copyfile(NOTO_LICENCE, folder / "LICENSE-noto")
    (folder / "LICENSE-fluent").write_text(
        FLUENT + (packages / "fluentui-emoji" / "LICENSE").read_text("utf-8"), "utf-8"
    )
    for file in files("emoji") or ():
        if file.name.startswith("LICENSE"):
            shutil.copyfile(str(file.locate()), folder / "LICENSE-emoji")
    shutil.copyfile(packages / "emojibase-data" / "LICENSE", folder / "LICENSE-emojibase")
    card = json.loads((folder / "card.json").read_text("utf-8"))
    found = measured(work)
    if found is None:
        raise SystemExit(f"{work / 'measure.json'} is of other weights or other defaults: measure again")
    began = began_with(latents, before)
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
        "began_with": began,
    }
    card["figures"] = {
        **card.get("figures", {}),
        "accuracy": found["english"]["accuracy"],
        "accuracy_prompts": found["english"]["prompts"],
        "accuracy_chinese": found["chinese"]["accuracy"],
        **({"accuracy_held_out": found["held_out"]["accuracy"]} if "held_out" in found else {}),
        **({"psnr_held_out_db": found["autoencoder"]["psnr_held_out_db"]} if "autoencoder" in found else {}),
        "pictures_trained_on": card["trained_on_images"],
        "training_minutes": round(sum(time.values())),
        **{k: found[k] for k in ("diversity", "sliced_wasserstein", "memorisation", "cost") if k in found},
    }
    begun = (
        ""
        if began is None
        else (BEGAN + (COUNTED if before.pictures else ", whose own training is not counted in.\n")).format(**began)
    )
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
        began=begun,
        machine=machine,
        vae_minutes=round(time["vae"]),
        minutes=round(time["latents"]),
        energy="; about {kwh} kWh, estimated at {watts:.0f} W".format(**energy),
        prompts=found["english"]["prompts"],
        pairs=found.get("held_out", {}).get("prompts", 0),
        measure_seed=found["seed"],
        figures=rows(found),
        defaults=", ".join(f"{name} {value}" for name, value in defaults_in_words(info(find(str(folder)))).items()),
        tuned=grids(card.get("tuned", [])),
        memory=MEMORY.format(**found["memorisation"]) if "memorisation" in found else "",
    )
    (folder / "README.md").write_text(text, "utf-8")
    card["sha256"] = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("card.json", "README.md")
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {folder / 'card.json'} and {folder / 'README.md'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--machine", default=machine_name(), help="what it was trained on")
    parser.add_argument(
        "--watts",
        type=float,
        help=f"of the machine while training [{WATTS} for each core of a CPU; {GPU_WATTS} for a GPU]",
    )
    parser.add_argument("--began-with", default="", help="what the second stage began with, in words")
    parser.add_argument("--pictures-before", type=int, default=0, help="that those weights had seen")
    parser.add_argument("--minutes-before", type=float, default=0.0, help="that those weights had been trained")
    a = parser.parse_args()
    main(a.work, a.machine, a.watts, Before(a.began_with, a.pictures_before, a.minutes_before))
