"""Which pictures a step sees, and at which times: pure functions of the seed and the step, for every job."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .seeds import HELD_OUT, ORDER, generator

HELD_OUT_PICTURES = 256  # at most; each is evaluated at four times


class Shuffle:
    """The pictures of step k: each epoch goes through all of them once, in an order of its own.

    With a window, an epoch goes through so many pictures only. Each window has `repeats` epochs, then comes the next
    one; what remains after the last whole window is left out. If the batch divides the window, all pictures of a step
    are in the same window.
    """

    def __init__(self, pictures: Tensor, batch: int, seed: int, window: int = 0, repeats: int = 1) -> None:
        self.pictures, self.batch, self.seed = pictures, batch, seed
        self.window, self.repeats = window or len(pictures), repeats
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def __call__(self, k: int) -> Tensor:
        """LongTensor [batch]: numbers of pictures."""
        n, parts = self.window, []
        first, stop = k * self.batch, (k + 1) * self.batch
        while first < stop:
            epoch, begin = divmod(first, n)
            end = min(n, begin + stop - first)
            parts.append(self._epoch(epoch)[begin:end])
            first += end - begin
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        first = epoch // self.repeats % (len(self.pictures) // self.window) * self.window
        order = torch.randperm(self.window, generator=generator(self.seed, ORDER, epoch))
        return self.pictures[first + order]


def times(u: Tensor, T: int, stratified: bool) -> Tensor:
    """Times 0 … T − 1, LongTensor [B], of u [B] uniform in [0, 1).

    Stratified: one from each of B equal parts of the range, which is less variance at no cost.
    """
    t = (torch.arange(len(u), device=u.device) + u) * (T / len(u)) if stratified else u * T
    return t.long().clamp_(max=T - 1)


def evenly(index: Tensor, count: int) -> Tensor:
    """At most `count` of the numbers, evenly spread."""
    return index if len(index) <= count else index[torch.linspace(0, len(index) - 1, count).long()]


def held_out_draws(shape: tuple[int, ...], T: int, quarter: int) -> tuple[Tensor, Tensor]:
    """(times [N] in that quarter of 0 … T − 1, noise [N, …]) for held-out examples of that shape, on the CPU.

    They do not depend on the run's seed, so that the losses of runs with different seeds can be compared.
    """
    g = generator(HELD_OUT, quarter)
    u = (torch.arange(shape[0]) + torch.rand(shape[0], generator=g)) / shape[0]
    return ((quarter + u) * (T / 4)).long().clamp_(max=T - 1), torch.randn(shape, generator=g)
