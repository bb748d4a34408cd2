"""inspect reads AUTOMATIC1111's text, its round trip through our own writer, and stable-diffusion.cpp's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sd_parsers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from picture_files import A1111, PICTURE, RECORD, Info, options, png, user_comment

import schedulers
from diffgen.images.metadata import encode_png, parameters_text
from diffgen.images.readers import a1111
from diffgen.images.readers.command import command


@pytest.mark.parametrize("how", ["tEXt", "zTXt", "iTXt", "jpeg", "webp", "little-endian"])
def test_a1111(inspect: Callable[[Path], Info], tmp_path: Path, how: str) -> None:
    path = tmp_path / "x"
    if how in ("jpeg", "webp"):  # piexif writes big-endian
        PICTURE.save(path, how.upper(), exif=user_comment(b"UNICODE\0" + A1111.encode("utf-16-be")))
    elif how == "little-endian":
        PICTURE.save(path, "JPEG", exif=user_comment(b"UNICODE\0" + A1111.encode("utf-16-le")))
    else:
        png(path, {"parameters": A1111}, how)
    info = inspect(path)
    expected = {
        "tool": "a1111",
        "prompt": "a (red:1.2) apple {ripe}\nSteps: none, on a table <lora:detail:0.7>",
        "negative": "blurry\nSteps: 3, low quality",
        "seed": 2750031551,
        "steps": 20,
        "guidance": 7.0,
        "scheduler": "dpmpp_2m",
        "grid": "karras",
        "width": 512,
        "height": 768,
        "model": "v1-5-pruned-emaonly",
    }
    assert {key: info[key] for key in expected} == expected
    assert set(info) == {*expected, "command", "notes"}
    flags = options(info)
    assert flags["prompt"] == "a (red:1.2) apple \\{ripe\\}\nSteps: none, on a table"
    assert (flags["--lora"], flags["--clip-skip"], flags["--size"]) == ("detail.safetensors:0.7", "2", "512x768")
    assert (flags["-m"], flags["--grid"]) == ("v1-5-pruned-emaonly.safetensors", "karras")


def test_settings_may_hold_anything_in_quotes() -> None:
    text = (
        'x\nSteps: 5, Sampler: Euler a, CFG scale: 7.5, Hires prompt: "a, Steps: 9, \\"b\\"\\nc", Seed: 3, Size: 8x16, '
        'ControlNet 0: "Module: canny, Model: control, Weight: 1"'
    )
    prompt, negative, values = a1111.split(text)
    assert (prompt, negative) == ("x", None)
    assert values["Hires prompt"] == 'a, Steps: 9, "b"\nc'
    assert (values["Steps"], values["Seed"], values["Size"]) == ("5", "3", "8x16")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Steps: 4, Sampler: Euler, Seed: 1", ("", None, "4")),
        ("a\nNegative prompt: b\nSteps: 4, Sampler: Euler, Seed: 1\nTemplate: {a|b}", ("a", "b", "4")),
        ("a cat", ("a cat", None, None)),
        ("a\n\nNegative prompt:\nb\nSteps: 4, Sampler: Euler, Seed: 1,", ("a\n", "\nb", "4")),
        ("Steps: 9, Sampler: DDIM, Seed: 5\nSteps: 4, Sampler: Euler, Seed: 1", (
            "Steps: 9, Sampler: DDIM, Seed: 5", None, "4")),
    ],
)  # fmt: skip
def test_the_settings_are_found_after_the_prompts(text: str, expected: tuple[str, str | None, str | None]) -> None:
    prompt, negative, values = a1111.split(text)
    assert (prompt, negative, values.get("Steps")) == expected


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras", "dpmpp_2m", "karras")),  # before 1.9
        ("DPM++ 2M", None, ("dpmpp_2m", None, "dpmpp_2m", "linspace")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras", "dpmpp_2m", "karras")),
        ("Euler a", "Automatic", ("euler_ancestral", "linspace", "euler_ancestral", "linspace")),
        ("DPM++ 2M SDE Heun", "Exponential", ("dpmpp_2m_sde", "exponential", "DPM++ 2M SDE Heun", "exponential")),
        ("Euler", "DDIM", ("euler", "leading", "euler", "leading")),
        ("Euler", "Align Your Steps", ("euler", "ays_11", "euler", "ays_11")),
        ("DPM++ 2M", "Beta", ("dpmpp_2m", "beta_sigma", "dpmpp_2m", "beta_sigma")),
        ("DPM++ 2M", "KL Optimal", ("dpmpp_2m", "kl_optimal_a1111", "dpmpp_2m", "kl_optimal_a1111")),
        ("UniPC", None, ("unipc", None, "UniPC", "leading")),
        ("Euler", "SGM Uniform", ("euler", "sgm_uniform", "euler", "sgm_uniform")),
        ("DDIM", None, ("euler", None, "euler", "leading")),
        ("Euler", "Turbo", ("euler", "trailing", "euler", "trailing")),
        ("DPM fast", "Karras", ("dpm_fast", "karras", "dpm_fast", "karras")),
        ("Unheard of", "Karras", ("Unheard of", "karras", None, None)),
        ("Euler", "../../secret.json", ("euler", "../../secret.json", "euler", None)),
    ],
)
def test_samplers_and_schedules_become_schedulers_and_grids(
    sampler: str, schedule: str | None, expected: tuple[str | None, ...]
) -> None:
    values = {"Steps": "4", "Seed": "1", "Sampler": sampler} | ({"Schedule type": schedule} if schedule else {})
    info = a1111.of_settings("a1111", "x", None, values)
    flags = dict(zip((words := command(info)[0])[3::2], words[4::2], strict=True))
    assert (info.scheduler, info.grid, flags.get("--scheduler"), flags.get("--grid")) == expected
    assert ("here" in " ".join(info.notes)) == (expected[2] is None or expected[3] is None)


def test_second_pass_variation_and_image(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    text = "x\nSteps: 9, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Denoising strength: 0.4"
    flags = options(inspect(png(tmp_path / "a", {"parameters": text + ", Hires upscale: 2, Hires upscaler: Latent"})))
    assert (flags["--upscale"], flags["--upscale-mode"], flags["--upscale-strength"]) == ("2", "latent", "0.4")
    more = ", Variation seed: 77, Variation seed strength: 0.25"
    info = inspect(png(tmp_path / "b", {"parameters": text + more}))
    assert (options(info)["--variation-seed"], options(info)["--variation-strength"]) == ("77", "0.25")
    assert any("--strength 0.4" in note for note in info["notes"])


def test_every_solver_and_grid_survives_the_round_trip() -> None:
    """A1111's text carries the canonical name of every solver, and each grid that A1111 has too."""
    for name in schedulers.names():
        record = {"prompt": "x", "steps": 4, "seed": 1, "scheduler": name, "grid": "karras", "width": 8, "height": 8}
        values = a1111.split(parameters_text(record))[2]
        info = a1111.of_settings("a1111", "x", None, values)
        assert (info.scheduler, info.grid) == (name, "karras")
    for grid in set(schedulers.grid_names()) - {"trailing"}:  # A1111 gives it the name of ComfyUI's simple
        values = a1111.split(parameters_text({"steps": 4, "seed": 1, "scheduler": "euler", "grid": grid}))[2]
        assert a1111.of_settings("a1111", "x", None, values).grid == grid


