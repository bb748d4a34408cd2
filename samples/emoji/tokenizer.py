"""The tokenizer of the bundled model: CLIP's byte-level BPE, merged until each word of the captions is one token.

Each Chinese character is one token, so that names in no caption can still be read. To CLIP's tokenizer a run of
characters is one word; no merge joins two of them. The last character of a run has its own token, with the end-of-word
mark. All 256 bytes are tokens, so any text can be encoded.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import unicodedata
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
WIDE = "\u2e80"  # Unicode characters from here on are one token each
LENGTH = 24  # tokens of a prompt, including start and end


def pieces(text: str) -> list[str]:
    """The text split as CLIP's tokenizer does: runs of letters, single digits, runs of other characters."""
    return re.findall(r"[^\W\d_]+|\d|(?:[^\w\s]|_)+", unicodedata.normalize("NFC", text).lower())


def as_bytes(text: str) -> str:
    """The text in CLIP's spelling: one printable character for each byte of its UTF-8."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def character_merges(character: str) -> list[tuple[str, str]]:
    """The merges that make a character one token, within a word and at its end."""
    spelt = as_bytes(character)
    inside = [(spelt[:i], spelt[i]) for i in range(1, len(spelt))]
    return [*inside, (spelt[:-1], spelt[-1] + LAST)] if len(spelt) > 1 else []


def word_merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges that make each word one token. Each word is learned from once, so that rare words get theirs too.

    Word ends are declared special tokens, so that they are numbered before training. The trainer breaks ties between
    equally frequent pairs by these numbers, and so the same words always give the same merges.
    """
    bpe = Tokenizer(BPE(end_of_word_suffix=LAST))
    bpe.pre_tokenizer = WhitespaceSplit()
    ends = [character + LAST for character in sorted(pre_tokenizers.ByteLevel.alphabet())]
    trainer = BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix=LAST, show_progress=False, special_tokens=ends
    )
    bpe.train_from_iterator([as_bytes(w) for w in words], trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]


def joined(word: str, merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that are missing for a word without the end-of-word mark, such as "flat" in "flat风格"."""
    rank, parts, missing = {m: i for i, m in enumerate(merges)}, list(as_bytes(word)), []
    while len(parts) > 1:
        pair = min(itertools.pairwise(parts), key=lambda p: rank.get(p, len(rank)))
        if pair not in rank:
            missing.append(pair)
        i = list(itertools.pairwise(parts)).index(pair)
        parts[i : i + 2] = ["".join(pair)]
    return missing


def build_tokenizer(captions: list[str], folder: Path, length: int = LENGTH) -> CLIPTokenizer:
    """A CLIPTokenizer with a token for each byte, word and Chinese character of the captions.

    Raises SystemExit if a word or a character is not one token, or if a caption is too long.
    """
    words = sorted({w for c in captions for w in pieces(c)})
    wide = sorted({c for w in words for c in w if c >= WIDE})
    parts = {w: re.findall(f"[{''.join(wide)}]|[^{''.join(wide)}]+", w) if wide else [w] for w in words}
    merges = [m for c in wide for m in character_merges(c)]
    merges += word_merges(sorted({p[-1] for p in parts.values()} - set(wide)))
    for part in sorted({x for p in parts.values() for x in p[:-1]} - set(wide)):
        merges += joined(part, merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(c + LAST for c in alphabet), *(a + b for a, b in merges), START, END])
    shutil.rmtree(
        folder, ignore_errors=True
    )  # CLIPTokenizer would read an old tokenizer.json instead of the new vocabulary
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length)
    tokenizer.save_pretrained(folder)  # adds tokenizer.json
    broken = [w for w in words if len(tokenizer(w).input_ids) != 2 + len(parts[w])]
    if broken:
        raise SystemExit(f"these words are not one token each: {broken[:10]}")
    long = [c for c in captions if len(tokenizer(c).input_ids) > length]
    if long:
        raise SystemExit(f"these captions are longer than {length} tokens: {long[:10]}")
    return tokenizer
