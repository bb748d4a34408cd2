"""Data sets in idx, CIFAR's binary version, NPZ, parquet and folders of `datasets`: what they hold, or refused."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffgen.errors import InputError, UsageError
from diffgen.training.data import open_data, open_training_data
from diffgen.training.data.dataset import DataSet

rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOUR = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 1, 3, 0, 1], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def cifar(folder: Path, head: int) -> None:
    rows = np.concatenate([np.stack([LABELS] * head, 1), COLOUR.transpose(0, 3, 1, 2).reshape(6, -1)], axis=1)
    if head == 1:
        (folder / "data_batch_1.bin").write_bytes(rows[:4].tobytes())
        (folder / "data_batch_2.bin").write_bytes(rows[4:].tobytes())
        (folder / "test_batch.bin").write_bytes(rows[:1].tobytes())
        (folder / "batches.meta.txt").write_text("plane\ncar\nbird\ncat\n\n")
    else:
        (folder / "train.bin").write_bytes(rows.tobytes())
        (folder / "fine_label_names.txt").write_text("plane\ncar\nbird\ncat\n")


def mnist(folder: Path, end: str = "", pack: Callable[[bytes], bytes] = bytes) -> None:
    (folder / f"train-images-idx3-ubyte{end}").write_bytes(pack(idx(GREY)))
    (folder / f"train-labels-idx1-ubyte{end}").write_bytes(pack(idx(LABELS)))
    (folder / f"t10k-images-idx3-ubyte{end}").write_bytes(pack(idx(GREY[:1])))


def check(data: DataSet, pictures: np.ndarray, classes: list[str] | None) -> None:
    assert data.images.numpy().transpose(0, 2, 3, 1).reshape(pictures.shape).tolist() == pictures.tolist()
    assert data.classes == classes
    if classes is not None:
        assert data.labels is not None
        names = dict(zip("013", ("plane", "car", "cat") if "cat" in classes else "013", strict=True))
        assert [classes[label] for label in data.labels.tolist()] == [names[str(label)] for label in LABELS]


def test_mnist(tmp_path: Path) -> None:
    for name, end, pack in (("plain", "", bytes), ("packed", ".gz", gzip.compress)):
        (tmp_path / name).mkdir()
        mnist(tmp_path / name, end, pack)
        data = open_data(tmp_path / name)
        check(data, GREY, ["0", "1", "3"])
        assert data.notes == (f"left out: t10k-images-idx3-ubyte{end}",)
    assert open_data(tmp_path / "plain/t10k-images-idx3-ubyte").labels is None
    scaled = open_data(tmp_path / "plain", size=8, channels=3)
    assert (list(scaled.images.shape), len(scaled.notes)) == ([6, 3, 8, 8], 3)
    assert open_data(tmp_path / "plain").fingerprint == open_data(tmp_path / "packed").fingerprint


def test_cifar(tmp_path: Path) -> None:
    for head in (1, 2):
        (tmp_path / str(head)).mkdir()
        cifar(tmp_path / str(head), head)
        check(open_data(tmp_path / str(head)), COLOUR, ["plane", "car", "bird", "cat"])


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train"), ("arr_0", "arr_1")])
def test_npz(tmp_path: Path, names: tuple[str, str]) -> None:
    for pictures in (GREY, COLOUR, COLOUR.transpose(0, 3, 1, 2)):
        np.savez_compressed(tmp_path / "a.npz", **{names[0]: pictures, names[1]: LABELS[:, None]})
        check(open_data(tmp_path / "a.npz"), GREY if pictures is GREY else COLOUR, ["0", "1", "3"])
    np.savez(tmp_path / "b.npz", images=GREY, labels=LABELS, classes=np.array(["plane", "car", "bird", "cat"]))
    check(open_data(tmp_path / "b.npz"), GREY, ["plane", "car", "bird", "cat"])


def test_parquet_and_folders_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["plane", "car", "bird", "cat"])}
    )
    rows = {"img": [{"bytes": png(p), "path": None} for p in COLOUR], "label": LABELS.tolist()}
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": whole.select([0]), "train": whole}).save_to_disk(str(tmp_path / "parts"))
    (tmp_path / "hub/data").mkdir(parents=True)
    whole.to_parquet(str(tmp_path / "hub/data/train-00000-of-00001.parquet"))
    whole.select([0]).to_parquet(str(tmp_path / "hub/data/test-00000-of-00001.parquet"))
    classes = ["plane", "car", "bird", "cat"]
    for place in ("saved", "parts", "hub", "hub/data/train-00000-of-00001.parquet"):
        data = open_training_data(tmp_path / place)
        assert isinstance(data, DataSet)
        check(data, COLOUR, classes)
        assert data.notes == (("left out: test",) if place in ("parts", "hub") else ())
    captions = datasets.Dataset.from_dict(
        {"image": rows["img"], "caption": [f"{n}" for n in range(6)]},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    captions.to_parquet(str(tmp_path / "captions.parquet"))
    data = open_training_data(tmp_path / "captions.parquet", size=16)
    assert data.captions is not None
    assert (data.size, data.labels, data.captions[5]) == ((16, 16), None, (("5", 1.0),))


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def saved(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


PAIR = {"train-images-idx3-ubyte": idx(GREY)}
HUGE = bytes([0, 0, 8, 3]) + b"\xff" * 12


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({"train-images-idx3-ubyte": idx(GREY)[:-1]}, "", "is not complete"),
        ({"train-images-idx3-ubyte": idx(GREY) + b"1"}, "", "longer than its header says"),
        ({"train-images-idx3-ubyte": b"junk"}, "", "no idx file of uint8 with 3 dimensions"),
        ({"train-images-idx3-ubyte": HUGE}, "", "do not fit in 16 bytes"),
        ({"train-images-idx3-ubyte.gz": gzip.compress(HUGE)}, "", "do not fit"),
        ({"train-images-idx3-ubyte.gz": gzip.compress(idx(GREY))[:40]}, "", "cannot read"),
        (PAIR | {"train-labels-idx1-ubyte": idx(LABELS[:2])}, "", "2 labels for 6 pictures"),
        ({"data_batch_1.bin": b"123"}, "", "not a multiple of 3073"),
        ({"data_batch_1.bin": b""}, "", "not a multiple of 3073"),
        ({"data_batch_1.bin": bytes([9]) + bytes(3072), "batches.meta.txt": b"a b"}, "", "the label 9 has no name"),
        ({"a.npz": b"junk"}, "a.npz", "cannot read"),
        ({"a.npz": saved(images=np.array([{"a": 1}]))}, "a.npz", "cannot read"),
        ({"a.npz": saved(images=GREY / 255)}, "a.npz", "is float64, not uint8"),
        ({"a.npz": saved(other=GREY)}, "a.npz", "no array of pictures: it has 'other'"),
        ({"a.npz": saved(images=GREY[0])}, "a.npz", r"has the shape \[5, 4\]"),
        ({"a.npz": saved(images=GREY[:0])}, "a.npz", "no picture in it"),
        ({"a.npz": saved(images=GREY, labels=LABELS[:3])}, "a.npz", r"labels has the shape \[3\]"),
        ({"a.npz": saved(images=GREY, labels=LABELS / 2)}, "a.npz", "the labels are float64"),
        ({"a.parquet": b"PAR1 junk PAR1"}, "a.parquet", "is broken"),
        ({"state.json": b'{"_data_files": [{"filename": "../a.arrow"}]}'}, "", "names files that are not there"),
        ({"state.json": b'{"_data_files": [{"filename": "a.arrow"}]}', "a.arrow": b"junk"}, "", "is broken"),
        ({"dataset_dict.json": b'{"splits": ["../up"]}'}, "", "has no part"),
    ],
)
def test_what_is_broken_is_refused(tmp_path: Path, files: dict[str, bytes], name: str, message: str) -> None:
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises((InputError, UsageError), match=message):
        open_training_data(tmp_path / name)


class Harm:
    """Unpickling this creates a file called harm in the current folder."""

    def __reduce__(self) -> tuple[object, ...]:
        return open, ("harm", "w")


def test_an_array_of_objects_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", images=np.array([Harm(), None], dtype=object))
    with pytest.raises(InputError, match="allow_pickle"):
        open_data("a.npz")
    assert not Path("harm").exists()
