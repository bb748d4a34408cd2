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
from diffgen.models.families import FAMILIES
from diffgen.pipelines.inputs import read_embedding, read_lora
from diffgen.pipelines.sampling.embed import embed
from diffgen.pipelines.weights import adapters

SAMPLE = Path(__file__).parents[1] / "samples" / "adapters"
FILES = ("dropling.safetensors", "delft.safetensors", "canny")


@pytest.fixture(scope="module")
def sample() -> Iterator[Callable[[str], ModuleType]]:
    """The sample's modules by name, as its script imports them."""
    with scripts_of(SAMPLE) as modules:
        yield modules


@pytest.fixture
def frozen(sample: Callable[[str], Any], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model in float32, also where bfloat16 is fast."""
    model = sample("model").Frozen(str(tiny))
    model.dtype = torch.float32
    monkeypatch.setattr(sample("embedding"), "BEGINNING", "red apple")
    return model


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
    sample: Callable[[str], Any], frozen: Any, tiny: Path, data: Path, tmp_path: Path
) -> None:
    make = sample("make").main
    make(str(tiny), str(data), tmp_path, steps=3)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    generator, options = diffgen.load(tiny, device="cpu"), {"seed": 1, "steps": 2}
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    plain, blue, edged = (
        np.asarray(generator.generate("a red apple", **options, **more)[0])
        for more in (
            {},
            {"loras": [str(tmp_path / "delft.safetensors")]},
            {"controls": [f"canny={tmp_path / 'red.png'}"], "control_models": [str(tmp_path / "canny")]},
        )
    )
    assert (blue != plain).any()
    assert edged.shape == plain.shape
    generator.generate("a <x>", embeddings=[f"<x>={tmp_path / 'dropling.safetensors'}"], **options)
    assert generator.fits == ["dropling.safetensors: <x> is 2 vectors"]

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    (tmp_path / "delft.safetensors").unlink()
    make(str(tiny), str(data), tmp_path, steps=3)
    assert {path: path.read_bytes() for path in files} == before  # the one that was trained again has its own seed


def test_pictures_without_captions_are_refused(
    sample: Callable[[str], Any], tiny: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "red.png").write_bytes((data / "red.png").read_bytes())
    with pytest.raises(InputError, match="no captions"):
        sample("make").main(str(tiny), str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_models_of_one_family(sample: Callable[[str], Any], tmp_path: Path) -> None:
    from tiny import build

    folder = build(tmp_path / "unconditional", family="unconditional")
    with pytest.raises(InputError, match="not a Stable Diffusion 1 model"):
        sample("model").Frozen(str(folder))


def test_the_lora_that_is_trained_is_the_one_that_is_merged(
    sample: Callable[[str], Any], frozen: Any, tiny: Path, tmp_path: Path
) -> None:
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([10, 900])
    context = frozen.context(["a red apple", ""])
    plain = frozen.denoise(x, t, context)
    low = sample("lora").widen(frozen.unet)
    assert torch.equal(frozen.denoise(x, t, context), plain)  # B starts at zero
    with torch.no_grad():
        for a, b in low.values():
            b.weight.normal_(std=0.1)
            for layer in (a, b):
                layer.weight.copy_(layer.weight.half())  # as in the file
    trained = frozen.denoise(x, t, context)
    assert (trained - plain).abs().max() > 0.1
    sample("lora").save(low, tmp_path / "lora.safetensors")
    merged = diffgen.load(tiny, device="cpu").pipeline
    matched = adapters.merge_lora(merged, "sd1", read_lora(str(tmp_path / "lora.safetensors")))
    assert matched.matched == matched.total == 2 * len(low)
    output = merged.unet(x, t, context).sample
    torch.testing.assert_close(output, trained, atol=1e-4, rtol=1e-4)


def test_the_word_that_is_trained_is_the_one_that_is_read(
    sample: Callable[[str], Any], frozen: Any, tiny: Path, tmp_path: Path
) -> None:
    embedding = sample("embedding")
    word, table, rows = embedding.add_word(frozen)
    before = table.detach().clone()
    assert torch.equal(before[rows], before[frozen.tokenizer("red apple", add_special_tokens=False).input_ids])
    frozen.context([f"a {word} and a red circle"]).sum().backward()
    assert (table.grad[rows] != 0).any()
    others = torch.ones(len(table), dtype=torch.bool)
    others[rows] = False
    assert not table.grad[others].any()
    with torch.no_grad():
        table[rows] += torch.randn(len(rows), table.shape[1])
    embedding.save(table, rows, tmp_path / "word.safetensors")
    pipeline = diffgen.load(tiny, device="cpu").pipeline
    adapters.add_embedding(pipeline, read_embedding(f"<word>={tmp_path / 'word.safetensors'}"))
    read = embed(pipeline, FAMILIES["sd1"], "a <word>, flat style", guided=False).tensors["prompt_embeds"]
    assert torch.equal(read, frozen.context([f"a {word}, flat style"]))


def test_an_untrained_controlnet_changes_nothing(sample: Callable[[str], Any], frozen: Any) -> None:
    network = sample("control").controlnet_for(frozen.unet)
    x, t, context = torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), frozen.context(["a red apple", ""])
    edges = torch.rand(2, 3, 32, 32)
    down, mid = network(x, t, context, edges, return_dict=False)
    assert not any(residual.any() for residual in (*down, mid))
    controlled = frozen.denoise(x, t, context, lambda *inputs: network(*inputs, edges, return_dict=False))
    assert torch.equal(controlled, frozen.denoise(x, t, context))
    own = frozen.unet.state_dict()
    shared = [name for name in network.state_dict() if name in own]
    assert len(shared) > 20
    assert all(torch.equal(network.state_dict()[name], own[name]) for name in shared)


def test_a_transformed_picture_stays_on_white(sample: Callable[[str], Any]) -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("black", (24, 24, 40, 40))
    for seed in range(20):
        dark = 1 - np.asarray(sample("control").transformed(picture, random.Random(seed)).convert("L")) / 255
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
