"""inspect: files as each tool writes them, ours read by an independent parser, round trips, and what is refused."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sd_parsers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import schedulers
from diffgen.generation.record import read_picture_info
from diffgen.images import read
from diffgen.images.metadata import encode_png, parameters_text
from diffgen.images.readers import a1111
from diffgen.images.readers.command import command
from diffgen.images.readers.picture_info import plain_number

Result = tuple[int, str, str]
Said = dict[str, Any]
PICTURE = Image.new("RGB", (64, 96), "red")
USER_COMMENT = 0x9286


def png(path: Path, texts: dict[str, str], how: str = "tEXt", exif: bytes | None = None) -> Path:
    chunks = PngInfo()
    for key, text in texts.items():
        if how == "iTXt":
            chunks.add_itxt(key, text, zip=True)
        else:
            chunks.add_text(key, text, zip=how == "zTXt")
    PICTURE.save(path, "PNG", pnginfo=chunks, **({"exif": exif} if exif else {}))
    return path


def comment(text: bytes, where: int = 0x8769) -> bytes:
    exif = Image.Exif()
    if where:
        exif.get_ifd(where)[USER_COMMENT] = text
    else:
        exif[USER_COMMENT] = text
    return exif.tobytes()


@pytest.fixture
def inspect(diffgen_: Callable[..., Result]) -> Callable[[Path], Said]:
    def inspected(path: Path) -> Said:
        code, out, err = diffgen_("inspect", path, "--json")
        assert code == 0, err
        return json.loads(out)["result"]

    return inspected


def options(said: Said) -> dict[str, str]:
    """{option: value} of the command, after the prompt."""
    words = shlex.split(said["command"])
    assert words[:2] == ["diffgen", "generate"]
    return dict(zip(words[3::2], words[4::2], strict=False)) | {"prompt": words[2]}


# AUTOMATIC1111 and what writes its text

A1111 = (
    "a (red:1.2) apple {ripe}\nSteps: none, on a table <lora:detail:0.7>\n"
    "Negative prompt: blurry\nSteps: 3, low quality\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 2750031551, Size: 512x768, "
    'Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, RNG: CPU, Lora hashes: "detail: 2e9a6b2a1c3f", '
    "Version: v1.10.1"
)


@pytest.mark.parametrize("how", ["tEXt", "zTXt", "iTXt", "jpeg", "webp", "little-endian"])
def test_a1111(inspect: Callable[[Path], Said], tmp_path: Path, how: str) -> None:
    path = tmp_path / "x"
    if how in ("jpeg", "webp"):  # piexif writes big-endian
        PICTURE.save(path, how.upper(), exif=comment(b"UNICODE\0" + A1111.encode("utf-16-be")))
    elif how == "little-endian":
        PICTURE.save(path, "JPEG", exif=comment(b"UNICODE\0" + A1111.encode("utf-16-le")))
    else:
        png(path, {"parameters": A1111}, how)
    said = inspect(path)
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
    assert {key: said[key] for key in expected} == expected
    assert set(said) == {*expected, "command", "notes"}
    given = options(said)
    assert given["prompt"] == "a (red:1.2) apple \\{ripe\\}\nSteps: none, on a table"
    assert (given["--lora"], given["--clip-skip"], given["--size"]) == ("detail.safetensors:0.7", "2", "512x768")
    assert (given["-m"], given["--grid"]) == ("v1-5-pruned-emaonly.safetensors", "karras")


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
def test_where_the_settings_stand(text: str, expected: tuple[str, str | None, str | None]) -> None:
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
        ("Euler", "Align Your Steps", ("euler", "ays", "euler", "ays")),
        ("Euler", "SGM Uniform", ("euler", "sgm_uniform", "euler", "sgm_uniform")),
        ("DDIM", None, ("euler", None, "euler", "leading")),
        ("Euler", "Turbo", ("euler", "Turbo", "euler", None)),
        ("DPM fast", "Karras", ("DPM fast", "karras", None, None)),
        ("Euler", "../../secret.json", ("euler", "../../secret.json", "euler", None)),
    ],
)
def test_samplers_and_schedules(sampler: str, schedule: str | None, expected: tuple[str | None, ...]) -> None:
    values = {"Steps": "4", "Seed": "1", "Sampler": sampler} | ({"Schedule type": schedule} if schedule else {})
    made = a1111.of_settings("a1111", "x", None, values)
    given = dict(zip((words := command(made)[0])[3::2], words[4::2], strict=True))
    assert (made.scheduler, made.grid, given.get("--scheduler"), given.get("--grid")) == expected
    assert ("here" in " ".join(made.notes)) == (expected[2] is None or expected[3] is None)


def test_every_name_of_ours_comes_back() -> None:
    """Through A1111's grammar: the canonical name of every solver, and each grid that A1111 has too."""
    for name in schedulers.names():
        record = {"prompt": "x", "steps": 4, "seed": 1, "scheduler": name, "grid": "karras", "width": 8, "height": 8}
        values = a1111.split(parameters_text(record))[2]
        made = a1111.of_settings("a1111", "x", None, values)
        assert (made.scheduler, made.grid) == (name, "karras")
    for grid in set(schedulers.grid_names()) - {"trailing"}:  # which A1111 calls as ComfyUI's simple
        values = a1111.split(parameters_text({"steps": 4, "seed": 1, "scheduler": "euler", "grid": grid}))[2]
        assert a1111.of_settings("a1111", "x", None, values).grid == grid


