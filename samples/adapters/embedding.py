"""A word for something that the model has never seen: textual inversion (Gal et al. 2022, arXiv 2208.01618).

Nothing of the model changes. The word is a few vectors in the text encoder's table of words, and these are moved until
the captions with the word make the model draw the pictures. More vectors say more; one or two are enough for a model
that has seen the world, five are better for one that knows nothing but emoji.
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
BEGINNING = "purple droplet ghost eyes face"  # its vectors begin as those of these words
CAPTIONS = ("{}", "a {}", "{}, flat style")
STEPS, BATCH, RATE = 500, 16, 2e-2
BODY, EYE = "#8457dd", "#2a1a4a"


def dropling(size: float, x: float, y: float, side: int) -> Image.Image:
    """A drop with eyes: its size, and where its middle is, in shares of the picture."""
    s = 8 * side  # drawn large, then made smaller: no jagged edges
    picture = Image.new("RGB", (s, s), "white")
    draw = ImageDraw.Draw(picture)

    def place(across: float, down: float) -> tuple[float, float]:
        """In pixels, of a place that is measured from the drop's middle in shares of its size; so is all below."""
        return (x + across * size) * s, (y + down * size) * s

    def oval(across: float, down: float, wide: float, high: float, colour: str) -> None:
        draw.ellipse((*place(across - wide, down - high), *place(across + wide, down + high)), colour)

    draw.polygon([place(0, -0.52), place(-0.33, -0.02), place(0.33, -0.02)], BODY)
    oval(0, 0.12, 0.38, 0.36, BODY)
    oval(-0.17, 0.1, 0.1, 0.14, EYE)
    oval(0.17, 0.1, 0.1, 0.14, EYE)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def pictures(side: int) -> list[Image.Image]:
    """Eight that differ a little, so that the word becomes what they share."""
    return [dropling(0.9 + 0.03 * (i % 3), 0.5 + 0.02 * math.cos(i), 0.52 + 0.02 * math.sin(i), side) for i in range(8)]


def add_word(model: Frozen) -> tuple[str, nn.Parameter, list[int]]:
    """(the word as the tokenizer reads it, the table [tokens, width], the word's rows): only these rows can learn."""
    tokenizer, encoder = model.tokenizer, model.text_encoder
    known = tokenizer(BEGINNING, add_special_tokens=False).input_ids
    tokens = [f"{WORD[:-1]}-{i}>" for i in range(len(known))]  # one for each vector
    tokenizer.add_tokens(tokens)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    rows = tokenizer.convert_tokens_to_ids(tokens)
    ours = torch.zeros(len(table), 1, device=table.device)
    ours[rows] = 1
    with torch.no_grad():
        table[rows] = table[known]
    table.requires_grad_().register_hook(lambda gradient: gradient * ours)
    return " ".join(tokens), table, rows


def save(table: Tensor, rows: list[int], path: Path) -> None:
    """[n, width], by the name that AUTOMATIC1111 gives it."""
    save_file({"emb_params": table[rows].detach().cpu().contiguous()}, path, {"format": "pt"})


def train(model: Frozen, data: DataSet, path: Path, steps: int = STEPS) -> None:
    """Write the word's vectors. The pictures are drawn here; `data` has nothing to do with them."""
    x0 = model.latents(pictures(model.side))
    word, table, rows = add_word(model)

    def loss(k: int) -> Tensor:
        shown, said = torch.randint(len(x0), (BATCH,)), torch.randint(len(CAPTIONS), (BATCH,))
        return model.loss(x0[shown], model.context([CAPTIONS[i].format(word) for i in said]))

    descend("embedding", [table], loss, steps=steps, batch=BATCH, rate=RATE)
    save(table, rows, path)