# A prompt is any text without lines that look like the grammar's.
WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=60)
PROMPTS = (
    st.lists(WORDS, min_size=1, max_size=4)
    .map("\n".join)
    .filter(lambda text: text.strip() != "" and "Negative prompt:" not in text and "<" not in text)
)


@settings(max_examples=300, deadline=None)
@given(
    PROMPTS,
    PROMPTS,
    st.integers(0, 2**32 - 1),
    st.integers(1, 1000),
    st.floats(0, 100).map(lambda x: round(x, 3)),
    st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/\\"), min_size=1, max_size=20),
)
@example("a", "b", 0, 1, 0.0, '" ')
def test_our_text_survives_the_round_trip(
    prompt: str, negative: str, seed: int, steps: int, guidance: float, model: str
) -> None:
    record = {**RECORD, "prompt": prompt, "negative": negative, "seed": seed, "steps": steps, "guidance": guidance,
              "model": model}  # fmt: skip

    def stripped(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().split("\n"))

    positive_read, negative_read, values = a1111.split(parameters_text(record))
    info = a1111.of_settings("a1111", positive_read, negative_read, values)
    assert (stripped(positive_read), stripped(negative_read or "")) == (stripped(prompt), stripped(negative))
    assert (info.seed, info.steps, info.guidance, info.scheduler, info.grid) == (
        seed, steps, guidance, "dpmpp_2m", "karras",
    )  # fmt: skip
    assert (info.width, info.height) == (64, 48)
    assert info.model == (model.strip() or None)


