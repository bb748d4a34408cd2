"""The prompt grammar: AUTOMATIC1111's documented examples, and a second reader, written for the test."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgen.errors import UsageError
from diffgen.prompts.syntax import Part, escape, is_weighted, notes, parse, plain_text

# From the docstring of AUTOMATIC1111's parser, and its wiki ("Attention/emphasis").
DOCUMENTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
    "(word)": [("word", 1.1)],
    "((word))": [("word", 1.1 * 1.1)],
    "[word]": [("word", 1 / 1.1)],
    "(word:1.5)": [("word", 1.5)],
    "(word:0.25)": [("word", 0.25)],
    r"\(word\)": [("(word)", 1.0)],
    r"\\": [("\\", 1.0)],
}


@pytest.mark.parametrize(("text", "parts"), DOCUMENTED.items())
def test_documented_examples(text: str, parts: list[tuple[str, float]]) -> None:
    assert parse(text) == [parts]


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("", [[]]),
        ("()", [[]]),
        ("a) b]", [[("a) b]", 1.0)]]),  # closes nothing: text
        ("10:30 (at: noon)", [[("10:30 ", 1.0), ("at: noon", 1.1)]]),
        ("a:1.3)", [[("a:1.3)", 1.0)]]),
        ("(a: +1.3 )", [[("a", 1.3)]]),
        ("(a:-.5)", [[("a", -0.5)]]),
        ("(a:1.2.3)", [[("a:1.2.3", 1.1)]]),
        (r"(a\:1.3)", [[("a:1.3", 1.1)]]),
        ("(a [b) c]", [[("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)]]),
        ("a BREAK b", [[("a", 1.0)], [("b", 1.0)]]),
        ("(a BREAK b:2) c", [[("a", 2.0)], [("b", 2.0), (" c", 1.0)]]),
        ("BREAK a", [[], [("a", 1.0)]]),
        ("BREAKFAST at DAYBREAK", [[("BREAKFAST at DAYBREAK", 1.0)]]),
        (r"\BREAK", [[("BREAK", 1.0)]]),
        ("tail\\", [[("tail\\", 1.0)]]),
        ("日(本:2)", [[("日", 1.0), ("本", 2.0)]]),
    ],
)
def test_corners(text: str, sections: list[list[tuple[str, float]]]) -> None:
    parsed = parse(text)
    assert [[part.text for part in section] for section in parsed] == [[t for t, _ in s] for s in sections]
    for section, expected in zip(parsed, sections, strict=True):
        assert [part.weight for part in section] == pytest.approx([weight for _, weight in expected])


def recursive(text: str) -> list[tuple[str, float]]:
    """The weight of each character of a text whose brackets are balanced, top down: an independent reader."""

    def inside(i: int, stop: str) -> tuple[list[tuple[str, float]], int, float | None]:
        characters: list[tuple[str, float]] = []
        while i < len(text) and text[i] != stop:
            if text[i] == "\\":
                characters.append((text[i + 1], 1.0))
                i += 2
            elif text[i] in "([":
                close = ")" if text[i] == "(" else "]"
                inner, end, number = inside(i + 1, close)
                factor = number if number is not None else 1.1 if close == ")" else 1 / 1.1
                characters += [(character, weight * factor) for character, weight in inner]
                i = end + 1
            elif text[i] == ":" and stop == ")" and is_number(text[i + 1 : closing(text, i)]):
                return characters, closing(text, i), float(text[i + 1 : closing(text, i)])
            else:
                characters.append((text[i], 1.0))
                i += 1
        return characters, i, None

    def closing(text: str, i: int) -> int:
        return text.index(")", i)

    def is_number(text: str) -> bool:
        return text.strip().replace(".", "", 1).isdigit() and text.isascii()

    return inside(0, "")[0]


plain_pieces = st.text(st.sampled_from("ab ,é日.:7"), min_size=1, max_size=4).filter(lambda t: ":" not in t[-3:])
escaped_pieces = st.sampled_from([r"\(", r"\)", r"\[", r"\]", "\\\\", r"\:"])
balanced = st.recursive(
    plain_pieces | escaped_pieces,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        inner.map("({})".format),
        inner.map("[{}]".format),
        st.tuples(inner, st.sampled_from(["1.3", "0.5", ".7", "2", "1."])).map("({0[0]}:{0[1]})".format),
    ),
    max_leaves=12,
)


@given(balanced)
@settings(max_examples=300, deadline=None)
def test_agrees_with_a_recursive_reader(text: str) -> None:
    ours = [(character, part.weight) for section in parse(text) for part in section for character in part.text]
    other = recursive(text)
    assert [character for character, _ in ours] == [character for character, _ in other]
    assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in other])


@given(st.text(st.sampled_from("ab ()[]{}|\\:_1.3BREAK日\n"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_escaped_text_says_itself(text: str) -> None:
    assert parse(escape(text)) == [[(text, 1.0)] if text else []]
    assert plain_text(escape(text)) == text


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_plain_takes_anything_literally(text: str) -> None:
    assert parse(text, "plain") == [[Part(text, 1.0)] if text else []]
    assert plain_text(text, "plain") == text
    assert notes(text, "plain") == []


@given(st.text(st.sampled_from("ab ()[]:1.\\BREAK"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_and_no_word_is_lost(text: str) -> None:
    sections = parse(text)
    assert all(part.text and math.isfinite(part.weight) for section in sections for part in section)
    for section in sections:
        assert all(a.weight != b.weight for a, b in itertools.pairwise(section))
    letters = [c for c in text.replace("BREAK", "") if c in "ab"]
    assert [c for c in plain_text(text) if c in "ab"] == letters


def test_weighted() -> None:
    assert not is_weighted(parse("a cat"))
    assert not is_weighted(parse("a (cat:1)"))
    assert is_weighted(parse("a (cat)"))
    assert is_weighted(parse("a BREAK cat"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(a:101)", "weight of 101"),
        ("(" * 60 + "a", "weight of"),
        ("[" * 101 + "a", "more than 100 open brackets"),
        ("a <lora:thing:0.8> b", "<lora:thing:0.8>"),
        ("<hypernet:x:1>", "<hypernet:x:1>"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)
    assert parse(text, "plain") == [[(text, 1.0)]]


def test_a_lora_in_the_prompt_is_reported_with_its_option() -> None:
    with pytest.raises(UsageError) as excinfo:
        parse("a cat <lora:thing:0.8>")
    assert "--lora thing.safetensors:0.8" in excinfo.value.hint


def test_an_unknown_syntax_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a1111 or plain \(got 'compel'\)"):
        parse("a", "compel")


@pytest.mark.parametrize(
    ("text", "message"),
    [("(a", "1 bracket never closed"), ("[a:b:0.5]", "change during"), ("[a|b]", "change during"), ("a AND b", "AND")],
)
def test_notes(text: str, message: str) -> None:
    assert any(message in note for note in notes(text))
    assert notes("a (cat:1.2), [dog] and a BRAND") == []


def test_a_long_prompt_of_brackets_is_parsed_in_linear_time() -> None:
    assert len(parse("[a " * 99 + "[b]c" * 15_000)[0]) > 1
