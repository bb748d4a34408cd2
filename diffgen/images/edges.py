"""The simple maps that ControlNets read, drawn from a picture with numpy: canny and scribble."""

from __future__ import annotations

import numpy as np
from PIL import Image

LOW, HIGH = 100, 200  # Canny's thresholds of the gradient's size, as ControlNet's examples have them


def is_map(image: Image.Image) -> bool:
    """Whether the picture is a map of lines: nearly only black and white, without colour, more black than white."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    colour = (pixels.max(2) - pixels.min(2)).max()
    grey = pixels[..., 0]
    extreme = ((grey <= 32) | (grey >= 223)).mean()
    return bool(colour <= 16 and extreme >= 0.98 and (grey >= 128).mean() < 0.5)


def canny(image: Image.Image, low: float = LOW, high: float = HIGH) -> Image.Image:
    """Edges as white lines, one pixel wide, on black (RGB).

    Canny, "A computational approach to edge detection" (1986): the gradient by Sobel's operator on grey, kept where it
    is largest across the edge and above `high`, or above `low` and connected with such a pixel.
    """
    dx, dy = _sobel(_blurred(image))
    size = np.abs(dx) + np.abs(dy)
    ridge = _is_ridge(size, dx, dy)
    strong = _connected(ridge & (size >= high), ridge & (size >= low))
    return _white_on_black(strong)


def scribble(image: Image.Image) -> Image.Image:
    """A rough drawing: strong edges only, white lines three pixels wide on black (RGB)."""
    lines = np.asarray(canny(image, 2 * LOW, 2 * HIGH))[..., 0] > 0
    return _white_on_black(_grown(lines))


def _blurred(image: Image.Image) -> np.ndarray:
    """Grey, float64, smoothed with the binomial filter (1, 4, 6, 4, 1)/16 each way."""
    grey = np.asarray(image.convert("L")).astype(np.float64)
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    for axis in (0, 1):
        padded = np.pad(grey, [(2, 2) if axis == a else (0, 0) for a in (0, 1)], mode="edge")
        grey = sum(w * np.take(padded, np.arange(grey.shape[axis]) + i, axis) for i, w in enumerate(kernel))
    return grey


def _sobel(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = np.pad(grey, 1, mode="edge")
    across = p[:-2] + 2 * p[1:-1] + p[2:]
    down = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    return across[:, 2:] - across[:, :-2], down[2:] - down[:-2]


def _is_ridge(size: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Where the gradient is not smaller than its two neighbours along its own direction (one of four)."""
    angle = np.rint(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    p = np.pad(size, 1)
    h, w = size.shape
    ridge = np.zeros((h, w), bool)
    for direction, (y, x) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        ahead = p[1 + y : 1 + y + h, 1 + x : 1 + x + w]
        behind = p[1 - y : 1 - y + h, 1 - x : 1 - x + w]
        ridge |= (angle == direction) & (size >= ahead) & (size > behind)
    return ridge


def _connected(seeds: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The pixels of `allowed` that a path of neighbours in `allowed` joins to a seed."""
    grown = seeds
    while True:
        more = _grown(grown) & allowed
        if (more == grown).all():
            return grown
        grown = more


def _grown(mask: np.ndarray) -> np.ndarray:
    p = np.pad(mask, 1)
    h, w = mask.shape
    return np.logical_or.reduce([p[y : y + h, x : x + w] for y in range(3) for x in range(3)])


def _white_on_black(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255)