def test_second_pass_variation_and_image(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    text = "x\nSteps: 9, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Denoising strength: 0.4"
    given = options(inspect(png(tmp_path / "a", {"parameters": text + ", Hires upscale: 2, Hires upscaler: Latent"})))
    assert (given["--upscale"], given["--upscale-mode"], given["--upscale-strength"]) == ("2", "latent", "0.4")
    more = ", Variation seed: 77, Variation seed strength: 0.25"
    said = inspect(png(tmp_path / "b", {"parameters": text + more}))
    assert (options(said)["--variation-seed"], options(said)["--variation-strength"]) == ("77", "0.25")
    assert any("--strength 0.4" in note for note in said["notes"])


SDCPP = (
    "a lovely cat\nNegative prompt: dog\nSteps: 20, CFG scale: 7.000000, Guidance: 3.500000, Eta: 0.000000, Seed: 42, "
    "Size: 512x640, Model: v1-5.safetensors, RNG: cuda, Sampler: euler_a karras, Version: stable-diffusion.cpp"
)


def test_sdcpp(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    said = inspect(png(tmp_path / "x.png", {"parameters": SDCPP}))
    assert (said["tool"], said["scheduler"], said["grid"], said["guidance"], said["seed"], said["negative"]) == (
        "sdcpp", "euler_ancestral", "karras", 7.0, 42, "dog",
    )  # fmt: skip
    assert (said["width"], said["height"], said["model"]) == (512, 640, "v1-5.safetensors")
    assert options(said)["--guidance"] == "7"


def test_sdcpp_with_its_json(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    """The JSON repeats the prompt, in which something may look like that JSON's beginning."""
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
    said = inspect(png(tmp_path / "x.png", {"parameters": text}))
    assert (said["tool"], said["prompt"], said["seed"], said["steps"], said["guidance"], said["scheduler"]) == (
        "sdcpp", prompt, 1375127038, 30, 5.0, "dpmpp_2m",
    )  # fmt: skip
    assert (said["grid"], options(said)["--lora"], options(said)["--clip-skip"]) == (
        "karras", "detail.safetensors:0.5", "2",
    )  # fmt: skip
    escaped = SDCPP.replace("&", "&amp;").replace("<", "&lt;")
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><sdcpp:parameters>{escaped}</sdcpp:parameters></x:xmpmeta>'
    PICTURE.save(tmp_path / "x.webp", "WEBP", xmp=xmp.encode())
    assert inspect(tmp_path / "x.webp")["seed"] == 42


# ComfyUI

BASE: dict[str, Any] = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15/v1-5-pruned.safetensors"}},
    "10": {"class_type": "LoraLoader", "inputs": {
        "lora_name": "styles\\ink.safetensors", "strength_model": 0.6, "strength_clip": 1, "model": ["4", 0],
        "clip": ["4", 1]}},
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "12": {"class_type": "PrimitiveString", "inputs": {"value": "a red apple"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["11", 0]}},
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 156680208700286, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras",
        "denoise": 1.0, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}  # fmt: skip


def test_comfyui(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    texts = {"prompt": json.dumps(BASE), "workflow": '{"nodes": [], "links": []}'}
    said = inspect(png(tmp_path / "x.png", texts))
    expected = {
        "tool": "comfyui",
        "prompt": "a red apple",
        "negative": "blurry",
        "seed": 156680208700286,
        "steps": 20,
        "guidance": 8.0,
        "scheduler": "dpmpp_2m_sde",
        "grid": "karras",
        "width": 512,
        "height": 768,
        "model": "v1-5-pruned.safetensors",
    }
    assert {key: said[key] for key in expected} == expected
    given = options(said)
    assert "--seed" not in given  # beyond 32 bits
    assert any("156680208700286" in note for note in said["notes"])
    assert (given["--lora"], given["--clip-skip"]) == ("ink.safetensors:0.6", "2")
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = "prompt:" + texts["prompt"], "workflow:{}"
    PICTURE.save(tmp_path / "x.webp", "WEBP", exif=exif)
    assert inspect(tmp_path / "x.webp")["prompt"] == "a red apple"


def test_comfyui_custom_sampling(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    """As its Flux template has it."""
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "ModelSamplingFlux", "inputs": {"max_shift": 1.15, "model": ["1", 0]}},
        "3": {"class_type": "CLIPTextEncodeFlux", "inputs": {"clip_l": "a fox", "t5xxl": "a fox", "clip": ["9", 0]}},
        "4": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["3", 0]}},
        "5": {"class_type": "BasicGuider", "inputs": {"model": ["2", 0], "conditioning": ["4", 0]}},
        "6": {"class_type": "RandomNoise", "inputs": {"noise_seed": 12}},
        "7": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "8": {"class_type": "BasicScheduler", "inputs": {
            "scheduler": "simple", "steps": 21, "denoise": 1.0, "model": ["2", 0]}},
        "9": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "t5xxl.safetensors"}},
        "10": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
        "11": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["6", 0], "guider": ["5", 0], "sampler": ["7", 0], "sigmas": ["8", 0], "latent_image": ["10", 0]}},
        "12": {"class_type": "VAEDecode", "inputs": {"samples": ["11", 0]}},
        "13": {"class_type": "SaveImage", "inputs": {"images": ["12", 0]}},
    }  # fmt: skip
    said = inspect(png(tmp_path / "x.png", {"prompt": json.dumps(graph)}))
    assert (said["prompt"], said["seed"], said["steps"], said["guidance"]) == ("a fox", 12, 21, 3.5)
    assert (said["scheduler"], said["grid"], said["width"], said["height"], said["model"]) == (
        "euler", "simple", 1024, 768, "flux1-dev.safetensors",
    )  # fmt: skip


