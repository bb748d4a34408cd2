"""Real pictures in two parts, and a small classifier trained on one: what samples are measured against.

    real = Reference(data)
    found, deviation, left_out = real.measure(samples)      # values uint8 [N, C, H, W]
    found["coverage"]                                        # {"value": 0.91, "floor": 0.96, "ceiling": 0.0}

The floor of a metric is what real pictures of the training part reach in place of the samples, the ceiling what noise
reaches: without them no figure of a few hundred pictures can be read.
"""

from __future__ import annotations

import statistics
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from diffgen.errors import InputError

from . import classifier, metrics
from .batches import evenly
from .data.dataset import DataSet

Metrics = dict[str, dict[str, float]]

MOST_TEST, MOST_TRAIN = 2_000, 20_000  # pictures that are looked at, evenly picked from what there is
DRAWS = 5  # of training pictures, for the floors


class Reference:
    """The real pictures that samples are measured against, and the classifier whose features they are measured in.

    data      with at least two pictures in each part
    held_out  the fraction that the run was not trained on
    own       whether the run was trained on the training part: else there is nothing that it could have memorised
    Raises InputError for too few pictures.
    """

    def __init__(self, data: DataSet, held_out: float = 0.1, own: bool = True) -> None:
        self.data, self.own = data, own
        train, test = data.split(held_out)
        if len(train) < 2 or len(test) < 2:
            raise InputError(
                f"{data.name} has {len(train)} pictures to train on and {len(test)} that are held out: two of each are "
                "the least to compare with",
                "use more pictures, or train with a larger data.held_out",
            )
        self.train_index, self.test_index = evenly(train, MOST_TRAIN), evenly(test, MOST_TEST)
        self.train, self.test = data.pictures(self.train_index), data.pictures(self.test_index)
        self.notes = [
            f"of {len(every)} {part} pictures, {len(some)} are looked at"
            for part, every, some in (("training", train, self.train), ("held-out", test, self.test))
            if len(some) < len(every)
        ]
        self._scales = lru_cache(maxsize=4)(self._find_scales)

    @cached_property
    def classifier(self) -> classifier.Classifier:
        """Trained on the training part: by class, or without classes by position."""
        x, labels = self._task(self.train_index)
        return classifier.train_classifier(x, labels, 4 if self.task == "position" else len(self.data.classes or ()))

    @property
    def task(self) -> str:
        """What the classifier tells apart: "class", where there are two at least, or "position"."""
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
        found = classifier.features(self.classifier, self.data.to_float(self.train))
        return found.mean(0), found.std(0).clamp_min(1e-6)

    @cached_property
    def classifier_accuracy(self) -> float:
        """Of the classifier on held-out pictures."""
        return classifier.accuracy(self.classifier, *self._task(self.test_index))

    def measure(
        self, samples: Tensor, labels: Tensor | None = None
    ) -> tuple[Metrics, dict[str, float | None], dict[str, str]]:
        """({name: {value, floor, ceiling}}, {name: the floor's standard deviation}, {name: why it is left out}).

        samples  values uint8 [N, C, H, W], as the data has them, N at least 2
        labels   LongTensor [N]: their classes, if they were made by class
        The floors are of as many training pictures as there are samples, if there are, the mean of a few draws.
        """
        values, floors, ceilings = self._distances(samples), *self._scales(len(samples))
        found: Metrics = {}
        spread: dict[str, float | None] = {}
        left_out = {name: why for name, why in values.items() if isinstance(why, str)}
        for name, value in values.items():
            if not isinstance(value, str):
                of_draws = [draw[name] for draw in floors]
                floor = statistics.fmean(of_draws)
                found[name] = {"value": value, "floor": floor, "ceiling": ceilings[name]}
                spread[name] = statistics.stdev(of_draws) if len(of_draws) > 1 else None
        try:
            found["memorisation_ratio"] = self._memorisation(samples)
        except ValueError as error:
            left_out["memorisation_ratio"] = str(error)
        if labels is not None:
            found["classification_accuracy_score"] = self._classification(samples, labels)
        return found, spread, left_out

    def noise(self, count: int) -> Tensor:
        """Pictures of which every value is drawn evenly from all that there are, uint8 [count, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.data.levels, (count, *self.test.shape[1:]), generator=generator, dtype=torch.uint8)

    def _distances(self, pictures: Tensor) -> dict[str, Any]:
        """From the held-out pictures; a text says why there is none."""
        a, b = pictures.flatten(1), self.test.flatten(1)
        x, y = self.data.to_float(pictures), self.data.to_float(self.test)
        found: dict[str, Any] = {
            "sliced_wasserstein": metrics.sliced_wasserstein(x.flatten(1), y.flatten(1)),
            "frechet_distance": metrics.frechet(self.features(x), self.features(y)),
            "nearest_neighbour_accuracy": metrics.nearest_neighbour_accuracy(a, b),
        }
        try:
            # parts of the size of the held-out part: more pictures would cover more
            parts = shuffled(a).split(len(b))[: max(1, len(a) // len(b))]
            found["density"], found["coverage"] = (
                statistics.fmean(both)
                for both in zip(*(metrics.density_and_coverage(b, part) for part in parts), strict=True)
            )
        except ValueError as error:
            found["density"] = found["coverage"] = str(error)
        return found

    def _find_scales(self, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(the distances of a few draws of `count` training pictures, those of noise)"""
        draws = DRAWS if count < len(self.train) else 1
        floors = [self._distances(shuffled(self.train, draw)[:count]) for draw in range(draws)]
        return floors, self._distances(self.noise(count))

    @cached_property
    def _real_distance(self) -> Tensor:
        """Median distance of a held-out picture to its nearest training picture."""
        return metrics.nearest(self.test.flatten(1), self.train.flatten(1))[0].quantile(0.5)

    def nearest(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """(distance [N], number in `train` [N]) of the nearest training picture; 1 is as far as held-out ones are."""
        distance, number = metrics.nearest(samples.flatten(1), self.train.flatten(1))
        return distance / self._real_distance.clamp_min(1e-9), number

    def _memorisation(self, samples: Tensor) -> dict[str, float]:
        """The floor: training pictures, each compared with the others."""
        if not self.own:
            raise ValueError("the run was trained on other pictures")
        train, test = self.train.flatten(1), self.test.flatten(1)
        picked = evenly(torch.arange(len(train)), MOST_TEST)
        rest = metrics.nearest(train[picked], train, leave_out=picked)[0].quantile(0.5)
        return {
            "value": metrics.memorisation_ratio(samples.flatten(1), train, test),
            "floor": float(rest / self._real_distance),
            "ceiling": metrics.memorisation_ratio(self.noise(len(samples)).flatten(1), train, test),
        }

    def _classification(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """Ravuri and Vinyals 2019; the floor learns from as many real pictures, the ceiling names one class for all."""
        data = self.data
        assert data.labels is not None
        assert data.classes is not None
        x, y, classes = data.to_float(self.test), data.labels[self.test_index], len(data.classes)

        def trained(pictures: Tensor, labels: Tensor) -> float:
            made = classifier.train_classifier(data.to_float(pictures), labels, classes)
            return classifier.accuracy(made, x, y)

        some = shuffled(torch.arange(len(self.train)))[: len(samples)]
        return {
            "value": trained(samples, labels),
            "floor": trained(self.train[some], data.labels[self.train_index[some]]),
            "ceiling": float(y.bincount().max() / len(y)),
        }


def shuffled(x: Tensor, seed: int = 0) -> Tensor:
    """The rows in a random order."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
