"""The model that ships with diffgen: complete, small, in the wheel, and it draws what the prompt says."""

import colorsys
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import diffgen
from diffgen.models import gate
from diffgen.models.find import find
from diffgen.models.info import info

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def emoji():
    return diffgen.load("emoji")


def test_it_is_complete_and_small():
    model = find(None)
    files = [p for p in model.folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40_000_000
    checked = gate.check_folder(model.folder)
    dtypes = {tensor.dtype for part in checked.components.values() for tensor in (part.tensors or {}).values()}
    assert dtypes == {"F16"}
    assert {"README.md", "LICENSE-noto", "LICENSE-fluent", "LICENSE-emojibase", "LICENSE-emoji", "card.json"} <= {
        p.name for p in files
    }
    assert "SIL OPEN FONT LICENSE" in (model.folder / "LICENSE-noto").read_text()
    assert "Microsoft" in (model.folder / "LICENSE-fluent").read_text()
    assert "Taehoon Kim" in (model.folder / "LICENSE-emoji").read_text()


def test_its_card_meets_the_bar_and_its_hashes_are_right():
    model = find("emoji")
    about = info(model)
    assert len(set(about["concepts"])) == len(about["concepts"]) >= 1400
    assert about["styles"] == ["noto", "flat", "modern"]
    assert len(about["held_out"]) == len(set(map(tuple, about["held_out"]))) >= 400
    assert about["resolution"] == 64
    figures = about["figures"]
    assert figures["accuracy"] >= 0.95
    assert figures["accuracy_prompts"] >= 300
    assert figures["accuracy_chinese"] >= figures["accuracy"] - 0.05
    assert figures["accuracy_held_out"] >= 0.5
    assert figures["psnr_held_out_db"] >= 26
    card = json.loads((model.folder / "card.json").read_text())
    files = {path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*") if path.is_file()}
    assert set(card["sha256"]) == files - {"card.json", "README.md"}
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((model.folder / name).read_bytes()).hexdigest() == digest
    readme = (model.folder / "README.md").read_text()
    assert f"| {figures['accuracy']:.3f} (" in readme
    assert card["held_out"] == json.loads((ROOT / "samples" / "emoji" / "held_out.json").read_text())


def test_the_readme_has_the_figures_of_its_card():
    card = json.loads((find("emoji").folder / "card.json").read_text())
    figures, section = (
        card["figures"],
        (ROOT / "README.md").read_text().split("## How the bundled model was trained")[1],
    )
    text = " ".join(section.split("\n## ")[0].split())
    for figure in (
        f"for {figures['accuracy']:.1%} of 300 English prompts",
        f"{figures['accuracy_chinese']:.1%} of 300 Chinese prompts",
        f"{figures['accuracy_held_out']:.1%} of prompts for a thing in a style in which the model never saw it",
        f"at {figures['psnr_held_out_db']:.1f} dB",
        f"in {card['hours']:.1f} hours",
        f": {figures['memorisation']['learned']:.0%} of its pictures",
    ):
        assert figure in text, figure


def test_the_wheel_carries_all_of_it(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 60e6, "PyPI accepts 100 MB; a first install should be quick"
    names = set(zipfile.ZipFile(wheel).namelist())
    models = ROOT / "diffgen" / "models"
    for folder in (models / "bundled" / "emoji", models / "configs"):
        expected = {path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert len(expected) > 10
        assert expected <= names
    assert {"schedulers/py.typed", "schedulers/solvers/euler.py", "diffgen/py.typed"} <= names


def hue(picture) -> float:
    """The hue in degrees of the mean colour of all pixels except the background."""
    pixels = np.asarray(picture, dtype=float) / 255
    colour = pixels[pixels.min(axis=2) < 0.7].mean(axis=0)
    return 360 * colorsys.rgb_to_hsv(*colour)[0]


@pytest.mark.parametrize(("colour", "degrees"), [("red", 0), ("yellow", 50), ("green", 110), ("blue", 210)])
def test_the_requested_colour(emoji, colour: str, degrees: float):
    (picture,) = emoji.generate(f"{colour} heart, flat style", seed=1)
    off = (hue(picture) - degrees + 180) % 360 - 180
    assert abs(off) < 40, f"a {colour} heart has the hue {hue(picture):.0f}°"
    assert np.asarray(picture)[:4, :4].min() > 200  # the background is white


def test_words_it_never_saw_are_named_and_it_draws_all_the_same(tmp_path: Path):
    def run(prompt: str, name: str) -> dict:
        command = [
            sys.executable,
            "-m",
            "diffgen",
            "generate",
            prompt,
            "--seed",
            "1",
            "--steps",
            "4",
            "--json",
            "-o",
            name,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)["result"] | {"stderr": process.stderr}

    unknown = run("a zeppelin and a red apple", "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    (warning,) = unknown["warnings"]
    assert "'zeppelin'" in warning
    assert "apple" not in warning.split(":")[0]
    assert "zeppelin" in unknown["stderr"]
    assert run("a red apple", "b.png")["warnings"] == []


def test_plain_diffusers_makes_the_same_picture(emoji):
    """The folder is an ordinary Stable Diffusion: diffusers' own pipeline gives the same pixels with our scheduler."""
    import torch
    from diffusers import StableDiffusionPipeline

    import schedulers

    folder = find("emoji").folder
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)  # no dtype
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    noise, prediction = schedulers.from_diffusers_config(
        json.loads((folder / "scheduler/scheduler_config.json").read_text())
    )
    pipe.scheduler = schedulers.get("euler", noise=noise, prediction=prediction)
    theirs = pipe(
        "octopus, flat style", num_inference_steps=5, guidance_scale=3, generator=torch.Generator().manual_seed(3)
    )
    (ours,) = emoji.generate("octopus, flat style", seed=3, steps=5, guidance=3, scheduler="euler")
    difference = np.abs(np.asarray(theirs.images[0], dtype=int) - np.asarray(ours, dtype=int))
    assert difference.max() <= 1
