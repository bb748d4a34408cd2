"""Pictures are read by their content, within limits, upright, and without metadata."""

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffgen.errors import InputError
from diffgen.images.read import MAX_PIXELS, read_image, read_kind, read_texts


def noise(height=9, width=14, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_of_size(width, height, data=b""):
    """A PNG whose header claims that size, written by hand."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def file(tmp_path):
    def write(data, name="picture"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.txt", "x"])
def test_formats_are_known_by_content(file, form, name):
    pixels = noise()
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    image = read_image(file(encode(Image.fromarray(pixels), form, **options), name))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, dtype=int) - pixels).max() <= (6 if form == "JPEG" else 0)


def test_modes(file):
    grey = noise(channels=1)[..., 0]
    expected = np.repeat(grey[..., None], 3, 2)
    sixteen = grey.astype(np.uint16) * 257  # the same grey in 16 bits
    assert (np.asarray(read_image(file(encode(Image.fromarray(grey), "PNG")))) == expected).all()
    assert (np.asarray(read_image(file(encode(Image.fromarray(sixteen), "PNG")))) == expected).all()
    one_bit = Image.fromarray(grey > 127)
    assert (np.asarray(read_image(file(encode(one_bit, "PNG")))) == np.where(expected > 127, 255, 0)).all()
    palette = Image.fromarray(noise()).quantize(16)
    assert (np.asarray(read_image(file(encode(palette, "PNG")))) == np.asarray(palette.convert("RGB"))).all()
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert np.asarray(read_image(file(encode(white, "JPEG")))).min() >= 250


def test_transparent_pixels_lie_on_white(file):
    rgba = noise(channels=4)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    read = np.asarray(read_image(file(encode(Image.fromarray(rgba), "PNG"))), dtype=float)
    assert np.abs(read - expected).max() <= 1
    palette = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    palette.putpalette([10, 20, 30] * 4)
    read = np.asarray(read_image(file(encode(palette, "PNG", transparency=2))))
    assert read.reshape(4, 3).tolist() == [[10, 20, 30], [10, 20, 30], [255, 255, 255], [10, 20, 30]]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "L"), ("L", "L"), ("I;16", "L"), ("LA", "RGBA"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGBA")],
)
def test_pictures_are_read_in_the_requested_mode(file, mode, kind):
    stored = Image.fromarray(noise(channels=4 if "A" in mode else 3)).convert(mode)
    path = file(encode(stored, "PNG"))
    assert read_kind(path) == (14, 9, kind)
    for requested in ("L", "RGB", "RGBA"):
        image = read_image(path, requested)
        assert (image.mode, image.size) == (requested, (14, 9))
    if mode not in ("LA", "RGBA"):
        assert np.asarray(read_image(path, "RGBA"))[..., 3].min() == 255
    else:
        assert read_image(path, "RGBA").tobytes() == stored.convert("RGBA").tobytes()
    assert read_image(path, "L").tobytes() == read_image(path).convert("L").tobytes()


def test_the_header_is_read_upright_and_judged(file):
    exif = Image.Exif()
    exif[0x0112] = 8
    assert read_kind(file(encode(Image.fromarray(noise()), "JPEG", exif=exif))) == (9, 14, "RGB")
    for data in (b"", b"GIF89a", png_of_size(9000, 9000)):
        with pytest.raises(InputError):
            read_kind(file(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(file, orientation):
    """By the EXIF table: which stored side is the visual top and left."""
    upright = noise()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = file(encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif))
    assert (np.asarray(read_image(path)) == upright).all()


def test_metadata_is_dropped(file):
    exif = Image.Exif()
    exif[0x010E] = "EXIF-SECRET"
    exif.get_ifd(0x8825)[1] = "N"
    data = encode(Image.fromarray(noise()), "JPEG", comment=b"COMMENT-SECRET", exif=exif, icc_profile=b"ICC-SECRET")
    assert all(secret in data for secret in (b"EXIF-SECRET", b"COMMENT-SECRET", b"ICC-SECRET"))
    image = read_image(file(data))
    assert image.info == {}
    assert not image.getexif()
    for form in ("JPEG", "PNG", "WEBP"):
        assert b"SECRET" not in encode(image, form)


@pytest.mark.parametrize(
    ("width", "height"), [(12000, 12000), (MAX_PIXELS + 1, 1), (2**31 - 1, 2**31 - 1), (30000, 30000)]
)
def test_size_is_refused_by_the_header(file, width, height, recwarn):
    with pytest.raises(InputError, match="MP"):
        read_image(file(png_of_size(width, height, zlib.compress(bytes(10**6)))))
    assert not recwarn.list


def test_the_limit_itself_passes_the_header(file):
    with pytest.raises(InputError, match="truncated or broken"):  # too few pixels in it, but not too large
        read_image(file(png_of_size(8192, 8192, zlib.compress(b"\0"))))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animations_are_refused(file, form):
    frames = [Image.fromarray(noise() // n) for n in (1, 2, 3)]
    with pytest.raises(InputError, match="animation of 3 frames"):
        read_image(file(encode(frames[0], form, save_all=True, append_images=frames[1:])))


def test_of_a_photo_with_a_preview_the_photo_is_read(file):
    photo, preview = Image.fromarray(noise(16, 16)), Image.new("RGB", (4, 4))
    data = encode(photo, "MPO", save_all=True, append_images=[preview])
    assert read_image(file(data)).size == (16, 16)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"<html></html>", b"GIF89a" + bytes(50), b"BM" + bytes(60), b"%!PS-Adobe-3.0", b"\x89PNG\r\n\x1a\n"],
)
def test_other_files_are_refused(file, data):
    with pytest.raises(InputError, match="cannot read the picture"):
        read_image(file(data, "x.png"))


def test_other_formats_of_pillow_are_refused(file):
    for form in ("GIF", "BMP", "TIFF", "PPM", "ICO"):
        with pytest.raises(InputError, match="cannot read"):
            read_image(file(encode(Image.fromarray(noise(16, 16)), form), "x.png"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused(file, form):
    data = encode(Image.fromarray(noise(64, 64)), form)
    for part in (0.1, 0.5, 0.9):
        with pytest.raises(InputError):
            read_image(file(data[: int(part * len(data))]))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1),
)
def test_damaged_files_are_read_or_refused(tmp_path_factory, form, damage):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(Image.fromarray(noise(8, 8)), form, exif=exif))
    for place, value in damage:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    with contextlib.suppress(InputError):  # and nothing else
        assert read_image(path).mode == "RGB"


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", ""):
        with pytest.raises(InputError, match="regular file"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(InputError):
        read_image("https://example.com/x.png")
    with pytest.raises(InputError):
        read_image("x\0.png")


def test_texts(file):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("plain", "a")
    chunks.add_text("wide", "東京")
    assert read_texts(file(encode(Image.fromarray(noise()), "PNG", pnginfo=chunks))) == {"plain": "a", "wide": "東京"}
