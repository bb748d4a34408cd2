"""Data to train on: the digits, folders of every kind, the same in every process, and refused if broken."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffgen.errors import CannotWrite, InputError, UsageError
from diffgen.images.pixels import from_pil, to_pil
from diffgen.training.data import dataset, mapped, open_data
from diffgen.training.data import folder as listing
from diffgen.training.data.dataset import DataSet

ROOT = Path(__file__).parent.parent


def picture(number, size=(6, 5), mode="RGB"):
    """A picture of its own for each number."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


@pytest.fixture
def write(tmp_path):
    """write({"a/1.png": picture or text or bytes}) makes files in a folder and returns it."""

    def make(files, name="pictures"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for path, what in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(what, Image.Image):
                what.save(folder / path)
            else:
                (folder / path).write_bytes(what.encode() if isinstance(what, str) else what)
        return folder

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of this test's own."""
    monkeypatch.setattr(mapped, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def values(image):
    return torch.from_numpy(np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1).copy())


# The digits


def test_digits_are_those_of_uci():
    """What scikit-learn's documentation says of them: the first picture, the counts of the classes, the sum."""
    data = open_data("digits")
    assert (len(data), data.channels, data.size, data.levels, data.name) == (1797, 1, (8, 8), 17, "digits")
    assert data.images[0, 0, :2].tolist() == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    assert (int(data.images.long().sum()), int(data.images.max())) == (561718, 16)
    assert data.labels is not None
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.classes == list("0123456789")
    assert data.captions is None
    assert data.fingerprint == "2f6ae3e0b1be7d64c195f320a2e53035725f27cc63e6967d44747cb7f1c3c174"


def test_a_bundled_name_goes_before_a_folder(write, monkeypatch):
    """Otherwise a run that is written to ./digits would be its own data when it is resumed."""
    monkeypatch.chdir(write({"digits/a.png": picture(0)}))
    assert len(open_data("digits")) == 1797
    assert len(open_data("./digits")) == 1


@pytest.mark.parametrize("options", [{"size": 16}, {"channels": 3}])
def test_digits_stay_as_they_are(options):
    assert len(open_data("digits", size=8, channels=1)) == 1797
    with pytest.raises(UsageError, match="digits is 8x8, L"):
        open_data("digits", **options)


# Folders


def test_flat_folder(write):
    folder = write({f"{i}.png": picture(i) for i in range(12)} | {"LICENCE.txt": "free", ".hidden.png": "no picture"})
    data = open_data(folder)
    assert (len(data), data.channels, data.size, data.levels) == (12, 3, (5, 6), 256)
    assert (data.labels, data.classes, data.captions, data.name, data.notes) == (None, None, None, "pictures", ())
    order = sorted(range(12), key=str)  # by name: 0, 1, 10, 11, 2, …
    assert torch.equal(data.images, torch.stack([values(picture(i)) for i in order]))


def test_class_folders(write):
    folder = write({f"{kind}/{i}/{i}.png": picture(i) for i, kind in enumerate(["dog", "cat", "dog"])})
    data = open_data(f"{folder}/")
    assert data.classes == ["cat", "dog"]
    assert data.labels is not None
    assert (data.labels.dtype, data.labels.tolist()) == (torch.int64, [0, 1, 1])
    assert torch.equal(data.images[0], values(picture(1)))
    assert data.about() == {
        "name": "pictures",
        "channels": 3,
        "size": [5, 6],
        "classes": ["cat", "dog"],
        "levels": 256,
        "count": 3,
        "fingerprint": data.fingerprint,
    }


def test_one_subfolder_is_no_class(write):
    assert open_data(write({"all/1.png": picture(1), "all/2.png": picture(2)})).classes is None


def test_links_are_followed_once(write, tmp_path):
    folder = write({"cat/1.png": picture(1)})
    (write({"2.png": picture(2)}, "elsewhere") / "loop").symlink_to(tmp_path / "elsewhere")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    data = open_data(folder)
    assert (len(data), data.classes) == (2, ["cat", "dog"])


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_captions(write, form):
    texts = {"b.png": 'a "red" apple, on 木', "sub/a.png": "", "c.png": "a\nb"}
    if form == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text, "other": [1]}) for name, text in texts.items()]
        metadata = "\ufeff" + "\n\n".join(lines)
    else:
        metadata = "text,file_name\n" + "".join('"{}",{}\n'.format(t.replace('"', '""'), n) for n, t in texts.items())
    files = {name: picture(i) for i, name in enumerate(texts)}
    data = open_data(write(files | {f"metadata.{form}": metadata, "unnamed.png": picture(9)}))
    assert data.captions == [((texts[name], 1.0),) for name in sorted(texts)]
    assert torch.equal(data.images, torch.stack([values(files[name]) for name in sorted(files)]))
    assert data.notes == (f"left out, because metadata.{form} does not name them: unnamed.png",)
    assert data.labels is None


