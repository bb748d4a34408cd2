"""The command line as a newcomer meets it: completion, what a model knows, and what to know before a picture."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import diffgen
from diffgen.cli.output import Output
from diffgen.prompts.compositions import composition_notes
from diffgen.prompts.words import nearest_words, other_numbers

Result = tuple[int, str, str]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("diffgen gener", ["generate"]),
        ("diffgen generate a --scheduler dpmpp_3", ["dpmpp_3m", "dpmpp_3m_sde"]),
        ("diffgen compare --schedulers euler,dpmpp_3", ["euler,dpmpp_3m", "euler,dpmpp_3m_sde"]),
        ("diffgen generate --grid kar", ["karras"]),
        ("diffgen generate -m emo", ["emoji"]),
        ("diffgen schedulers show kar", ["karras"]),
        ("diffgen models info emo", ["emoji"]),
        ("diffgen generate --see", ["--seed", "--seeds"]),
    ],
)
def test_a_shell_completes(
    line: str, expected: list[str], diffgen_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_DIFFGEN_COMPLETE", "complete_bash"), ("COMP_WORDS", line)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    code, out, err = diffgen_()
    assert (code, out.split(), err) == (0, expected, "")


def test_info_lists_what_a_model_knows(diffgen_: Callable[..., Result]) -> None:
    code, out, _ = diffgen_("models", "info", "emoji", "--names", "*POLICE car*")
    assert (code, out.splitlines()) == (0, ["oncoming police car", "police car", "police car light"])
    assert json.loads(diffgen_("models", "info", "emoji", "--names", "apple", "--json")[1])["result"]["names"] == [
        "apple"
    ]
    code, out, err = diffgen_("models", "info", "emoji", "--names", "police ca")
    assert (code, out) == (3, "")
    assert "knows no name like 'police ca'; the nearest: oncoming police car" in err


@pytest.mark.parametrize(
    ("plural", "singular"),
    [("apples", "apple"), ("boxes", "box"), ("strawberries", "strawberry"), ("leaves", "leaf"), ("knives", "knife")],
)
def test_a_plural_is_matched_with_its_singular(plural: str, singular: str) -> None:
    assert other_numbers(plural)[:2].count(singular) == 1
    assert nearest_words({singular, "zebra"}, [plural]) == [singular]


def test_a_singular_is_matched_with_its_plural() -> None:
    assert nearest_words({"cats", "boxes", "berries"}, ["cat", "box", "berry"]) == ["cats", "boxes", "berries"]


def test_a_model_that_composes_nothing_says_what_it_may_not_show() -> None:
    card = {"concepts": ["cat", "robot", "sunglasses", "police car"], "styles": ["flat"], "compositions": None}

    def note(text: str) -> str:
        return "".join(composition_notes(card, text))

    assert note("a cat with sunglasses, flat style") == (
        "it draws one thing at a time and may not show all of 'cat with sunglasses'; it knows 'sunglasses'"
    )
    assert "all of 'happy robot'; it knows 'robot'" in note("a happy robot")
    assert note("a purple car") == "it draws one thing at a time and may not show all of 'purple car'"
    assert [note(text) for text in ("a police car", "a cat, flat style", "good morning", "cat", "戴墨镜的 猫")] == [
        ""
    ] * 5


def test_a_spinner_turns_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Output("generate").waiting("loading [emoji] …"):
        pass
    assert capsys.readouterr() == ("", "")
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Output("generate").waiting("loading [emoji] …"):
        pass
    assert "loading [emoji] …" in capsys.readouterr().err


def test_the_version_is_the_same_everywhere() -> None:
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    changelog, citation = ((root / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff"))
    sections = re.findall(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    assert cited is not None
    assert {project["version"], diffgen.__version__, cited[1], sections[0][0]} == {diffgen.__version__}
    assert len(re.findall("^## ", changelog, re.MULTILINE)) == len(sections)
