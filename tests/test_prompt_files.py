"""Prompt files and styles."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from diffgen.errors import InputError, UsageError
from diffgen.generation.options import json_types
from diffgen.prompts.files import Line, read_lines
from diffgen.prompts.styles import Style, apply_styles, read_styles


def lines_of(folder: Path, content: str | bytes, name: str = "prompts.txt") -> list[Line]:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_lines(str(file), json_types())


def test_a_prompt_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red apple\r\n\n  # a comment\n  a piñata  \n".encode())
    assert [line.prompt for line in read_lines(str(file), json_types())] == ["a red apple", "a piñata"]


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (b"a\nb\xff\n", InputError, "line 2: not valid UTF-8"),
        (b'a\n{"prompt": "b", "sed": 5}\n', InputError, "line 2: unknown key 'sed'"),
        (b"a\n" + b"x" * 65537, InputError, "line 2: longer than 65536 bytes"),
        (b"\n# nothing\n", UsageError, "has no prompt"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_its_line(
    tmp_path: Path, content: bytes, error: type[Exception], text: str
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(error, match=text):
        read_lines(str(file), json_types())


def test_lines_and_objects_may_be_mixed(tmp_path: Path) -> None:
    content = (
        '\ufeffa cat\n# no\n\n{"prompt": " a dog ", "seed": 7, "size": [64, 64]}\n{red|green} __x__\n{ "prompt": "b"}'
    )
    where = str(tmp_path / "prompts.txt")
    assert lines_of(tmp_path, content) == [
        Line("a cat", {}, f"{where}, line 1"),
        Line("a dog", {"seed": 7, "size": [64, 64]}, f"{where}, line 4"),
        Line("{red|green} __x__", {}, f"{where}, line 5"),
        Line("b", {}, f"{where}, line 6"),
    ]


def test_every_option_is_read(tmp_path: Path) -> None:
    value = {str: "x", list: ["x"], int: 3, float: 0.5}
    for kind in (0, -1):
        options = {key: value[kinds[kind]] for key, kinds in json_types().items()}
        line = json.dumps({"prompt": "a", **{key.replace("_", "-"): options[key] for key in options}})
        assert lines_of(tmp_path, line, "a.jsonl") == [Line("a", options, f"{tmp_path / 'a.jsonl'}, line 1")]


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ('{"prompt": "a", "sed": 5}', "unknown key 'sed'", "'seed'"),
        ('{"prompt": "a", "negative_prompt": "b"}', "unknown key 'negative_prompt'", "negative"),
        ('{"prompt": "a", "zzz": 5}', "unknown key 'zzz'", "valid keys: prompt, negative"),
        ('{"promt": "a"}', "it has no text 'prompt'", ""),
        ('{"prompt": " "}', "it has no text 'prompt'", ""),
        ('{"prompt": ["a"]}', "it has no text 'prompt'", ""),
        ('{"prompt": "a", "seed": "5"}', r"'seed' must be a whole number \(got '5'\)", ""),
        ('{"prompt": "a", "seed": true}', "'seed' must be a whole number", ""),
        ('{"prompt": "a", "seed": 1.5}', "'seed' must be a whole number", ""),
        ('{"prompt": "a", "guidance": null}', "'guidance' must be a whole number or a number", ""),
        ('{"prompt": "a", "guidance": NaN}', "NaN is not a number", ""),
        ('{"prompt": "a", "style": ["x", 1]}', "'style' must be a text or a list of texts", ""),
        ('{"prompt": "a", "grid": ""}', "'grid' is empty", "leave it out"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "'seed' appears twice", ""),
        ('{"prompt": "a", "clip-skip": 1, "clip_skip": 2}', "'clip_skip' appears twice", ""),
        ('{"prompt": "a"', "broken JSON", "one object a line"),
        ('{"a": ' + "[" * 20_000, "broken JSON", ""),
        ("x" * 65537, "longer than 65536 bytes", ""),
        (b"\xff", "not valid UTF-8", "UTF-8"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, content: str | bytes, message: str, hint: str) -> None:
    content = content.encode() if isinstance(content, str) else content
    with pytest.raises(InputError, match=f"prompts.txt, line 3: {message}") as excinfo:
        lines_of(tmp_path, b"a\n\n" + content)
    assert hint in excinfo.value.hint


def test_in_a_jsonl_file_every_line_is_an_object(tmp_path: Path) -> None:
    assert lines_of(tmp_path, '{"prompt": "a"}\n\n{"prompt": "b"}\n', "a.JSONL")[1].prompt == "b"
    for content in ("a cat", "[1]", "3"):
        with pytest.raises(InputError, match=r"a\.jsonl, line 1"):
            lines_of(tmp_path, content, "a.jsonl")
    with pytest.raises(UsageError, match="has no prompt"):
        lines_of(tmp_path, "# nothing\n")
    with pytest.raises(InputError, match="cannot read prompts"):
        read_lines(str(tmp_path / "nowhere.txt"), json_types())


# Styles

STYLES = """
[ink]
prompt = "ink drawing of {prompt}, black and white"
negative = "colour"