def test_metadata_without_text(write):
    data = open_data(write({"a.png": picture(1), "metadata.jsonl": '{"file_name": "./a.png"}'}))
    assert (len(data), data.captions) == (1, None)


# Sizes and kinds


def test_mixed_sizes_are_scaled_and_cropped_in_the_middle(write):
    wide = Image.new("RGB", (40, 10), "red")
    wide.paste("blue", (15, 0, 25, 10))  # the middle square
    folder = write({"wide.png": wide, "small.png": Image.new("RGB", (4, 4), "green"), "x.png": picture(0, (10, 10))})
    with pytest.raises(InputError, match="3 sizes, with sides from 4 to 40 pixels") as excinfo:
        open_data(folder)
    assert "--size 4" in excinfo.value.hint
    data = open_data(folder, size=10)
    assert data.size == (10, 10)
    assert torch.equal(data.images[1], values(Image.new("RGB", (10, 10), "blue")))
    assert torch.equal(data.images[0], values(Image.new("RGB", (10, 10), "green")))
    assert torch.equal(data.images[2], values(picture(0, (10, 10))))
    assert data.notes == (
        "2 of 3 pictures scaled and cropped to 10x10",
        "1 of 3 pictures were smaller and are enlarged",
    )
    assert open_data(folder, size=(6, 8)).size == (6, 8)


def test_mixed_modes_are_read_as_the_richest(write):
    kinds = {"L": picture(0, mode="L"), "RGB": picture(1), "RGBA": picture(2, mode="RGBA")}
    for names, channels in (("L", 1), ("L RGB", 3), ("L RGB RGBA", 4), ("RGBA", 4)):
        data = open_data(write({f"{name}.png": kinds[name] for name in names.split()}, names))
        assert data.channels == channels
        for i, name in enumerate(sorted(names.split())):
            assert torch.equal(data.images[i], values(kinds[name].convert(["L", "", "RGB", "RGBA"][channels - 1])))
    assert data.notes == ()


def test_pictures_are_read_in_the_requested_channels(write):
    folder = write({"a.png": picture(2, mode="RGBA"), "b.png": picture(0, mode="L")})
    on_white = Image.alpha_composite(Image.new("RGBA", (6, 5), "white"), picture(2, mode="RGBA")).convert("RGB")
    assert torch.equal(open_data(folder, channels=3).images[0], values(on_white))
    assert torch.equal(open_data(folder, channels=1).images[0], values(on_white.convert("L")))
    assert torch.equal(open_data(folder, channels=4).images[1], values(picture(0, mode="L").convert("RGBA")))
    assert open_data(folder).notes == ("pictures of several kinds (L, RGBA) all read as RGBA",)


def test_sizes_are_upright(write):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = write({"a.png": picture(0, (4, 6))})
    picture(1, (6, 4)).save(folder / "b.png", exif=exif)
    assert open_data(folder).size == (6, 4)


@pytest.mark.parametrize("size", [0, -1, 2000, 1.5, (8,), (8, 0), "8", True])
def test_sizes_are_checked(size):
    with pytest.raises(UsageError, match="size"):
        open_data("digits", size=size)


def test_other_arguments_are_checked():
    with pytest.raises(UsageError, match="channels must be 1, 3 or 4"):
        open_data("digits", channels=2)
    with pytest.raises(UsageError, match="memory"):
        open_data("digits", memory="disk")


def test_large_pictures_need_a_size(write):
    folder = write({"a.png": Image.new("L", (1100, 2))})
    with pytest.raises(InputError, match="1100x2 pixels: a side is at most 1024"):
        open_data(folder)
    assert open_data(folder, size=2).size == (2, 2)


