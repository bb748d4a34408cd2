"""The last stage: write the figures into the finished model's card, and put the licences of its pictures beside it.

python samples/emoji/card.py work/
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import torch

from diffgen.training.run import read_run

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
`flat` and `modern` from npm's `fluentui-emoji` 1.3.0 (MIT, LICENSE-fluent). Names from PyPI's `emoji` (BSD) and, with the CLDR
keywords, npm's `emojibase-data` 17.0.0 (MIT, LICENSE-emojibase). Of nearly identical pictures one was kept. {held_out} of the pictures,
a tenth of the (concept, style) pairs of concepts that have all three, were never trained on: `held_out` in card.json.
Captions: a name (English 55 %, Chinese 24 %) or a keyword (13 %, 8 %), three in four with the style; one in ten was empty.

## Training

`samples/emoji/make.py`, which is `diffgen train` with vae.toml and then latents.toml, seed 0. Autoencoder: {vae_steps} steps of
{vae_batch} pictures, L1 + gradient + L2 and a small KL term. UNet and text encoder together: {images} pictures in steps of {batch},
{prediction}, {noise} schedule, AdamW at {learning_rate:g}, a moving average of the weights. Trained on: {machine}; {vae_minutes} minutes for
the autoencoder, {minutes} for the rest{energy}.

## Figures

`python samples/emoji/measure.py work/ --prompts {prompts} --seed {seed}`; distances at 16x16 RGB, values 0 to 255.

| what | value |
|---|---|
{figures}

Defaults: {defaults}.

## What it cannot do

It is an icon model: a prompt gives back something close to the picture it learned for that name, and words that it never saw
leave it guessing (`diffgen` names them in a warning). No sentences, no counting, no combining of things; faces, people and
letters come out blurred. Do not expect new designs from it: it is here so that every feature has something real to run on.
"""
RIGHT = "nearest of all pictures of the style is the right one"


def rows(measured: dict) -> str:
    """The lines of the table, from measure.json."""
    found = [
        (
            f"autoencoder, PSNR on the {apart['pictures']} held-out pictures",
            f"{apart['psnr_held_out_db']:.1f} dB",
        )
        for apart in [measured.get("autoencoder")]
        if apart
    ]
    found += [
        (
            f"{measured[key]['prompts']} {what}: {RIGHT}",
            f"{measured[key]['accuracy']:.3f} ± {measured[key]['plus_minus']:.3f}",
        )
        for key, what in (
            ("english", "English prompts drawn from the captions"),
            ("chinese", "Chinese prompts drawn from the captions"),
            ("held_out", "prompts of held-out (concept, style) pairs"),
        )
        if key in measured
    ]
    spread, distance, memory = measured["diversity"], measured["sliced_wasserstein"], measured.get("memorisation")
    found.append(
        (
            "mean distance of two seeds of a prompt (of two prompts)",
            "{of_one_prompt} ({of_two_prompts})".format(**spread),
        )
    )
    found.append(
        ("sliced Wasserstein distance to the data (floor, ceiling)", "{value} ({floor}, {ceiling})".format(**distance))
    )
    if memory:
        found.append(("memorisation ratio: 1 new pictures, 0 copies", f"{memory['ratio']}"))
    if cost := measured.get("cost"):
        found.append(("one picture, two threads; peak memory", f"{cost['seconds']} s; {cost['peak_mib']} MiB"))
    return "\n".join(f"| {what} | {value} |" for what, value in found)


def machine_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of {platform.machine()}"


def minutes(run: Path) -> float:
    """How long a run took, all its starts together, by its timing.jsonl."""
    seconds = [json.loads(line)["seconds"] for line in (run / "timing.jsonl").read_text().splitlines()]
    ends = [a for a, b in zip(seconds, [*seconds[1:], 0.0], strict=True) if b < a]  # each start counts from 0
    return sum(ends) / 60


def main(work: Path, machine: str, watts: float | None = None, before: float = 0.0) -> None:
    """`before`: minutes that the weights with which work/latents began had been trained."""
    folder, vae, latents = work / "emoji", read_run(work / "vae"), read_run(work / "latents")
    measured = json.loads((work / "measure.json").read_text("utf-8"))
    packages = work / "npm" / "node_modules"
    shutil.copyfile(NOTO_LICENCE, folder / "LICENSE-noto")
    shutil.copyfile(packages / "fluentui-emoji" / "LICENSE", folder / "LICENSE-fluent")
    shutil.copyfile(packages / "emojibase-data" / "LICENSE", folder / "LICENSE-emojibase")
    card = json.loads((folder / "card.json").read_text("utf-8"))
    time = {"vae": minutes(vae.folder), "latents": before + minutes(latents.folder)}
    card["figures"] = {
        "accuracy": measured["english"]["accuracy"],
        "accuracy_prompts": measured["english"]["prompts"],
        "accuracy_chinese": measured["chinese"]["accuracy"],
        **({"accuracy_held_out": measured["held_out"]["accuracy"]} if "held_out" in measured else {}),
        **({"psnr_held_out_db": measured["autoencoder"]["psnr_held_out_db"]} if "autoencoder" in measured else {}),
        "pictures_trained_on": card["trained_on_images"],
        "training_minutes": round(sum(time.values())),
        **{k: measured[k] for k in ("diversity", "sliced_wasserstein", "memorisation", "cost") if k in measured},
    }
    card["sha256"] = {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.safetensors"))
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = README.format(
        megabytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6,
        concepts=len(card["concepts"]),
        pictures=len(np.load(work / "data.npz")["names"]),
        held_out=len(card["held_out"]),
        vae_steps=vae.config["train"]["steps"],
        vae_batch=vae.config["train"]["batch_size"],
        batch=latents.config["train"]["batch_size"],
        images=card["trained_on_images"],
        prediction=latents.prediction,
        noise=latents.noise["name"],
        learning_rate=latents.config["train"]["learning_rate"],
        machine=machine,
        vae_minutes=round(time["vae"]),
        minutes=round(time["latents"]),
        energy="" if watts is None else f"; about {watts * sum(time.values()) / 60 / 1000:.2f} kWh at {watts:.0f} W",
        prompts=measured["english"]["prompts"],
        seed=measured["seed"],
        figures=rows(measured),
        defaults=", ".join(
            f"{k} {'x'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in card["defaults"].items()
        ),
    )
    (folder / "README.md").write_text(text, "utf-8")
    print(f"wrote {folder / 'card.json'} and {folder / 'README.md'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--machine", default=machine_name(), help="what it was trained on")
    parser.add_argument("--watts", type=float, help="of the machine while training, estimated")
    parser.add_argument("--before", type=float, default=0.0, help="minutes that the weights it began with had taken")
    arguments = parser.parse_args()
    main(arguments.work, arguments.machine, arguments.watts, arguments.before)
