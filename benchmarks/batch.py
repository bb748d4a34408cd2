"""Measure batches: what kills cost, what engines cost, and that a million rows stay linear and small.

    python benchmarks/batch.py kills --count 1000 --shard-size 50 --seconds 10 --drivers 3
    python benchmarks/batch.py parts --count 200 --shard-size 10
    python benchmarks/batch.py overhead --count 60
    python benchmarks/batch.py rows --count 1000000
    python benchmarks/batch.py index --count 1000000

Each prints one JSON object. `kills` and `parts` use the bundled model with one step and real processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffgen.batch import check, prepare, run
from diffgen.batch.maker import Made, PictureMaker
from diffgen.batch.plan import write_plan
from diffgen.batch.rows import Row
from diffgen.prompts.files import Line
from diffgen.storage import Storage

THINGS = ("apple", "rocket", "cat", "star")


def plan(out: Path, count: int, shard_size: int) -> None:
    lines = (Line(f"a {THINGS[i % len(THINGS)]}") for i in range(count))
    prepare.plan(lines, out, shard_size=shard_size, steps=1)


def start(out: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "diffgen", "batch", "run", str(out), "-q", *options])


def children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text("ascii").split()]
    except OSError:
        return []


def result(out: Path) -> dict[str, Any]:
    return {name: len(keys) for name, keys in check.check(out).as_json().items()}


def kills(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Kill a random worker every few seconds, and the driver some times; then run to the end."""
    plan(out, args.count, args.shard_size)
    chance, workers, drivers, began = random.Random(0), 0, 0, time.perf_counter()
    driver = start(out, "--workers", "2", "--retries", "1000")
    while driver.poll() is None:
        try:
            driver.wait(args.seconds)
            break
        except subprocess.TimeoutExpired:
            pass
        if drivers < args.drivers and workers >= 2 * (drivers + 1):
            driver.kill()
            driver.wait()
            drivers += 1
            driver = start(out, "--workers", "2", "--retries", "1000")
        elif pids := children(driver.pid):
            os.kill(chance.choice(pids), signal.SIGKILL)
            workers += 1
    seconds = round(time.perf_counter() - began, 1)
    return {
        "killed_workers": workers,
        "killed_drivers": drivers,
        "exit": driver.returncode,
        "seconds": seconds,
    } | result(out)


def parts(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Three parts in three processes, and one more by mistake with a part that runs already."""
    plan(out, args.count, args.shard_size)
    processes = [start(out, "--part", f"{part}/3") for part in (0, 1, 2, 1)]
    return {"exits": [process.wait() for process in processes]} | result(out)


def overhead(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Seconds a picture: a plain loop over the generator, and shards by `run` in this process, in turn."""
    from diffgen.batch.plan import read_plan

    plan(out, args.count, 10)
    batch = read_plan(Storage(out))
    maker, rows = PictureMaker(batch.about), [row for shard in batch.shards for row in batch.rows(shard)]
    list(maker(rows[:3]))
    times: dict[str, float] = {}
    begin = time.process_time()
    for row in rows:
        maker.generator.generate(row.prompt, seed=row.seed, steps=1)
    times["loop"] = (time.process_time() - begin) / len(rows)
    begin = time.process_time()
    run.run(out, maker=maker)
    times["shards"] = (time.process_time() - begin) / len(rows)
    times["ratio"] = times["shards"] / times["loop"]
    return {name: round(value, 4) for name, value in times.items()}


def nothing(rows: Sequence[Row]) -> Iterator[Made]:
    """Rows without pictures."""
    return (Made(row, b"", {}) for row in rows)


def rows(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Plan, make without pictures (webdataset), list and read the status of so many rows."""
    seconds = {}
    begin = time.perf_counter()
    planned = (Row(f"{i:09}", f"a {THINGS[i % 4]} number {i}", i) for i in range(args.count))
    about = {"model": "emoji", "options": {}, "metadata": "none", "format": "webdataset", "shard_size": 1000}
    write_plan(Storage(out), planned, about)
    seconds["plan"] = time.perf_counter() - begin
    begin = time.perf_counter()
    run.run(out, maker=nothing)
    seconds["run"] = time.perf_counter() - begin
    begin = time.perf_counter()
    state = run.status(out).as_json()
    seconds["status"] = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {name: round(value, 2) for name, value in seconds.items()} | {"done": state["done"], "peak_mb": peak}


def index(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Open an index of so many pictures, all of them the same few shards, and read the first batch."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image
    from safetensors.numpy import save

    from diffgen.training.data.index import FILE, SCHEMA, held_out_keys

    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "00000.tar", "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.size = len(file.getvalue())
        tar.addfile(member, io.BytesIO(file.getvalue()))
    n = args.count
    text, digests = f"{'a caption of some forty characters in all':40}".encode(), np.arange(n)
    place = np.tile(np.array([[512, len(file.getvalue())]], dtype=np.int64), (n, 1))
    about = {"schema": SCHEMA, "kind": "tar", "shards": ["00000.tar"], "count": n, "captioned": True}
    about |= {"shard_bytes": [(out / "00000.tar").stat().st_size], "sizes": {"16x16": n}, "modes": {"RGB": n}}
    about["fingerprint"] = "0" * 64
    ends = (np.arange(n, dtype=np.int64) + 1) * len(text)
    arrays = {"shard": np.zeros(n, np.int32), "place": place, "digest": digests, "held_out": held_out_keys(digests)}
    arrays |= {"ends": ends, "texts": np.frombuffer(text * n, np.uint8)}
    arrays |= {"name_ends": np.empty(0, np.int64), "names": np.empty(0, np.uint8)}
    (out / FILE).write_bytes(save(arrays, {"about": json.dumps(about)}))
    del arrays, place, digests, ends
    code = f"""
import json, os, time
import torch

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

from diffgen.training.batches import Shuffle
from diffgen.training.data import open_training_data
torch.randperm(10)
before, begin = resident(), time.perf_counter()
data = open_training_data({str(out)!r})
train, _ = data.split(0.1)
data.pictures(Shuffle(train, 128, 0)(0))
seconds = time.perf_counter() - begin
after = resident()
print(json.dumps({{"first_batch": round(seconds, 3), "added_mb": (after - before) // 2**20}}))
"""
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "parts", "overhead", "rows", "index"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--shard-size", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10.0, help="between kills")
    parser.add_argument("--drivers", type=int, default=3, help="how often the driver is killed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = {"kills": kills, "parts": parts, "overhead": overhead, "rows": rows, "index": index}[args.what]
        print(json.dumps({"what": args.what, "count": args.count, **measured(args, Path(folder, "out"))}))


if __name__ == "__main__":
    main()
