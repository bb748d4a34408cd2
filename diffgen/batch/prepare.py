"""Plan a batch: check every row, make its choices, load the model for its hash and a timed sample, write the plan."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, cast

from diffgen.errors import UsageError
from diffgen.generation.checks import check_int
from diffgen.generation.options import Options
from diffgen.images.metadata import LEVELS
from diffgen.models.find import DEFAULT, find, predicting
from diffgen.prompts.files import Line
from diffgen.storage import Storage

from .formats import FORMATS
from .maker import PictureMaker
from .plan import MAX_SHARD, BatchPlan, name_of, write_plan
from .rows import Row, read_prompts, rows_of

SAMPLE = 2  # pictures that are timed; one before them warms up


@dataclass(frozen=True)
class Estimate:
    """What a plan will take, by a sample on this machine; None without a sample."""

    rows: int
    shards: int
    seconds: float | None  # with one worker like this process
    bytes: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    prompts: str | Iterable[Line],
    out: str | os.PathLike[str],
    model: str | None = None,
    *,
    prediction: str | None = None,
    shard_size: int = 1000,
    format: str = "files",
    metadata: str = "full",
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> tuple[BatchPlan | None, Estimate]:
    """Freeze the pictures of many prompts into a folder; with `dry_run`, check and count them.

    prompts     a file (text, JSON lines, CSV, parquet), here or on a store that fsspec knows, or its lines
    out         the folder, here or on such a store
    model       what `diffgen.load` takes; a path is recorded from `out` or from the home; `run` can be told another
    shard_size  rows in a shard: a killed worker loses at most one shard
    format      files, webdataset or parquet
    options     those of `generate`; a row's own replace them

    The same plan may be written again; another one is refused. Raises UsageError and InputError with the place of a
    row, CannotWrite.
    """
    check_int("--shard-size", shard_size, 1, MAX_SHARD)
    if format not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)} (got {format!r})")
    if metadata not in LEVELS:
        raise UsageError(f"--metadata must be one of {', '.join(LEVELS)} (got {metadata!r})")
    FORMATS[format].check_packages()
    store = Storage(out)
    lines = read_prompts(prompts) if isinstance(prompts, str) else prompts
    source = find(model)
    rows = rows_of(predicting(source, prediction) if prediction else source, lines, cast(Options, options))
    if dry_run:
        count = sum(1 for _ in rows)
        return None, Estimate(count, -(-count // shard_size), None, None)
    planned = {name: value for name, value in options.items() if name not in ("seed", "seeds", "count", "wildcards")}
    about = {
        "model": name_of(model or DEFAULT, store),
        "prediction": prediction,
        "options": planned,
        "metadata": metadata,
        "format": format,
        "shard_size": shard_size,
    }
    first = list(islice(rows, 1 + SAMPLE))
    maker = PictureMaker(about, device, dtype, offline, model or DEFAULT)
    about["model_hash"] = maker.generator.model_hash
    seconds, size = _sample(maker, first)
    written = write_plan(store, _joined(first, rows), about)
    count = int(written.about["rows"])
    estimate = Estimate(count, len(written.shards), round(seconds * count, 1), round(size * count))
    return written, estimate


def _joined(first: list[Row], rest: Iterable[Row]) -> Iterable[Row]:
    yield from first
    yield from rest


def _sample(maker: PictureMaker, rows: list[Row]) -> tuple[float, float]:
    """(seconds, bytes) of a picture. The first row warms up; it is the sample if it is the only one."""
    size, begin, count = 0, time.perf_counter(), 0
    for one in maker(rows[:1]):
        size, count = len(one.png), 1
    seconds = time.perf_counter() - begin
    if rest := rows[1:]:
        begin, size = time.perf_counter(), 0
        for one in maker(rest):
            size += len(one.png)
        seconds, count = time.perf_counter() - begin, len(rest)
    return seconds / count, size / count
