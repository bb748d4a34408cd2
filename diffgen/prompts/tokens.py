"""CLIP's tokenizer, and prompts split into the chunks that CLIP's text encoders read.

An encoder reads a fixed number of tokens at once; two of them are the start and the end. A longer prompt is split into
chunks, which are encoded one by one and concatenated, as in AUTOMATIC1111.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from diffgen.errors import InputError
from diffgen.models.gate import MAX_TOKENIZER_FILE, read_bytes, read_json

from .syntax import Part

MAX_TOKENS = 600_000  # of a vocabulary, and merges: twice what the largest known ones have

COMMA_REACH = 20  # tokens: AUTOMATIC1111's "comma padding backtrack"

_START, _END = "<|startoftext|>", "<|endoftext|>"
# How CLIP splits text into words, from the paper's code (simple_tokenizer.py of openai/CLIP).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Chunk = list[tuple[int, float]]  # (token number, weight) pairs, without start, end and padding


class ClipTokenizer:
    """CLIP's tokenizer with a folder's vocabulary; it gives the same numbers as the transformers library."""

    def __init__(self, folder: Path, length: int, special: Mapping[str, str] | None = None) -> None:
        """Read the vocabulary. `length` is how many tokens the encoder reads at once, start and end included; `special`
        overrides the folder's special tokens. Raises InputError."""
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
            raise InputError(f"{folder}: not a CLIP tokenizer: {error}") from error
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
        """The token numbers of a text, without start and end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token(self, number: int) -> str:
        """A token as readable text; the end of a word is a space."""
        return self._tokenizer.decode([number], skip_special_tokens=False).replace("</w>", " ")

    def text(self, numbers: Sequence[int]) -> str:
        """The text of a sequence of tokens."""
        return self._tokenizer.decode(list(numbers), skip_special_tokens=False).replace("</w>", " ").strip()


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read (tokens, merges) from a byte-pair tokenizer's folder: tokenizer.json, else vocab.json and merges.txt.

    With merges.txt alone, the tokens are the bytes, then what each merge makes. Raises InputError if the files hold no
    byte-pair vocabulary.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        model = read_json(path, MAX_TOKENIZER_FILE).get("model")
        vocabulary, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    else:
        path = folder / "vocab.json"
        lines = read_bytes(folder / "merges.txt", MAX_TOKENIZER_FILE).decode("utf-8", "replace").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        if path.exists():
            vocabulary = read_json(path, MAX_TOKENIZER_FILE)
        else:
            tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "", 1) for merge in merges)]
            vocabulary = {token: i for i, token in enumerate(tokens)}
    if not isinstance(vocabulary, dict) or not all(type(i) is int and 0 <= i < 2**31 for i in vocabulary.values()):
        raise InputError(f"{path}: not a table of tokens and numbers")
    if not isinstance(merges, list):
        raise InputError(f"{path}: not a list of merges")
    if max(len(vocabulary), len(merges)) > MAX_TOKENS:
        raise InputError(f"{path}: {len(vocabulary)} tokens and {len(merges)} merges, at most {MAX_TOKENS} are read")
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m if isinstance(m, list) else ()) for m in merges]
    if not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs):
        raise InputError(f"{folder}: a merge is not a pair of texts")
    return vocabulary, pairs


def special_tokens(folder: Path) -> dict[str, str]:
    """Read bos_token, eos_token, pad_token and unk_token from a CLIP tokenizer's folder. Raises InputError."""
    tokens = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).exists():
            for name, value in read_json(folder / file, MAX_TOKENIZER_FILE).items():
                token = value.get("content") if isinstance(value, dict) else value
                if name in tokens and isinstance(token, str):
                    tokens[name] = token
    return tokens


def chunks(sections: Sequence[Sequence[Part]], ids: Callable[[str], list[int]], room: int) -> list[Chunk]:
    """Split a parsed prompt into one or more chunks of at most `room` tokens; each section begins a new chunk.

    If there is a comma among the last 20 tokens of a full chunk, the chunk ends after that comma and the tokens behind
    it move to the next chunk. `ids` turns a text into token numbers.
    """
    comma = ids(",")
    finished: list[Chunk] = []
    for section in sections:
        chunk: Chunk = []
        for number, weight in [(number, weight) for text, weight in section for number in ids(text)]:
            if len(chunk) == room:
                kept = room if [number] == comma else _after_comma(chunk, comma)
                finished.append(chunk[:kept])
                chunk = chunk[kept:]
            chunk.append((number, weight))
        finished.append(chunk)
    while len(finished) > 1 and not finished[-1]:
        finished.pop()
    return finished


def _after_comma(chunk: Chunk, comma: list[int]) -> int:
    """The number of tokens that a full chunk keeps."""
    for place in range(len(chunk) - 1, max(len(chunk) - COMMA_REACH, 0) - 1, -1):
        if [chunk[place][0]] == comma:
            return place + 1
    return len(chunk)