# What is refused


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("digist", "there is no data set 'digist'", "did you mean 'digits'?"),
        ("Digits", "there is no data set", "did you mean 'digits'?"),
        ("nowhere/at/all", "there is no data set", "a folder of pictures, or a bundled name: digits"),
        ("", "there is no data set", "digits"),
        ("a\0b", "there is no data set", "digits"),
        ("file", "'file' is neither a folder nor a file", "digits"),
    ],
)
def test_refused_data_sets(tmp_path, monkeypatch, name, message, hint):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(InputError) as excinfo:
        open_data(name)
    assert message in excinfo.value.message
    assert hint in excinfo.value.hint


GOOD = '{"file_name": "a.png", "text": "a"}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no picture in it"),
        ({"a.gif": b"GIF89a", "b.txt": "x"}, "no picture in it .*, only a.gif"),
        ({"run.json": "{}", "samples/1.png": picture(0)}, "is a training run"),
        ({"b.png": picture(0), "a.png": b"\x89PNG\r\n\x1a\n"}, r"a\.png"),
        ({"a.png": picture(0), "b.png": "<html>"}, r"b\.png: it is no PNG"),
        ({"a.png": picture(0), "cat/b.png": picture(1)}, r"1 pictures lie in the folder itself, .* \(cat\)"),
        ({"train/a.png": picture(0), "test/a.png": picture(0)}, "look like parts of a data set"),
        ({"a.png": picture(0), "metadata.jsonl": GOOD, "metadata.csv": "file_name\na.png\n"}, "has both"),
        ({"a.png": picture(0), "metadata.jsonl": ""}, "names no picture"),
        ({"a.png": picture(0), "metadata.jsonl": GOOD + "\n" + GOOD}, r"line 3: 'a\.png' is already on line 1"),
        ({"a.png": picture(0), "metadata.jsonl": GOOD + GOOD.replace("a.png", "./a.png")}, "already on line 1"),
        ({"a.png": picture(0), "metadata.jsonl": GOOD.replace("a.png", "b.png")}, r"line 1: no file 'b\.png'"),
        ({"a.png": picture(0), "metadata.jsonl": GOOD + '{"text": "a"}'}, "line 2: no file_name"),
        ({"a.png": picture(0), "metadata.jsonl": '{"file_name": 3}'}, "line 1: no file_name"),
        ({"a.png": picture(0), "metadata.jsonl": "[]"}, "line 1: not a JSON object"),
        ({"a.png": picture(0), "metadata.jsonl": GOOD + '{"file_name": "a.png"'}, "line 2: broken JSON"),
        ({"a.png": picture(0), "metadata.jsonl": "[" * 60_000}, "line 1: broken JSON"),
        ({"a.png": picture(0), "metadata.jsonl": " " * 70_000}, "line 1: longer than"),
        ({"a.png": picture(0), "metadata.jsonl": '{"file_name": "a.png", "text": 3}'}, "the text 3 is not a string"),
        (
            {"a.png": picture(0), "metadata.jsonl": '{"file_name": "a.png", "text": "\\ud800"}'},
            "is not a string in UTF-8",
        ),
        ({"a.png": picture(0), "metadata.jsonl": GOOD.encode("utf-16")}, "not UTF-8"),
        ({"a.png": picture(0), "metadata.csv": "file_name,text\n\xff\n".encode("latin-1")}, "not UTF-8"),
        ({"a.png": picture(0), "metadata.csv": 'file_name,text\na.png,"x\n'}, "broken CSV"),
        ({"a.png": picture(0), "metadata.csv": "name,text\na.png,x\n"}, "line 2: no file_name"),
        (
            {"a.png": picture(0), "b.png": picture(1), "metadata.jsonl": GOOD + '{"file_name": "b.png"}'},
            r"line 2: 'b\.png' has no text, 'a\.png' has one",
        ),
    ],
)
def test_refused_folders(write, files, message):
    with pytest.raises(InputError, match=message):
        open_data(write(files))


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "b/../../a.png", "C:\\\\a.png", "..\\\\a.png", "a\\u0000.png"]
)
def test_metadata_stays_in_its_folder(write, tmp_path, name):
    picture(0).save(tmp_path / "a.png")
    folder = write({"a.png": picture(0), "metadata.jsonl": GOOD.replace("a.png", name)})
    with pytest.raises(InputError, match="leads out of the folder"):
        open_data(folder)


