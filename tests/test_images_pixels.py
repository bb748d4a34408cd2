"""Pixels and numbers, against integer arithmetic and against diffusers' own processor."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffgen.errors import InvalidOutput
from diffgen.images.pixels import from_pil, pixels_sha256, to_pil

RANDOM = np.random.default_rng(0)


def test_all_values_come_back_exactly():
    values = np.arange(256, dtype=np.uint8)
    pixels = np.stack([values, values[::-1], values]).reshape(3, 16, 16).transpose(1, 2, 0)
    x = from_pil(Image.fromarray(np.ascontiguousarray(pixels)))
    assert (x.dtype, x.shape, x.min(), x.max()) == (np.float32, (3, 16, 16), -1, 1)
    assert (np.asarray(to_pil(x[None])[0]) == pixels).all()


def test_range_and_layout():
    x = np.zeros((2, 3, 4, 5), dtype=np.float32)
    x[0, 0], x[0, 1], x[0, 2] = -1, 1, 7
    first, second = to_pil(x)
    assert (first.mode, first.size) == ("RGB", (5, 4))
    assert first.getpixel((4, 3)) == (0, 255, 255)
    assert second.getpixel((0, 0)) == (128, 128, 128)


@given(st.floats(-1, 1, width=32))
def test_rounds_to_the_nearest(value):
    """Against rational arithmetic: float32 may only decide otherwise right at the middle of two pixel values."""
    exact = (Fraction(value) + 1) * Fraction(255, 2)
    pixel = to_pil(np.full((1, 3, 1, 1), value, dtype=np.float32))[0].getpixel((0, 0))[0]
    assert abs(exact - pixel) <= Fraction(1, 2) + Fraction(1, 2**15)


def test_same_pixels_as_diffusers():
    torch = pytest.importorskip("torch")
    processing = pytest.importorskip("diffusers.image_processor")
    x = np.concatenate([RANDOM.normal(0, 0.7, (2, 3, 64, 64)), RANDOM.integers(-255, 256, (2, 3, 64, 64)) / 255])
    x = x.astype(np.float32)
    theirs = processing.VaeImageProcessor().postprocess(torch.from_numpy(x), output_type="pil")
    for ours, other in zip(to_pil(x), theirs, strict=True):
        assert (np.asarray(ours) == np.asarray(other)).all()


def test_half_precision_is_read_as_it_is():
    x = RANDOM.uniform(-1, 1, (1, 3, 8, 8)).astype(np.float16)
    assert to_pil(x)[0].tobytes() == to_pil(x.astype(np.float32))[0].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = np.zeros((3, 3, 4, 4), dtype=np.float32)
    x[1, 2, 3, 3] = bad
    with pytest.raises(InvalidOutput, match="picture 2 of 3"):
        to_pil(x)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_other_channels_and_levels(levels):
    """Against rational arithmetic: every value of its levels becomes the nearest of 0 … 255."""
    steps = np.arange(levels)
    x = (2 * steps / (levels - 1) - 1).astype(np.float32)
    expected = [round(Fraction(255 * int(i), levels - 1)) for i in steps]
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        (image,) = to_pil(np.tile(x, (1, channels, 1, 1)), levels)
        assert (image.mode, image.size) == (mode, (levels, 1))
        assert (np.asarray(image).reshape(levels, channels) == np.array(expected)[:, None]).all()
    near = to_pil(np.tile(x + np.float32(0.4 / levels), (1, 1, 1, 1)), levels)[0]
    assert list(near.tobytes()) == expected


def test_shape_is_checked():
    for shape in ((3, 4, 4), (1, 5, 4, 3), (1, 2, 4, 4)):
        with pytest.raises(ValueError, match="expected"):
            to_pil(np.zeros(shape, dtype=np.float32))


def test_hash_is_of_the_pixels_alone(tmp_path):
    image = Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    assert pixels_sha256(image) == hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
    image.save(tmp_path / "x.png", compress_level=0)
    image.save(tmp_path / "y.webp", lossless=True)
    hashes = {pixels_sha256(Image.open(tmp_path / name)) for name in ("x.png", "y.webp")}
    assert hashes == {pixels_sha256(image)}
