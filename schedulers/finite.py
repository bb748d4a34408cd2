"""Detect non-finite values without reading the device inside the sampling loop."""

from __future__ import annotations

import torch
from torch import Tensor

from schedulers.noise import Point


class NonFinite(ArithmeticError):  # noqa: N818
    """The network's output, or the state after it, held NaN or infinity.

    Attributes: `step`, the first such evaluation, from 0; `t`, its time; `images`, the images of the batch.
    """

    def __init__(self, step: int, t: float, images: list[int]) -> None:
        self.step, self.t, self.images = step, t, images
        which = f"image {images[0]}" if len(images) == 1 else f"images {', '.join(map(str, images))}"
        super().__init__(f"not finite from evaluation {step} on, at t = {t:g}, in {which}")


class OutputSums:
    """The sum over each image of each output, kept on the device: it is finite only if all its terms are."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._points: list[Point] = []

    def __len__(self) -> int:
        return len(self._points)

    def add(self, output: Tensor, p: Point) -> None:
        self._sums.append(_sum_of_images(output))
        self._points.append(p)

    def check(self, result: Tensor) -> None:
        """Read all sums at once, that of the final state too. Raises NonFinite."""
        if not self._points:
            return
        not_finite = ~torch.isfinite(torch.stack([*self._sums, _sum_of_images(result)]))
        for i, row in enumerate(not_finite.tolist()):
            if any(row):
                step = min(i, len(self) - 1)
                raise NonFinite(step, float(self._points[step].t), [j for j, bad in enumerate(row) if bad])


def _sum_of_images(x: Tensor) -> Tensor:
    return x.sum(tuple(range(1, x.ndim))) if x.ndim > 1 else x
