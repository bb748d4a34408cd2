"""Which pictures a step sees, and at which times: pure functions of the seed and the step, for every job."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.dataset import TrainingData
from .seeds import HELD_OUT, ORDER, generator, mix

Order = Callable[[int, int], Tensor]  # (begin, end): the pictures at these positions of an epoch
IN_MEMORY = 10**7  # pictures whose order is kept as one tensor

AHEAD = 2  # steps whose pictures are read early
HELD_OUT_PICTURES = 256  # at most; each is evaluated at four times


class Shuffle:
    """The pictures of step k: each epoch goes through all of them once, in an order of its own.

    With a window, an epoch goes through so many pictures only. Each window has `repeats` epochs, then comes the next
    one; what remains after the last whole window is left out. If the batch divides the window, all pictures of a step
    are in the same window.

    With `bounds`, pictures are in shards, and an epoch takes the shards in an order of its own, `shards` at a time: it
    mixes the pictures of these, then goes on to the next ones. So only so many shards must be at hand.
    """

    def __init__(
        self,
        pictures: Tensor,
        batch: int,
        seed: int,
        window: int = 0,
        repeats: int = 1,
        *,
        bounds: Tensor | None = None,
        shards: int = 0,
    ) -> None:
        """`bounds`, LongTensor [S + 1], says where each shard begins among the pictures, and their count."""
        self.pictures, self.batch, self.seed = pictures, batch, seed
        self.window, self.repeats = window or len(pictures), repeats
        self.bounds, self.shards = bounds, shards
        self._epoch: Callable[[int], Order] = lru_cache(maxsize=2)(self._order)

    def __call__(self, k: int) -> Tensor:
        """LongTensor [batch]: numbers of pictures."""
        n, parts = self.window, []
        first, stop = k * self.batch, (k + 1) * self.batch
        while first < stop:
            epoch, begin = divmod(first, n)
            end = min(n, begin + stop - first)
            parts.append(self._epoch(epoch)(begin, end))
            first += end - begin
        return torch.cat(parts)

    def _order(self, epoch: int) -> Order:
        if self.bounds is not None and self.shards:
            return ShardOrder(self.pictures, self.bounds, self.shards, (self.seed, ORDER, epoch))
        first = epoch // self.repeats % (len(self.pictures) // self.window) * self.window
        if self.window > IN_MEMORY:
            far = Permutation(self.window, mix(self.seed, ORDER, epoch))
            return lambda begin, end: self.pictures[first + far(torch.arange(begin, end))]
        near = torch.randperm(self.window, generator=generator(self.seed, ORDER, epoch))
        return lambda begin, end: self.pictures[first + near[begin:end]]


class BucketShuffle(Shuffle):
    """A shuffle whose steps have pictures of one shape as far as that goes, so that they are one batch of the network.

    Each epoch has every picture once. Its full batches of one shape come in random order; the pictures that fill none
    share steps with other shapes, first those that complete the last step of the epoch before.
    """

    def __init__(self, pictures: Tensor, batch: int, seed: int, shapes: Sequence[Hashable]) -> None:
        """`shapes` are those of all pictures, by their numbers."""
        super().__init__(pictures, batch, seed)
        self.shapes = shapes

    def _order(self, epoch: int) -> Order:
        n, size, g = len(self.pictures), self.batch, generator(self.seed, ORDER, epoch)
        groups: dict[Hashable, list[int]] = {}
        for picture in self.pictures[torch.randperm(n, generator=g)].tolist():
            groups.setdefault(self.shapes[picture], []).append(picture)
        blocks, rest = [], []
        for group in groups.values():
            whole = len(group) // size * size
            blocks += [group[i : i + size] for i in range(0, whole, size)]
            rest += group[whole:]
        begun = min(n, -epoch * n % size)
        while len(rest) < begun:
            rest += blocks.pop()
        head, rest = rest[:begun], rest[begun:]
        blocks += [rest[i : i + size] for i in range(0, len(rest) - size + 1, size)]
        blocks = [blocks[i] for i in torch.randperm(len(blocks), generator=g).tolist()]
        order = torch.tensor([*head, *(p for block in blocks for p in block), *rest[len(rest) // size * size :]])
        return lambda begin, end: order[begin:end]


class ShardOrder:
    """A permutation in two levels: the shards, then the pictures of some shards at a time."""

    def __init__(self, pictures: Tensor, bounds: Tensor, at_once: int, words: tuple[int, ...]) -> None:
        """A pure function of its arguments; `words` are those of the generator."""
        self.pictures, self.bounds, self.words = pictures, bounds, words
        shards = torch.randperm(len(bounds) - 1, generator=generator(*words))
        self.groups = shards.split(at_once)
        counts = torch.stack([(bounds[group + 1] - bounds[group]).sum() for group in self.groups])
        self.ends = counts.cumsum(0)
        self._group = lru_cache(maxsize=2)(self._mixed)

    def __call__(self, begin: int, end: int) -> Tensor:
        """The pictures at the positions begin … end − 1 of the epoch: LongTensor."""
        parts = []
        while begin < end:
            group = int(torch.searchsorted(self.ends, begin, right=True))
            start = int(self.ends[group - 1]) if group else 0
            stop = min(end, int(self.ends[group]))
            parts.append(self._group(group)[begin - start : stop - start])
            begin = stop
        return torch.cat(parts) if parts else self.pictures[:0]

    def _mixed(self, group: int) -> Tensor:
        """The pictures of some shards, in random order."""
        shards = self.groups[group].tolist()
        members = torch.cat([self.pictures[int(self.bounds[s]) : int(self.bounds[s + 1])] for s in shards])
        return members[torch.randperm(len(members), generator=generator(*self.words, group))]


class Permutation:
    """A pseudorandom permutation of 0 … n − 1 that needs no memory: a Feistel network with cycle walking.

    Four rounds on the smallest even number of bits that holds n (Luby & Rackoff 1988); numbers that leave the range
    are permuted again until they are inside (Black & Rogaway 2002), at most four times on average.
    """

    def __init__(self, n: int, key: int) -> None:
        """`n` is at most 2⁶²."""
        self.n, self.half = n, max(1, ((n - 1).bit_length() + 1) // 2)
        self.keys = [np.uint64(mix(key, turn)) for turn in range(4)]

    def __call__(self, positions: Tensor) -> Tensor:
        """Where these positions go: LongTensor, as `positions`."""
        x = self._once(positions.numpy().astype(np.uint64))
        while (outside := x >= self.n).any():
            x[outside] = self._once(x[outside])
        return torch.from_numpy(x.astype(np.int64))

    def _once(self, x: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = x >> half, x & mask
        for key in self.keys:
            h = right ^ key  # SplitMix64's finalizer (Steele, Lea & Flood 2014)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((h ^ (h >> np.uint64(31))) & mask)
        return (left << half) | right


def shuffle_of(config: Any, data: TrainingData, train: Tensor, window: int = 0, repeats: int = 1) -> Shuffle:
    """The order of the training pictures; by shards if the configuration wants that and the data have some."""
    batch, seed, shards = config.train.batch_size, config.train.seed, config.data.shuffle_shards
    bounds = getattr(data, "shard_bounds", None)
    if not shards or bounds is None:
        return Shuffle(train, batch, seed, window, repeats)
    return Shuffle(train, batch, seed, window, repeats, bounds=bounds(train), shards=shards)


def prefetch(data: TrainingData, indices: Shuffle, k: int, positions: slice) -> None:
    """Let data that are read, such as shards, begin with the pictures of the steps after k."""
    begin = getattr(data, "prefetch", None)
    if begin is not None:
        for ahead in range(1, AHEAD + 1):
            begin(indices(k + ahead)[positions])


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
