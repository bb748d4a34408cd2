"""Write the trained model as a diffusers Stable Diffusion folder in float16, with its card.

python samples/emoji/export.py work/           # work/latents -> work/emoji
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from captions import every, names
from data import HELD_OUT, STYLES
from safetensors.torch import load_file, save_file
from tokenizer import LAST, WIDE, as_bytes, pieces
from transformers import CLIPTokenizer

from diffgen.models.info import COMPOSITIONS
from diffgen.pipelines.training.export import save_latent_run
from diffgen.training.run import read_run

DEFAULTS = {"steps": 25, "guidance": 3.0, "scheduler": "dpmpp_2m", "grid": "karras"}
LICENCE = "Apache-2.0 (weights); pictures: OFL-1.1 (Noto), MIT (Fluent); keywords: MIT (emojibase)"
TABLE = "token_embedding.weight"


def settle(table: torch.Tensor, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """The token embeddings [tokens, width] for inference: tokens in no caption were never trained, and become 0.

    A Chinese character has two tokens, within a word and at its end. If only one was trained, the other becomes a copy.
    """
    words = sorted({word for caption in captions for word in pieces(caption)})
    trained = {i for ids in tokenizer(words).input_ids for i in ids}
    mask = torch.tensor([i not in trained for i in range(len(table))])
    table = table.detach().cpu().masked_fill(mask[:, None], 0)
    for character in {c for word in words for c in word if c >= WIDE}:
        pair = tokenizer.convert_tokens_to_ids([as_bytes(character), as_bytes(character) + LAST])
        for one, other in (pair, pair[::-1]):
            if one in trained and other not in trained:
                table[other] = table[one]
    return table


def card(work: Path) -> dict:
    """The model's card, with its names and words. `card.py` adds the figures of its training."""
    table = names(work)
    words = {word for caption in every(table) for word in pieces(caption) if any(map(str.isalnum, word))}
    return {
        "schema": "diffgen.card/1",
        "licence": LICENCE,
        "resolution": read_run(work / "latents").data["size"][0],
        "styles": list(STYLES),
        "held_out": json.loads(HELD_OUT.read_text("utf-8")),
        "defaults": DEFAULTS,
        "concepts": sorted(table),
        "words": sorted(words),
        "compositions": {name: [] for name in COMPOSITIONS},  # it draws one thing at a time
    }


def main(work: Path, which: str = "ema") -> None:
    """Export work/latents to work/emoji, and replace an older one."""
    captions = every(names(work))
    write(work / "latents", work / "tokenizer", work / "emoji", card(work), captions, which)


def write(run_folder: Path, tokens: Path, folder: Path, about: dict, captions: list[str], which: str = "ema") -> None:
    """Export a run with its card to `folder`, and replace an older one. `captions` are all that it was trained on."""
    run, new = read_run(run_folder), folder.with_suffix(".tmp")
    newest = run.latest()
    if newest is None:
        raise SystemExit(f"{run.folder} has no checkpoint")
    shutil.rmtree(new, ignore_errors=True)
    save_latent_run(run, new, about, which=which)
    path, tokenizer = new / "text_encoder" / "model.safetensors", CLIPTokenizer.from_pretrained(tokens)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(TABLE)]:
        tensors[name] = settle(tensors[name], tokenizer, captions)
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    print(f"{which} of step {newest.name} -> {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--weights", default="ema", help="ema, model, or ema-<length>")
    arguments = parser.parse_args()
    main(arguments.work, arguments.weights)
