"""The captions of a data set as tokens, and which of a picture's captions a step sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffgen.training.data.dataset import Captions

EMPTY = 0  # the number of the empty caption


class Tokens:
    """Every caption once, as the tokens that a text encoder reads; and the choice of one for a picture."""

    def __init__(self, captions: Sequence[Captions], tokenizer: Any) -> None:
        """`captions` of each picture, with their weights; longer ones than the tokenizer's length are cut off."""
        numbers = {"": EMPTY}
        rows: list[int] = []
        ends: list[Tensor] = []
        starts = [0]
        for i, said in enumerate(captions):
            rows += [numbers.setdefault(text, len(numbers)) for text, _ in said]
            parts = torch.tensor([weight for _, weight in said], dtype=torch.float64).cumsum(0)
            ends.append(i + parts / parts[-1])
            starts.append(len(rows))
        self.tokenizer = tokenizer
        self.of, self.ends = torch.tensor(rows), torch.cat(ends)  # of each (picture, caption)
        self.last = torch.tensor(starts[1:]) - 1  # the place of each picture's last caption
        self.heaviest = torch.tensor([numbers[max(said, key=lambda one: one[1])[0]] for said in captions])
        self.texts = list(numbers)
        self.ids = read(tokenizer, self.texts)
        room = tokenizer.model_max_length
        self.too_long = sum(len(ids) > room for ids in tokenizer(self.texts, verbose=False).input_ids)

    def choose(self, pictures: Tensor, u: Tensor) -> Tensor:
        """LongTensor [b]: the caption of each picture that u [b], uniform in [0, 1), stands for, by the weights."""
        at = torch.searchsorted(self.ends, pictures + u.double(), right=True)
        return self.of[at.minimum(self.last[pictures])]


def read(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """LongTensor [B, length]: what a text encoder reads of each text."""
    length = tokenizer.model_max_length
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, verbose=False)
    return torch.tensor(found.input_ids)
