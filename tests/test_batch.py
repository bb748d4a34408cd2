"""Batches: plans that never change, shards that are whole or not there, the engines, kills, checks and repairs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import diffgen
from diffgen.batch import check as checks
from diffgen.batch import prepare, run
from diffgen.batch.maker import Made
from diffgen.batch.plan import read_plan, shard_file
from diffgen.batch.rows import Row, read_prompts
from diffgen.errors import CannotWrite, DiffgenError, InputError, InvalidOutput, UsageError
from diffgen.images.pixels import pixels_sha256
from diffgen.prompts.files import Line
from diffgen.storage import Storage

Command = Callable[..., tuple[int, str, str]]
LINES = [Line("a red apple"), Line("a {blue|green} star", {"count": 3, "seed": 5}), Line("a cat", {"guidance": 2.0})]
ROOT = Path(__file__).parent.parent


def plan(out: Path, tiny: Path, lines: Sequence[Line] = LINES, **options: Any) -> Any:
    return prepare.plan(lines, out, str(tiny), **{"steps": 1, "shard_size": 2, "size": 16, **options})[0]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished batch of five rows in a format; not to be changed."""
    folder, done = tmp_path_factory.mktemp("batches"), {}

    def batch(format: str) -> Path:
        if format not in done:
            plan(folder / format, tiny, format=format)
            run.run(folder / format, part=(0, 1))
            done[format] = folder / format
        return done[format]

    return batch


def pictures(out: Path) -> dict[str, tuple[str, str]]:
    """(prompt, hash of the pixels) of each picture of a batch of files."""
    found = {}
    for path in out.glob("*/metadata.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            about = json.loads(line)
            digest = pixels_sha256(Image.open(path.parent / about["file_name"]))
            assert digest == about["pixels_sha256"]
            found[about["key"]] = about["text"], digest
    return found


def test_a_batch_makes_the_pictures_that_generate_makes(finished: Callable[[str], Path], tiny: Path) -> None:
    generator = diffgen.load(tiny)
    expected = []
    for prompt, options in (
        ("a red apple", {"seed": 0}),
        ("a {blue|green} star", {"seed": 5, "count": 3}),
        ("a cat", {"seed": 4, "guidance": 2.0}),
    ):
        for image in generator.generate(prompt, steps=1, size=16, **options):
            expected.append((json.loads(image.info["diffgen"])["prompt"], pixels_sha256(image)))
    assert pictures(finished("files")) == {f"{number:09}": pair for number, pair in enumerate(expected)}


def test_the_default_seed_is_the_number_of_the_row(finished: Callable[[str], Path]) -> None:
    batch = read_plan(Storage(finished("files")))
    rows = [row for shard in batch.shards for row in batch.rows(shard)]
    assert [row.seed for row in rows] == [0, 5, 6, 7, 4]
    assert [row.key for row in rows] == [f"{number:09}" for number in range(5)]
    assert all("{" not in row.prompt for row in rows)


def test_the_same_plan_is_accepted_again_and_another_one_refused(tiny: Path, tmp_path: Path) -> None:
    first = plan(tmp_path / "out", tiny)
    assert plan(tmp_path / "out", tiny).about == first.about
    for options in ({"steps": 2}, {"lines": LINES[:2]}, {"lines": [*LINES, Line("one more")]}, {"shard_size": 3}):
        with pytest.raises(CannotWrite, match="has another plan"):
            plan(tmp_path / "out", tiny, **options)
    assert read_plan(Storage(tmp_path / "out")).about == first.about


def test_a_plan_that_changed_is_refused(tiny: Path, tmp_path: Path) -> None:
    batch = plan(tmp_path, tiny)
    rows = tmp_path / shard_file(1)
    rows.write_text(rows.read_text("utf-8").replace("star", "moon"), "utf-8")
    with pytest.raises(InputError, match=r"plan/00001\.jsonl .* is not the one of its plan\.json"):
        batch.rows(1)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text("utf-8").replace('"steps": 1', '"steps": 9'), "utf-8")
    with pytest.raises(InputError, match="has changed since it was written"):
        read_plan(Storage(tmp_path))


