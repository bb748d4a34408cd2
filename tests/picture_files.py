"""Picture files as other tools write them, and the options of the command that inspect prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

Result = tuple[int, str, str]  # exit code, stdout, stderr
Info = dict[str, Any]  # what inspect --json prints as "result"
PICTURE = Image.new("RGB", (64, 96), "red")

A1111 = (
    "a (red:1.2) apple {ripe}\nSteps: none, on a table <lora:detail:0.7>\n"
    "Negative prompt: blurry\nSteps: 3, low quality\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 2750031551, Size: 512x768, "
    'Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, RNG: CPU, Lora hashes: "detail: 2e9a6b2a1c3f", '
    "Version: v1.10.1"
)

RECORD: dict[str, Any] = {  # of a picture of diffgen's own
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


def png(path: Path, texts: dict[str, str], how: str = "tEXt", exif: bytes | None = None) -> Path:
    """Write PICTURE with text chunks of the kind `how`: tEXt, zTXt or iTXt."""
    chunks = PngInfo()
    for key, text in texts.items():
        if how == "iTXt":
            chunks.add_itxt(key, text, zip=True)
        else:
            chunks.add_text(key, text, zip=how == "zTXt")
    PICTURE.save(path, "PNG", pnginfo=chunks, **({"exif": exif} if exif else {}))
    return path


def user_comment(text: bytes) -> bytes:
    """EXIF data with a UserComment (0x9286) in the EXIF directory (0x8769)."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = text
    return exif.tobytes()


def options(info: Info) -> dict[str, str]:
    """{option: value} of the command, after the prompt."""
    words = shlex.split(info["command"])
    assert words[:2] == ["diffgen", "generate"]
    return dict(zip(words[3::2], words[4::2], strict=False)) | {"prompt": words[2]}