@pytest.mark.parametrize("level", ["full", "params"])
def test_an_independent_parser_reads_ours(tmp_path: Path, level: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encode_png(PICTURE, RECORD, level))
    parsed = sd_parsers.ParserManager().parse(path)
    assert parsed is not None
    (sampler,) = parsed.samplers
    assert parsed.generator.name == "AUTOMATIC1111"
    assert (sampler.name, sampler.parameters["scheduler"], sampler.parameters["seed"]) == ("DPM++ 2M", "Karras", "7")
    assert (sampler.parameters["steps"], sampler.parameters["cfg_scale"]) == ("20", "5")
    assert [prompt.value for prompt in sampler.prompts] == [RECORD["prompt"]]
    assert [prompt.value for prompt in sampler.negative_prompts] == ["blurry"]
    assert (sampler.model.name, sampler.model.hash) == ("emoji", "0123456789")


SDCPP = (
    "a lovely cat\nNegative prompt: dog\nSteps: 20, CFG scale: 7.000000, Guidance: 3.500000, Eta: 0.000000, Seed: 42, "
    "Size: 512x640, Model: v1-5.safetensors, RNG: cuda, Sampler: euler_a karras, Version: stable-diffusion.cpp"
)


def test_sdcpp(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    info = inspect(png(tmp_path / "x.png", {"parameters": SDCPP}))
    assert (info["tool"], info["scheduler"], info["grid"], info["guidance"], info["seed"], info["negative"]) == (
        "sdcpp", "euler_ancestral", "karras", 7.0, 42, "dog",
    )  # fmt: skip
    assert (info["width"], info["height"], info["model"]) == (512, 640, "v1-5.safetensors")
    assert options(info)["--guidance"] == "7"


def test_sdcpp_with_its_json(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    """The JSON repeats the prompt, and a prompt may look like the start of that JSON."""
    prompt = 'a cat, Seed: 999, SDCPP: {"seed": 5} \U0001f408'
    record = {
        "schema": "sdcpp.image.params/v1",
        "seed": 1375127038,
        "width": 512,
        "height": 640,
        "prompt": {"positive": prompt, "negative": "dog"},
        "sampling": {"steps": 30, "method": "dpm++2m", "scheduler": "karras", "guidance": {"txt_cfg": 5.0}},
        "models": {"model": "v1-5.safetensors"},
        "loras": [{"name": "detail", "multiplier": 0.5}],
        "clip_skip": 2,
        "rng": "cpu",
    }
    text = SDCPP.replace("a lovely cat", prompt) + ", SDCPP: " + json.dumps(record)
    info = inspect(png(tmp_path / "x.png", {"parameters": text}))
    assert (info["tool"], info["prompt"], info["seed"], info["steps"], info["guidance"], info["scheduler"]) == (
        "sdcpp", prompt, 1375127038, 30, 5.0, "dpmpp_2m",
    )  # fmt: skip
    assert (info["grid"], options(info)["--lora"], options(info)["--clip-skip"]) == (
        "karras", "detail.safetensors:0.5", "2",
    )  # fmt: skip
    escaped = SDCPP.replace("&", "&amp;").replace("<", "&lt;")
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><sdcpp:parameters>{escaped}</sdcpp:parameters></x:xmpmeta>'
    PICTURE.save(tmp_path / "x.webp", "WEBP", xmp=xmp.encode())
    assert inspect(tmp_path / "x.webp")["seed"] == 42
