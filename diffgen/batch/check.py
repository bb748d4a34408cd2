"""Open every shard of a batch and compare it with the plan: keys, decoded pixels, their recorded hash."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from diffgen.errors import InputError
from diffgen.images.pixels import pixels_sha256
from diffgen.images.read import read_image, read_kind
from diffgen.storage import Storage

from .formats import FORMATS
from .plan import BatchPlan, read_plan
from .shards import Shards, find_shards, forget


@dataclass
class Findings:
    """The keys that are wrong, by what is wrong with them, and the shards they are in."""

    missing: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # cannot be decoded, or other pixels than recorded
    extra: list[str] = field(default_factory=list)
    shards: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, list[str]]:
        return {"missing": self.missing, "duplicate": self.duplicate, "bad": self.bad, "extra": self.extra}

    @property
    def wrong(self) -> int:
        return sum(map(len, self.as_json().values()))


def check(out: str | os.PathLike[str], on_step: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """Check all shards. Rows that failed when they were made are not missing. Raises InputError without a plan."""
    plan = read_plan(Storage(out))
    shards, findings = find_shards(plan), Findings()
    for shard in plan.shards:
        before = findings.wrong
        _check_shard(shards, shard, findings)
        if findings.wrong > before:
            findings.shards.add(shard)
        on_step(shard + 1, len(plan.shards))
    for name in ("device", "dtype"):
        kinds = sorted({str(stats[name]) for stats in shards.stats.values() if name in stats})
        if len(kinds) > 1:
            findings.notes.append(f"the shards were made with several kinds of {name}: {', '.join(kinds)}")
    return findings


def _check_shard(shards: Shards, shard: int, findings: Findings) -> None:
    plan, planned = shards.plan, shards.plan.keys(shard)
    if shard not in shards.stats:
        findings.missing += planned
        return
    failed = {row["key"] for row in shards.stats[shard]["failed"]}
    times: Counter[str] = Counter()
    try:
        for key, png, about in FORMATS[plan.about["format"]].read(plan.store, shard, len(plan.shards)):
            times[key] += 1
            if times[key] == 2:
                findings.duplicate.append(key)
            if key not in planned:
                findings.extra.append(key)
            elif _pixels(png) != about.get("pixels_sha256"):
                findings.bad.append(key)
    except InputError:  # what could not be read is missing
        pass
    findings.missing += [key for key in planned if key not in times and key not in failed]


def _pixels(png: bytes) -> str:
    """The hash of a picture's pixels; "" if it cannot be decoded."""
    try:
        return pixels_sha256(read_image(png, read_kind(png)[2]))
    except InputError:
        return ""


def forget_bad(out: str | os.PathLike[str], findings: Findings) -> BatchPlan:
    """Remove the shards in which something is wrong, so that `run` makes them again. Raises CannotWrite."""
    plan = read_plan(Storage(out))
    for shard in sorted(findings.shards):
        forget(plan, shard)
    return plan