def test_comfyui_two_passes(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    """Its hires template: the first pass is told, the second becomes --upscale."""
    second = {**BASE["3"]["inputs"], "denoise": 0.5, "latent_image": ["20", 0], "steps": 14, "seed": 5}
    graph = BASE | {
        "3": {"class_type": "KSampler", "inputs": BASE["3"]["inputs"] | {"seed": 9}},
        "20": {"class_type": "LatentUpscale", "inputs": {"width": 1024, "height": 1536, "samples": ["3", 0]}},
        "21": {"class_type": "KSampler", "inputs": second},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["21", 0]}},
    }
    said = inspect(png(tmp_path / "x.png", {"prompt": json.dumps(graph)}))
    given = options(said)
    assert (said["seed"], said["steps"], given["--seed"], given["--size"]) == (9, 20, "9", "512x768")
    assert (given["--upscale"], given["--upscale-mode"], given["--upscale-strength"]) == ("2", "latent", "0.5")


def test_comfyui_only_the_editors_graph(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    workflow = {
        "nodes": [
            {"id": 4, "type": "CheckpointLoaderSimple", "inputs": [], "widgets_values": ["v1-5.safetensors"]},
            {"id": 5, "type": "EmptyLatentImage", "inputs": [], "widgets_values": [640, 512, 1]},
            {"id": 6, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "link": 3}], "widgets_values": ["a fox"]},
            {"id": 7, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "link": 3}], "widgets_values": [""]},
            {"id": 3, "type": "KSampler", "widgets_values": [42, "randomize", 20, 8, "euler", "normal", 1],
             "inputs": [{"name": "model", "link": 1}, {"name": "positive", "link": 4}, {"name": "negative", "link": 6},
                        {"name": "latent_image", "link": 2}]},
        ],
        "links": [[1, 4, 0, 3, 0, "MODEL"], [2, 5, 0, 3, 3, "LATENT"], [3, 4, 1, 6, 0, "CLIP"],
                  [4, 6, 0, 3, 1, "CONDITIONING"], [6, 7, 0, 3, 2, "CONDITIONING"]],
    }  # fmt: skip
    said = inspect(png(tmp_path / "x.png", {"workflow": json.dumps(workflow)}))
    assert (said["prompt"], said["negative"], said["seed"], said["steps"], said["scheduler"], said["grid"]) == (
        "a fox", "", 42, 20, "euler", "linspace",
    )  # fmt: skip
    assert (said["width"], said["height"], said["model"]) == (640, 512, "v1-5.safetensors")


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["1", "2", "3", "4"]),
        st.fixed_dictionaries(
            {
                "class_type": st.sampled_from(["KSampler", "CLIPTextEncode", "SaveImage", "Reroute", "LatentUpscale"]),
                "inputs": st.dictionaries(
                    st.sampled_from(["seed", "steps", "latent_image", "positive", "model", "text", "samples", "images",
                                     "sampler_name", "scheduler", "clip", "conditioning", "guider", "sigmas", "width"]),
                    st.one_of(
                        st.tuples(st.sampled_from(["1", "2", "3", "4", 1, None]), st.just(0)).map(list),
                        st.integers(), st.text(max_size=5), st.none(), st.floats(), st.lists(st.none(), max_size=3),
                    ),
                ),
            }
        ),
    )
)  # fmt: skip
def test_no_graph_breaks_the_walk(graph: dict[str, Any]) -> None:
    """Links may go in circles and to nothing, values may be anything."""
    from diffgen.images.readers import comfyui

    made = comfyui.read(read.Carried({"prompt": json.dumps(graph)}, width=8, height=8))
    assert (made is None) == (not graph)
    if made is not None:
        shlex.join(command(made)[0])


