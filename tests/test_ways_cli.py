"""`diffgen generate` with pictures, masks, adapters and lists: its output, and the exit codes of errors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffgen

Result = tuple[int, str, str]


def info(path: str | Path) -> dict[str, Any]:
    with Image.open(path) as image:
        image.load()
        return dict(image.info)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """photo.png and mask.png (32×32), small.png (8×8), black.png, and a LoRA that fits the tiny model, in a folder."""
    folder = tmp_path / "files"
    folder.mkdir()
    y, x = np.mgrid[:32, :32] * 8
    Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8)).save(folder / "photo.png")
    mask = Image.new("L", (32, 32))
    mask.save(folder / "black.png")
    mask.paste(255, (16, 0, 32, 32))
    mask.save(folder / "mask.png")
    Image.new("L", (8, 8), 255).save(folder / "small.png")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)},
        folder / "lora.safetensors",
    )
    save_file({"nothing.lora_up.weight": torch.ones(2, 2)}, folder / "other.safetensors")
    (folder / "not.png").write_text("<html>")
    return folder


def test_the_command_and_the_function_have_the_same_names(
    diffgen_: Callable[..., Result], tiny: Path, files: Path
) -> None:
    options = (
        "--image",
        files / "photo.png",
        "--mask",
        files / "mask.png",
        "--strength",
        0.8,
        "--steps",
        3,
        "--seed",
        4,
    )
    lora = f"{files / 'lora.safetensors'}:0.5"
    code, out, err = diffgen_("generate", "a red apple", "-m", tiny, "-o", "x.png", *options, "--lora", lora, "--json")
    assert code == 0, err
    assert "lora.safetensors: matched 2 of 2 tensors, rank 2" in err
    assert json.loads(out)["result"]["adapters"] == ["lora.safetensors: matched 2 of 2 tensors, rank 2"]
    (image,) = diffgen.load(str(tiny), device="cpu").generate(
        "a red apple", image=files / "photo.png", mask=files / "mask.png", strength=0.8, steps=3, seed=4, loras=[lora]
    )
    assert image.tobytes() == Image.open("x.png").convert("RGB").tobytes()
    metadata = info("x.png")
    assert metadata["diffgen"] == image.info["diffgen"]
    text = metadata["parameters"]
    assert text.startswith("a red apple <lora:lora:0.5>\n")
    assert "Denoising strength: 0.8" in text
    assert 'Lora hashes: "lora: ' in text
    assert "digitalsourcetype/trainedAlgorithmicMedia<" in metadata["XML:com.adobe.xmp"]
    assert str(files) not in json.dumps({key: str(value) for key, value in metadata.items()})


def test_defaults_come_from_the_model(diffgen_: Callable[..., Result], tiny: Path) -> None:
    err = diffgen_("generate", "a", "-m", tiny, "--dry-run", "--steps", 9, "-s", "32")[2]
    assert "9 steps," in err
    assert "guidance 2 (model default)" in err
    assert "euler on karras (model default)" in err
    assert "32x32," in err


def test_lines_with_options(diffgen_: Callable[..., Result], tiny: Path) -> None:
    Path("p.jsonl").write_text(
        '{"prompt": "red"}\n{"prompt": "green", "seed": 9, "steps": 2, "size": "16x24"}\n{"prompt": "blue"}\n'
    )
    _, out, _ = diffgen_("generate", "--prompt-file", "p.jsonl", "-m", tiny, "--json", "--seed", 5, "-o", "made/")
    images = json.loads(out)["result"]["images"]
    assert [(i["prompt"], i["seed"], i["width"], i["height"]) for i in images] == [
        ("red", 5, 32, 32), ("green", 9, 16, 24), ("blue", 5, 32, 32),
    ]  # fmt: skip
    assert json.loads(info(images[1]["path"])["diffgen"])["steps"] == 2
    _, out, _ = diffgen_("generate", "--prompt-file", "p.jsonl", "-m", tiny, "--json", "--dry-run")
    first, second, third = (i["seed"] for i in json.loads(out)["result"]["images"])
    assert (second, first) == (9, third)  # a random seed is drawn once
    Path("named.jsonl").write_text('{"prompt": "red", "seed": 9}\n{"prompt": "green"}\n{"prompt": "blue"}\n')
    drawn = set()
    for _ in range(2):
        _, out, _ = diffgen_("generate", "--prompt-file", "named.jsonl", "-m", tiny, "--json", "--dry-run")
        first, second, third = (i["seed"] for i in json.loads(out)["result"]["images"])
        assert (first, second) == (9, third)
        drawn.add(second)
    assert len(drawn) == 2  # a line's own seed does not set the seed of others


def test_seeds_and_choices(diffgen_: Callable[..., Result], tiny: Path) -> None:
    _, out, _ = diffgen_("generate", "a {red|blue} apple", "--seeds", "0-2,9", "-m", tiny, "--dry-run", "--json")
    images = json.loads(out)["result"]["images"]
    assert [image["seed"] for image in images] == [0, 1, 2, 9]
    assert {image["prompt"] for image in images} == {"a red apple", "a blue apple"}
    assert diffgen_("generate", "a {red|blue} apple", "--seed", 9, "-m", tiny, "-o", "x.png", "--steps", 1)[0] == 0
    record = json.loads(info("x.png")["diffgen"])
    assert (record["prompt"], record["template"]) == (images[3]["prompt"], "a {red|blue} apple")


def test_the_help_fits_two_screens(diffgen_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = diffgen_("generate", "--help")[1]
    assert len(text.splitlines()) <= 100
    assert "[outputs/{index:06}-{seed}-{prompt}.png]" in text
    for panel in ("Prompt", "Picture", "Sampling", "From a picture", "Model", "Device and memory", "Output"):
        assert f"─ {panel} ─" in text


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--strength", "0.5"], 2, "--image"),
        (["--mask", "@mask.png"], 2, "--image"),
        (["--image", "@photo.png", "--strength", "0"], 2, "--strength"),
        (["--image", "@photo.png", "--strength", "1.5"], 2, "--strength"),
        (["--image", "@none.png"], 3, "none.png"),
        (["--image", "@not.png"], 3, "not.png"),
        (["--image", "https://example.org/a.png"], 3, "https://example.org/a.png is a URL"),
        (["--image", "@photo.png", "--mask", "@small.png"], 3, "different sizes"),
        (["--image", "@photo.png", "--mask", "@black.png"], 3, "all black"),
        (["--image", "@photo.png", "--mask", "@mask.png", "--outpaint", "8"], 2, "exclude"),
        (["--image", "@photo.png", "--outpaint", "1,2,3"], 2, "--outpaint"),
        (["--image", "@photo.png", "--outpaint", "0"], 2, "--outpaint"),
        (["--image", "@photo.png", "--outpaint", "8", "-s", "32"], 2, "--size"),
        (["--image", "@photo.png", "--mask", "@mask.png", "--upscale", "2"], 2, "exclude"),
        (["--upscale", "0.5"], 2, "--upscale"),
        (["--upscale", "2", "--upscale-mode", "cubic"], 2, "--upscale-mode"),
        (["--upscale-mode", "latent"], 2, "--upscale 2"),
        (["--upscale-strength", "0.4"], 2, "--upscale 2"),
        (["--size", "2048", "--upscale", "8"], 2, "16384x16384"),
        (["--scheduler", "ddim_inverse"], 2, "from pictures to noise"),
        (["--variation-seed", "3"], 2, "go together"),
        (["--variation-seed", "3", "--variation-strength", "2"], 2, "--variation-strength"),
        (["--seeds", "5-2"], 2, "--seeds"),
        (["--seeds", "1,x"], 2, "--seeds"),
        (["--seeds", "1", "--seed", "2"], 2, "--seeds"),
        (["--guidance-interval", "0.5"], 2, "--guidance-interval"),
        (["--guidance-interval", "0.6,0.2"], 2, "--guidance-interval"),
        (["--guidance-rescale", "2"], 2, "--guidance-rescale"),
        (["--steps"], 2, "see: diffgen generate --help"),
        (["--image", ""], 2, "--image is empty"),
        (["--control", ""], 2, "--control is empty"),
        (["--lora", ":0.5"], 2, "--lora names no file"),
        (["--control", "canny=:0.5"], 2, "--control names no file"),
        (["--grid", "nothing.json"], 3, "cannot read the grid nothing.json: No such file or directory; "),
        (["--prediction", "epsilon"], 2, "--prediction is for single files"),
        (["-m", "nobody/nothing", "-o", "@photo.png"], 6, "it exists"),
        (["--clip-skip", "0"], 2, "--clip-skip"),
        (["--clip-skip", "9"], 2, "--clip-skip"),
        (["--prompt-syntax", "compel"], 2, "--prompt-syntax"),
        (["--style", "nothing"], 2, "no style"),
        (["--wildcards", "@none"], 3, "none"),
        (["--safety", "maybe"], 2, "--safety"),
        (["--offload", "all"], 2, "--offload"),
        (["--offload", "model", "--device", "cpu"], 2, "--offload"),
        (["--lora", "@none.safetensors"], 3, "none.safetensors"),
        (["--lora", "@photo.png"], 3, "photo.png"),
        (["--lora", "@other.safetensors"], 3, "none of its 1 tensors"),
        (["--lora", "@lora.safetensors:99"], 2, "--lora"),
        (["--embedding", "@lora.safetensors"], 2, "--embedding"),
        (["--embedding", "x=@lora.safetensors"], 3, "another family"),
        (["--control", "canny"], 2, "--control"),
        (["--control", "canny=@none.png"], 3, "none.png"),
        (["--control", "canny=@photo.png"], 3, "--control-model"),
        (["--control-model", "@photo.png"], 2, "--control"),
        (["--refiner", "nothing"], 3, "nothing"),
        (["--refiner", "emoji"], 3, "not a refiner"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_reported_before_any_work(
    diffgen_: Callable[..., Result], tiny: Path, files: Path, args: list[str], code: int, text: str
) -> None:
    args = [arg.replace("@", f"{files}/") for arg in args]
    exit_code, out, err = diffgen_("generate", "a red apple", "-m", tiny, "-o", "x.png", *args)
    assert (exit_code, out) == (code, ""), err
    assert err.splitlines()[-1].startswith("error: ")
    assert text in err.splitlines()[-1]
    assert not Path("x.png").exists()


def test_a_family_without_controlnets_says_so_first(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    from tiny import build

    folder = build(tmp_path / "chroma", family="chroma")
    code, _, err = diffgen_("generate", "a", "-m", folder, "--control", "canny=nothing.png")
    assert code == 2
    assert "ControlNet is not supported for models of the family chroma" in err


def test_an_error_names_its_line(diffgen_: Callable[..., Result], tiny: Path) -> None:
    Path("p.jsonl").write_text('{"prompt": "red"}\n{"prompt": "green", "steps": 0}\n')
    code, _, err = diffgen_("generate", "--prompt-file", "p.jsonl", "-m", tiny)
    assert code == 2
    assert "p.jsonl, line 2: --steps" in err
    Path("p.txt").write_text("red\n# a comment\n{blue\n")
    code, _, err = diffgen_("generate", "--prompt-file", "p.txt", "-m", tiny, "--steps", 0)
    assert code == 2
    assert "p.txt, line 3: a brace is never closed" in err
    assert "p.txt" not in diffgen_("generate", "--prompt-file", "p.txt", "-m", tiny, "-n", 0)[2]


def test_unknown_words_of_wildcards_are_named(diffgen_: Callable[..., Result], tiny: Path) -> None:
    Path("wildcards").mkdir()
    Path("wildcards/fruit.txt").write_text("apple\n2::zebra\n")
    err = diffgen_("generate", "a __fruit__, {3::red|lila}", "-m", tiny, "--dry-run")[2]
    assert "never saw 'zebra', 'lila': " in err


def test_a_file_that_does_not_say_what_it_predicts(
    diffgen_: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command requires --prediction, shows and records it; inspect prints it and reproduce uses it."""
    import original_layout
    from tiny import build

    original_layout.write(build(tmp_path / "x", family="sd2"), tmp_path / "x.safetensors", "sd2")
    (tmp_path / "x").rename(tmp_path / "aside")
    code, _, err = diffgen_("generate", "a", "-m", "x.safetensors", "--dry-run")
    assert code == 3
    assert "add --prediction epsilon or v_prediction" in err
    assert diffgen_("generate", "a", "-m", "x.safetensors", "--prediction", "v")[0] == 2
    code, _, err = diffgen_("generate", "a", "-m", "x.safetensors", "--prediction", "v_prediction", "--dry-run")
    assert code == 0
    assert "768x768 (model default)" in err
    assert "predicts v_prediction" in err
    (tmp_path / "aside").rename(tmp_path / "x")  # the small configuration, which says v_prediction
    common = ("generate", "a", "-m", "x.safetensors", "--seed", 3, "--steps", 2, "-s", 32)
    assert diffgen_(*common, "--prediction", "epsilon", "-o", "e.png")[0] == 0
    assert diffgen_(*common, "-o", "v.png")[0] == 0
    assert json.loads(info("e.png")["diffgen"])["prediction"] == "epsilon"
    assert Image.open("e.png").tobytes() != Image.open("v.png").tobytes()
    command = json.loads(diffgen_("inspect", "e.png", "--json")[1])["result"]["command"]
    assert "--prediction epsilon" in command
    assert diffgen_("reproduce", "e.png", "-m", "x.safetensors")[:2] == (0, "identical pixels\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("a --seed 3 --steps 2 -s 32 -o s.png\n"))
    assert diffgen_("shell", "-m", "x.safetensors", "--prediction", "epsilon")[0] == 0
    assert Image.open("s.png").tobytes() == Image.open("e.png").tobytes()
