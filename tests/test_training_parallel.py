"""Two processes: the same losses as one, the same bits as two others, and an end when one of them dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import FOREVER, contents, lines, run, start, write_config

ROOT = Path(__file__).parent.parent


def pair(folder: Path, *args: object) -> tuple[list[int | None], list[str]]:
    """(exit codes, stderr) of `diffgen ARGS` in two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [start(folder, *args, "--device", "cpu", environment=environment) for environment in ranks]
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes], [(folder / f"err{rank}").read_text() for rank in range(2)]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "held_out_raw", "held_out_ema") if key in line]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 steps without dropout by two processes; not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    codes, errors = pair(folder, "train", "digits", "-o", "run", "--config", write_config(folder, 0.0, 50, 10))
    assert codes == [0, 0], errors
    assert errors[1] == ""
    assert (folder / "out0").read_text() == "run\n"
    assert (folder / "out1").read_text() == ""
    return folder / "run"


def test_two_processes_have_the_losses_of_one(two: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, 0.0, 50, 10)
    assert run(tmp_path, "train", "digits", "-o", "run", "--config", config, "--device", "cpu")[0] == 0
    assert losses(two) == pytest.approx(losses(tmp_path / "run"), abs=1e-5, rel=0)
    for name in ("model", "ema"):
        ours, theirs = (load_file(r / f"checkpoints/50/{name}.safetensors") for r in (two, tmp_path / "run"))
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=0)
    pictures = (two / "samples/40.png").read_bytes(), (tmp_path / "run/samples/40.png").read_bytes()
    assert len(pictures[0]) == pytest.approx(len(pictures[1]), rel=0.1)


def test_a_killed_process_ends_the_training_and_resume_ends_in_the_same_bytes(two: Path, tmp_path: Path) -> None:
    """Under torchrun itself. The interrupted run equals, to the bit, the one of two other processes."""
    config = write_config(tmp_path, 0.0, 50, 10)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "-m", "diffgen", "train", "digits", "-o", "run", "--config", config, "--device", "cpu"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # those of the other run: torchrun itself would set 1
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while lines(tmp_path / "run/timing.jsonl") < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    os.kill(child_of(process.pid, "LOCAL_RANK=1"), signal.SIGKILL)
    died = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - died < 60
    assert process.returncode != 0
    assert "error: another process of this training has ended" in err
    assert "start the same command again with --resume" in err
    assert (tmp_path / "run/checkpoints/10").exists()
    assert not (tmp_path / "run/checkpoints/50").exists()
    codes, errors = pair(tmp_path, "train", "digits", "-o", "run", "--resume")
    assert codes == [0, 0], errors
    assert contents(tmp_path / "run") == contents(two)


def child_of(parent: int, variable: str) -> int:
    """The process that `parent` started with this in its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "stat").read_text().rpartition(") ")[2].split()
            if int(status[1]) == parent and variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no child of {parent} has {variable}")


def test_parts_of_a_network_make_the_same_files(two: Path, tmp_path: Path) -> None:
    """FSDP2: the first losses of the run with before copies, its names and shapes; and it can be resumed."""
    config = write_config(tmp_path, 0.0, 20, 10)
    train = ["train", "digits", "-o", "run", "--config", config, "--parallel", "fsdp"]
    codes, errors = pair(tmp_path, *train)
    assert codes == [0, 0], errors
    assert losses(tmp_path / "run") == pytest.approx(losses(two)[:4], abs=1e-5, rel=0)
    before = contents(tmp_path / "run")
    for name in ("model", "ema", "ema-0.05", "optimizer"):
        ours = load_file(tmp_path / f"run/checkpoints/20/{name}.safetensors")
        theirs = load_file(two / f"checkpoints/50/{name}.safetensors")
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    shutil.rmtree(tmp_path / "run/checkpoints/20")
    codes, errors = pair(tmp_path, *train, "--resume")
    assert codes == [0, 0], errors
    assert contents(tmp_path / "run") == before


def test_an_error_is_printed_once_and_ends_both(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    codes, errors = pair(tmp_path, "train", "digits", "-o", "run", "--resume", "--seed", "60")
    assert codes == [2, 2]
    assert "train.seed: 0, now 60" in errors[0]
    assert errors[1] == ""
    codes, errors = pair(tmp_path, "train", "digits", "-o", "new", "--batch-size", "1")
    assert codes == [2, 2]
    assert "a batch of 1 cannot be divided into 2 parts" in errors[0]
    assert not (tmp_path / "new").exists()


def test_a_signal_to_one_stops_and_saves_both(tmp_path: Path) -> None:
    config = write_config(tmp_path, 0.0, FOREVER, 10)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    train = ["train", "digits", "-o", "run", "--config", config, "--device", "cpu"]
    processes = [start(tmp_path, *train, environment=address | {"RANK": r, "LOCAL_RANK": r}) for r in "01"]
    while lines(tmp_path / "run/timing.jsonl") < 1:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 143]
    steps = sorted(map(int, os.listdir(tmp_path / "run/checkpoints")))
    state = json.loads((tmp_path / "run/checkpoints" / str(steps[-1]) / "state.json").read_text())
    assert len(state["pending"]["loss"]) == steps[-1] % 10
