"""The documents: their commands and Python run, and each picture is the one that its command makes."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffgen.cli.app import app
from diffgen.generation.options import json_types

ROOT = Path(__file__).parent.parent
PAGES = ["docs/ways.md", "docs/seeing.md", "docs/prompts.md", "samples/gallery/README.md"]
DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "samples/*/README.md", "diffgen/models/bundled/*/README.md")
    for path in sorted(ROOT.glob(pattern))
]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `diffgen` command in a document's code blocks, fenced or indented."""
    blocks = re.findall(r"```bash\n(.*?)```|((?:^ {4}.*\n)+)", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(fenced or indented for fenced, indented in blocks).replace("\\\n", " ").splitlines()
    for part in (part for line in lines for part in line.split(" | ")):
        if match := re.match(r"\s*(?:\$ |torchrun .* -m )?diffgen (.*)", part):
            yield shlex.split(match[1], comments=True)


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
    """The pages of the two scripts, by path."""
    guide = load("make_guide", ROOT / "docs" / "pictures" / "make.py").PAGES
    gallery = load("make_gallery", ROOT / "samples" / "gallery" / "make.py").PAGE
    return {page.path.relative_to(ROOT).as_posix(): page for page in (*guide, gallery)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_parses(name: str) -> None:
    """The command and its options exist, and so does each file of the samples that it reads."""
    for words in commands((ROOT / name).read_text("utf-8")):
        command, rest = app, words
        while subcommands := getattr(command, "commands", None):
            command, rest = subcommands[rest[0]], rest[1:]
        command.make_context("diffgen", list(rest))
        for word in rest:
            if word.startswith("samples/"):
                assert (ROOT / word).exists(), f"{name}: {words}"


def test_contributing_names_every_package_and_only_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for package in sorted({path.parent for path in (ROOT / "diffgen").glob("*/__init__.py")}):
        assert f"`diffgen/{package.name}/`" in text, package


def test_every_key_of_prompt_files_is_documented() -> None:
    table = (ROOT / "docs" / "prompts.md").read_text("utf-8").split("| key | value |")[1]
    keys = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|")))
    assert sorted(keys) == sorted(["prompt", *json_types()])


@pytest.mark.parametrize("name", ["README.md", "docs/seeing.md"])
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs alone, so that it has all of its imports."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})


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
        for line in example.lines:  # a stand-in for the input picture, which an earlier command makes
            words = shlex.split(line)
            if "--image" in words:
                Image.new("RGB", (64, 64)).save(words[words.index("--image") + 1])
        maker.make(example, ["--dry-run", *["--overwrite"] * ("--overwrite" not in example.lines[-1])])


def test_every_block_has_its_pictures(pages: dict[str, Any]) -> None:
    folders: dict[Path, set[str]] = {}
    for name, page in pages.items():
        assert name in PAGES
        text, expected = page.path.read_text("utf-8"), []
        for example in page.examples():
            expected += (
                [Path(file).name for file in example.files] if example.kind == "files" else [f"{example.name}.png"]
            )
        shown = [page.path.parent / file for file in re.findall(r"\]\(([\w/-]+\.(?:png|gif))\)", text)]
        assert sorted(path.name for path in shown) == sorted(expected)
        assert {path.parent for path in shown} == {page.folder}
        assert len(re.findall(r"<!-- (?:picture|files|terminal): ", text)) == len(list(page.examples()))
        folders.setdefault(page.folder, set()).update(expected)
    for folder, expected in folders.items():
        pictures = [path for path in folder.iterdir() if path.suffix in (".png", ".gif")]
        assert {path.name for path in pictures} == expected
        assert sum(path.stat().st_size for path in pictures) < 800_000


def test_a_picture_is_what_its_commands_make(
    maker: ModuleType, pages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = pages["docs/ways.md"]
    example = next(example for example in page.examples() if example.name == "image-to-image")
    maker.make(example)
    shown = np.asarray(Image.open(page.folder / f"{example.name}.png").convert("RGB")).astype(int)
    remade = np.asarray(maker.joined(example)).astype(int)
    assert remade.shape == shown.shape
    assert abs(remade - shown).mean() < 2  # other machines round differently


def test_rows_of_pictures_with_captions(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures in rows of three: each at its place, twice as large, its prompt below it."""
    from diffgen.images.metadata import SCHEMA, encode_png

    monkeypatch.chdir(tmp_path)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    for i, colour in enumerate(colours):
        record = {"schema": SCHEMA, "prompt": f"a thing, {'no' * 40} style" if i == 1 else ""}
        Path(f"{i}.png").write_bytes(encode_png(Image.new("RGB", (16, 16), colour), record))
    paper = maker.joined(maker.Example("picture", "rows", ("*.png",), (), columns=3, captions=True))
    below, gap = 2 * maker.LINE, maker.GAP
    assert paper.size == (3 * 32 + 2 * gap, 2 * (32 + below) + gap)
    for i, colour in enumerate(colours):
        left, top = i % 3 * (32 + gap), i // 3 * (32 + below + gap)
        assert paper.crop((left, top, left + 32, top + 32)).getcolors() == [(32 * 32, colour)]
        under = np.asarray(paper.crop((left, top + 32, left + 32, top + 32 + below)))
        assert (under.min() < 200) == (i == 1)
    outside = np.asarray(paper.crop((0, 32, 32, 32 + below)))
    assert outside.min() == 255  # a long caption is cut


def test_the_gallery_shows_what_the_model_was_trained_on() -> None:
    """Both languages, all three styles, no held-out pair, no prompt twice."""
    prompts = (ROOT / "samples/gallery" / "prompts.txt").read_text("utf-8").splitlines()
    assert len(set(prompts)) == len(prompts) == 48
    assert 16 <= sum(not prompt.isascii() for prompt in prompts) <= 32
    styles = [re.split("[，,] ?", prompt)[1].split(" ")[0] for prompt in prompts]
    chinese = {"noto": "诺托风格", "flat": "扁平风格", "modern": "现代风格"}
    assert set(styles) == {*chinese, *chinese.values()}
    held_out = json.loads((ROOT / "samples" / "emoji" / "held_out.json").read_text("utf-8"))
    english = {prompt.removeprefix("an ").removeprefix("a ") for prompt in prompts}
    assert not english & {f"{name}, {style} style" for name, style in held_out}
