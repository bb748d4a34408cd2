"""`diffgen prompt explain`: tokens, weights and choices of a prompt, and its errors."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffgen.models.find import find
from diffgen.models.gate import check_folder
from diffgen.prompts.explain import explain
from diffgen.prompts.tokens import ClipTokenizer

Command = Callable[..., tuple[int, str, str]]
LONG = "a red apple on the green square, a blue circle and the modern piñata"


@pytest.fixture
def said(diffgen_: Command, tiny: Path) -> Callable[..., dict[str, Any]]:
    def explained(*args: object) -> dict[str, Any]:
        code, out, err = diffgen_("prompt", "explain", *args, "-m", tiny, "--json")
        assert code == 0, err
        document = json.loads(out)
        assert (document["schema"], document["ok"], document["command"]) == ("diffgen.result/1", True, "prompt explain")
        return document["result"]

    return explained


def test_weights_tokens_and_their_numbers(said: Callable[..., dict[str, Any]], tiny: Path) -> None:
    from diffgen.pipelines.weights.tokenizers import load_tokenizer

    result = said("a (red:1.3) [apple]")
    (chunk,) = result["chunks"]
    assert [(token["token"], token["weight"]) for token in chunk] == [("a ", 1), ("red ", 1.3), ("apple ", 0.909091)]
    assert [token["id"] for token in chunk] == load_tokenizer(tiny / "tokenizer", 16)("a red apple").input_ids[1:-1]
    assert result["parts"] == [
        {"text": "a ", "weight": 1, "section": 0},
        {"text": "red", "weight": 1.3, "section": 0},
        {"text": " ", "weight": 1, "section": 0},
        {"text": "apple", "weight": 0.909091, "section": 0},
    ]
    assert (result["text"], result["tokens"], result["length"], result["cut"]) == ("a red apple", 3, 16, "")
    assert (result["read"], result["unknown"], result["family"]) == ("chunks", [], "sd1")


def test_the_words_that_one_chunk_leaves_out(said: Callable[..., dict[str, Any]]) -> None:
    chunks, plain = said(LONG), said(LONG, "--prompt-syntax", "plain")
    assert [len(chunk) for chunk in chunks["chunks"]] == [8, 7]
    assert [len(chunk) for chunk in plain["chunks"]] == [14]
    assert chunks["cut"] == plain["cut"] == "piñata"
    assert (chunks["read"], plain["read"]) == ("chunks", "one chunk")
    assert chunks["tokens"] == plain["tokens"] == 15
    assert len(said("a BREAK red")["chunks"]) == 2


def test_explain_shows_the_choices_of_wildcards(said: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "shape.txt").write_text("circle\nsquare\n")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "shape.txt").write_text("piñata\n")
    results = [said("a {red|green} __shape__", "--seed", seed) for seed in range(20)]
    assert {result["prompt"] for result in results} == {
        f"a {c} {s}" for c in ("red", "green") for s in ("circle", "square")
    }
    for result in results:
        assert [choice["wildcard"] for choice in result["choices"]] == ["{red|green}", "__shape__"]
        assert result["prompt"] == "a " + " ".join(choice["value"] for choice in result["choices"])
        assert result["template"] == "a {red|green} __shape__"
    assert said("__shape__", "--wildcards", tmp_path / "others")["prompt"] == "piñata"
    assert said("{a|b}", "--prompt-syntax", "plain")["prompt"] == "{a|b}"


def test_styles(said: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "styles.toml").write_text('[flat]\nprompt = "{prompt}, flat style"\n')
    result = said("a red apple", "--style", "flat")
    assert (result["text"], result["styles"]) == ("a red apple, flat style", ["flat"])


def test_the_lines(diffgen_: Command, tiny: Path) -> None:
    code, out, err = diffgen_("prompt", "explain", "a {(red:1.5)} blue (apple", "-m", tiny)
    assert code == 0
    lines = [line for line in out.splitlines() if line]
    tokens = [("1", "a"), ("1.5", "red"), ("1", "blue"), ("1.1", "apple")]
    assert lines[0].split() == ["prompt", "a", "(red:1.5)", "blue", "(apple"]
    assert "{(red:1.5)} became '(red:1.5)' (seed 0)" in lines[1]
    assert [line.split()[1:] for line in lines[-5:]] == [["weight", "token"], *([w, t] for w, t in tokens)]
    assert "never saw 'blue'" in err
    assert "never closed" in err
    code, out, _ = diffgen_("prompt", "explain", LONG, "-m", tiny, "-q")
    assert "15 in 2 chunks of at most 14" in out
    assert "'piñata'" in out


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ((" ",), 2, "empty"),
        (("a {b",), 2, "never closed"),
        (("a", "--seed", "-1"), 2, "--seed"),
        (("a", "--prompt-syntax", "compel"), 2, "a1111 or plain"),
        (("a <lora:x:1>",), 2, "--lora x.safetensors:1"),
        (("a", "--style", "none"), 2, "no style 'none'"),
        (("__none__",), 3, "no wildcards file for __none__"),
        (("a", "--wildcards", "nowhere"), 3, "no wildcards folder"),
        (("a", "-m", "nothing"), 3, "no model 'nothing'"),
        ((), 2, "Missing argument"),
    ],
)
def test_errors(diffgen_: Command, args: tuple[str, ...], code: int, text: str) -> None:
    assert diffgen_("prompt", "explain", *args)[0] == code
    exit_code, out, err = diffgen_("prompt", "explain", *args, "--json")
    assert exit_code == code
    assert text in err
    document = json.loads(out)
    assert document["ok"] is False
    assert document["command"] == "prompt explain"


def test_a_family_without_weights_reads_the_text_in_one_chunk(tiny: Path) -> None:
    tokenizer = ClipTokenizer(check_folder(tiny).components["tokenizer"].folder, 16)
    result = explain(f"({LONG}:1.2)", tokenizer, weights=False)
    assert result["read"] == "one chunk"
    assert {token["weight"] for token in result["chunks"][0]} == {1.0}
    assert result["cut"] == "piñata"


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from diffgen.cli import run\n"
        "assert run(['prompt', 'explain', 'a (red:1.2) {apple|pear}']) == 0 and run(['prompt', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_explain_shows_what_the_bundled_model_reads(diffgen_: Command) -> None:
    code, out, _ = diffgen_("prompt", "explain", "a (red:1.3) apple", "--json")
    assert code == 0
    result = json.loads(out)["result"]
    assert result["model"] == "emoji"
    assert [token["token"].strip() for token in result["chunks"][0]] == ["a", "red", "apple"]
    assert find("emoji").folder.is_dir()


def test_the_guide(diffgen_: Command) -> None:
    """The guide's first example prints what the page shows, except the token ids; its table names every key."""
    from diffgen.generation.options import json_types

    page = (Path(__file__).parent.parent / "docs" / "prompts.md").read_text("utf-8")
    command, _, rest = page.partition("    $ diffgen ")[2].partition("\n")
    code, out, _ = diffgen_(*shlex.split(command))
    assert code == 0
    shown = textwrap.dedent(rest.partition("\n\n")[0]).splitlines()
    assert [re.sub(r"^  \d+ +", "", line) for line in shown] == [
        re.sub(r"^  \d+ +", "", line) for line in out.splitlines()
    ]
    table = page.partition("| key | value |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", table)) == {"prompt", *json_types()}


def test_the_guides_other_commands_run(diffgen_: Command, tmp_path: Path) -> None:
    """With the files that the page describes; `generate` runs with --dry-run."""
    page = (Path(__file__).parent.parent / "docs" / "prompts.md").read_text("utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)]
    blocks += re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "styles.toml").write_text(next(block for block in blocks if block.startswith("[icon]")))
    (tmp_path / "prompts.jsonl").write_text("".join(re.findall(r"^ *(\{\"prompt.*\n)", page, re.MULTILINE)))
    lines = [line for block in blocks for line in block.splitlines()]
    subprocess.run(["sh", "-c", next(line for line in lines if line.startswith("mkdir"))], cwd=tmp_path, check=True)
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("diffgen ")]
    assert len(commands) == 5
    for command in commands:
        code, _, err = diffgen_(*command, *(["--dry-run"] if command[0] == "generate" else []))
        assert code == 0, err
