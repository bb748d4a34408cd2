"""Metrics of a cell, means with their intervals, and the order of convergence.

A metric is a function, a line in one of the three tables at the end, and a row in `training.metrics.METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffgen.training.metrics import METRICS, sliced_wasserstein

from .subjects import MixtureSubject

# Student's t at 97.5 %, for 1, 2, … degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def overlaps(self, other: Interval) -> bool:
        """True if the intervals overlap, or one of them is unknown."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


def interval(values: Sequence[float]) -> Interval:
    """Mean ± t·s/√n (Student 1908) of at least one value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t(n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def _t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, beyond the table by its expansion (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """The root-mean-square distance of two arrays of the same shape."""
    return float(np.sqrt(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))))


def psnr(a: Image.Image, b: Image.Image) -> float | None:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB, 20·log10(255/rms); None if they are equal."""
    distance = rms(_pixels(a), _pixels(b))
    return None if distance == 0 else 20 * math.log10(255 / distance)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity of two 8-bit pictures (Wang et al. 2004, eq. 13), 1 if they are equal.

    The mean over pixels and colour channels with the paper's Gaussian window: σ = 1.5, 11 pixels wide (or as wide as a
    smaller picture), K1 = 0.01, K2 = 0.03, only windows inside the picture.
    """
    x, y = _pixels(a), _pixels(b)
    size = min(11, x.shape[0], x.shape[1])
    place = np.arange(size) - (size - 1) / 2
    window = np.exp(-(place**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blur(x, window), _blur(y, window)
    vx, vy = _blur(x * x, window) - mx * mx, _blur(y * y, window) - my * my
    cov = _blur(x * y, window) - mx * my
    index = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(index.mean())


def order(nfe: Sequence[float], errors: Sequence[float]) -> float | None:
    """The measured order of convergence: minus the slope of ln error over ln NFE, by least squares.

    None for fewer than three points.
    """
    if len(nfe) < 3:
        return None
    x, y = np.log(np.asarray(nfe, dtype=np.float64)), np.log(np.asarray(errors, dtype=np.float64))
    return float(-np.polyfit(x, y, 1)[0])


def _pixels(image: Image.Image) -> np.ndarray:
    """[H, W, 3], float64."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def _blur(x: np.ndarray, window: np.ndarray) -> np.ndarray:
    """The separable filter over the first two axes, inner part only."""
    for axis in (0, 1):
        views = np.lib.stride_tricks.sliding_window_view(x, len(window), axis)
        x = views @ window
    return x


def mean_error(x0: Tensor, subject: MixtureSubject, seed: int) -> float:
    """The distance between the mean of a cloud [N, 2] and that of the data."""
    return float((x0.double().mean(0) - subject.moments[0]).norm())


def covariance_error(x0: Tensor, subject: MixtureSubject, seed: int) -> float:
    """The Frobenius distance between the covariance of a cloud [N, 2] and that of the data."""
    return float((torch.cov(x0.double().T) - subject.moments[1]).norm())


def wasserstein_error(x0: Tensor, subject: MixtureSubject, seed: int) -> float:
    """The sliced Wasserstein distance between a cloud [N, 2] and four times as many points of the data."""
    return sliced_wasserstein(x0, subject.draw(4 * len(x0), seed + 1))


# Which metrics a cell has, by their names in METRICS.
RESULT = {"error": rms}  # of the result and the reference
PICTURE = {"psnr": psnr, "ssim": ssim}  # of the decoded pictures of the result and the reference
CLOUD = {  # of a cloud of points, against the distribution that the mixture knows exactly
    "mean_error": mean_error,
    "covariance_error": covariance_error,
    "sliced_wasserstein": wasserstein_error,
}
COMPARED = tuple(name for name in METRICS if name in {**RESULT, **PICTURE, **CLOUD})
