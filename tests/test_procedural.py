"""Data that a function computes: pictures, captions, fingerprint, and a training on them that can be resumed."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffgen
from diffgen.errors import InputError
from diffgen.training.data.procedural import ProceduralData


def stripe(i: int) -> np.ndarray:
    """A grey picture with one bright row, uint8 [1, 8, 8]."""
    picture = np.random.default_rng((0, i)).integers(0, 60, (1, 8, 8), dtype=np.uint8)
    picture[0, i % 8] = 255
    return picture


def stripes(**changes) -> ProceduralData:
    return ProceduralData(**{"make": stripe, "count": 1000, "name": "stripes 1", "held_out": 100, **changes})


def test_pictures_are_what_the_function_makes():
    data = stripes()
    some = data.pictures(torch.tensor([3, 999, 3]))
    assert some.dtype == torch.uint8
    assert some.shape == (3, 1, 8, 8)
    assert np.array_equal(some[1].numpy(), stripe(999))
    assert torch.equal(some[0], some[2])
    assert data.pictures(torch.tensor([], dtype=torch.int64)).shape == (0, 1, 8, 8)
    assert (len(data), data.channels, data.size) == (1000, 1, (8, 8))
    assert data.to_float(torch.tensor([0, 255])).tolist() == [-1, 1]
    assert data.on(torch.device("cpu")) is data
    for outside in (1000, -1):
        with pytest.raises(IndexError):
            data.pictures(torch.tensor([outside]))


def test_the_last_pictures_are_held_out():
    train, test = stripes().split(0.5)
    assert train.tolist() == list(range(900))
    assert test.tolist() == list(range(900, 1000))
    assert not len(stripes(held_out=0).split()[1])


def test_captions():
    assert stripes().captions is None
    captions = stripes(count=2, held_out=0, describe=lambda i: f"row {i}").captions
    assert list(captions) == [(("row 0", 1.0),), (("row 1", 1.0),)]
    two = (("a row", 3.0), ("row", 1.0))
    assert stripes(count=1, held_out=0, describe=lambda i: two).captions[0] == two


def test_functions_have_different_fingerprints():
    changes = (
        {},
        {"name": "stripes 2"},
        {"count": 1001},
        {"held_out": 99},
        {"make": lambda i: stripe(i + 1)},
        {"describe": lambda i: "a row"},
    )
    assert len({stripes(**change).about()["fingerprint"] for change in changes}) == len(changes)
    assert stripes().about() == stripes().about()


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
def test_wrong_pictures_are_refused(make):
    with pytest.raises(InputError, match=r"stripes 1: picture \d"):
        stripes(make=make).pictures(torch.tensor([0, 1]))


@pytest.mark.parametrize(("count", "held_out"), [(0, 0), (5, 5), (5, -1), (2**31, 1)])
def test_wrong_counts_are_refused(count: int, held_out: int):
    with pytest.raises(ValueError, match="count"):
        stripes(count=count, held_out=held_out)


def run(folder: Path, stop_at: int | None = None) -> Path:
    """Six steps of a tiny network on stripes, stopped after some of them, or resumed."""
    tables = {
        "network": {"name": "unet", "width": 8, "multipliers": [1, 1], "blocks": 1, "attention": [False, False]},
        "train": {"steps": 6, "batch_size": 4, "held_out_every": 3, "checkpoint_every": 3, "precision": "float32"},
        "sample": {"every": 6, "count": 1, "steps": 1},
    }
    polls = iter(range((stop_at or 7) - 1))
    stopping = contextlib.nullcontext(lambda: next(polls, None) is None)
    diffgen.train(stripes(count=100_000), folder, config=tables, resume=True, device="cpu", stopping=stopping)
    return folder


def test_an_interrupted_training_ends_in_the_same_bytes(tmp_path: Path):
    whole = run(tmp_path / "whole")
    part = run(tmp_path / "part", stop_at=2)
    assert (part / "checkpoints" / "2").exists()
    run(part)
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (load_file(folder / "checkpoints" / "6" / f"{name}.safetensors") for folder in (part, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (part / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