# InvokeAI


def test_invokeai(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    record = {
        "app_version": "5.4.2",
        "generation_mode": "txt2img",
        "positive_prompt": "a red apple",
        "negative_prompt": "blurry",
        "width": 512,
        "height": 768,
        "seed": 3721534628,
        "rand_device": "cpu",
        "cfg_scale": 7.5,
        "cfg_rescale_multiplier": 0,
        "steps": 30,
        "scheduler": "dpmpp_2m_k",
        "clip_skip": 1,
        "model": {"key": "1", "hash": "blake3:00", "name": "dreamshaper-8", "base": "sd-1", "type": "main"},
        "loras": [{"model": {"name": "ink", "base": "sd-1"}, "weight": 0.75}],
    }
    said = inspect(png(tmp_path / "x.png", {"invokeai_metadata": json.dumps(record), "invokeai_graph": "{}"}))
    assert (said["tool"], said["prompt"], said["negative"], said["seed"], said["steps"]) == (
        "invokeai", "a red apple", "blurry", 3721534628, 30,
    )  # fmt: skip
    assert (said["scheduler"], said["grid"], said["guidance"], said["model"]) == (
        "dpmpp_2m", "karras", 7.5, "dreamshaper-8",
    )  # fmt: skip
    given = options(said)
    assert (given["--clip-skip"], given["--lora"]) == ("2", "ink.safetensors:0.75")


def test_older_invokeai(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    image = {"prompt": [{"prompt": "a red apple [blurry, dark]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5,
             "height": 512, "width": 640, "seed": 123, "sampler": "k_euler_a"}  # fmt: skip
    record = {"model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "image": image}
    said = inspect(png(tmp_path / "x.png", {"sd-metadata": json.dumps(record)}))
    assert (said["tool"], said["prompt"], said["negative"], said["scheduler"], said["model"]) == (
        "invokeai", "a red apple", "blurry, dark", "euler_ancestral", "stable-diffusion-1.5",
    )  # fmt: skip
    for line in (
        '"a red "ripe" apple [blurry]" -s 50 -S 123 -W 640 -H 512 -C 7.5 -A k_lms',
        '"a red "ripe" apple [blurry]" -s50 -S123 -W640 -H512 -C7.5 -Ak_lms',
    ):
        said = inspect(png(tmp_path / "y.png", {"Dream": line}))
        assert (said["prompt"], said["negative"], said["seed"], said["steps"], said["guidance"]) == (
            'a red "ripe" apple', "blurry", 123, 50, 7.5,
        )  # fmt: skip
        assert (said["scheduler"], said["width"], said["height"]) == ("lms", 640, 512)


# kohya, mflux, Fooocus, NovelAI


def test_kohya(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    texts = {"prompt": "a red apple", "seed": "1234", "sampler": "k_euler_a", "steps": "50", "scale": "7.5",
             "negative-prompt": "blurry", "original-height": "512"}  # fmt: skip
    said = inspect(png(tmp_path / "x.png", texts))
    assert [said[key] for key in ("tool", "prompt", "negative", "seed", "steps", "guidance", "scheduler", "model")] == [
        "kohya", "a red apple", "blurry", 1234, 50, 7.5, "euler_ancestral", None,
    ]  # fmt: skip
    assert (said["width"], said["height"]) == (64, 96)  # it does not write them: the file's own


def test_mflux(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    record = {
        "mflux_version": "0.18.0",
        "model": "black-forest-labs/FLUX.1-dev",
        "base_model": "None",
        "seed": 42,
        "steps": 25,
        "guidance": 3.5,
        "height": 512,
        "width": 768,
        "precision": "mlx.core.bfloat16",
        "quantize": 8,
        "lora_paths": ["/Users/me/ink.safetensors"],
        "lora_scales": [0.8],
        "image_path": None,
        "prompt": "a puffin — ü",
        "negative_prompt": None,
    }
    said = inspect(png(tmp_path / "x.png", {}, exif=comment(json.dumps(record, ensure_ascii=False).encode())))
    assert [said[key] for key in ("tool", "prompt", "seed", "steps", "guidance", "width", "height", "model")] == [
        "mflux", "a puffin — ü", 42, 25, 3.5, 768, 512, "black-forest-labs/FLUX.1-dev",
    ]  # fmt: skip
    assert (said["negative"], said["scheduler"], said["grid"]) == (None, None, None)
    assert options(said)["--lora"] == "ink.safetensors:0.8"
    assert "/Users" not in json.dumps(said)


FOOOCUS: dict[str, Any] = {
    "adm_guidance": "(1.5, 0.8, 0.3)",
    "base_model": "juggernautXL_v8Rundiffusion",
    "base_model_hash": "aeb7e9e689",
    "full_negative_prompt": ["blurry"],
    "full_prompt": ["cinematic still a red apple", "a red apple, sharp"],
    "guidance_scale": 4,
    "loras": [["sd_xl_offset_example-lora_1.0", 0.1, "4852686128"]],
    "negative_prompt": "blurry",
    "prompt": "a red apple",
    "resolution": "(1152, 896)",
    "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "seed": "5646470013",
    "sharpness": 2,
    "steps": 30,
    "styles": "['Fooocus V2']",
    "version": "Fooocus v2.5.5",
}


@pytest.mark.parametrize("how", ["png", "jpeg", "a1111"])
def test_fooocus(inspect: Callable[[Path], Said], tmp_path: Path, how: str) -> None:
    path = tmp_path / "x"
    if how == "png":
        png(path, {"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"})
    elif how == "jpeg":  # the tags lie in the outer folder there
        exif = Image.Exif()
        exif[0x9286], exif[0x0131], exif[0x927C] = json.dumps(FOOOCUS), "Fooocus v2.5.5", "fooocus"
        PICTURE.save(path, "JPEG", exif=exif)
    else:
        text = (
            "cinematic still a red apple, a red apple, sharp\nNegative prompt: blurry, dark\n"
            "Steps: 30, Sampler: DPM++ 2M SDE Karras, Seed: 5646470013, Size: 1152x896, CFG scale: 4, Sharpness: 2, "
            'ADM Guidance: "(1.5, 0.8, 0.3)", Model: juggernautXL_v8Rundiffusion, Model hash: aeb7e9e689, '
            "Performance: Speed, Scheduler: karras, VAE: Default (model), Raw prompt: a red apple, "
            'Raw negative prompt: blurry, Lora hashes: "sd_xl_offset_example-lora_1.0: 4852686128", '
            'Lora weights: "sd_xl_offset_example-lora_1.0: 0.1", Version: Fooocus v2.5.5'
        )
        png(path, {"parameters": text, "fooocus_scheme": "a1111"})
    said = inspect(path)
    assert [said[key] for key in ("tool", "prompt", "negative", "seed", "steps", "guidance", "width", "height")] == [
        "fooocus", "a red apple", "blurry", 5646470013, 30, 4.0, 1152, 896,
    ]  # fmt: skip
    assert (said["scheduler"], said["grid"], said["model"]) == ("dpmpp_2m_sde", "karras", "juggernautXL_v8Rundiffusion")
    assert options(said)["--lora"] == "sd_xl_offset_example-lora_1.0.safetensors:0.1"


def test_novelai(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    record = {"prompt": "{apple}, red", "steps": 28, "height": 1216, "width": 832, "scale": 5.0, "seed": 3086521243,
              "noise_schedule": "karras", "sampler": "k_euler_ancestral", "uc": "lowres", "strength": 0.7,
              "request_type": "PromptGenerateRequest"}  # fmt: skip
    texts = {"Title": "NovelAI generated image", "Description": "{apple}, red", "Software": "NovelAI",
             "Source": "NovelAI Diffusion V3 7BCCAA2C", "Comment": json.dumps(record)}  # fmt: skip
    PICTURE.save(tmp_path / "x.webp", "WEBP", exif=comment(b"ASCII\0\0\0" + json.dumps(texts).encode()))
    for path in (png(tmp_path / "x.png", texts), tmp_path / "x.webp"):
        said = inspect(path)
        assert [said[key] for key in ("tool", "prompt", "negative", "seed", "steps", "guidance", "scheduler")] == [
            "novelai", "{apple}, red", "lowres", 3086521243, 28, 5.0, "euler_ancestral",
        ]  # fmt: skip
        assert (said["grid"], said["width"], said["height"]) == ("karras", 832, 1216)
        assert not any("made from a picture" in note for note in said["notes"])


# Ours

RECORD: dict[str, Any] = {
    "prompt": "a red apple, noto style",
    "negative": "blurry",
    "seed": 7,
    "steps": 20,
    "guidance": 5.0,
    "scheduler": "dpmpp_2m",
    "scheduler_options": {},
    "grid": "karras",
    "width": 64,
    "height": 48,
    "model": "emoji",
    "model_hash": "0123456789" + "0" * 54,
    "rng": "CPU",
    "versions": {"diffgen": "0.1.0"},
}
SHA = "ab" * 32


def test_our_command_says_all_of_it(inspect: Callable[[Path], Said], tmp_path: Path) -> None:
    """Parsed by the command itself, it asks for what the record says."""
    more: dict[str, Any] = {
        "prompt": "-a cat's {hat",
        "prompt_syntax": "plain",
        "scheduler": "dpmpp_2m_sde",
        "scheduler_options": {"variant": "heun"},
        "clip_skip": 2,
        "guidance_rescale": 0.7,
        "guidance_interval": [0.2, 0.8],
        "image": {"name": "start.png", "sha256": SHA},
        "mask": {"name": "mask.png", "sha256": SHA},
        "strength": 1e-05,
        "loras": [{"name": "ink.safetensors", "sha256": SHA, "scale": 0.25}],
        "embeddings": [{"word": "<cat>", "name": "cat.safetensors", "sha256": SHA}],
        "controls": [{"kind": "canny", "name": "edge.png", "sha256": SHA, "drawn": True, "scale": 0.8,
                      "model": "canny", "model_sha256": SHA}],
        "variation": {"seed": 3, "strength": 0.5},
        "tile": True,
        "safety": "off",
    }  # fmt: skip
    path = tmp_path / "x.png"
    path.write_bytes(encode_png(PICTURE, {**RECORD, **more}))
    said = inspect(path)
    assert shlex.split(said["command"])[2:] == [
        *("--negative", "blurry", "--seed", "7", "--steps", "20", "--guidance", "5"),
        *("--scheduler", "DPM++ 2M SDE Heun", "--grid", "karras", "--size", "64x48", "--clip-skip", "2"),
        *("--lora", "ink.safetensors:0.25", "--variation-seed", "3", "--variation-strength", "0.5"),
        *("--prompt-syntax", "plain", "--guidance-rescale", "0.7", "--guidance-interval", "0.2,0.8"),
        *("--image", "start.png", "--mask", "mask.png", "--strength", "0.00001"),
        *("--control", "canny=edge.png:0.8", "--control-model", "canny=canny", "--embedding", "<cat>=cat.safetensors"),
        *("--tile", "--safety", "off", "--", "-a cat's {hat"),
    ]


def test_the_command_makes_the_same_pixels(
    inspect: Callable[[Path], Said], diffgen_: Callable[..., Result], tiny: Path
) -> None:
    """Of a picture that was made with a style, wildcards and a second pass."""
    Path("styles.toml").write_text('[icon]\nprompt = "{prompt}, flat style"\n')
    first = ["generate", "a {red|green|blue} (circle:1.2)", "-m", tiny, "--style", "icon", "--seed", 5, "--upscale", 2]
    code, out, err = diffgen_(*first, "--steps", 3, "--scheduler", "DPM++ 2M SDE Heun Karras", "-o", "a.png", "--json")
    assert code == 0, err
    said = inspect(Path("a.png"))
    words = shlex.split(said["command"])
    assert words[words.index("-m") + 1] == "tiny"
    words[words.index("-m") + 1] = str(tiny)
    code, again, err = diffgen_(*words[1:], "-o", "b.png", "--json")
    assert code == 0, err
    hashes = [json.loads(text)["result"]["images"][0]["pixels_sha256"] for text in (out, again)]
    assert hashes[0] == hashes[1]
    assert (said["width"], said["height"]) == (64, 64)  # after the second pass


@pytest.mark.parametrize("level", ["full", "params"])
def test_an_independent_parser_reads_ours(tmp_path: Path, level: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encode_png(PICTURE, RECORD, level))
    found = sd_parsers.ParserManager().parse(path)
    assert found is not None
    (sampler,) = found.samplers
    assert found.generator.name == "AUTOMATIC1111"
    assert (sampler.name, sampler.parameters["scheduler"], sampler.parameters["seed"]) == ("DPM++ 2M", "Karras", "7")
    assert (sampler.parameters["steps"], sampler.parameters["cfg_scale"]) == ("20", "5")
    assert [prompt.value for prompt in sampler.prompts] == [RECORD["prompt"]]
    assert [prompt.value for prompt in sampler.negative_prompts] == ["blurry"]
    assert (sampler.model.name, sampler.model.hash) == ("emoji", "0123456789")


# What stands in a prompt: any text but one whose own lines look like the grammar's.
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
def test_our_text_comes_back(prompt: str, negative: str, seed: int, steps: int, guidance: float, model: str) -> None:
    record = {**RECORD, "prompt": prompt, "negative": negative, "seed": seed, "steps": steps, "guidance": guidance,
              "model": model}  # fmt: skip

    def stripped(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().split("\n"))

    found, also, values = a1111.split(parameters_text(record))
    made = a1111.of_settings("a1111", found, also, values)
    assert (stripped(found), stripped(also or "")) == (stripped(prompt), stripped(negative))
    assert (made.seed, made.steps, made.guidance, made.scheduler, made.grid) == (
        seed, steps, guidance, "dpmpp_2m", "karras",
    )  # fmt: skip
    assert (made.width, made.height) == (64, 48)
    assert made.model == (model.strip() or None)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_read_without_a_fault(text: str) -> None:
    for texts in ({"parameters": text}, {"prompt": text}, {"Comment": text, "Description": text}, {"Dream": text},
                  {"sd-metadata": text}, {"invokeai_metadata": "{" + text}):  # fmt: skip
        from diffgen.images.readers import READERS

        for _, reader in READERS.values():
            made = reader(read.Carried(texts, width=1, height=1))
            if made is not None:
                shlex.join(command(made)[0])


@given(st.floats(1e-9, 1e9))
def test_numbers_are_written_in_full(value: float) -> None:
    text = plain_number(value)
    assert float(text) == value
    assert "e" not in text


# Refused, cleaned, bounded


def test_control_characters_do_not_reach_the_terminal(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    text = A1111.replace("apple", "ap\x1b[31m\x07ple").replace("v1-5", "v\x1b]0;x\x07")
    code, out, err = diffgen_("inspect", png(tmp_path / "x.png", {"parameters": text}))
    assert code == 0
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert "tool       AUTOMATIC1111 or Forge" in out


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        ({}, "says nothing"),
        ({"Title": "Flowers", "Software": "GIMP"}, "Software, Title"),
        ({"prompt": "[1, 2"}, "says nothing"),
        ({"prompt": "{" * 5000}, "says nothing"),
        ({"prompt": '{"a": ' * 100_000}, "says nothing"),
        ({"invokeai_metadata": "[]"}, "says nothing"),
        ({"diffgen": "{"}, "broken"),
        ({"diffgen": '{"schema": "diffgen.image/2"}'}, "diffgen.image/1"),
    ],
)
def test_pictures_that_say_nothing(
    diffgen_: Callable[..., Result], tmp_path: Path, texts: dict[str, str], word: str
) -> None:
    code, out, err = diffgen_("inspect", png(tmp_path / "x.png", texts), "--json")
    assert code == 3
    document = json.loads(out)
    assert (document["ok"], document["error"]["code"], document["command"]) == (False, 3, "inspect")
    assert word in err
    assert "Traceback" not in err


def test_broken_files_are_refused(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    whole = png(tmp_path / "whole.png", {"parameters": A1111}).read_bytes()
    for name, data in {
        "cut.png": whole[: len(whole) // 2],
        "text.png": b"no picture",
        "empty.png": b"",
        "half.jpg": b"\xff\xd8\xff\xe1\xff\xff",
    }.items():
        (tmp_path / name).write_bytes(data)
        code, _, err = diffgen_("inspect", name)
        assert code == 3, name
        assert "Traceback" not in err
    assert diffgen_("inspect", "nothing.png")[0] == 3
    assert diffgen_("inspect", tmp_path)[0] == 3


def test_a_long_text_is_refused(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    code, _, err = diffgen_("inspect", png(tmp_path / "x.png", {"parameters": "a" * (read.MAX_TEXT + 1)}))
    assert code == 3
    assert "characters" in err


def test_a_broken_exif_does_no_harm(tmp_path: Path) -> None:
    for body in (b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(40)):
        file = io.BytesIO()
        PICTURE.save(file, "PNG", exif=b"Exif\0\0" + body)
        (tmp_path / "x.png").write_bytes(file.getvalue())
        with pytest.raises(Exception, match=r"says nothing|broken"):
            read_picture_info(tmp_path / "x.png")


def test_it_needs_no_torch(tmp_path: Path) -> None:
    path = png(tmp_path / "x.png", {"parameters": A1111})
    code = (
        "import sys; from diffgen.cli import run\n"
        f"assert run(['inspect', {str(path)!r}]) == 0 and run(['reproduce', {str(path)!r}]) == 3\n"
        "assert all(run([name, '--help']) == 0 for name in ('inspect', 'reproduce', 'shell'))\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "diffgen generate" in done.stderr  # reproduce says what to try instead
