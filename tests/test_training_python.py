"""`diffgen.train`: what the command does, from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import contents, write_config

import diffgen
from diffgen.cli import run as command
from diffgen.errors import CannotWrite, InputError, UsageError
from diffgen.training import seeds
from diffgen.training.data import open_data
from diffgen.training.job import JOBS
from diffgen.training.listener import Listener
from diffgen.training.run import read_run
from diffgen.training.start import TrainEstimate, TrainResult


class Recorder(Listener):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.lines: list[dict[str, Any]] = []

    def step(self, step: int, steps: int) -> None:
        self.steps.append((step, steps))

    def losses(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


def test_python_and_the_command_make_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, steps=20)
    recorder = Recorder()
    result = diffgen.train("digits", tmp_path / "python", config=config, seed=3, listener=recorder)
    assert isinstance(result, TrainResult)
    assert (result.step, result.steps, result.images, result.started_at, result.finished) == (20, 20, 320, 0, True)
    assert recorder.steps == [(step, 20) for step in range(1, 21)]
    assert [line["step"] for line in recorder.lines] == [7, 14, 20, 20]
    assert recorder.lines[-1]["held_out_ema"] == result.held_out_ema
    line = ["train", "digits", "-o", str(tmp_path / "command"), "--config", str(config), "--seed", "3", "--json", "-q"]
    assert command(line) == 0
    document = json.loads(capsys.readouterr().out)["result"]
    assert document.keys() == vars(result).keys()
    assert (document["loss"], document["held_out_raw"]) == (result.loss, result.held_out_raw)
    assert contents(tmp_path / "python") == contents(tmp_path / "command")


def test_stopping_and_resuming(tmp_path: Path) -> None:
    """An open data set and the tables of a configuration serve as well as names do."""
    tables = {"train": {"batch_size": 8, "checkpoint_every": 100, "ema": [0.1]}, "network": {"width": 8, "blocks": 1}}
    steps = iter(range(1, 100))

    class Stop:
        def __enter__(self) -> Any:
            return lambda: next(steps) == 3

        def __exit__(self, *exception: object) -> None: ...

    data = open_data("digits")
    stopped = diffgen.train(data, tmp_path / "run", config=tables, steps=6, stopping=Stop())  # type: ignore[arg-type]
    assert isinstance(stopped, TrainResult)
    assert (stopped.step, stopped.finished) == (3, False)
    with pytest.raises(CannotWrite, match="is already a run"):
        diffgen.train(data, tmp_path / "run", config=tables, steps=6)
    resumed = diffgen.train(data, tmp_path / "run", resume=True)
    assert isinstance(resumed, TrainResult)
    assert (resumed.started_at, resumed.step, resumed.finished) == (3, 6, True)
    assert read_run(tmp_path / "run").config["network"] == tables["network"]


def test_a_dry_run_returns_an_estimate(tmp_path: Path) -> None:
    estimate = diffgen.train("digits", tmp_path / "run", config=write_config(tmp_path), dry_run=True)
    assert isinstance(estimate, TrainEstimate)
    assert estimate.bytes["moments"] == 2 * estimate.bytes["weights"] == 8 * estimate.parameters
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"stepps": 3}, "train takes no keyword 'stepps'", "did you mean 'steps'?"),
        ({"batchsize": 3}, "train takes no keyword 'batchsize'", "did you mean 'batch_size'?"),
        ({"steps": 0}, "--steps", ""),
        ({"parallel": "all"}, "--parallel must be ddp or fsdp", ""),
        ({"device": "toaster"}, "--device", ""),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as excinfo:
        diffgen.train("digits", tmp_path / "run", **options)
    assert message in excinfo.value.message
    assert hint in excinfo.value.hint
    with pytest.raises(InputError, match=r"the configuration: train\.steps"):
        diffgen.train("digits", tmp_path / "run", config={"train": {"steps": "many"}})


@pytest.mark.parametrize("name", JOBS)
def test_every_row_of_jobs_names_what_exists(name: str) -> None:
    kind = JOBS[name]
    config, job = kind.load("config"), kind.load("job")
    assert config().job == name
    assert callable(job)
    assert not kind.export or callable(kind.load("export"))


class Gratings:
    """Data that are a function of (seed, number): `dataset.TrainingData` without an image in memory."""

    name, channels, size, levels, notes = "gratings", 1, (8, 8), 256, ()
    classes: list[str] | None = None
    labels: torch.Tensor | None = None
    captions: None = None
    seed = 7

    def __len__(self) -> int:
        return 10**6

    def pictures(self, indices: torch.Tensor) -> torch.Tensor:
        phase = torch.stack([torch.rand(1, generator=seeds.generator(self.seed, i)) for i in indices.tolist()])
        wave = ((torch.arange(64) / 8 + phase) * 2 * torch.pi).sin()
        return (127.5 * (1 + wave)).to(torch.uint8).reshape(-1, 1, 8, 8)

    def to_float(self, values: torch.Tensor) -> torch.Tensor:
        return values.float() / 127.5 - 1

    def on(self, device: torch.device) -> Gratings:
        return self

    def split(self, held_out: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(1000, len(self)), torch.arange(1000)

    def about(self) -> dict[str, Any]:
        about = {"name": self.name, "channels": 1, "size": [8, 8], "classes": None, "levels": 256, "count": len(self)}
        return about | {"fingerprint": f"{self.seed:064x}"}


def test_data_that_are_a_function(tmp_path: Path) -> None:
    """A training reads only what `TrainingData` promises; two runs are the same bytes; the run makes pictures."""
    tables = {"train": {"steps": 4, "batch_size": 8}, "network": {"width": 8, "blocks": 1}, "sample": {"steps": 2}}
    for name in ("a", "b"):
        result = diffgen.train(Gratings(), tmp_path / name, config=tables)
        assert isinstance(result, TrainResult)
        assert result.finished
        assert result.held_out_ema is not None
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (picture,) = diffgen.load(tmp_path / "a").generate(seed=1)
    assert picture.size == (8, 8)
