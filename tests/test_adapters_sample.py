"""samples/adapters: `generate` reads what the scripts train."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import scripts_of

import diffgen
from diffgen.errors import InputError
from diffgen.pipelines.inputs import read_embedding, read_lora
from diffgen.pipelines.weights import adapters
from diffgen.training import config as configuration
from diffgen.training.job import JOBS

SAMPLE = Path(__file__).parents[1] / "samples" / "adapters"
FILES = ("dropling.safetensors", "delft.safetensors", "canny")


@pytest.fixture(scope="module")
def sample() -> Iterator[Callable[[str], ModuleType]]:
    """The sample's modules by name, as its script imports them."""
    with scripts_of(SAMPLE) as modules:
        yield modules


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four captioned pictures; one is held out."""
    folder, colours = tmp_path_factory.mktemp("pictures"), ("red", "green", "blue", "black")
    lines = []
    for colour in colours:
        picture = Image.new("RGB", (32, 32), "white")
        picture.paste(colour, (8, 8, 24, 24))
        picture.save(folder / f"{colour}.png")
        lines.append({"file_name": f"{colour}.png", "text": f"{colour} square", "held_out": colour == "black"})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_all_are_trained_once_and_read(
    sample: Callable[[str], Any], tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make, out = sample("make").main, tmp_path / "out"
    make(str(tiny), str(data), out, steps=3)
    assert {path.name for path in out.iterdir()} == set(FILES)
    generator, options = diffgen.load(tiny, device="cpu"), {"seed": 1, "steps": 2}
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    plain, blue, edged = (
        np.asarray(generator.generate("a red apple", **options, **more)[0])
        for more in (
            {},
            {"loras": [f"{out / 'delft.safetensors'}:9"]},
            {"controls": [f"canny={tmp_path / 'red.png'}"], "control_models": [str(out / "canny")]},
        )
    )
    assert (blue != plain).any()
    assert edged.shape == plain.shape
    generator.generate("a <x>", embeddings=[f"<x>={out / 'dropling.safetensors'}"], **options)
    assert generator.fits[0].startswith("dropling.safetensors: <x> is ")

    files = [path for path in out.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    (out / "delft.safetensors").unlink()
    make(str(tiny), str(data), out, steps=3)
    assert {path: path.read_bytes() for path in files} == before  # the one that was trained again has its own seed


def test_pictures_without_captions_are_refused(
    sample: Callable[[str], Any], tiny: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "red.png").write_bytes((data / "red.png").read_bytes())
    with pytest.raises(InputError, match="no captions"):
        sample("pictures").delft(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lora", "embedding", "control", "full"])
def test_each_job_has_a_configuration(name: str) -> None:
    """It parses, and its first lines are a command that starts it."""
    path = SAMPLE / f"{name}.toml"
    tables = configuration.read_toml(path)
    assert configuration.parse(tables, path, JOBS[name].load("config")).job == name
    assert f"--config samples/adapters/{name}.toml" in path.read_text()


def test_a_transformed_picture_stays_on_white(sample: Callable[[str], Any]) -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("black", (24, 24, 40, 40))
    for seed in range(20):
        dark = 1 - np.asarray(sample("pictures").transform(picture, random.Random(seed)).convert("L")) / 255
        assert 0.2 * 16**2 < dark.sum() < 1.2 * 16**2  # the area is scaled by 0.5 · 0.5 to 1.05 · 1.05
        assert not dark[[0, -1]].any()
        assert not dark[:, [0, -1]].any()


@pytest.mark.parametrize("name", FILES)
def test_the_committed_adapters_fit_the_bundled_model(name: str) -> None:
    """Each committed file loads into the bundled model."""
    if not (SAMPLE / name).exists():
        pytest.skip(f"no {name}: run python samples/adapters/make.py")
    pipeline = diffgen.load("emoji", device="cpu").pipeline
    if name == "canny":
        from diffgen.pipelines.weights.load import load_controlnet

        load_controlnet(SAMPLE / name, pipeline.unet, torch.device("cpu"), torch.float32)
    elif name.startswith("delft"):
        matched = adapters.merge_lora(pipeline, "sd1", read_lora(str(SAMPLE / name)))
        assert matched.matched == matched.total
    else:
        assert adapters.add_embedding(pipeline, read_embedding(f"<dropling>={SAMPLE / name}")) > 1