[soft]
prompt = "soft light"

["two words"]
negative = "no {prompt} please"
"""


@pytest.mark.parametrize(
    ("names", "prompt", "negative", "expected"),
    [
        ([], "a cat", "x", ("a cat", "x")),
        (["ink"], "a cat", "", ("ink drawing of a cat, black and white", "colour")),
        (["ink"], "a cat", "x", ("ink drawing of a cat, black and white", "x, colour")),
        (["soft"], "a cat", "x", ("a cat, soft light", "x")),
        (["soft", "ink"], "a cat", "", ("ink drawing of a cat, soft light, black and white", "colour")),
        (["two words"], "a cat", "dog", ("a cat", "no dog please")),
        (["ink"], "{red|green} {prompt}", "", ("ink drawing of {red|green} {prompt}, black and white", "colour")),
    ],
)
def test_styles(tmp_path: Path, names: list[str], prompt: str, negative: str, expected: tuple[str, str]) -> None:
    (tmp_path / "styles.toml").write_text(STYLES)
    assert apply_styles(names, prompt, negative, read_styles([tmp_path / "styles.toml"])) == expected


def test_styles_of_this_folder_override_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("the user's folder is set by XDG_CONFIG_HOME")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert read_styles() == {}
    (tmp_path / "config" / "diffgen").mkdir(parents=True)
    (tmp_path / "config" / "diffgen" / "styles.toml").write_text('[a]\nprompt = "mine"\n[b]\nprompt = "mine"\n')
    (tmp_path / "styles.toml").write_text('[a]\nprompt = "here"\n')
    assert read_styles() == {"a": Style("a", "here"), "b": Style("b", "mine")}
    assert apply_styles(["b"], "x") == ("x, mine", "")


def test_an_unknown_style_is_refused_with_similar_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "styles.toml").write_text(STYLES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no style 'inc'") as excinfo:
        apply_styles(["inc"], "a")
    assert excinfo.value.hint == "did you mean 'ink'?"
    with pytest.raises(UsageError) as excinfo:
        apply_styles(["qqqq"], "a")
    assert "ink, soft, two words" in excinfo.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[a", "broken TOML"),
        (b"\xff", "broken TOML"),
        (b"a = 3", "'a' is not a style"),
        (b"[a]\nprompts = 'x'", "'prompts' of the style 'a'"),
        (b"[a]\nprompt = 3", "'prompt' of the style 'a'"),
        (b"[a]", "'a' is empty"),
        (b"#" * (2**20 + 1), "larger than"),
        (b"a = " + b"[" * 30_000, "broken TOML"),
    ],
)
def test_an_invalid_file_of_styles_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s.toml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_styles([tmp_path / "s.toml"])
    with pytest.raises(InputError, match=r"nowhere.toml: No such file"):
        read_styles([tmp_path / "nowhere.toml"])
