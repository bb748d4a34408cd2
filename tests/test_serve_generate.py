"""`diffgen generate --server`: the same files as without it, and no torch in the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import ROOT, Served, encoded, half_mask

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def key(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFGEN_API_KEY", str(served.key))


def test_the_files_are_those_that_the_command_writes_here(served: Served, diffgen_: Command, tmp_path: Path) -> None:
    (tmp_path / "from.png").write_bytes(encoded(Image.linear_gradient("L").resize((64, 64)).convert("RGB")))
    (tmp_path / "mask.png").write_bytes(encoded(half_mask()))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red apple", "steps": 2}\n{"prompt": "a cat", "count": 2}\n')
    lines = [
        ["a blue car", "--seed", 3, "-n", 2, "--steps", 3, "--negative", "a dog", "--metadata", "params"],
        ["--prompt-file", "prompts.jsonl", "--seed", 5, "--steps", 3, "--guidance", 2.5],
        ["a red apple", "--image", "from.png", "--mask", "mask.png", "--strength", 0.8, "--seed", 1, "--steps", 4],
    ]
    for number, line in enumerate(lines):
        results = []
        for place, more in (("here", []), ("there", ["--server", served.url])):
            code, out, err = diffgen_("generate", *line, *more, "-o", f"{place}-{number}/", "--json")
            assert code == 0, err
            results.append(json.loads(out)["result"])
        here, there = results
        paths = [[Path(one.pop("path")) for one in result["images"]] for result in results]
        assert [path.name for path in paths[0]] == [path.name for path in paths[1]]
        assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]
        for name in ("images", "model", "scheduler", "grid", "steps", "nfe", "guidance"):
            assert here[name] == there[name], name


def test_stdout_names_the_files(served: Served, diffgen_: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFGEN_SERVER", served.url)
    code, out, err = diffgen_("generate", "a cat", "--steps", 2, "-n", 2, "-o", "cat.png")
    assert (code, out.split()) == (0, ["cat-1.png", "cat-2.png"]), err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--steps", "1000"], 2, "steps must be from 1 to 150"),
        (["-n", "11"], 2, "count must be from 1 to 10"),
        (["-m", "nothing"], 3, "there is no model 'nothing'"),
        (["--device", "cpu"], 2, "--device and --server exclude each other"),
        (["--dry-run"], 2, "--dry-run and --server exclude each other"),
        (["--safety", "off"], 2, "--safety and --server exclude each other"),
        (["--wildcards", "."], 2, "--wildcards and --server exclude each other"),
        (["--lora", "secret"], 2, "there is no LoRA 'secret'"),
        (["--image", "missing.png"], 3, "missing.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_and_exit_codes(served: Served, diffgen_: Command, words: list[str], code: int, text: str) -> None:
    result, out, err = diffgen_("generate", "a cat", *words, "--server", served.url, "-o", "cat.png", "--json")
    content = json.loads(out)
    assert (result, content["error"]["code"], text in content["error"]["message"]) == (code, code, True), err
    assert not Path("cat.png").exists()


def test_a_wrong_key_and_no_server(served: Served, diffgen_: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFGEN_API_KEY", "wrong")
    code, _, err = diffgen_("generate", "a cat", "--server", served.url)
    assert (code, "set DIFFGEN_API_KEY" in err) == (3, True)
    code, _, err = diffgen_("generate", "a cat", "--server", "http://127.0.0.1:1")
    assert (code, "does not answer" in err) == (3, True)
    code, _, err = diffgen_("generate", "a cat", "--server", "ftp://127.0.0.1")
    assert (code, "--server must be a URL" in err) == (2, True)


def test_the_process_imports_no_torch(served: Served, tmp_path: Path) -> None:
    code = f"""
import sys
from diffgen.cli import run
assert run(["generate", "a cat", "--steps", "2", "--server", {served.url!r}, "-o", {str(tmp_path / "cat.png")!r}]) == 0
loaded = sorted({{"torch", "diffusers", "transformers", "numpy", "starlette", "uvicorn"}} & set(sys.modules))
assert not loaded, loaded
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert Image.open(tmp_path / "cat.png").size == (64, 64)


def test_a_full_queue_is_waited_for(tmp_path: Path, diffgen_: Command, served: Served) -> None:
    words: list[Any] = [f"a cat {number}" for number in range(15)]  # more than may wait
    code, out, err = diffgen_("generate", *words, "--steps", 1, "--seed", 1, "--server", served.url, "-o", "cats/")
    assert (code, len(out.split())) == (0, 15), err
