"""Make shard i of a plan and publish it whole: the one function that every engine runs.

A shard is written into a scratch folder and given its name in one step; then `stats/00012.json` is written. A shard is
done if its statistics and its files are there, with the recorded sizes. Making a shard twice is a waste of time and
nothing else: the names are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgen.errors import InputError
from diffgen.generation import recorded
from diffgen.storage import FOLDER

from .formats import FORMATS
from .maker import Maker
from .plan import MAX_ROWS, MAX_SHARD, BatchPlan

STATS = "stats"


def make_shard(plan: BatchPlan, shard: int, maker: Maker) -> dict[str, Any]:
    """Make one shard and publish it; returns its statistics. Raises CannotWrite, InputError for a changed plan."""
    store, started = plan.store, time.time()
    count, failed = 0, []
    with store.scratch() as folder:
        writer = FORMATS[plan.about["format"]](folder, shard, len(plan.shards))
        for made in maker(plan.rows(shard)):
            if made.error is None:
                writer.add(made)
                count += 1
            else:
                error = {"code": int(made.error.code), "message": made.error.message}
                failed.append({"key": made.row.key, "prompt": made.row.again, "error": error})
        files = {}
        for name, path in writer.close().items():
            for part in sorted(path.iterdir()) if path.is_dir() else [path]:
                if part.suffix != ".png":  # a picture has its own hash in its description
                    own = f"{name}/{part.name}" if path.is_dir() else name
                    files[own] = {"bytes": part.stat().st_size, "sha256": _sha256(part)}
            store.put_path(name, path)
    finished = time.time()
    stats = {
        "shard": shard,
        "plan": plan.about["sha256"],
        "count": count,
        "failed": failed,
        "files": files,
        "started": round(started, 3),
        "seconds": round(finished - started, 3),
        "process": os.getpid(),
        **getattr(maker, "where", {}),
    }
    store.put(stats_file(shard), json.dumps(stats).encode())
    return stats


def stats_file(shard: int) -> str:
    return f"{STATS}/{shard:05}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Shards:
    """What there is of a plan: the statistics of each shard that is done."""

    plan: BatchPlan
    stats: Mapping[int, dict[str, Any]]

    @property
    def missing(self) -> list[int]:
        """The numbers of the shards that are not done."""
        return [shard for shard in self.plan.shards if shard not in self.stats]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The rows that failed, in their order: key, prompt (a line of a prompt file), error."""
        rows = [row for _, stats in sorted(self.stats.items()) for row in stats["failed"]]
        return sorted(rows, key=lambda row: row["key"])

    def as_json(self) -> dict[str, Any]:
        """What `status` prints."""
        done = sum(stats["count"] for stats in self.stats.values())
        failed = sum(len(stats["failed"]) for stats in self.stats.values())
        rows = int(self.plan.about["rows"])
        return {
            "rows": rows,
            "done": done,
            "failed": failed,
            "missing": rows - done - failed,
            "shards": len(self.plan.shards),
            "done_shards": len(self.stats),
            "seconds_left": self.seconds_left(),
        }

    def rate(self) -> float | None:
        """Rows a second, of all workers together, over the shards that were finished last; None if none was."""
        last = sorted(self.stats.values(), key=lambda s: s["started"] + s["seconds"])[-64:]
        if not last:
            return None
        begin = min(s["started"] for s in last)
        end = max(s["started"] + s["seconds"] for s in last)
        return sum(s["count"] + len(s["failed"]) for s in last) / max(end - begin, 1e-3)

    def seconds_left(self) -> float | None:
        """The time until all shards are done, at the rate of the last ones."""
        rate = self.rate()
        left = sum(self.plan.count(shard) for shard in self.missing)
        return 0.0 if not left else None if rate is None else round(left / rate, 1)


def find_shards(plan: BatchPlan, only: Iterable[int] | None = None) -> Shards:
    """Read which shards are done, all or some. Raises InputError for statistics of another plan."""
    store = plan.store
    kind, shards = FORMATS[plan.about["format"]], len(plan.shards)
    listed = store.sizes(STATS)
    wanted = [shard for shard in (plan.shards if only is None else only) if f"{shard:05}.json" in listed]
    places = {name.rpartition("/")[0] for shard in wanted[:1] for name in kind.names(shard, shards)}
    there = {f"{place}/{name}".lstrip("/"): size for place in places for name, size in store.sizes(place).items()}
    stats_of = {}
    for name, data in store.read_all([stats_file(shard) for shard in wanted]):
        stats = _parsed(data)
        if stats is None:  # half written by something that does not rename
            continue
        if stats["plan"] != plan.about["sha256"]:
            raise InputError(
                f"{name} in {store.place} belongs to another plan", "plan into an empty folder, or remove stats/"
            )
        if _is_whole(stats, there, kind.names(stats["shard"], shards)):
            stats_of[stats["shard"]] = stats
    return Shards(plan, stats_of)


def _is_failed(row: Any) -> bool:
    """A row that failed, as statistics have it."""
    parts = ((row, "key", str), (row, "prompt", dict), (row["error"], "code", int), (row["error"], "message", str))
    return all(type(table[key]) is kind for table, key, kind in parts)


STATISTICS: dict[str, recorded.Fits] = {  # the values that are read
    "shard": recorded.whole(0, MAX_ROWS),
    "plan": recorded.sha256,
    "count": recorded.whole(0, MAX_SHARD),
    "failed": lambda value: isinstance(value, list) and all(map(_is_failed, value)),
    "files": lambda value: isinstance(value, dict) and all(isinstance(one, dict) for one in value.values()),
    "started": recorded.number(0, 2**40),
    "seconds": recorded.number(0, 2**40),
}


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        stats = json.loads(data)
        return stats if all(fits(stats[key]) for key, fits in STATISTICS.items()) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_whole(stats: dict[str, Any], there: Mapping[str, int], names: list[str]) -> bool:
    """Whether the files of a shard are there with their sizes, and its folders at all."""
    folders_exist = all(name in there for name in names)
    return folders_exist and all(
        there[name] == FOLDER or there[name] == stats["files"].get(name, {}).get("bytes") for name in names
    )


def forget(plan: BatchPlan, shard: int) -> None:
    """Remove a shard, its statistics first, so that it is made again. Raises CannotWrite."""
    plan.store.remove(stats_file(shard))
    for name in FORMATS[plan.about["format"]].names(shard, len(plan.shards)):
        plan.store.remove(name)
