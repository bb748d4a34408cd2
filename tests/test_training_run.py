"""Reading a run folder: its content is checked, damaged checkpoints are ignored, the network is the saved one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import CONFIG

from diffgen import networks
from diffgen.errors import InputError
from diffgen.training import config, start
from diffgen.training.data import open_data
from diffgen.training.listener import Listener
from diffgen.training.parallel import Ranks
from diffgen.training.pixels import PixelJob
from diffgen.training.run import load_network, read_run, read_state

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    (folder.parent / "c.toml").write_text(CONFIG.format(dropout=0.0, steps=20, log_every=10))
    chosen = config.parse(config.read_toml(folder.parent / "c.toml"), "c.toml")
    job = PixelJob(chosen, open_data("digits"))
    result = start.execute(start.TrainRequest(folder, chosen), job, Ranks("cpu"), Listener(), lambda: False)
    assert (result.step, result.finished) == (20, True)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_description_of_a_run(finished: Path) -> None:
    run = read_run(finished)
    assert (run.name, run.job, run.prediction, run.variance) == ("digits", "pixels", "epsilon", "fixed_small")
    assert run.noise == {"name": "linear", "T": 1000}
    assert (run.data["channels"], run.data["size"], run.data["levels"], run.data["count"]) == (1, [8, 8], 17, 1797)
    assert run.data["classes"] == [str(digit) for digit in range(10)]
    assert run.config["sample"] == {"every": 20, "count": 3, "scheduler": "dpmpp_2m", "steps": 2, "guidance": 1.0}
    assert networks.build(run.network).config == {k: v for k, v in run.network.items() if k != "name"}
    assert [folder.name for folder in run.checkpoints()] == ["20", "10"]
    assert run.latest() == finished / "checkpoints/20"


@pytest.mark.parametrize("which", ["model", "ema", "ema-0.05"])
def test_the_network_is_the_one_that_was_saved(finished: Path, which: str) -> None:
    """Its weights are the file's, and a network built without `load_network` answers the same."""
    run = read_run(finished)
    network, step = load_network(run, which)
    assert (step, network.training) == (20, False)
    other = networks.build(run.network)
    other.load_state_dict(load_file(finished / f"checkpoints/20/{which}.safetensors"))
    x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, label), other.eval()(x, t, label), atol=0, rtol=0)
    assert not any(p.requires_grad for p in network.parameters())


def test_weights_that_are_not_there(finished: Path) -> None:
    for which in ("ema-0.2", "../model", "optimizer"):
        with pytest.raises(InputError) as excinfo:
            load_network(read_run(finished), which)
        assert "ema" in excinfo.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema="diffgen.run/2"), "its schema is 'diffgen.run/2'"),
        (lambda content: content.update(data=[]), "data is '\\[\\]', not a table"),
        (lambda content: content["data"].update(channels=2), "data.channels is 2"),
        (lambda content: content["data"].update(size=[8]), "data.size is \\[8\\]"),
        (lambda content: content["data"].update(size=[8, 10**6]), "data.size is 1000000"),
        (lambda content: content["data"].update(levels=1), "data.levels is 1"),
        (lambda content: content["data"].update(classes=[1]), "data.classes is not a list of names"),
        (lambda content: content["data"].update(fingerprint="0"), "data.fingerprint is not a SHA-256"),
        (lambda content: content["noise"].update(T=10**9), "noise.T is 1000000000"),
        (lambda content: content["noise"].update(name="os.system"), "noise.name is 'os.system'"),
        (lambda content: content.update(prediction="eps"), "prediction is 'eps'"),
        (lambda content: content.update(variance=[]), "variance is '\\[\\]', not a string"),
    ],
)
def test_invalid_values_in_a_run(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(copy / "run.json", change)
    with pytest.raises(InputError, match=f"run.json: {message}"):
        read_run(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1, "schema": 1}', "\xff", "NaN"])
def test_a_run_that_is_broken(copy: Path, text: str) -> None:
    (copy / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"run\.json"):
        read_run(copy)


def test_refused_runs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="is not a run"):
            read_run(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(name="resnet"), "unknown network 'resnet'"),
        (lambda content: content.update(extra=1), "a unet has no 'extra'"),
        (lambda content: content.update(width="wide"), "width"),
        (lambda content: content.update(blocks=2), "these are weights of another network|lacks tensor"),
        (lambda content: content.update(classes=11), "has the shape"),
    ],
)
def test_a_network_that_the_weights_do_not_fit(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(copy / "run.json", lambda content: change(content["network"]))
    with pytest.raises(InputError, match=message):
        load_network(read_run(copy))


def test_a_damaged_checkpoint_is_ignored_with_a_warning(copy: Path) -> None:
    run = read_run(copy)
    with (copy / "checkpoints/20/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    warnings: list[str] = []
    assert run.latest(warnings.append) == copy / "checkpoints/10"
    assert "checkpoints/20 is damaged" in warnings[0]
    assert "model.safetensors" in warnings[0]
    assert load_network(run)[1] == 10
    shutil.rmtree(copy / "checkpoints/10")
    assert run.latest() is None
    with pytest.raises(InputError, match="no checkpoint") as excinfo:
        load_network(run)
    assert "--resume" in excinfo.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(step=11),
        lambda state: state.update(step=True),
        lambda state: state.update(schema="diffgen.checkpoint/2"),
        lambda state: state.update(files={}),
        lambda state: state["files"].update({"../../x.safetensors": {"bytes": 1, "sha256": ""}}),
        lambda state: state["files"].update({"model.safetensors": 3}),
        lambda state: state.update(metrics_bytes=state["metrics_bytes"] + 1),
        lambda state: state["pending"].update(loss=[0.5]),
    ],
)
def test_an_invalid_state(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(copy / "checkpoints/10/state.json", change)
    with pytest.raises(InputError, match=r"state\.json"):
        read_state(copy / "checkpoints/10")


def test_weights_that_are_not_finite_are_not_read(copy: Path) -> None:
    path = copy / "checkpoints/20/ema.safetensors"
    weights = load_file(path)
    weights["last.bias"].fill_(float("nan"))
    save_file(weights, path)
    with pytest.raises(InputError, match=r"last\.bias is not finite"):
        load_network(read_run(copy), checkpoint=path.parent)


def test_reading_a_run_imports_no_torch(finished: Path) -> None:
    code = f"""
import sys
from diffgen.training.run import read_run
run = read_run({str(finished)!r})
assert run.latest().name == "20"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
