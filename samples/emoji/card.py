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

import torch

NOTO_LICENCE = Path("/usr/share/doc/fonts-noto-color-emoji/copyright")
README = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffgen, emoji]
---
# emoji

A complete small Stable Diffusion (CLIP tokenizer and text encoder, UNet, autoencoder), {megabytes:.1f} MB in float16. It draws
{concepts} things in the styles noto, flat and modern, at 64x64 pixels. Nothing in it was trained elsewhere.

    diffgen generate "a red apple" "octopus, flat style"
    diffgen models info emoji --json      # all the names

## Data

{pictures} pictures of {concepts} concepts, each in all three styles: `noto` from Debian's `fonts-noto-color-emoji` (SIL Open Font
License 1.1, LICENSE-noto), `flat` and `modern` from npm's `fluentui-emoji` 1.3.0 (MIT, LICENSE-fluent). The autoencoder saw
{vae_pictures} pictures of these sets, people, faces and signs included; the diffusion model learned names of one or two words only.
Captions: "<name>, <style> style"; sometimes without the style, or with an article; one in ten was dropped.

## Training

`samples/emoji/make.py`, seed 0. Autoencoder: {vae_steps} steps of 32 pictures, L1 + gradient + L2 and a small KL term. UNet and text
encoder together: {steps} steps of {batch} ({images} pictures), {prediction}, scaled-linear schedule, AdamW at 1e-3 falling to zero along a
cosine, EMA 0.999, the project's own `GaussianDiffusion.loss`. Trained on: {machine};
{vae_minutes} minutes for the autoencoder, {minutes} for the rest.

## Figures

| what | value | command |
|---|---|---|
| autoencoder, PSNR on {held_out} pictures of concepts it was not trained on | {psnr:.1f} dB | `python samples/emoji/vae.py work/` |
| of {prompts} prompts drawn from the captions, pictures whose nearest neighbour (16x16 RGB) among the pictures of that style is what was asked for | {accuracy:.2f} | `python samples/emoji/check.py work/ --prompts {prompts} --seed {seed}` |

Defaults: {defaults}.

## What it cannot do

It is an icon model: a prompt gives back something close to the picture it learned for that name, and words that it never saw
leave it guessing (`diffgen` names them in a warning). No sentences, no counting, no combining of things; faces, people and
letters come out blurred. Do not expect new designs from it: it is here so that every feature has something real to run on.
"""


def minutes(work: Path, stage: str) -> int:
    return round(json.loads((work / f"{stage}.timing.json").read_text())["seconds"] / 60)


def main(work: Path, machine: str) -> None:
    folder = work / "emoji"
    vae, diffusion, check = (json.loads((work / f"{name}.json").read_text()) for name in ("vae", "diffusion", "check"))
    shutil.copyfile(NOTO_LICENCE, folder / "LICENSE-noto")
    shutil.copyfile(work / "npm" / "node_modules" / "fluentui-emoji" / "LICENSE", folder / "LICENSE-fluent")
    card = json.loads((folder / "card.json").read_text())
    card["figures"] = {
        "accuracy": check["accuracy"],
        "accuracy_prompts": check["prompts"],
        "psnr_held_out_db": round(vae["psnr_held_out_db"], 2),
        "pictures_trained_on": diffusion["images"],
    }
    card["sha256"] = {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.safetensors"))
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    text = README.format(
        megabytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6,
        concepts=len(card["concepts"]),
        pictures=3 * len(card["concepts"]),
        vae_steps=vae["steps"],
        steps=diffusion["steps"],
        batch=diffusion["batch"],
        images=diffusion["images"],
        prediction=json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"],
        machine=machine,
        vae_minutes=minutes(work, "vae"),
        minutes=minutes(work, "diffusion"),
        held_out=vae["held_out"],
        vae_pictures=vae["pictures"],
        psnr=vae["psnr_held_out_db"],
        prompts=check["prompts"],
        seed=check["seed"],
        accuracy=check["accuracy"],
        defaults=", ".join(
            f"{k} {'x'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in card["defaults"].items()
        ),
    )
    (folder / "README.md").write_text(text)
    print(f"wrote {folder / 'card.json'} and {folder / 'README.md'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--machine", default=f"{torch.get_num_threads()} threads of {platform.machine()}", help="what it was trained on"
    )
    arguments = parser.parse_args()
    main(arguments.work, arguments.machine)
