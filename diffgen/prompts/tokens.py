"""From words to token numbers in chunks, as CLIP's text encoders read them. Imports no torch.

An encoder reads so many tokens at once, of which two are the start and the end. A longer prompt is read in several
chunks, and what the encoder makes of them is put side by side, as AUTOMATIC1111 does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from diffgen.errors import InputError
from diffgen.models.gate import MAX_TOKENIZER_FILE, read_json

from .syntax import Part
from .words import read_vocabulary

COMMA_REACH = 20  # tokens: AUTOMATIC1111's "comma padding backtrack"

_START, _END = "<|startoftext|>", "<|endoftext|>"
# How CLIP cuts text into words, from the paper's code (simple_tokenizer.py of openai/CLIP).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Chunk = list[tuple[int, float]]  # (token number, weight) each, without start, end and padding


class ClipTokenizer:
    """CLIP's tokenizer with a folder's vocabulary; its numbers are those of the transformers library's."""

    def __init__(self, folder: Path, length: int, special: Mapping[str, str] | None = None) -> None:
        """`length`: tokens that the encoder reads at once, start and end included; `special` goes before what the
        folder says of special tokens. Raises InputError."""
        vocabulary, merges = read_vocabulary(folder)
        special = special_tokens(folder) | dict(special or {})
        self.length = length
        outside = [token for token in special.values() if token not in vocabulary]
        if outside:
            raise InputError(f"{folder}: the token {outside[0]!r} is not in the vocabulary")
        try:
            model = BPE(
                vocabulary,
                merges,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                unk_token=special["unk_token"],
            )
            self._tokenizer = Tokenizer(model)
            self._tokenizer.add_special_tokens(
                [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(special.values())]
            )
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise InputError(f"{folder}: makes no CLIP tokenizer: {error}") from error
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()

    def ids(self, text: str) -> list[int]:
        """The numbers of a text's tokens, without start and end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token(self, number: int) -> str:
        """A token as it can be read: the end of a word is a space."""
        return self._tokenizer.decode([number], skip_special_tokens=False).replace("</w>", " ")

    def text(self, numbers: Sequence[int]) -> str:
        """What tokens say."""
        return self._tokenizer.decode(list(numbers), skip_special_tokens=False).replace("</w>", " ").strip()


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, pad_token and unk_token of a CLIP tokenizer's folder. Raises InputError."""
    found = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).exists():
            for name, value in read_json(folder / file, MAX_TOKENIZER_FILE).items():
                token = value.get("content") if isinstance(value, dict) else value
                if name in found and isinstance(token, str):
                    found[name] = token
    return found


def chunks(sections: Sequence[Sequence[Part]], ids: Callable[[str], list[int]], room: int) -> list[Chunk]:
    """A parsed prompt in chunks of at most `room` tokens, at least one; each section begins a new one.

    A full chunk ends after its last comma if that is among its last 20 tokens: what follows goes over to the next one.
    `ids` makes the token numbers of a text.
    """
    comma = ids(",")
    made: list[Chunk] = []
    for section in sections:
        chunk: Chunk = []
        for number, weight in [(number, weight) for text, weight in section for number in ids(text)]:
            if len(chunk) == room:
                kept = room if [number] == comma else _after_comma(chunk, comma)
                made.append(chunk[:kept])
                chunk = chunk[kept:]
            chunk.append((number, weight))
        made.append(chunk)
    while len(made) > 1 and not made[-1]:
        made.pop()
    return made


def _after_comma(chunk: Chunk, comma: list[int]) -> int:
    """How many tokens a full chunk keeps."""
    for place in range(len(chunk) - 1, max(len(chunk) - COMMA_REACH, 0) - 1, -1):
        if [chunk[place][0]] == comma:
            return place + 1
    return len(chunk)