def test_a_worker_with_other_versions_or_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    from diffgen.batch.maker import PictureMaker
    from diffgen.batch.plan import check_versions, versions

    batch = plan(tmp_path, tiny)
    with pytest.raises(InputError, match=r"this worker has torch 1\.0, the plan was made with"):
        check_versions(batch.about, versions() | {"torch": "1.0"}, "this worker")
    with pytest.raises(InputError, match="other weights here"):
        PictureMaker({**batch.about, "model_hash": "0" * 64}, model=batch.model)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.parquet"])
def test_prompts_are_read_in_every_format(name: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": "a red apple", "seed": None, "guidance": None}, {"prompt": "a cat", "seed": 7, "guidance": 2.5}]
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith("csv"):
        path.write_text("prompt,seed,guidance\na red apple,,\na cat,7,2.5\n", "utf-8")
    else:
        lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows]
        path.write_text("\n".join(lines), "utf-8")
    read = [(line.prompt, line.options) for line in read_prompts(str(path))]
    assert read == [("a red apple", {}), ("a cat", {"seed": 7, "guidance": 2.5})]


def test_a_wrong_row_is_refused_with_its_place(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    for cells, message in (
        ("prompt,steps\na,5\na,many\n", "'steps' must be a whole number"),
        ("prompt,stps\na,5\n", "stps"),
    ):
        path.write_text(cells, "utf-8")
        with pytest.raises(InputError, match=r"p\.csv, line \d: ") as caught:
            prepare.plan(str(path), tmp_path / "out", str(tiny))
        assert message in str(caught.value)
    with pytest.raises(UsageError) as refused:
        prepare.plan([Line("a", {"seed": 2**32 - 1, "count": 2}, "line 9")], tmp_path / "out", str(tiny))
    assert refused.value.message.startswith("line 9: the last seed")
    assert not (tmp_path / "out").exists()


def stub(rows: Sequence[Row]) -> Iterator[Made]:
    """Pictures of one colour, without a model; a row whose prompt is "broken" fails."""
    import io

    for row in rows:
        if row.prompt == "broken":
            yield Made(row, error=InvalidOutput("is not finite"))
            continue
        image, file = Image.new("RGB", (8, 8), (row.seed % 256, 0, 0)), io.BytesIO()
        image.save(file, "PNG")
        yield Made(row, file.getvalue(), {"width": 8, "height": 8, "pixels_sha256": pixels_sha256(image)})


@pytest.mark.parametrize("format", ["files", "webdataset", "parquet"])
def test_a_row_that_fails_ends_nothing_and_can_be_planned_again(
    format: str, tiny: Path, tmp_path: Path, diffgen_: Command
) -> None:
    out = tmp_path / "out"
    plan(out, tiny, [Line("a"), Line("broken", {"seed": 3, "guidance": 2.0}), Line("b")], format=format)
    shards = run.run(out, maker=stub)
    assert shards.as_json() | {"seconds_left": 0.0} == {
        **dict(rows=3, done=2, failed=1, missing=0, shards=2, done_shards=2, seconds_left=0.0)
    }
    assert checks.check(out).as_json() == {"missing": [], "duplicate": [], "bad": [], "extra": []}
    code, text, errors = diffgen_("batch", "failures", out)
    assert code == 0
    assert json.loads(text) == {"prompt": "broken", "seed": 3, "guidance": 2.0}
    assert "000000001: is not finite" in errors
    code, text, errors = diffgen_("batch", "run", out, "--json")  # finished: nothing to do, the failure is reported
    assert code == 1
    assert json.loads(text)["result"]["failed"] == 1
    assert "1 of 3 rows failed" in errors


def test_a_maker_retries_the_rows_of_a_group_alone(tiny: Path, tmp_path: Path) -> None:
    """A picture that is missing stops its own row, not the others of the same options."""
    from diffgen.batch.maker import PictureMaker

    batch = plan(tmp_path, tiny)
    rows = [Row("0", "a", 1), Row("1", "a", 2, {"image": str(tmp_path / "missing.png")}), Row("2", "b", 3)]
    made = {one.row.key: one for one in PictureMaker(batch.about, model=batch.model)(rows)}
    assert isinstance(made["1"].error, InputError)
    assert made["0"].error is None
    assert made["2"].error is None


@pytest.mark.parametrize("format", ["files", "webdataset", "parquet"])
def test_check_finds_what_is_wrong_and_repair_makes_it_again(
    format: str, finished: Callable[[str], Path], tmp_path: Path, diffgen_: Command
) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(finished(format), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.parent.name != "stats"}
    assert diffgen_("batch", "check", out)[0] == 0
    if format == "files":
        data = bytearray((out / "00000" / "000000000.png").read_bytes())
        data[len(data) // 2] ^= 1
        (out / "00000" / "000000000.png").write_bytes(data)
        (out / "00001" / "000000003.png").unlink()
        Image.new("RGB", (8, 8)).save(out / "00001" / "000000099.png")
        expected = {"missing": ["000000003"], "bad": ["000000000"], "extra": ["000000099"], "duplicate": []}
    else:
        path = out / ("00001.tar" if format == "webdataset" else "data/train-00001-of-00003.parquet")
        path.write_bytes(path.read_bytes()[:-300])
        expected = {"missing": ["000000002", "000000003"], "bad": [], "extra": [], "duplicate": []}
    code, text, _ = diffgen_("batch", "check", out, "--json")
    assert code == 1
    assert json.loads(text)["result"] == expected
    if format == "files":
        code, _, errors = diffgen_("batch", "check", out, "--repair")
        assert code == 0, errors
    else:
        checks.forget_bad(out, checks.check(out))
        run.run(out, part=(0, 1))
    assert {path: path.read_bytes() for path in before if path.suffix != ".parquet"} == {
        path: data for path, data in before.items() if path.suffix != ".parquet"
    }


def test_what_others_left_half_written_is_replaced(tiny: Path, tmp_path: Path) -> None:
    plan(tmp_path, tiny)
    (tmp_path / "00001").mkdir()
    (tmp_path / "00001" / "000000002.png").write_bytes(b"half")
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "00001.json").write_text('{"shard": 1, "pl', "utf-8")
    assert run.status(tmp_path).missing == [0, 1, 2]
    run.run(tmp_path, maker=stub)
    assert checks.check(tmp_path).wrong == 0


def test_statistics_of_another_plan_are_refused(tiny: Path, tmp_path: Path) -> None:
    plan(tmp_path / "a", tiny)
    plan(tmp_path / "b", tiny, steps=2)
    run.run(tmp_path / "a", maker=stub)
    (tmp_path / "a" / "stats").rename(tmp_path / "b" / "stats")
    with pytest.raises(InputError, match="belongs to another plan"):
        run.status(tmp_path / "b")


def test_a_full_disk_ends_the_run_with_one_line(tiny: Path, tmp_path: Path, diffgen_: Command) -> None:
    import resource

    out = tmp_path / "out"
    plan(out, tiny)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        code, _, errors = diffgen_("batch", "run", out, "--part", "0/1", "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert code == 6, errors
    assert errors.count("\n") == 1
    assert not list(out.glob("0*"))
    assert not list(out.glob(".diffgen-*"))


def test_parts_together_make_everything_once(tiny: Path, tmp_path: Path) -> None:
    plan(tmp_path, tiny, [Line(f"picture {i}") for i in range(11)])
    made = []

    def counting(rows: Sequence[Row]) -> Iterator[Made]:
        made.extend(row.key for row in rows)
        return stub(rows)

    for part in (0, 1, 1, 2):  # one of them by mistake twice
        run.run(tmp_path, part=(part, 3), maker=counting)
    assert sorted(made) == [f"{number:09}" for number in range(11)]
    assert checks.check(tmp_path).wrong == 0


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/3", {}, (2, 3)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, (4, 8)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"}, (5, 8)),
        ("auto", {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "4"}, (0, 4)),
    ],
)
def test_a_part_is_written_or_told_by_slurm_and_kubernetes(
    text: str, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    assert run.parse_part(text, environment) == expected


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "1/0", "auto", "1/2/3", ""])
def test_an_impossible_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--part"):
        run.parse_part(text, {"JOB_COMPLETION_INDEX": "0"} if text == "auto" else {})


