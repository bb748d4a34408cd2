"""Train a word for something that the model has not seen: textual inversion (Gal et al. 2022, arXiv 2208.01618).

The model does not change. The word is a few vectors in the text encoder's embedding table. They are trained until the
model draws the pictures from captions with the word. More vectors carry more: one or two are enough for a large model,
and five are better for one that was trained on emoji only.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from model import Frozen, descend
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from diffgen.training.data.dataset import DataSet

WORD = "<dropling>"
BEGINNING = "purple droplet ghost eyes face"  # the vectors start as those of these words
CAPTIONS = ("{}", "a {}", "{}, flat style")
STEPS, BATCH, RATE = 500, 16, 2e-2
BODY, EYE = "#8457dd", "#2a1a4a"


def dropling(size: float, x: float, y: float, side: int) -> Image.Image:
    """A drop with eyes; its size and centre (x, y) are fractions of the picture."""
    s = 8 * side  # drawn large, then reduced: no jagged edges
    picture = Image.new("RGB", (s, s), "white")
    draw = ImageDraw.Draw(picture)

    def place(across: float, down: float) -> tuple[float, float]:
        """Pixels of a position relative to the drop's centre, in units of its size."""
        return (x + across * size) * s, (y + down * size) * s

    def oval(across: float, down: float, wide: float, high: float, colour: str) -> None:
        draw.ellipse((*place(across - wide, down - high), *place(across + wide, down + high)), colour)

    draw.polygon([place(0, -0.52), place(-0.33, -0.02), place(0.33, -0.02)], BODY)
    oval(0, 0.12, 0.38, 0.36, BODY)
    oval(-0.17, 0.1, 0.1, 0.14, EYE)
    oval(0.17, 0.1, 0.1, 0.14, EYE)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def pictures(side: int) -> list[Image.Image]:
    """Eight pictures that differ a little, so that the word learns what they share."""
    return [dropling(0.9 + 0.03 * (i % 3), 0.5 + 0.02 * math.cos(i), 0.52 + 0.02 * math.sin(i), side) for i in range(8)]


def add_word(model: Frozen) -> tuple[str, nn.Parameter, list[int]]:
    """Add the word; only its rows are trained. Returns (its tokens as text, the table [tokens, width], the rows)."""
    tokenizer, encoder = model.tokenizer, model.text_encoder
    initial = tokenizer(BEGINNING, add_special_tokens=False).input_ids
    tokens = [f"{WORD[:-1]}-{i}>" for i in range(len(initial))]  # one for each vector
    tokenizer.add_tokens(tokens)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    rows = tokenizer.convert_tokens_to_ids(tokens)
    mask = torch.zeros(len(table), 1, device=table.device)
    mask[rows] = 1
    with torch.no_grad():
        table[rows] = table[initial]
    table.requires_grad_().register_hook(lambda gradient: gradient * mask)
    return " ".join(tokens), table, rows


def save(table: Tensor, rows: list[int], path: Path) -> None:
    """Write the vectors [n, width], with AUTOMATIC1111's name."""
    save_file({"emb_params": table[rows].detach().cpu().contiguous()}, path, {"format": "pt"})


def train(model: Frozen, data: DataSet, path: Path, steps: int = STEPS) -> None:
    """Train the word's vectors on drawn pictures, and write them. `data` is not used."""
    x0 = model.latents(pictures(model.side))
    word, table, rows = add_word(model)

    def loss(k: int) -> Tensor:
        batch, captions = torch.randint(len(x0), (BATCH,)), torch.randint(len(CAPTIONS), (BATCH,))
        return model.loss(x0[batch], model.context([CAPTIONS[i].format(word) for i in captions]))

    descend("embedding", [table], loss, steps=steps, batch=BATCH, rate=RATE)
    save(table, rows, path)