def test_metadata_that_is_a_pipe_is_not_waited_for(write):
    folder = write({"a.png": picture(0)})
    os.mkfifo(folder / "metadata.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        open_data(folder)


def test_a_picture_with_broken_pixels_is_named(write):
    folder = write({f"{i}.png": picture(i, (64, 64)) for i in range(5)})
    content = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])
    for memory in ("ram", "map"):
        with pytest.raises(InputError, match=r"3\.png: it is truncated or broken"):
            open_data(folder, memory=memory)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_metadata_is_read_or_refused(tmp_path_factory, damage):
    folder = tmp_path_factory.getbasetemp() / "damaged-metadata"
    folder.mkdir(exist_ok=True)
    picture(0).save(folder / "a.png")
    data = bytearray((GOOD * 2).replace("a.png", "b.png", 1).encode())
    picture(1).save(folder / "b.png")
    for place, value in damage:
        data[place % len(data)] = value
    (folder / "metadata.jsonl").write_bytes(data)
    with contextlib.suppress(InputError):  # and nothing else
        assert len(open_data(folder)) <= 2


# The same for everyone


def test_the_fingerprint_depends_on_what_matters(write, tmp_path):
    files = {f"{kind}/{i}.png": picture(10 * i + len(kind)) for kind in ("a", "bb") for i in range(3)}
    data = open_data(write(files))
    backwards = write(dict(reversed(files.items())), "other-order")
    assert open_data(backwards).fingerprint == data.fingerprint
    for file in backwards.rglob("*.png"):  # the same pixels in other files
        pixels = Image.open(file)
        pixels.load()
        pixels.save(file.with_suffix(".webp"), lossless=True)
        file.unlink()
    assert open_data(backwards).fingerprint == data.fingerprint

    changes = {
        "a pixel": {**files, "a/0.png": picture(99)},
        "a class's name": {name.replace("bb/", "cc/"): what for name, what in files.items()},
        "one more": {**files, "a/3.png": picture(98)},
        "no classes": {name.replace("/", "-"): what for name, what in files.items()},
        "another class": {("bb/x.png" if name == "a/0.png" else name): what for name, what in files.items()},
        "captions": {
            **{name.replace("/", "-"): what for name, what in files.items()},
            "metadata.csv": "file_name,text\n" + "".join(f"{name.replace('/', '-')},t\n" for name in files),
        },
    }
    fingerprints = {open_data(write(changed, name)).fingerprint for name, changed in changes.items()}
    assert len(fingerprints | {data.fingerprint}) == len(changes) + 1
    assert open_data(write(files), channels=1).fingerprint != data.fingerprint


