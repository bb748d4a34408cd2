"""docs/ways.md: its commands work, and its pictures are what they make."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ways_pictures", DOCS / "pictures" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_command_is_right(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in maker.examples():
        for line in example.lines:  # what they begin with is there, as other commands would have made it
            words = shlex.split(line)
            if "--image" in words:
                Image.new("RGB", (64, 64)).save(words[words.index("--image") + 1])
        maker.make(example, ["--dry-run", "--overwrite"])


def test_every_block_has_its_picture(maker: ModuleType) -> None:
    page = (DOCS / "ways.md").read_text("utf-8")
    names = [example.name for example in maker.examples()]
    assert re.findall(r"\]\(pictures/([\w-]+)\.png\)", page) == names
    assert page.count("```bash") == len(names)
    assert {path.stem for path in (DOCS / "pictures").glob("*.png")} == set(names)
    assert sum(path.stat().st_size for path in (DOCS / "pictures").glob("*.png")) < 300_000


def test_a_picture_is_what_its_commands_make(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = next(example for example in maker.examples() if example.name == "image-to-image")
    maker.make(example)
    shown = np.asarray(Image.open(DOCS / "pictures" / f"{example.name}.png").convert("RGB")).astype(int)
    made = np.asarray(maker.side_by_side(example)).astype(int)
    assert made.shape == shown.shape
    assert abs(made - shown).mean() < 2  # other machines round otherwise
