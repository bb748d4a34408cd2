"""inspect reads the records of InvokeAI, kohya, mflux, Fooocus and NovelAI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from picture_files import PICTURE, Info, options, png, user_comment
from PIL import Image


def test_invokeai(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
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
    info = inspect(png(tmp_path / "x.png", {"invokeai_metadata": json.dumps(record), "invokeai_graph": "{}"}))
    assert (info["tool"], info["prompt"], info["negative"], info["seed"], info["steps"]) == (
        "invokeai", "a red apple", "blurry", 3721534628, 30,
    )  # fmt: skip
    assert (info["scheduler"], info["grid"], info["guidance"], info["model"]) == (
        "dpmpp_2m", "karras", 7.5, "dreamshaper-8",
    )  # fmt: skip
    flags = options(info)
    assert (flags["--clip-skip"], flags["--lora"]) == ("2", "ink.safetensors:0.75")


def test_older_invokeai(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    image = {"prompt": [{"prompt": "a red apple [blurry, dark]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5,
             "height": 512, "width": 640, "seed": 123, "sampler": "k_euler_a"}  # fmt: skip
    record = {"model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "image": image}
    info = inspect(png(tmp_path / "x.png", {"sd-metadata": json.dumps(record)}))
    assert (info["tool"], info["prompt"], info["negative"], info["scheduler"], info["model"]) == (
        "invokeai", "a red apple", "blurry, dark", "euler_ancestral", "stable-diffusion-1.5",
    )  # fmt: skip
    for line in (
        '"a red "ripe" apple [blurry]" -s 50 -S 123 -W 640 -H 512 -C 7.5 -A k_lms',
        '"a red "ripe" apple [blurry]" -s50 -S123 -W640 -H512 -C7.5 -Ak_lms',
    ):
        info = inspect(png(tmp_path / "y.png", {"Dream": line}))
        assert (info["prompt"], info["negative"], info["seed"], info["steps"], info["guidance"]) == (
            'a red "ripe" apple', "blurry", 123, 50, 7.5,
        )  # fmt: skip
        assert (info["scheduler"], info["width"], info["height"]) == ("lms", 640, 512)


def test_kohya(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    texts = {"prompt": "a red apple", "seed": "1234", "sampler": "k_euler_a", "steps": "50", "scale": "7.5",
             "negative-prompt": "blurry", "original-height": "512"}  # fmt: skip
    info = inspect(png(tmp_path / "x.png", texts))
    assert [info[key] for key in ("tool", "prompt", "negative", "seed", "steps", "guidance", "scheduler", "model")] == [
        "kohya", "a red apple", "blurry", 1234, 50, 7.5, "euler_ancestral", None,
    ]  # fmt: skip
    assert (info["width"], info["height"]) == (64, 96)  # it does not write them: the file's own


def test_mflux(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
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
    info = inspect(png(tmp_path / "x.png", {}, exif=user_comment(json.dumps(record, ensure_ascii=False).encode())))
    assert [info[key] for key in ("tool", "prompt", "seed", "steps", "guidance", "width", "height", "model")] == [
        "mflux", "a puffin — ü", 42, 25, 3.5, 768, 512, "black-forest-labs/FLUX.1-dev",
    ]  # fmt: skip
    assert (info["negative"], info["scheduler"], info["grid"]) == (None, None, None)
    assert options(info)["--lora"] == "ink.safetensors:0.8"
    assert "/Users" not in json.dumps(info)


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
def test_fooocus(inspect: Callable[[Path], Info], tmp_path: Path, how: str) -> None:
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
    info = inspect(path)
    assert [info[key] for key in ("tool", "prompt", "negative", "seed", "steps", "guidance", "width", "height")] == [
        "fooocus", "a red apple", "blurry", 5646470013, 30, 4.0, 1152, 896,
    ]  # fmt: skip
    assert (info["scheduler"], info["grid"], info["model"]) == ("dpmpp_2m_sde", "karras", "juggernautXL_v8Rundiffusion")
    assert options(info)["--lora"] == "sd_xl_offset_example-lora_1.0.safetensors:0.1"


def test_novelai(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    record = {"prompt": "{apple}, red", "steps": 28, "height": 1216, "width": 832, "scale": 5.0, "seed": 3086521243,
              "noise_schedule": "karras", "sampler": "k_euler_ancestral", "uc": "lowres", "strength": 0.7,
              "request_type": "PromptGenerateRequest"}  # fmt: skip
    texts = {"Title": "NovelAI generated image", "Description": "{apple}, red", "Software": "NovelAI",
             "Source": "NovelAI Diffusion V3 7BCCAA2C", "Comment": json.dumps(record)}  # fmt: skip
    PICTURE.save(tmp_path / "x.webp", "WEBP", exif=user_comment(b"ASCII\0\0\0" + json.dumps(texts).encode()))
    for path in (png(tmp_path / "x.png", texts), tmp_path / "x.webp"):
        info = inspect(path)
        assert [info[key] for key in ("tool", "prompt", "negative", "seed", "steps", "guidance", "scheduler")] == [
            "novelai", "{apple}, red", "lowres", 3086521243, 28, 5.0, "euler_ancestral",
        ]  # fmt: skip
        assert (info["grid"], info["width"], info["height"]) == ("karras", 832, 1216)
        assert not any("made from a picture" in note for note in info["notes"])
