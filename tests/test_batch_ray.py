"""The engine "ray", on a real Ray of this machine; and other libraries that read what batches write."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffgen.batch import check as checks
from diffgen.batch import prepare, run
from diffgen.batch.shards import Shards
from diffgen.errors import DiffgenError, InputError
from diffgen.images.pixels import pixels_sha256
from diffgen.prompts.files import Line
from diffgen.training.run import state_hash

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray of this machine, started once for this file."""
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    settings: Any = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    ray.init(address="local", log_to_driver=False, logging_level="ERROR", **settings)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def batches(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished batch of 12 rows in a format, made in this process; not to be changed."""
    top = tmp_path_factory.mktemp("batches")

    def batch(format: str) -> Path:
        out = top / format
        if not out.exists():
            plan(out, digits_run, format=format)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as Ray's actors have: another number may change last bits
            try:
                run.run(out, part=(0, 1))
            finally:
                torch.set_num_threads(threads)
        return out

    return batch


def plan(out: Path, model: Path, count: int = 12, **options: Any) -> None:
    lines = [Line(str(number % 10)) for number in range(count)]
    prepare.plan(lines, out, str(model), steps=2, shard_size=3, **options)


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.glob("0*/*")}


def test_ray_makes_the_same_files_after_an_actor_was_killed(
    ray: Any, batches: Callable[[str], Path], digits_run: Path, tmp_path: Path
) -> None:
    """With kill -9 of the process that made the first shard; each file equals the one that this process makes."""
    plan(tmp_path, digits_run)
    killed: list[int] = []

    def kill_one(shards: Shards) -> None:
        if not killed:
            (first,) = shards.stats.values()
            killed.append(first["process"])
            os.kill(first["process"], signal.SIGKILL)

    made = run.run(tmp_path, engine="ray", workers=(1, 2), report=kill_one)
    assert killed
    assert os.getpid() not in {stats["process"] for stats in made.stats.values()}
    assert made.as_json()["done"] == 12
    assert checks.check(tmp_path).wrong == 0
    assert {name: data for name, data in files(tmp_path).items() if name.endswith("jsonl")} == {
        name: data for name, data in files(batches("files")).items() if name.endswith("jsonl")
    }


def test_an_actor_with_other_weights_stops_the_run_with_one_line(ray: Any, digits_run: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(digits_run, model)
    plan(tmp_path / "out", model, count=3)
    weights = next(model.glob("checkpoints/*/ema.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    state = json.loads((weights.parent / "state.json").read_text("utf-8"))
    state["files"][weights.name]["sha256"] = hashlib.sha256(data).hexdigest()
    state["sha256"] = state_hash(state)
    (weights.parent / "state.json").write_text(json.dumps(state), "utf-8")
    with pytest.raises(DiffgenError) as caught:
        run.run(tmp_path / "out", engine="ray", workers=1)
    assert "has other weights here than when the batch was planned" in caught.value.message


def test_datasets_reads_every_format(batches: Callable[[str], Path], tmp_path: Path) -> None:
    import datasets

    cache = {"cache_dir": str(tmp_path), "split": "train"}
    loaded = {
        "files": datasets.load_dataset("imagefolder", data_dir=str(batches("files")), **cache),
        "webdataset": datasets.load_dataset(
            "webdataset", data_files={"train": str(batches("webdataset") / "*.tar")}, **cache
        ),
        "parquet": datasets.load_dataset(str(batches("parquet")), **cache),
    }
    images = {"files": "image", "webdataset": "png", "parquet": "image"}
    texts = {"files": "text", "webdataset": "txt", "parquet": "text"}
    expected = [(about["text"], about["pixels_sha256"]) for about in descriptions(batches("files"))]
    for format, rows in loaded.items():
        pairs = [(row[texts[format]], pixels_sha256(row[images[format]])) for row in rows]
        # imagefolder lists the folders in an order of its own
        assert (sorted(pairs) == sorted(expected)) if format == "files" else (pairs == expected), format


def test_ray_data_reads_webdataset(ray: Any, batches: Callable[[str], Path]) -> None:
    rows = ray.data.read_webdataset([str(path) for path in sorted(batches("webdataset").glob("*.tar"))]).take_all()
    found = {}
    for row in rows:
        image = row["png"] if not isinstance(row["png"], bytes) else Image.open(io.BytesIO(row["png"]))
        found[row["__key__"]] = pixels_sha256(image if isinstance(image, Image.Image) else Image.fromarray(image))
    assert found == {about["key"]: about["pixels_sha256"] for about in descriptions(batches("files"))}


def descriptions(out: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted(out.glob("*/metadata.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def test_a_cluster_that_does_not_answer_is_one_line(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would wait for minutes."""
    import subprocess
    import sys

    plan(tmp_path, digits_run, count=3)
    code = f"""
from diffgen.batch import ray, run
ray.START_SECONDS = 8
run.run({str(tmp_path)!r}, engine="ray", workers=1, address="127.0.0.1:9")
"""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "the Ray cluster at 127.0.0.1:9" in done.stderr
    assert InputError.__name__ in done.stderr
    assert time.monotonic() - begin < 120
    assert threading.active_count() < 100
