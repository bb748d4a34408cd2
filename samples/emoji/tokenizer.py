"""The tokenizer of the bundled model: byte-pair merges learned from its own captions until each word is one token."""

from __future__ import annotations

import json
from pathlib import Path

from data import STYLES, caption
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"


def build_tokenizer(names: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer whose vocabulary is the words of the captions, the single letters, and the merges in between."""
    sentences = [caption(f"{article} {name}", style) for name in names for style in STYLES for article in ("a", "an")]
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.pre_tokenizer = Whitespace()
    # each word once: rare words get their merges as surely as common ones
    words = sorted({w for s in sentences for w in s.replace(",", " , ").split()})
    letters = [*LETTERS, *(f"{c}</w>" for c in LETTERS)]
    trainer = BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=list(LETTERS),
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = [*sorted({*letters, *model["vocab"]}), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    # longer prompts than any caption are allowed, up to 14 words
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    tokenizer.save_pretrained(folder)  # tokenizer.json, beside vocab.json and merges.txt
    broken = [w for w in words if len(tokenizer(w).input_ids) != 3]
    if broken:
        raise SystemExit(f"these words are not one token each: {broken[:10]}")
    return tokenizer
