"""Compare samples with real pictures in two parts, and with a small classifier trained on one of them.

    real = RealPictures(data)
    real.measure(samples).metrics["coverage"]      # uint8 [N, C, H, W]; Figures(value=0.91, floor=0.96, ceiling=0.0)

The floor of a metric is what real pictures of the training part reach in place of the samples, the ceiling what noise
reaches: without them, a figure of a few hundred pictures says nothing.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from diffgen.errors import InputError

from . import classifier, metrics
from .batches import evenly
from .data.dataset import DataSet

MOST_TEST, MOST_TRAIN = 2_000, 20_000  # pictures to compare with, evenly picked
DRAWS = 5  # of training pictures, for the floors


@dataclass(frozen=True)
class Figures:
    """A metric of samples, between what real pictures reach (floor) and what noise reaches (ceiling)."""

    value: float
    floor: float
    ceiling: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.value, self.floor, self.ceiling)))


@dataclass(frozen=True)
class Measured:
    """The metrics of samples by name, and why others are missing."""

    metrics: dict[str, Figures]
    floor_deviation: dict[str, float | None]  # standard deviation over the draws of a floor; None for a single draw
    left_out: dict[str, str]  # {name: reason}


class RealPictures:
    """The real pictures that samples are compared with, and the classifier whose features are compared.

    data      with at least two pictures in each part
    held_out  the fraction that the run was not trained on
    own       whether the run was trained on the training part: otherwise there is nothing that it could memorise
    Raises InputError for too few pictures.
    """

    def __init__(self, data: DataSet, held_out: float = 0.1, own: bool = True) -> None:
        self.data, self.own = data, own
        train, test = data.split(held_out)
        if len(train) < 2 or len(test) < 2:
            raise InputError(
                f"{data.name} has {len(train)} pictures to train on and {len(test)} that are held out: a comparison "
                "needs two of each",
                "use more pictures, or train with a larger data.held_out",
            )
        self.train_index, self.test_index = evenly(train, MOST_TRAIN), evenly(test, MOST_TEST)
        self.train, self.test = data.pictures(self.train_index), data.pictures(self.test_index)
        self.notes = [
            f"of {len(every)} {part} pictures, {len(picked)} are used"
            for part, every, picked in (("training", train, self.train), ("held-out", test, self.test))
            if len(picked) < len(every)
        ]
        self._scales = lru_cache(maxsize=4)(self._measure_scales)

    @cached_property
    def classifier(self) -> classifier.Classifier:
        """Trained on the training part: by class, or without classes by position."""
        x, labels = self._task(self.train_index)
        return classifier.train_classifier(x, labels, 4 if self.task == "position" else len(self.data.classes or ()))

    @property
    def task(self) -> str:
        """What the classifier predicts: "class" if there are at least two, else "position"."""
        return "class" if self.data.labels is not None and len(self.data.classes or ()) > 1 else "position"

    def _task(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(pictures, labels) of the classifier's task."""
        x = self.data.to_float(self.data.pictures(index))
        if self.task == "position" or self.data.labels is None:
            return classifier.turned(x)
        return x, self.data.labels[index]

    def features(self, x: Tensor) -> Tensor:
        """[N, 32] of pictures [N, C, H, W]; over the training part each has mean 0 and variance 1."""
        mean, deviation = self._moments
        return (classifier.features(self.classifier, x) - mean) / deviation

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        features = classifier.features(self.classifier, self.data.to_float(self.train))
        return features.mean(0), features.std(0).clamp_min(1e-6)

    @cached_property
    def classifier_accuracy(self) -> float:
        """The accuracy of the classifier on held-out pictures."""
        return classifier.accuracy(self.classifier, *self._task(self.test_index))

    def measure(self, samples: Tensor, labels: Tensor | None = None) -> Measured:
        """Measure samples.

        samples  values uint8 [N, C, H, W] in the range of the data, N at least 2
        labels   LongTensor [N]: their classes, if they were made by class
        A floor is the mean over a few draws of as many training pictures as there are samples, if there are so many.
        """
        values, floors, ceilings = self._distances(samples), *self._scales(len(samples))
        figures: dict[str, Figures] = {}
        deviation: dict[str, float | None] = {}
        left_out = {name: reason for name, reason in values.items() if isinstance(reason, str)}
        for name, value in values.items():
            if not isinstance(value, str):
                draws = [draw[name] for draw in floors]
                figures[name] = Figures(value, statistics.fmean(draws), ceilings[name])
                deviation[name] = statistics.stdev(draws) if len(draws) > 1 else None
        try:
            figures["memorisation_ratio"] = self._memorisation(samples)
        except ValueError as error:
            left_out["memorisation_ratio"] = str(error)
        if labels is not None:
            figures["classification_accuracy_score"] = self._classification(samples, labels)
        return Measured(figures, deviation, left_out)

    def noise(self, count: int) -> Tensor:
        """Pictures of uniformly drawn values, uint8 [count, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.data.levels, (count, *self.test.shape[1:]), generator=generator, dtype=torch.uint8)

    def _distances(self, pictures: Tensor) -> dict[str, Any]:
        """Metrics of pictures against the held-out ones; a text in place of a number says why there is none."""
        a, b = pictures.flatten(1), self.test.flatten(1)
        x, y = self.data.to_float(pictures), self.data.to_float(self.test)
        values: dict[str, Any] = {
            "sliced_wasserstein": metrics.sliced_wasserstein(x.flatten(1), y.flatten(1)),
            "frechet_distance": metrics.frechet(self.features(x), self.features(y)),
            "nearest_neighbour_accuracy": metrics.nearest_neighbour_accuracy(a, b),
        }
        try:
            # as many pictures as are held out: more of them would cover more
            parts = shuffled(a).split(len(b))[: max(1, len(a) // len(b))]
            values["density"], values["coverage"] = (
                statistics.fmean(both)
                for both in zip(*(metrics.density_and_coverage(b, part) for part in parts), strict=True)
            )
        except ValueError as error:
            values["density"] = values["coverage"] = str(error)
        return values

    def _measure_scales(self, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(the metrics of a few draws of `count` training pictures, those of noise)"""
        draws = DRAWS if count < len(self.train) else 1
        floors = [self._distances(shuffled(self.train, draw)[:count]) for draw in range(draws)]
        return floors, self._distances(self.noise(count))

    @cached_property
    def _real_distance(self) -> Tensor:
        """Median distance of a held-out picture to its nearest training picture."""
        return metrics.nearest(self.test.flatten(1), self.train.flatten(1))[0].quantile(0.5)

    def nearest(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """(distance [N], number in `train` [N]) of the nearest training picture; held-out ones have a median of 1."""
        distance, number = metrics.nearest(samples.flatten(1), self.train.flatten(1))
        return distance / self._real_distance.clamp_min(1e-9), number

    def _memorisation(self, samples: Tensor) -> Figures:
        """The memorisation ratio; its floor compares each training picture with the others."""
        if not self.own:
            raise ValueError("the run was trained on other pictures")
        train, test = self.train.flatten(1), self.test.flatten(1)
        picked = evenly(torch.arange(len(train)), MOST_TEST)
        rest = metrics.nearest(train[picked], train, leave_out=picked)[0].quantile(0.5)
        return Figures(
            value=metrics.memorisation_ratio(samples.flatten(1), train, test),
            floor=float(rest / self._real_distance),
            ceiling=metrics.memorisation_ratio(self.noise(len(samples)).flatten(1), train, test),
        )

    def _classification(self, samples: Tensor, labels: Tensor) -> Figures:
        """Ravuri and Vinyals 2019; the floor learns from as many real pictures, the ceiling predicts one class."""
        data = self.data
        assert data.labels is not None
        assert data.classes is not None
        x, y, classes = data.to_float(self.test), data.labels[self.test_index], len(data.classes)

        def accuracy(pictures: Tensor, labels: Tensor) -> float:
            trained = classifier.train_classifier(data.to_float(pictures), labels, classes)
            return classifier.accuracy(trained, x, y)

        picked = shuffled(torch.arange(len(self.train)))[: len(samples)]
        return Figures(
            value=accuracy(samples, labels),
            floor=accuracy(self.train[picked], data.labels[self.train_index[picked]]),
            ceiling=float(y.bincount().max() / len(y)),
        )


def shuffled(x: Tensor, seed: int = 0) -> Tensor:
    """The rows in a random order."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
