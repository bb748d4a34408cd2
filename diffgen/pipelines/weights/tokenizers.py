"""Make tokenizers from the files of a folder: CLIP's byte pairs and T5's unigrams, from their tables alone.

Patterns and code to split and join with, which such a file may name, are ignored: both classes have their own.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from diffgen.errors import InputError
from diffgen.models.gate import MAX_TOKENIZER_FILE, Component, read_json
from diffgen.prompts.tokens import read_vocabulary
from diffgen.prompts.tokens import special_tokens as tokens_of

T5_LENGTH = 512  # tokens
T5_EXTRA = 100  # <extra_id_0> … <extra_id_99>, which spiece.model leaves out and tokenizer.json names


def tokenizer_of(component: Component, encoder: Any) -> CLIPTokenizer | T5Tokenizer:
    """Make the tokenizer of a component that has passed the gate, for an encoder of that configuration.

    CLIP's cuts a text where its encoder ends; T5's encoder has no end, and its pipelines cut at T5_LENGTH or before.
    Raises InputError.
    """
    if component.class_name.startswith("T5"):
        return load_t5_tokenizer(component.folder, T5_LENGTH)
    return load_tokenizer(component.folder, encoder.max_position_embeddings, component.config)


def load_tokenizer(folder: Path, length: int, special_tokens: Mapping[str, str] | None = None) -> CLIPTokenizer:
    """Make CLIP's tokenizer with the vocabulary of a folder; it cuts a text at `length` tokens.

    `special_tokens` (bos_token, eos_token, pad_token, unk_token) override those that the folder names. Raises
    InputError.
    """
    vocabulary, merges = read_vocabulary(folder)
    special = tokens_of(folder) | dict(special_tokens or {})
    outside = [token for token in special.values() if token not in vocabulary]
    if outside:
        raise InputError(f"{folder}: the token {outside[0]!r} is not in the vocabulary")
    try:
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, **special)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise InputError(f"{folder}: makes no CLIP tokenizer: {error}") from error


def load_t5_tokenizer(folder: Path, length: int) -> T5Tokenizer:
    """Make T5's tokenizer with the vocabulary of a folder's tokenizer.json or spiece.model. Raises InputError."""
    path = folder / "tokenizer.json"
    pieces, normalization = _from_json(path) if path.exists() else _from_sentencepiece(folder / "spiece.model")
    if [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise InputError(f"{folder}: the vocabulary does not begin with <pad>, </s>, <unk>, as T5's does")
    try:
        return T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=normalization, model_max_length=length)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise InputError(f"{folder}: makes no T5 tokenizer: {error}") from error


def _from_json(path: Path) -> tuple[list[tuple[str, float]], bytes | None]:
    """(pieces with their log-probabilities, the table of characters to normalise) of a tokenizer.json."""
    content = read_json(path, MAX_TOKENIZER_FILE)
    model = content.get("model")
    rows = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(rows, list) or not all(_is_piece(row) for row in rows):
        raise InputError(f"{path}: has no list of pieces and numbers")
    return [(piece, float(score)) for piece, score in rows], _charsmap(path, content.get("normalizer"))


def _is_piece(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and type(row[1]) in (int, float)


def _charsmap(path: Path, normalizer: Any) -> bytes | None:
    """The table of the first precompiled normalizer, which may be in a sequence."""
    if not isinstance(normalizer, dict):
        return None
    parts = normalizer.get("normalizers")
    for part in parts if isinstance(parts, list) else [normalizer]:
        text = part.get("precompiled_charsmap") if isinstance(part, dict) else None
        if isinstance(text, str):
            try:
                return base64.b64decode(text, validate=True)
            except (ValueError, binascii.Error) as error:
                raise InputError(f"{path}: precompiled_charsmap is not base64") from error
    return None


def _from_sentencepiece(path: Path) -> tuple[list[tuple[str, float]], bytes | None]:
    """The same of a SentencePiece model: a protocol buffer with `pieces` (1) and `normalizer_spec` (3)."""
    pieces: list[tuple[str, float]] = []
    normalization = None
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece: dict[int, Any] = {1: b"", 2: b"\0\0\0\0"} | dict(_fields(value))
                pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece[2])[0]))
            elif number == 3:
                normalization = dict(_fields(value)).get(2)
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path}: not a SentencePiece model: {error}") from error
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(T5_EXTRA))]
    return pieces + extra, normalization or None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer: a whole number, or the bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of the kind {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("cut off")
        yield number, data[at : at + size]
        at += size
