"""The words of a prompt, and those that a model knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, byte_level

from diffgen.models.find import find
from diffgen.models.info import info
from diffgen.pipelines.plan import make_plan
from diffgen.pipelines.weights.tokenizers import load_tokenizer
from diffgen.prompts.words import caption_words, known_words, unknown_words, words


@given(
    st.lists(st.sampled_from([*WORDS, "Zebra's", "éclair", "日本", "7", "x2", "?!", "don't", "ПЁС", "a_b"]), max_size=8)
)
@settings(max_examples=60, deadline=None)
def test_words_are_those_that_the_tokenizer_looks_up(tiny: Path, pieces: list[str]) -> None:
    text = " ".join(pieces)
    backend = load_tokenizer(tiny / "tokenizer", 16).backend_tokenizer
    looked_up = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
    ours = [byte_level(word) for word in words(text)]
    assert ours == [piece for piece in looked_up if piece not in {"'s", "'t", "?!", "_"}]


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a red apple, flat style", ()),
        ("an apple on a PIÑATA!", ("on",)),
        ("zebra, zebra and Circle", ("zebra", "and")),
        ("a blue square", ("blue", "square")),  # tokens of the vocabulary, words of no caption
    ],
)
def test_unknown_words_are_in_no_caption(tiny: Path, text: str, unknown: tuple[str, ...]) -> None:
    assert make_plan(find(str(tiny)), text).unknown(text) == unknown


def test_a_piece_of_a_known_word_is_not_a_known_word() -> None:
    vocabulary = caption_words(["snowman", "t-rex", "1st place"], ["flat"])
    assert unknown_words(vocabulary, "a man, a snowman and the T-Rex, flat style, 1st 2nd") == [
        "man", "and", "the", "2", "nd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "syntax", "unknown"),
    [
        ("a (red:1.3) [apple] BREAK flat \\(style\\)", "a1111", []),
        ("a (red:1.3) zebra", "a1111", ["zebra"]),
        ("a (red:1.3) BREAK", "plain", ["1", "3", "break"]),
        ("苹果 flat风格", "a1111", []),
        ("红苹果, 斑马斑", "a1111", ["斑马斑"]),
        ("苹斑果马", "a1111", ["斑", "马"]),
        ("flatx风", "a1111", ["flatx"]),
        ("ЁЖ", "a1111", ["ёж"]),
    ],
)
def test_words_of_a_card_that_lists_them(text: str, syntax: str, unknown: list[str]) -> None:
    vocabulary = known_words(
        {"words": ["a", "Red", "apple", "flat", "style", "苹果", "红", "风格"], "concepts": ["zebra"]}
    )
    assert vocabulary is not None
    assert unknown_words(vocabulary, text, syntax) == unknown


def test_words_of_cards_without_a_list() -> None:
    assert known_words({"words": None, "concepts": None}) is None
    assert known_words({"concepts": ["t-rex"], "styles": None}) == {"a", "an", "style", "t", "rex"}
    vocabulary = known_words(info(find("emoji")))
    assert vocabulary is not None
    assert unknown_words(vocabulary, "a (red:1.2) [apple], flat style") == []


@given(st.lists(st.text(st.sampled_from("ab苹果é"), min_size=1), min_size=1))
def test_words_that_a_card_lists_are_known(listed: list[str]) -> None:
    vocabulary = known_words({"words": listed})
    assert vocabulary is not None
    assert unknown_words(vocabulary, " ".join(listed)) == []
