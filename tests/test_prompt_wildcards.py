"""Wildcards: choices by the seed, files of choices, limits."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgen.errors import InputError, UsageError
from diffgen.prompts.wildcards import Wildcards

NONE = Wildcards([])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = tmp_path / "wildcards"
    (files / "zoo").mkdir(parents=True)
    (files / "animals.txt").write_text("\ufeff# animals\ncat\n\n  dog  \n{big|small} __zoo/birds__\n", "utf-8")
    (files / "zoo" / "birds.txt").write_text("owl\n3::eagle\n")
    (files / "my_colours.txt").write_bytes("red\r\nété\r\n".encode())
    return files


def expansions(text: str, wildcards: Wildcards = NONE, seeds: int = 400) -> Counter[str]:
    return Counter(wildcards.expand(text, seed)[0] for seed in range(seeds))


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|{b|c}d|}", {"a", "bd", "cd", ""}),
        ("{a}", {"a"}),
        ("{}", {""}),
        ("{2$$a|b|c}", {", ".join(pair) for pair in permutations("abc", 2)}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{0-1$$a|b}", {"", "a", "b"}),
        ("{1-2$$-$$a|b}", {"a", "b", "a-b", "b-a"}),
        ("{0::a|b}", {"b"}),
        ("{1:30|a:b}", {"1:30", "a:b"}),
        (r"\{a|b\} \__c__ {\||\}}", {r"\{a|b\} \__c__ \|", r"\{a|b\} \__c__ \}"}),
        ("a|b (c:1.2) [d] snake_case ____ 5$$", {"a|b (c:1.2) [d] snake_case ____ 5$$"}),
    ],
)
def test_all_choices_and_no_others_come_up(text: str, possible: set[str]) -> None:
    assert set(expansions(text)) == possible


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("{a|b|c|d}", {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}),
        ("{3::a|b}", {"a": 0.75, "b": 0.25}),
        ("{2::a|.5::b|c}", {"a": 2 / 3.5, "b": 0.5 / 3.5, "c": 1 / 3.5}),
        # without replacement: the second is drawn from what is left
        ("{2$$2::a|b|c}", {"a, b": 0.25, "a, c": 0.25, "b, a": 1 / 6, "c, a": 1 / 6, "b, c": 1 / 12, "c, b": 1 / 12}),
    ],
)
def test_choices_are_as_likely_as_their_weights(text: str, shares: dict[str, float]) -> None:
    """Over neighbouring seeds; five standard deviations."""
    n = 4000
    counts = expansions(text, seeds=n)
    assert set(counts) == set(shares)
    for value, share in shares.items():
        assert abs(counts[value] / n - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_files(folder: Path) -> None:
    files = Wildcards([folder])
    assert set(expansions("__animals__", files)) == {
        "cat", "dog", "big owl", "small owl", "big eagle", "small eagle",
    }  # fmt: skip
    birds = expansions("a __zoo/birds__!", files, 1000)
    assert birds["a eagle!"] > 600 > 300 > birds["a owl!"]
    assert set(expansions("__my_colours__", files)) == {"red", "été"}
    assert set(expansions("{2$$__my_colours__}", files)) == {"red, été", "été, red"}
    assert set(expansions("{__my_colours__|x}", files)) == {"red", "été", "x"}


def test_the_first_folder_wins(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "my_colours.txt").write_text("blue\n")
    assert set(expansions("__my_colours__ __zoo/birds__", Wildcards([other, folder]))) == {"blue owl", "blue eagle"}


def test_default_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    mine = tmp_path / "config" / "diffgen" / "wildcards"
    mine.mkdir(parents=True)
    (mine / "mine.txt").write_text("x\n")
    if sys.platform == "linux":
        assert Wildcards().expand("__mine__", 1)[0] == "x"
    assert Wildcards().expand("{__my_colours__}", 1)[0] in ("red", "été")


def test_a_seed_chooses_the_same_in_every_process(folder: Path) -> None:
    """The literal values hold for every version of Python: `Random.random()` is promised not to change."""
    text = "{a|b|c|d|e|f} {2$$a|b|c|d} __animals__"
    expanded = [Wildcards([folder]).expand(text, seed, "{x|y|z}") for seed in range(4)]
    code = (
        "from diffgen.prompts.wildcards import Wildcards; import sys\n"
        f"print([Wildcards([sys.argv[1]]).expand({text!r}, seed, '{{x|y|z}}') for seed in range(4)])"
    )
    process = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == str(expanded)
    draws = [Random(seed).random() for seed in range(4)]
    assert [prompt[0] for prompt, _ in expanded] == ["abcdef"[int(draw * 6)] for draw in draws]
    assert draws[0] == 0.8444218515250481


def test_prompt_and_negative_draw_one_after_the_other() -> None:
    pairs = {NONE.expand("{a|b}", seed, "{a|b}") for seed in range(40)}
    assert pairs == {(x, y) for x in "ab" for y in "ab"}
    assert [NONE.expand("{a|b}", s)[0] for s in range(40)] == [NONE.expand("{a|b}", s, "{c|d}")[0] for s in range(40)]


def test_the_choices_are_reported(folder: Path) -> None:
    text, choices = Wildcards([folder]).choose("a {{red|red}|red} __zoo/birds__ on {}", Random(3))
    assert [choice.wildcard for choice in choices] == ["{{red|red}|red}", "__zoo/birds__", "{}"]
    assert text == f"a {choices[0].value} {choices[1].value} on {choices[2].value}"


texts = st.recursive(
    st.text(st.sampled_from("ab (:1.2)"), max_size=4) | st.sampled_from([r"\{", r"\}", r"\|", r"\\"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: "{" + "|".join(items) + "}"),
        st.lists(inner, min_size=2, max_size=3).map(lambda items: "{1-2$$" + "|".join(items) + "}"),
    ),
    max_leaves=10,
)


@given(texts, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_an_expanded_prompt_has_nothing_left_to_choose(text: str, seed: int) -> None:
    expanded, _ = NONE.expand(text, seed)
    assert NONE.expand(text, seed)[0] == expanded
    assert NONE.expand(expanded, seed + 1)[0] == expanded


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a {b|c", UsageError, "never closed"),
        ("a} b", UsageError, "closed but never opened"),
        ("{3$$a|b}", UsageError, "asks for 3 of 2"),
        ("{2-1$$a|b}", UsageError, "asks for 2 to 1"),
        ("{0::a|0::b}", UsageError, "asks for 1 of 0"),
        ("{2$$0::a|b}", UsageError, "asks for 2 of 1"),
        ("__never__", InputError, "there is no line to choose"),
        ("{2$$__my_colours__|x|y}{3$$__my_colours__}", UsageError, "asks for 3 of 2"),
        ("{" * 25 + "}" * 25, UsageError, "20 deep"),
        ("{x|__nothing__}", InputError, "there is no wildcards file for __nothing__"),
        ("__../secret__", InputError, "not a wildcard.s name"),
        ("__zoo/../../secret__", InputError, "not a wildcard.s name"),
        ("__/etc/passwd__", InputError, "not a wildcard.s name"),
        ("__zoo//birds__", InputError, "not a wildcard.s name"),
        ("__link__", InputError, "outside its folder"),
        ("__a__", InputError, r"__b__ > __c__ > __b__"),
        ("__empty__", InputError, "there is no line to choose"),
        ("__latin__", InputError, "not valid UTF-8"),
        ("__broken__", InputError, r"broken.txt, line 2: a brace is never closed"),
        ("__grow__", InputError, "more than 10000 choices"),
        ("__long__" * 40, InputError, "longer than 65536"),
    ],
)
def test_texts_that_are_refused_with_every_seed(folder: Path, text: str, error: type[Exception], message: str) -> None:
    (folder.parent / "secret.txt").write_text("secret\n")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    for name, content in {
        "a": b"__b__",
        "b": b"x\n__c__",
        "c": b"{y|z __b__}",
        "empty": b"# nothing\n\n",
        "never": b"0::a\n0::b\n",
        "latin": "é".encode("latin-1"),
        "broken": b"fine\n{a|b\n",
        "grow": b"__grow1__" * 30,
        "grow1": b"__grow2__" * 30,
        "grow2": b"{a|b}" * 30,
        "long": b"x" * 2000,
    }.items():
        (folder / f"{name}.txt").write_bytes(content)
    for seed in range(3):
        with pytest.raises(error, match=message):
            Wildcards([folder]).expand(text, seed)


def test_possible_lists_every_choice(folder: Path) -> None:
    words = Wildcards([folder]).possible("a {3::red|2$$green} __animals__, __zoo/birds__ \\{b\\}").split()
    assert words == ["a", "red", "2$$green", "cat", "dog", "big", "small", "owl", "eagle", ",", "\\{b\\}"]


def test_the_error_suggests_near_names(folder: Path) -> None:
    with pytest.raises(InputError) as excinfo:
        Wildcards([folder]).check("{a|__anmals__}")
    assert "__animals__" in excinfo.value.hint
    with pytest.raises(InputError, match="no wildcards folder"):
        Wildcards([folder / "nowhere"])


def test_a_large_file_is_read_once_and_quickly(folder: Path) -> None:
    (folder / "many.txt").write_text("\n".join(f"word {i}" for i in range(200_000)))
    files = Wildcards([folder])
    assert len(expansions("__many__", files, 20)) == 20
