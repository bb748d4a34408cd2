"""A run that was killed, stopped or out of disk resumes and ends in the same bytes as an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_runs import FOREVER, contents, lines, run, start, wait, write_config

from diffgen.training.run import state_hash

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 40 steps with dropout; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    code, out, err = run(folder, "train", "digits", "-o", "run", "--config", write_config(folder), "--json")
    assert code == 0, err
    result = json.loads(out)["result"]
    assert (result["step"], result["steps"], result["images"], result["finished"]) == (40, 40, 640, True)
    assert result["run"] == "run"
    assert result["seconds"] > 0
    return folder / "run"


def test_the_folder_is_what_the_interface_says(finished: Path) -> None:
    assert sorted(os.listdir(finished / "checkpoints")) == ["30", "40"]
    for step in ("30", "40"):
        assert sorted(os.listdir(finished / "checkpoints" / step)) == [
            "ema-0.05.safetensors", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json",
        ]  # fmt: skip
    assert sorted(os.listdir(finished / "samples")) == ["20.png", "40.png"]
    assert sorted(name for name in os.listdir(finished) if name[0] != ".") == [
        "checkpoints", "curve.png", "metrics.jsonl", "run.json", "samples", "tensorboard", "timing.jsonl",
    ]  # fmt: skip
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [7, 14, 21, 28, 35, 40]
    assert [line["step"] for line in metrics if "held_out_ema" in line] == [20, 40]
    assert metrics[-1]["held_out_raw"] < metrics[2]["held_out_raw"]
    assert [len(line["held_out_raw_quartiles"]) for line in metrics if "held_out_raw" in line] == [4, 4]
    about = json.loads((finished / "run.json").read_text())
    assert about["schema"] == "diffgen.run/1"
    assert about["config"]["train"]["steps"] == 40
    assert re.fullmatch(r"[0-9a-f]{64}", about["data"]["fingerprint"])
    assert about["versions"].keys() == {"diffgen", "torch", "python"}
    content = b"".join(contents(finished).values()).lower()
    assert b"time" not in (finished / "metrics.jsonl").read_bytes()
    assert str(Path.home()).encode() not in content
    assert not [name for name in os.listdir(finished) if name.startswith(".diffgen")]


def test_tensorboard_reads_what_was_written(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"])) for line in metrics if "loss" in line]
    assert [event.step for event in board.Images("samples")] == [20, 40]


def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    """Kill the training without warning after every few lines of the log and a random delay, until it finishes."""
    chance = random.Random(0)
    train = ["train", "digits", "-o", "run", "--config", write_config(tmp_path), "--resume", "-q"]
    killed = 0
    for signals in [signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]:
        process = start(tmp_path, *train)
        before = lines(tmp_path / "run/timing.jsonl")
        wait(process, lambda: not process.is_alive() or lines(tmp_path / "run/timing.jsonl") > before)  # noqa: B023
        process.join(chance.random() * 0.1)
        if not process.is_alive():
            assert process.exitcode == 0
            continue
        os.kill(process.pid, signals)
        process.join()
        killed += 1
        assert process.exitcode in {signal.SIGKILL: (-9,), signal.SIGINT: (130,), signal.SIGTERM: (143,)}[signals]
        for folder in (tmp_path / "run/checkpoints").glob("*"):
            assert (folder / "state.json").exists()
    assert killed >= 2
    assert run(tmp_path, *train)[0] == 0
    assert contents(tmp_path / "run") == contents(finished)


def test_a_stopped_run_finishes_the_step_saves_and_reports_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=FOREVER)
    process = start(tmp_path, "train", "digits", "-o", "run", "--config", config, "--json")
    wait(process, lambda: lines(tmp_path / "run/timing.jsonl") > 1)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    document = json.loads((tmp_path / "out").read_text())
    assert (process.exitcode, document["ok"], document["error"]["code"]) == (130, False, 130)
    step = document["result"]["step"]
    assert document["result"]["finished"] is False
    assert max(int(name) for name in os.listdir(tmp_path / "run/checkpoints")) == step
    assert (tmp_path / "err").read_text().endswith("error: interrupted\n")


def test_a_second_process_is_refused_while_the_first_trains(tmp_path: Path) -> None:
    train = ["train", "digits", "-o", "run", "--config", write_config(tmp_path, steps=FOREVER)]
    first = start(tmp_path, *train)
    wait(first, lambda: lines(tmp_path / "run/timing.jsonl") > 0)
    code, _, err = run(tmp_path, *train, "--resume")
    assert first.is_alive()
    first.kill()
    assert code == 6
    assert "another process is training in run" in err
    assert lines(tmp_path / "run/timing.jsonl") > 0


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_complete(finished: Path, tmp_path: Path) -> None:
    """A limit on the size of files simulates the full disk: metrics fit below it, the optimizer's moments do not."""
    shutil.copytree(finished, tmp_path / "run")
    for step in ("30", "40"):
        shutil.rmtree(tmp_path / "run/checkpoints" / step)
    train = ["train", "digits", "-o", "run", "--config", write_config(tmp_path), "--resume"]
    largest = max(path.stat().st_size for path in (finished / "checkpoints/40").iterdir())
    code, _, err = run(tmp_path, *train, largest_file=largest - 1)
    assert code == 6
    assert "error: cannot write run/checkpoints/10: the file would be larger than the limit; make room" in err
    assert os.listdir(tmp_path / "run/checkpoints") == []
    assert not list((tmp_path / "run").glob(".diffgen-*"))
    assert run(tmp_path, *train)[0] == 0
    before = contents(tmp_path / "run/checkpoints/30")
    shutil.rmtree(tmp_path / "run/checkpoints/40")
    assert run(tmp_path, *train, largest_file=largest - 1)[0] == 6
    assert os.listdir(tmp_path / "run/checkpoints") == ["30"]
    assert contents(tmp_path / "run/checkpoints/30") == before
    assert run(tmp_path, *train)[0] == 0
    assert contents(tmp_path / "run") == contents(finished)


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    """The first file that meets the limit is TensorBoard's, which a thread writes."""
    config = write_config(tmp_path, log_every=1)
    train = ["train", "digits", "-o", "run", "--config", config, "--checkpoint-every", 1000, "-q"]
    code, out, err = run(tmp_path, *train, largest_file=3000)
    assert (code, out) == (6, "")
    assert re.fullmatch(r"error: cannot write run/tensorboard: [^\n]*\n", err)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "state"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/checkpoints/40" / ("state.json" if damage == "state" else "ema.safetensors")
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:middle] if damage != "flipped" else data[:middle] + b"\xff" + data[middle + 1 :])
    code, _, err = run(tmp_path, "train", "digits", "-o", "run", "--resume")
    assert code == 0
    assert re.search(rf"warning: the checkpoint run/checkpoints/40 is damaged .*{path.name}", err)
    assert contents(tmp_path / "run") == contents(finished)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics_bytes": None},
        {"metrics_bytes": -1},
        {"metrics_bytes": "12"},
        {"pending": []},
        {"pending": {"loss": [0.5]}},
        {"pending": {"loss": ["0.5"], "gradient_norm": []}},
    ],
)
def test_a_checkpoint_without_the_state_of_training_is_refused(
    finished: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """The checkpoint comes from elsewhere; its hash is right."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/checkpoints/40/state.json"
    state = {k: v for k, v in (json.loads(path.read_text()) | change).items() if v is not None}
    path.write_text(json.dumps(state | {"sha256": state_hash(state)}))
    config = json.loads((tmp_path / "run/run.json").read_text())
    config["config"]["train"]["steps"] = 60
    (tmp_path / "run/run.json").write_text(json.dumps(config))
    code, _, err = run(tmp_path, "train", "digits", "-o", "run", "--resume")
    assert code == 3
    assert "state.json lacks what a resume needs" in err


def test_resume_starts_an_empty_folder_at_step_0_and_reports_a_finished_run(finished: Path, tmp_path: Path) -> None:
    train = ["train", "digits", "-o", "run", "--config", write_config(tmp_path), "--resume"]
    assert run(tmp_path, *train)[0] == 0
    assert contents(tmp_path / "run") == contents(finished)
    code, out, err = run(tmp_path, *train)
    assert (code, out) == (0, "run\n")
    assert "run is finished: all 40 steps are done" in err
    assert json.loads(run(tmp_path, *train, "--json")[1])["result"]["loss"] is not None
    assert contents(tmp_path / "run") == contents(finished)


def test_a_finished_run_continues_with_more_steps(finished: Path, tmp_path: Path) -> None:
    """At a constant learning rate it becomes the run that had so many steps from the start."""
    shutil.copytree(finished, tmp_path / "run")
    more = ["train", "digits", "-o", "run", "--resume", "--steps", "60"]
    code, _, err = run(tmp_path, *more)
    assert code == 0, err
    assert "the finished run continues from step 40 to 60: the learning rate stays as it was" in err
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert (about["config"]["train"]["steps"], about["segments"]) == (60, [40])
    ended = contents(tmp_path / "run")
    config = write_config(tmp_path, steps=60)
    assert run(tmp_path, "train", "digits", "-o", "straight", "--config", config)[0] == 0
    straight = contents(tmp_path / "straight")
    weights = [name for name in straight if name.endswith("safetensors")]
    assert "checkpoints/60/optimizer.safetensors" in weights
    assert [straight[name] == ended[name] for name in weights] == [True] * len(weights)
    shutil.rmtree(tmp_path / "run/checkpoints/60")  # as if it had been killed before its last checkpoint
    code, _, err = run(tmp_path, *more)
    assert (code, "steps    51 to 60" in err, "continues" in err) == (0, True, False)
    assert contents(tmp_path / "run") == ended
    code, _, err = run(tmp_path, *more)
    assert (code, "run is finished: all 60 steps are done; a larger --steps continues it" in err) == (0, True)


def test_only_a_finished_run_gets_more_steps(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/40")
    before = contents(tmp_path / "run")
    code, _, err = run(tmp_path, "train", "digits", "-o", "run", "--resume", "--steps", "60")
    assert (code, "a finished run continues with a larger --steps" in err) == (2, True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 6, "run is already a run"),
        (["--resume", "--steps", "30"], 2, "config.train.steps: 40, now 30"),
        (["--resume", "--steps", "60", "--seed", "1"], 2, "config.train.seed: 0, now 1; remove these options"),
        (["--resume", "--seed", "1", "--batch-size", "8"], 2, "batch_size: 16, now 8; config.train.seed: 0, now 1"),
        (["--resume", "--config", "other.toml"], 2, "config.network.dropout: 0.1, now 0.0"),
        (["--resume", "--init", "run"], 2, "init.sha256: missing, now"),
    ],
)  # fmt: skip
def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(
    finished: Path, tmp_path: Path, args: list[str], code: int, message: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    write_config(tmp_path, dropout=0.0).rename(tmp_path / "other.toml")
    exit_code, out, err = run(tmp_path, "train", "digits", "-o", "run", *args)
    assert (exit_code, out) == (code, "")
    assert message in err
    assert contents(tmp_path / "run") == contents(finished)


def test_a_key_that_is_newer_than_the_run_has_its_default(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    about = json.loads((tmp_path / "run/run.json").read_text())
    del about["config"]["train"]["keep"]
    (tmp_path / "run/run.json").write_text(json.dumps(about))
    assert run(tmp_path, "train", "digits", "-o", "run", "--resume")[0] == 0
    code, _, err = run(tmp_path, "train", "digits", "-o", "run", "--resume", "--seed", "1")
    assert code == 2
    assert "another configuration: config.train.seed: 0, now 1;" in err


def test_other_data_is_another_configuration(finished: Path, tmp_path: Path) -> None:
    from PIL import Image

    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"data/{i}.png")
    code, _, err = run(tmp_path, "train", "data", "-o", "run", "--resume")
    assert code == 2
    assert "data.count: 1797, now 3" in err


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/to-mother.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    for out in ("letters", "file", "file/run"):
        for resume in ([], ["--resume"]):
            code, _, err = run(tmp_path, "train", "digits", "-o", out, *resume)
            assert code == 6, err
    assert os.listdir(tmp_path / "letters") == ["to-mother.txt"]


def test_weights_to_begin_with(finished: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=1)
    assert run(tmp_path, "train", "digits", "-o", "run", "--config", config, "--init", finished)[0] == 0
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["init"]["file"] == "ema.safetensors"
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["held_out_raw"] == pytest.approx(trained[-1]["held_out_ema"], rel=0.05)
    shutil.rmtree(tmp_path / "run/checkpoints")
    code, _, err = run(tmp_path, "train", "digits", "-o", "run", "--resume")
    assert code == 2
    assert "init.sha256" in err
    (tmp_path / "small.toml").write_text("[network]\nwidth = 16\n")
    code, _, err = run(tmp_path, "train", "digits", "-o", "other", "--config", "small.toml", "--init", finished)
    assert code == 3
    assert "these are weights of another network" in err
    assert not (tmp_path / "other").exists()


def test_values_that_are_not_finite_are_named_and_never_saved(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(finished / "checkpoints/40/model.safetensors")
    weights["last.bias"].fill_(3e38)  # finite, but its square is not
    save_file(weights, tmp_path / "large.safetensors")
    config = write_config(tmp_path, log_every=7)
    code, out, err = run(
        tmp_path, "train", "digits", "-o", "run", "--config", config, "--init", "large.safetensors", "--json"
    )
    assert (code, json.loads(out)["error"]["code"]) == (5, 5)
    assert "the loss is inf at step 1" in err
    assert not (tmp_path / "run/checkpoints").exists()
    assert lines(tmp_path / "run/metrics.jsonl") == 0


def test_the_command_itself_in_an_empty_folder(finished: Path, tmp_path: Path) -> None:
    """`python -m diffgen train`, not forked: --dry-run writes nothing, and the training writes the same bytes."""
    train = [sys.executable, "-m", "diffgen", "train", "digits", "-o", "run", "--config", write_config(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([*train, "--dry-run", "--json"], cwd=tmp_path, env=environment, capture_output=True)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)["result"]
    assert result["parameters"] == result["bytes"]["weights"] // 4
    assert result["bytes"]["moments"] == result["bytes"]["averages"] == 2 * result["bytes"]["weights"]
    assert result["bytes"]["activations"] > 0
    assert result["seconds"] == pytest.approx(40 * result["seconds_per_step"])
    assert result["data"]["count"] == 1797
    assert not (tmp_path / "run").exists()
    assert subprocess.run(train, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    assert contents(tmp_path / "run") == contents(finished)
