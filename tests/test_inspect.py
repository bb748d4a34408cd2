"""inspect prints a command that reproduces our pictures, and refuses or cleans what is broken."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import A1111, PICTURE, RECORD, Info, Result, png

from diffgen.generation.record import read_picture_info
from diffgen.images import read
from diffgen.images.metadata import encode_png
from diffgen.images.readers import READERS
from diffgen.images.readers.command import command
from diffgen.images.readers.picture_info import plain_number

SHA = "ab" * 32


def test_our_command_has_every_option_of_the_record(inspect: Callable[[Path], Info], tmp_path: Path) -> None:
    """The command has an option for each key of the record."""
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
    info = inspect(path)
    assert shlex.split(info["command"])[2:] == [
        *("--negative", "blurry", "--seed", "7", "--steps", "20", "--guidance", "5"),
        *("--scheduler", "DPM++ 2M SDE Heun", "--grid", "karras", "--size", "64x48", "--clip-skip", "2"),
        *("--lora", "ink.safetensors:0.25", "--variation-seed", "3", "--variation-strength", "0.5"),
        *("--prompt-syntax", "plain", "--guidance-rescale", "0.7", "--guidance-interval", "0.2,0.8"),
        *("--image", "start.png", "--mask", "mask.png", "--strength", "0.00001"),
        *("--control", "canny=edge.png:0.8", "--control-model", "canny=canny", "--embedding", "<cat>=cat.safetensors"),
        *("--tile", "--safety", "off", "--", "-a cat's {hat"),
    ]


def test_the_command_makes_the_same_pixels(
    inspect: Callable[[Path], Info], diffgen_: Callable[..., Result], tiny: Path
) -> None:
    """The picture has a style, wildcards and a second pass."""
    Path("styles.toml").write_text('[icon]\nprompt = "{prompt}, flat style"\n')
    first = ["generate", "a {red|green|blue} (circle:1.2)", "-m", tiny, "--style", "icon", "--seed", 5, "--upscale", 2]
    code, out, err = diffgen_(*first, "--steps", 3, "--scheduler", "DPM++ 2M SDE Heun Karras", "-o", "a.png", "--json")
    assert code == 0, err
    info = inspect(Path("a.png"))
    words = shlex.split(info["command"])
    assert words[words.index("-m") + 1] == "tiny"
    words[words.index("-m") + 1] = str(tiny)
    code, again, err = diffgen_(*words[1:], "-o", "b.png", "--json")
    assert code == 0, err
    hashes = [json.loads(text)["result"]["images"][0]["pixels_sha256"] for text in (out, again)]
    assert hashes[0] == hashes[1]
    assert (info["width"], info["height"]) == (64, 64)  # after the second pass


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_read_without_a_fault(text: str) -> None:
    for texts in ({"parameters": text}, {"prompt": text}, {"Comment": text, "Description": text}, {"Dream": text},
                  {"sd-metadata": text}, {"invokeai_metadata": "{" + text}):  # fmt: skip
        for _, reader in READERS.values():
            info = reader(read.Carried(texts, width=1, height=1))
            if info is not None:
                shlex.join(command(info)[0])


@given(st.floats(1e-9, 1e9))
def test_numbers_are_written_in_full(value: float) -> None:
    text = plain_number(value)
    assert float(text) == value
    assert "e" not in text


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
def test_pictures_without_generation_data(
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


def test_inspect_needs_no_torch(tmp_path: Path) -> None:
    path = png(tmp_path / "x.png", {"parameters": A1111})
    code = (
        "import sys; from diffgen.cli import run\n"
        f"assert run(['inspect', {str(path)!r}]) == 0 and run(['reproduce', {str(path)!r}]) == 3\n"
        "assert all(run([name, '--help']) == 0 for name in ('inspect', 'reproduce', 'shell'))\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "diffgen generate" in process.stderr  # reproduce says what to try instead