def some_data(labels, same=()):
    """A set of 1×1 pictures; those of `same` are equal."""
    count = len(labels)
    images = torch.arange(count * 2).to(torch.uint8).reshape(count, 1, 1, 2)
    digests = torch.from_numpy(dataset.digests_of([np.array([0 if i in same else i + 1]) for i in range(count)]))
    classes = sorted(set(labels))
    return DataSet("x", images, torch.tensor(labels), [str(c) for c in classes], None, 256, digests)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
    st.integers(0, 2**32),
)
def test_split(labels, held_out, seed):
    data = some_data(labels)
    train, test = data.split(held_out, seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    assert train.tolist() == sorted(train.tolist())
    assert test.tolist() == sorted(test.tolist())
    assert train.dtype == test.dtype == torch.int64
    counts = [labels.count(c) for c in range(4)]
    counted = [sum(labels[i] == c for i in test.tolist()) for c in range(4)]
    if any(round(held_out * n) for n in counts):
        assert counted == [round(held_out * n) for n in counts]
    else:
        assert len(test) == (held_out > 0 and len(labels) > 1)
    assert all(torch.equal(a, b) for a, b in zip(data.split(held_out, seed), (train, test), strict=True))


def test_split_is_the_same_on_every_machine_and_another_for_another_seed():
    data = open_data("digits")
    train, test = data.split()
    assert (len(train), len(test)) == (1618, 179)
    assert hashlib.sha256(test.numpy().astype("<i8").tobytes()).hexdigest()[:16] == "acd9eeac7c2bcecd"
    assert len(set(test.tolist()) & set(data.split(seed=1)[1].tolist())) < 60
    with pytest.raises(ValueError, match="held_out"):
        data.split(1.0)


def test_equal_pictures_stay_together():
    for seed in range(20):
        same = {1, 5, 9, 13}
        test = set(some_data([0] * 20, same).split(0.5, seed)[1].tolist())
        assert len(test & same) in (0, 4)


def test_values_and_floats():
    for levels in (2, 17, 256):
        data = some_data([0])
        data = DataSet("x", data.images, None, None, None, levels, data.digests)
        every = torch.arange(levels).to(torch.uint8)
        x = data.to_float(every)
        assert (x.dtype, x.min(), x.max()) == (torch.float32, -1, 1)
        exact = 2 * torch.arange(levels).double() / (levels - 1) - 1
        assert (x - exact).abs().max() < 1e-7
        assert torch.equal(data.to_values(x), every)
        assert data.to_values(torch.tensor([-3.0, 3.0])).tolist() == [0, levels - 1]
    image = picture(0)
    assert torch.equal(data.to_float(values(image)), torch.from_numpy(from_pil(image)))


def test_digits_become_pictures():
    data = open_data("digits")
    image = to_pil(data.to_float(data.images[:1]).numpy(), data.levels)[0]
    assert (image.mode, image.size) == ("L", (8, 8))
    expected = (data.images[0, 0].double() * 255 / 16).round()
    assert (np.asarray(image) == expected.numpy()).all()


# Mapped from a file


def test_mapped_data_is_the_same(write, cache):
    folder = write({f"{i % 2}/{i}.png": picture(i) for i in range(150)})
    here, heard = open_data(folder), []
    mapped = open_data(folder, memory="map", progress=lambda done, total: heard.append((done, total)))
    assert heard == [(i + 1, 150) for i in range(150)]
    assert torch.equal(mapped.images, here.images)
    assert mapped.fingerprint == here.fingerprint
    assert mapped.about() == here.about()
    (file,) = cache.rglob("*.safetensors")
    before = file.stat().st_mtime_ns
    assert open_data(folder, memory="map").fingerprint == here.fingerprint
    assert file.stat().st_mtime_ns == before
    assert not list(cache.rglob("*.part"))


def test_mapped_data_follows_its_folder(write, cache):
    folder = write({f"{i}.png": picture(i) for i in range(3)})
    first = open_data(folder, memory="map")
    picture(7).save(folder / "1.png")
    os.utime(folder / "1.png", ns=(1, 1))
    changed = open_data(folder, memory="map")
    assert changed.fingerprint == open_data(folder).fingerprint != first.fingerprint
    assert open_data(folder, size=4, memory="map").size == (4, 4)


def test_a_damaged_cache_is_rebuilt(write, cache):
    folder = write({f"{i}.png": picture(i) for i in range(3)})
    good = open_data(folder, memory="map").fingerprint
    (file,) = cache.rglob("*.safetensors")
    content = file.read_bytes()
    for damaged in (b"", content[:-1], b"x" * 500):
        file.write_bytes(damaged)
        assert open_data(folder, memory="map").fingerprint == good
        assert file.read_bytes() == content


def test_large_data_is_mapped_by_itself(write, cache, monkeypatch):
    folder = write({f"{i}.png": picture(i) for i in range(3)})
    open_data(folder)
    assert not cache.exists()
    monkeypatch.setattr(listing, "IN_MEMORY", 3 * 3 * 5 * 6 - 1)
    open_data(folder)
    assert len(list(cache.rglob("*.safetensors"))) == 1


def test_a_cache_that_cannot_be_written(write, cache):
    folder = write({"a.png": picture(0)})
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file, where the folder should be")
    with pytest.raises(CannotWrite, match="not a folder"):
        open_data(folder, memory="map")


def test_of_several_processes_one_makes_the_file(write, tmp_path):
    folder = write({f"{i}.png": picture(i, (32, 32)) for i in range(300)})
    code = (
        "import sys; from diffgen.training.data import open_data; heard = []\n"
        f"data = open_data({str(folder)!r}, memory='map', progress=lambda d, n: heard.append(d))\n"
        "print(data.fingerprint, len(heard))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0].split() for process in running]
    assert {fingerprint for fingerprint, _ in outputs} == {open_data(folder).fingerprint}
    assert sorted(int(count) for _, count in outputs) == [0, 300]


def test_a_copy_elsewhere_is_the_same_data(write, tmp_path):
    folder = write({f"{i}.png": picture(i) for i in range(4)})
    shutil.copytree(folder, tmp_path / "copy")
    assert open_data(tmp_path / "copy").fingerprint == open_data(folder).fingerprint
