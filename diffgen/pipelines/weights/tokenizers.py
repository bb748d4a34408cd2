"""Make tokenizers from the files of a folder: byte pairs of CLIP and Qwen, unigrams of T5, from their tables alone.

Patterns and code to split and join with, which such a file may name, are ignored: the classes have their own. So are
chat templates, which are programs: the few that models need stand here.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from diffgen.errors import InputError
from diffgen.models.gate import MAX_TOKENIZER_FILE, Component, read_bytes, read_json, short
from diffgen.prompts.tokens import read_vocabulary
from diffgen.prompts.tokens import special_tokens as tokens_of

T5_LENGTH = 512  # tokens
T5_EXTRA = 100  # <extra_id_0> … <extra_id_99>, which spiece.model leaves out and tokenizer.json names
MAX_ADDED = 4096  # tokens beside a byte-pair vocabulary

# Chat templates, by the names that families' rows have (`Part.template`). Never one of a file.
TEMPLATES = {
    # Qwen3, turns of text alone; without thinking, the answer begins with an empty thought
    "qwen": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    # Mistral Small 3, turns of texts or of lists of them
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% set text = message.content if message.content is string else message.content|map(attribute='text')|join %}"
        "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
        "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
    ),
}
# How Mistral's tokenizer splits text into words (mistral-common, tekken).
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(component: Component, encoder: Any, template: str = "") -> Any:
    """Make the tokenizer of a component that has passed the gate, for an encoder of that configuration.

    CLIP's cuts a text where its encoder ends; the others' encoders have no end, and their pipelines cut. `template` is
    one of TEMPLATES. Raises InputError.
    """
    if template:
        tokenizer = LOADERS[template](component.folder)
        tokenizer.chat_template = TEMPLATES[template]
        return tokenizer
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


def load_qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Make Qwen's tokenizer with the vocabulary of a folder and the tokens added to it. Raises InputError."""
    vocabulary, merges = read_vocabulary(folder)
    added = _added_tokens(folder)
    known = {**vocabulary, **{token.content: number for number, token in added.items()}}
    if "<|endoftext|>" not in known:
        raise InputError(f"{folder}: the vocabulary has no <|endoftext|>, which Qwen's models pad with")
    try:
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
        tokenizer.add_tokens([token for _, token in sorted(added.items())])
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise InputError(f"{folder}: makes no Qwen tokenizer: {error}") from error
    _check_numbers(folder, tokenizer, added)
    return tokenizer


def load_mistral_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Make Mistral's tokenizer with the vocabulary of a folder and the tokens added to it. Raises InputError.

    The side on which short texts are padded is the folder's.
    """
    vocabulary, merges = read_vocabulary(folder)
    path, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config = read_json(path, MAX_TOKENIZER_FILE) if path.exists() else {}
    content = read_json(file, MAX_TOKENIZER_FILE) if file.exists() else {}
    model = content.get("model")
    side = "left" if config.get("padding_side") == "left" else "right"
    added = _added_tokens(folder)
    known = {**vocabulary, **{token.content: number for number, token in added.items()}}
    needed = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if lacking := next((token for token in needed.values() if token not in known), None):
        raise InputError(f"{folder}: the vocabulary has no {lacking}, which Mistral's models read")
    try:
        whole = isinstance(model, dict) and model.get("ignore_merges") is True
        inner = Tokenizer(BPE(vocabulary, merges, ignore_merges=whole))
        inner.add_tokens([token for _, token in sorted(added.items())])
        split = pre_tokenizers.Split(Regex(TEKKEN), behavior="isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        inner.decoder = decoders.ByteLevel()
        if '"<s>"' in json.dumps(content.get("post_processor")):  # texts begin with it
            inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", known["<s>"])])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, padding_side=side, **needed)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise InputError(f"{folder}: makes no Mistral tokenizer: {error}") from error
    _check_numbers(folder, tokenizer, added)
    return tokenizer


LOADERS = {"qwen": load_qwen_tokenizer, "mistral": load_mistral_tokenizer}


def _check_numbers(folder: Path, tokenizer: Any, added: Mapping[int, AddedToken]) -> None:
    """Raise InputError unless each added token has its number in the tokenizer."""
    for number, token in added.items():
        if (other := tokenizer.convert_tokens_to_ids(token.content)) != number:
            raise InputError(f"{folder}: the added token {short(token.content)} has the number {number}, not {other}")


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """{number: token} of the tokens added to a vocabulary, from the first file that lists them. Raises InputError."""
    rows: list[Any] = []
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        path = folder / name
        if rows or not path.exists():
            continue
        content = read_json(path, MAX_TOKENIZER_FILE)
        table = content.get("added_tokens_decoder") if name == "tokenizer_config.json" else None
        if name == "tokenizer.json":
            rows = content.get("added_tokens") or []
        elif name == "added_tokens.json":
            rows = [{"id": number, "content": token, "special": True} for token, number in content.items()]
        elif isinstance(table, dict):
            rows = [
                {**row, "id": int(n)}
                for n, row in table.items()
                if n.isdecimal() and len(n) < 10 and isinstance(row, dict)
            ]
    if not isinstance(rows, list) or len(rows) > MAX_ADDED:
        raise InputError(f"{folder}: the added tokens are no list of at most {MAX_ADDED}")
    added = {}
    for row in rows:
        text, number = (row.get("content"), row.get("id")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not 0 < len(text) <= 100 or type(number) is not int or number in added:
            raise InputError(f"{folder}: {short(row)} is no added token with a number of its own")
        added[number] = AddedToken(text, special=row.get("special") is True, normalized=False)
    return added


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
        for number, value in _fields(read_bytes(path, MAX_TOKENIZER_FILE)):
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
