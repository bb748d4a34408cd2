"""A tiny random Stable Diffusion folder: every part of the real thing, a few thousand weights each."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "apple",
    "circle",
    "square",
    "on",
    "the",
    "and",
    "piñata",
    "flat",
    "modern",
    "style",
]
CONCEPTS = ["red apple", "green circle", "piñata"]
START, END = "<|startoftext|>", "<|endoftext|>"


def build(folder: Path, closed: bool = False) -> Path:
    """Write the folder: 4 latent channels, 32×32 pixels, VAE factor 8; `closed` adds a card that lists all concepts."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    vocabulary, merges = _byte_pairs(WORDS)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=4,
        sample_size=32,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, f"{word!r} is not one token"
    if closed:
        card = {
            "licence": "CC0-1.0",
            "resolution": 32,
            "concepts": CONCEPTS,
            "styles": ["flat"],
            "held_out": [["piñata", "flat"]],
            "defaults": {"steps": 3, "guidance": 2.0, "scheduler": "euler", "grid": "karras"},
        }
        (folder / "card.json").write_text(json.dumps(card))
    return folder


def byte_level(word: str) -> str:
    """The word in the letters of a byte-level vocabulary: printable Latin-1 bytes stand for themselves, the others for
    the characters from 256 on (GPT-2)."""
    return "".join(_BYTES[byte] for byte in word.encode())


def _byte_letters() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_BYTES = _byte_letters()


def _byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary in which each word is one token: merge the commonest pair until all are whole."""
    letters = sorted(_BYTES.values())
    vocabulary = {token: i for i, token in enumerate([*letters, *(letter + "</w>" for letter in letters), START, END])}
    pieces = [[*byte_level(word)[:-1], byte_level(word)[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((left, right))
        vocabulary.setdefault(left + right, len(vocabulary))
        pieces = [_merge(word, left, right) for word in pieces]
    return vocabulary, merges


def _merge(word: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and merged[-1] == left and piece == right:
            merged[-1] = left + right
        else:
            merged.append(piece)
    return merged


if __name__ == "__main__":
    build(Path(sys.argv[1]), closed=len(sys.argv) > 2)
