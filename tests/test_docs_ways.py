"""The pages whose pictures their own commands make: the commands work, and the pictures are what they make."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = ["docs/ways.md", "docs/seeing.md", "docs/prompts.md", "samples/gallery/README.md"]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up, and the scripts this one
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return load("page", ROOT / "docs" / "pictures" / "page.py")


@pytest.fixture(scope="module")
def pages(maker: ModuleType) -> dict[str, Any]:
    """The pages that the two scripts remake."""
    guide = load("make_guide", ROOT / "docs" / "pictures" / "make.py").PAGES
    gallery = load("make_gallery", ROOT / "samples" / "gallery" / "make.py").PAGE
    return {page.path.relative_to(ROOT).as_posix(): page for page in (*guide, gallery)}


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_right(
    maker: ModuleType, pages: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("samples").symlink_to(ROOT / "samples")
    for example in pages[name].examples():
        if example.python:
            compile(example.lines[0], example.name, "exec")
            continue
        for line in example.lines:  # what they begin with is there, as other commands would have made it
            words = shlex.split(line)
            if "--image" in words:
                Image.new("RGB", (64, 64)).save(words[words.index("--image") + 1])
        maker.make(example, ["--dry-run", *["--overwrite"] * ("--overwrite" not in example.lines[-1])])


def test_every_block_has_its_pictures(pages: dict[str, Any]) -> None:
    folders: dict[Path, set[str]] = {}
    for name, page in pages.items():
        assert name in PAGES
        text, made = page.path.read_text("utf-8"), []
        for example in page.examples():
            made += [Path(file).name for file in example.files] if example.kind == "files" else [f"{example.name}.png"]
        shown = [page.path.parent / file for file in re.findall(r"\]\(([\w/-]+\.(?:png|gif))\)", text)]
        assert sorted(path.name for path in shown) == sorted(made)
        assert {path.parent for path in shown} == {page.folder}
        assert len(re.findall(r"<!-- (?:picture|files|terminal): ", text)) == len(list(page.examples()))
        folders.setdefault(page.folder, set()).update(made)
    for folder, made in folders.items():
        found = [path for path in folder.iterdir() if path.suffix in (".png", ".gif")]
        assert {path.name for path in found} == made
        assert sum(path.stat().st_size for path in found) < 800_000


def test_a_picture_is_what_its_commands_make(
    maker: ModuleType, pages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = pages["docs/ways.md"]
    example = next(example for example in page.examples() if example.name == "image-to-image")
    maker.make(example)
    shown = np.asarray(Image.open(page.folder / f"{example.name}.png").convert("RGB")).astype(int)
    made = np.asarray(maker.together(example)).astype(int)
    assert made.shape == shown.shape
    assert abs(made - shown).mean() < 2  # other machines round otherwise


def test_rows_of_pictures_with_captions(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures in rows of three: each at its place, twice as large, its prompt below it."""
    from diffgen.images.metadata import SCHEMA, encode_png

    monkeypatch.chdir(tmp_path)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    for i, colour in enumerate(colours):
        record = {"schema": SCHEMA, "prompt": f"a thing, {'no' * 40} style" if i == 1 else ""}
        Path(f"{i}.png").write_bytes(encode_png(Image.new("RGB", (16, 16), colour), record))
    paper = maker.together(maker.Example("picture", "rows", ("*.png",), (), columns=3, captions=True))
    below, gap = 2 * maker.LINE, maker.GAP
    assert paper.size == (3 * 32 + 2 * gap, 2 * (32 + below) + gap)
    for i, colour in enumerate(colours):
        left, top = i % 3 * (32 + gap), i // 3 * (32 + below + gap)
        assert paper.crop((left, top, left + 32, top + 32)).getcolors() == [(32 * 32, colour)]
        under = np.asarray(paper.crop((left, top + 32, left + 32, top + 32 + below)))
        assert (under.min() < 200) == (i == 1)
    outside = np.asarray(paper.crop((0, 32, 32, 32 + below)))
    assert outside.min() == 255  # a long caption is cut


def test_the_gallery_shows_what_the_model_was_taught() -> None:
    """Both languages, three styles in equal parts or nearly so, no pair that was held out, no prompt twice."""
    prompts = (ROOT / "samples/gallery" / "prompts.txt").read_text("utf-8").splitlines()
    assert len(set(prompts)) == len(prompts) == 48
    assert 16 <= sum(not prompt.isascii() for prompt in prompts) <= 32
    styles = [re.split("[，,] ?", prompt)[1].split(" ")[0] for prompt in prompts]
    meant = {"noto": "诺托风格", "flat": "扁平风格", "modern": "现代风格"}
    assert set(styles) == {*meant, *meant.values()}
    held_out = json.loads((ROOT / "samples" / "emoji" / "held_out.json").read_text("utf-8"))
    english = {prompt.removeprefix("an ").removeprefix("a ") for prompt in prompts}
    assert not english & {f"{name}, {style} style" for name, style in held_out}