def test_a_remote_store_holds_a_batch(tiny: Path, finished: Callable[[str], Path]) -> None:
    import fsspec

    place = "memory://bucket/out"
    prompts = [{"prompt": line.prompt, **line.options} for line in LINES]
    fsspec.filesystem("memory").pipe_file("/bucket/p.jsonl", "\n".join(map(json.dumps, prompts)).encode())
    prepare.plan("memory://bucket/p.jsonl", place, str(tiny), steps=1, shard_size=2, size=16, format="webdataset")
    run.run(place, part=(0, 1))
    assert checks.check(place).wrong == 0
    store, local = Storage(place), finished("webdataset")
    assert sorted(store.sizes()) == sorted(path.name for path in local.iterdir())
    for name in ("00000.tar", "00001.tar", "00002.tar", "plan/00001.jsonl"):
        assert store.read(name) == (local / name).read_bytes()
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_no_credentials_are_written_or_printed(tmp_path: Path) -> None:
    from diffgen.storage import without_credentials

    assert without_credentials("s3://key:secret@bucket/out") == "s3://bucket/out"
    with pytest.raises((UsageError, InputError)) as caught:
        read_plan(Storage("gs://user:secret@bucket/out"))
    assert "secret" not in str(caught.value)


def start(out: Path, *options: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "diffgen", "batch", "run", str(out), "-q", *options]
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task")
    return [int(pid) for task in path.iterdir() for pid in (task / "children").read_text("ascii").split()]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_kills_and_ctrl_c_lose_nothing(digits_run: Path, tmp_path: Path) -> None:
    """kill -9 of a worker and of a driver, and Ctrl-C: in the end the same pixels as in one process, each key once."""
    out, reference = tmp_path / "out", tmp_path / "reference"
    for folder in (out, reference):
        lines = [Line(str(number % 10)) for number in range(60)]
        prepare.plan(lines, folder, str(digits_run), steps=20, shard_size=2)
    run.run(reference, part=(0, 1))

    def done() -> int:
        return len(list(out.glob("stats/*.json")))

    driver = start(out, "--workers", "1", "--retries", "9")
    wait_for(lambda: done() >= 2)
    workers = workers_of(driver)
    os.kill(workers[0], signal.SIGKILL)
    before = done()
    wait_for(lambda: done() > before + 1)  # made by another one
    workers += workers_of(driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not any(map(is_alive, workers)), 20)  # they end with their driver

    before = done()
    driver = start(out, "--workers", "2")
    wait_for(lambda: done() > before)
    workers = workers_of(driver)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(20) == 130
    wait_for(lambda: not any(map(is_alive, workers)), 20)
    assert not list(out.glob(".diffgen-*/*.part"))

    assert 0 < len(run.status(out).missing) < 30
    run.run(out, part=(0, 1))
    assert pictures(out) == pictures(reference)
    assert checks.check(out).wrong == 0


def test_a_shard_that_kills_its_workers_is_given_up_and_named(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A worker that cannot even start is not started for ever."""
    from diffgen.batch.local import Crew

    plan(tmp_path, tiny)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DiffgenError, match=r"workers cannot start \(exit code 1\)"):
        Crew(str(tmp_path), {}, workers=1, retries=2).run([0, 1], lambda stats: None)
