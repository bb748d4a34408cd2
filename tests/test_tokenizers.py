"""Tokenizers: T5's from its two file formats, and those that come with diffgen."""

from __future__ import annotations

import math
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from diffgen.errors import InputError
from diffgen.models import gate, single_file
from diffgen.pipelines.weights.tokenizers import _from_sentencepiece, load_t5_tokenizer, load_tokenizer


def tag(number: int, kind: int, value: bytes) -> bytes:
    """A field of a protocol buffer whose value has less than 128 bytes, or the size before it."""
    size = []
    if kind == 2:
        left = len(value)
        while True:
            size.append(left & 127 | (128 if left > 127 else 0))
            left >>= 7
            if not left:
                break
    return bytes([number << 3 | kind, *size]) + value


def spiece(pieces: list[tuple[str, float]], charsmap: bytes = b"") -> bytes:
    """A SentencePiece model as sentencepiece_model.proto defines it, with the fields that T5's has."""
    body = b"".join(
        tag(1, 2, tag(1, 2, piece.encode()) + tag(2, 5, struct.pack("<f", score)) + tag(3, 0, b"\x01"))
        for piece, score in pieces
    )
    return body + tag(2, 2, tag(3, 0, b"\x01")) + tag(3, 2, tag(1, 2, b"nmt_nfkc") + tag(2, 2, charsmap))


TEXTS = ["a red apple", "  Two   spaces, and\ta piñata!", "apple</s> <extra_id_7> x", "", "日本 a"]


def test_t5s_tokenizer_is_what_transformers_reads(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    where = family_folder("flux") / "tokenizer_2"
    other, ours = T5Tokenizer.from_pretrained(where), load_t5_tokenizer(where, 32)
    (tmp_path / "spiece.model").write_bytes(spiece(tiny.t5_pieces()[:-100]))
    short = load_t5_tokenizer(tmp_path, 32)
    for text in TEXTS:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": 12}
        assert ours(text, **options).input_ids == other(text, **options).input_ids == short(text, **options).input_ids
    assert len(ours) == len(other) == len(short)


def test_t5s_normalization_is_read(tmp_path: Path) -> None:
    """A precompiled table in which ﬁ becomes fi is read from either file."""
    # sentencepiece/src/normalizer.h: the size of a double array, the array, the replacements, each ended by a zero.
    # The array is a trie over bytes (Darts): node n leads by byte b to the place n ^ offset(n) ^ b, which holds b.
    units = [0] * 1024
    node = 0
    for place, byte in zip((256, 512, 768), "ﬁ".encode(), strict=True):
        units[node] |= (node ^ place ^ byte) << 10
        units[place] = byte
        node = place
    leaf = 900
    units[node] |= (node ^ leaf) << 10 | 1 << 8
    units[leaf] = 1 << 31  # the value: 0, where its replacement begins
    table = struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + b"fi\0"
    pieces = [*tiny.t5_pieces()[:-100], ("▁fi", -1.0)]
    (tmp_path / "spiece.model").write_bytes(spiece(pieces, table))
    tokenizer = load_t5_tokenizer(tmp_path, 32)
    assert tokenizer("ﬁ").input_ids == [len(pieces) - 1, 1]
    tokenizer.save_pretrained(tmp_path / "json")
    assert load_t5_tokenizer(tmp_path / "json", 32)("ﬁ").input_ids == [len(pieces) - 1, 1]


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02no pickle", b"\x0a\xff\xff", b"\x0f", b"\x0a\x04\x0a\x02\xff\xfe", b"\x80" * 20]
)
def test_what_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(InputError, match=r"SentencePiece|does not begin"):
        load_t5_tokenizer(tmp_path, 32)


def test_clips_tokenizer_that_comes_with_diffgen_is_clips() -> None:
    """Ids from OpenAI's own tokenizer, as CLIP's README and diffusers' documentation show them."""
    tokenizer = load_tokenizer(single_file.CONFIGS / "clip_tokenizer", 77)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a", padding="max_length").input_ids[-1] == 49407
    second = load_tokenizer(single_file.CONFIGS / "clip_tokenizer", 77, {"pad_token": "!"})
    assert second("a", padding="max_length").input_ids[2:] == [49407] + [0] * 74


def most_probable(text: str, scores: dict[str, float]) -> float:
    """The sum of the scores of the best division of a text of one space between words, by dynamic programming."""
    text = "▁" + unicodedata.normalize("NFKC", text).replace(" ", "▁")
    best = [0.0] + [-math.inf] * len(text)
    for end in range(1, len(text) + 1):
        best[end] = max(best[at] + scores.get(text[at:end], -math.inf) for at in range(max(0, end - 24), end))
    return best[-1]


def test_t5s_tokenizer_that_comes_with_diffgen_is_t5s() -> None:
    """The ids that transformers' documentation of T5 prints; and the definition of a unigram tokenizer."""
    folder = single_file.CONFIGS / "t5_tokenizer"
    assert gate.check_tokenizer(folder) == [folder / "spiece.model"]
    tokenizer = load_t5_tokenizer(folder, 512)
    assert tokenizer("The house is wonderful.").input_ids == [37, 629, 19, 1627, 5, 1]
    documented = [2116, 43, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1]
    assert tokenizer("studies have shown that owning a dog is good for you").input_ids == documented
    assert tokenizer("  a\tphoto  \n").input_ids == tokenizer("a photo").input_ids
    assert tokenizer("🍎").input_ids == [3, 2, 1]
    pieces, normalization = _from_sentencepiece(folder / "spiece.model")
    assert (len(pieces), len(normalization)) == (32100, 237_539)
    scores = dict(pieces[3:32000])
    for text in ("a photograph of an astronaut riding a horse", "Zürich, café: １２ ﬁne ⅷ", "qwxzjkvq 100mm f/1.8"):
        ids = tokenizer(text).input_ids[:-1]
        assert sum(pieces[i][1] for i in ids) == pytest.approx(most_probable(text, scores), abs=1e-4)
