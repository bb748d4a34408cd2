"""Data that a function makes: it is read as a data set is, and a training on it is a function of the seed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffgen.errors import InputError
from diffgen.training import config, start
from diffgen.training.data.procedural import procedural
from diffgen.training.parallel import Ranks
from diffgen.training.pixels import PixelJob


def stripe(i: int) -> np.ndarray:
    """A grey picture with one bright row, uint8 [1, 8, 8]."""
    picture = np.random.default_rng((0, i)).integers(0, 60, (1, 8, 8), dtype=np.uint8)
    picture[0, i % 8] = 255
    return picture


def test_examples_are_what_the_function_makes():
    data = procedural(stripe, 1000, name="stripes 1", held_out=100)
    some = data.images[torch.tensor([3, 999, 3])]
    assert some.dtype == torch.uint8
    assert some.shape == (3, 1, 8, 8)
    assert np.array_equal(some[1].numpy(), stripe(999))
    assert torch.equal(some[0], some[2])
    assert torch.equal(data.images[3], some[0])
    assert torch.equal(data.images[2:4][1], some[0])
    assert data.images[torch.tensor([], dtype=torch.int64)].shape == (0, 1, 8, 8)
    assert (len(data), data.channels, data.size) == (1000, 1, (8, 8))
    with pytest.raises(IndexError):
        data.images[1000]


def test_the_last_examples_are_held_out():
    train, test = procedural(stripe, 1000, name="stripes 1", held_out=100).split(0.5)
    assert train.tolist() == list(range(900))
    assert test.tolist() == list(range(900, 1000))
    assert not len(procedural(stripe, 10, name="stripes 1", held_out=0).split()[1])


def test_the_fingerprint_tells_functions_apart():
    def other(i: int) -> np.ndarray:
        return stripe(i + 1)

    prints = {
        procedural(make, count, name=name, held_out=held_out).fingerprint
        for make, count, name, held_out in (
            (stripe, 1000, "stripes 1", 100),
            (stripe, 1000, "stripes 2", 100),
            (stripe, 1001, "stripes 1", 100),
            (stripe, 1000, "stripes 1", 99),
            (other, 1000, "stripes 1", 100),
        )
    }
    assert len(prints) == 5
    assert procedural(stripe, 1000, name="stripes 1", held_out=100).fingerprint in prints


@pytest.mark.parametrize(
    "make",
    [
        lambda i: stripe(i).astype(np.float32),
        lambda i: stripe(i)[0],
        lambda i: stripe(i).tolist(),
        lambda i: stripe(i)[:, : 8 - i],
        lambda i: np.zeros((2, 8, 8), dtype=np.uint8),
    ],
)
def test_wrong_examples_are_refused(make):
    with pytest.raises(InputError, match=r"example \d|stripes"):
        _ = procedural(make, 10, name="stripes", held_out=2).images[torch.tensor([0, 1])]


@pytest.mark.parametrize(("count", "held_out"), [(0, 0), (5, 5), (5, -1), (2**31, 1)])
def test_wrong_counts_are_refused(count: int, held_out: int):
    with pytest.raises(ValueError, match="count"):
        procedural(stripe, count, name="stripes", held_out=held_out)


class Silence:
    """Hears how a training goes, and says nothing."""

    def note(self, text: str) -> None: ...

    warn = note

    def moved(self, step: int) -> None: ...

    def said(self, line: dict) -> None: ...


def run(folder: Path, resume: bool, stop_at: int = 10**9) -> Path:
    """Six steps of a tiny network on stripes, stopped after `stop_at` of them."""
    tables = {
        "network": {"name": "unet", "width": 8, "multipliers": [1, 1], "blocks": 1, "attention": [False, False]},
        "train": {"steps": 6, "batch_size": 4, "held_out_every": 3, "checkpoint_every": 3, "precision": "float32"},
        "sample": {"every": 6, "count": 1, "steps": 1},
    }
    chosen = config.parse(tables, "a test")
    steps = iter(range(stop_at - 1))
    job = PixelJob(chosen, procedural(stripe, 100_000, name="stripes 1", held_out=8), "a test")
    start.run(
        start.Order(folder, chosen, resume, None, "cpu"),
        job,
        Ranks("cpu"),
        Silence(),
        lambda: next(steps, None) is None,
    )
    return folder


def test_an_interrupted_training_ends_in_the_same_bytes(tmp_path: Path):
    whole = run(tmp_path / "whole", False)
    part = run(tmp_path / "part", False, stop_at=2)
    assert not (part / "checkpoints" / "6").exists()
    run(part, True)
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (load_file(folder / "checkpoints" / "6" / f"{name}.safetensors") for folder in (part, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (part / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
