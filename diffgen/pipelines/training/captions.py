"""The captions of a data set as tokens, and the choice of a caption for a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffgen.training.data.dataset import Captions

EMPTY = 0  # the number of the empty caption


class Tokens:
    """All distinct captions as token ids, and a weighted choice among the captions of a picture."""

    def __init__(self, captions: Sequence[Captions], tokenizer: Any) -> None:
        """`captions` of each picture, with their weights; captions beyond the tokenizer's length are cut off."""
        numbers = {"": EMPTY}
        rows: list[int] = []
        ends: list[Tensor] = []
        starts = [0]
        for i, texts in enumerate(captions):
            rows += [numbers.setdefault(text, len(numbers)) for text, _ in texts]
            parts = torch.tensor([weight for _, weight in texts], dtype=torch.float64).cumsum(0)
            ends.append(i + parts / parts[-1])
            starts.append(len(rows))
        self.tokenizer = tokenizer
        self.of, self.ends = torch.tensor(rows), torch.cat(ends)  # of each (picture, caption)
        self.last = torch.tensor(starts[1:]) - 1  # the position of each picture's last caption
        self.heaviest = torch.tensor([numbers[max(texts, key=lambda pair: pair[1])[0]] for texts in captions])
        self.texts = list(numbers)
        self.ids = read(tokenizer, self.texts)
        room = tokenizer.model_max_length
        self.too_long = sum(len(ids) > room for ids in tokenizer(self.texts, verbose=False).input_ids)

    def choose(self, pictures: Tensor, u: Tensor) -> Tensor:
        """Draw a caption of each picture by its weights: LongTensor [b], from u [b] uniform in [0, 1)."""
        at = torch.searchsorted(self.ends, pictures + u.double(), right=True)
        return self.of[at.minimum(self.last[pictures])]


def read(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The token ids of texts, LongTensor [B, length]."""
    length = tokenizer.model_max_length
    encoding = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, verbose=False)
    return torch.tensor(encoding.input_ids)
