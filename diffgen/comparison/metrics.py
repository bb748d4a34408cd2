"""How far apart two results are, and what a handful of them says about the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Student's t at 97.5 %, for 1, 2, … degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; with one value there is no interval: low and high are None."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def overlaps(self, other: Interval) -> bool:
        """True too where one of them is unknown: then nothing can be told apart."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


def interval(values: Sequence[float]) -> Interval:
    """Mean ± t·s/√n (Student 1908). `values` must not be empty."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _t(n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def _t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by its expansion (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """The root-mean-square distance of two arrays of one shape."""
    return float(np.sqrt(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))))


def psnr(a: Image.Image, b: Image.Image) -> float | None:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB: 20·log10(255/rms); None if they are the same."""
    distance = rms(_pixels(a), _pixels(b))
    return None if distance == 0 else 20 * math.log10(255 / distance)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity of two 8-bit pictures (Wang et al. 2004, eq. 13), 1 for equal ones.

    Mean over pixels and colour channels, with the paper's Gaussian window: σ = 1.5, 11 pixels wide (as wide as the
    picture, where that is smaller), K1 = 0.01, K2 = 0.03; only windows that lie inside the picture.
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
    """The measured order of convergence: minus the slope of ln error over ln NFE, by least squares; None below 3."""
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
