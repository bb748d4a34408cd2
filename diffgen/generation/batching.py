"""Make the pictures of several plans in batches of what can be made together, and yield them in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from .model import OnStep
from .plan import Picture, Plan

AHEAD = 4  # batches: a picture is made at most this long before its turn


class Maker(Protocol):
    """Makes the pictures of the plans that share one `Plan.batch_key`."""

    @property
    def size(self) -> int:
        """The number of pictures in a full batch."""

    def kind(self, shot: Any, /) -> Hashable:
        """Shots of equal kinds fit into one batch."""

    def make(self, shots: list[Any], /) -> Iterable[Picture]:
        """The pictures of a batch, in its order."""


class Progress:
    """Counts the evaluations of the network for the pictures of some plans, and estimates how many there will be."""

    def __init__(self, plans: Sequence[Plan], nfe: Callable[[Any], int], on_step: OnStep | None) -> None:
        """`nfe(plan)` is the number of evaluations for one batch of a plan."""
        self.on_step = on_step
        self.done = self.total = 0
        self.left: Counter[Hashable] = Counter()
        self.nfe: dict[Hashable, int] = {}
        self.sizes: dict[Hashable, int] = {}
        for plan in plans:
            key = plan.batch_key
            if key not in self.nfe:
                self.nfe[key] = nfe(plan)
                self.sizes[key] = plan.batch_size or 1
            self.left[key] += len(plan)

    def begin(self, key: Hashable, size: int) -> None:
        """A batch of at most `size` pictures begins."""
        self.sizes[key] = size
        self.total = self.done + sum(-(-left // self.sizes[key]) * self.nfe[key] for key, left in self.left.items())

    def tick(self) -> None:
        """The network was evaluated."""
        self.done += 1
        if self.on_step is not None:
            self.on_step(self.done, max(self.done, self.total))


def in_batches(plans: Sequence[Plan], maker_of: Callable[[Any], Maker], progress: Progress) -> Iterator[Picture]:
    """Make the pictures of all plans, and yield them in the order of the plans and of their shots.

    `maker_of(plan)` makes the pictures with the plan's batch key. A batch takes its pictures from the next `AHEAD`
    batches' worth of them: plans that alternate fill batches too, and few finished pictures wait for their turn.
    """
    keys = {id(plan): plan.batch_key for plan in plans}
    coming = (
        (number, (shot, keys[id(shot.plan)])) for number, shot in enumerate(s for plan in plans for s in plan.shots())
    )
    waiting = dict(islice(coming, 1))  # (shot, batch key) by number
    finished: dict[int, Picture] = {}
    turn, current = 0, None
    maker: Maker | None = None
    while waiting:
        first, key = waiting[turn]
        if maker is None or key != current:
            maker = None  # so that its memory is free before the next one takes some
            maker, current = maker_of(first.plan), key
        if maker.size > 1:
            waiting.update(islice(coming, max(0, AHEAD * maker.size - len(waiting) - len(finished))))
        kind = maker.kind(first)
        alike = (number for number, (shot, own) in waiting.items() if own == key and maker.kind(shot) == kind)
        numbers = list(islice(alike, maker.size))
        progress.begin(key, maker.size)
        for number, picture in zip(numbers, maker.make([waiting[number][0] for number in numbers]), strict=True):
            del waiting[number]
            progress.left[key] -= 1
            finished[number] = picture
            while turn in finished:
                yield finished.pop(turn)
                turn += 1
        waiting.update(islice(coming, 0 if waiting else 1))
