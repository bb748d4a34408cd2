"""The plan of a batch: `plan.json`, and the rows of each shard in `plan/00012.jsonl`. It never changes.

    plan = make_plan_of_rows(rows, about, store)      # writes it, or finds the same one there
    plan = read_plan(store)
    plan.rows(12)                                     # the rows of shard 12

`plan.json` has a SHA-256 of each shard's rows, so that rows are never read from another plan. It holds no credentials.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from diffgen.errors import CannotWrite, InputError
from diffgen.generation import recorded
from diffgen.images.metadata import LEVELS
from diffgen.storage import Storage
from diffgen.version import __version__

from .formats import FORMATS
from .rows import Row, canonical, parse_rows

SCHEMA = "diffgen.batch/1"
FILE = "plan.json"
MAX_ROWS = 10**9
MAX_SHARD = 100_000  # rows
ABOUT: dict[str, recorded.Fits] = {  # the values of a plan.json
    "model": recorded.text,
    "prediction": recorded.optional(recorded.text),
    "options": lambda value: isinstance(value, dict),
    "metadata": lambda value: value in LEVELS,
    "format": lambda value: isinstance(value, str) and value in FORMATS,
    "shard_size": recorded.whole(1, MAX_SHARD),
    "rows": recorded.whole(0, MAX_ROWS),
    "shards": lambda value: isinstance(value, list) and all(map(recorded.sha256, value)),
    "versions": lambda value: isinstance(value, dict),
}
VERSIONED = ("torch", "diffusers", "transformers")  # packages that change pixels


@dataclass(frozen=True)
class BatchPlan:
    """A plan that was read or written."""

    store: Storage
    about: Mapping[str, Any]  # the content of plan.json

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(len(self.about["shards"]))

    @property
    def model(self) -> str:
        """The planned model as `find` takes it: a path in a plan is relative to its folder, or to the home."""
        name = os.path.expanduser(str(self.about["model"]))
        return os.path.abspath(os.path.join(self.store.root, name)) if name.startswith("./") else name

    def count(self, shard: int) -> int:
        """How many rows a shard has."""
        size = int(self.about["shard_size"])
        return min(size, int(self.about["rows"]) - shard * size)

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's rows."""
        first = shard * int(self.about["shard_size"])
        return [f"{number:09}" for number in range(first, first + self.count(shard))]

    def rows(self, shard: int) -> list[Row]:
        """The rows of a shard. Raises InputError if they are not those of the plan."""
        name = shard_file(shard)
        data = self.store.read(name)
        if hashlib.sha256(data).hexdigest() != self.about["shards"][shard]:
            hint = "another plan was written there, or a file has changed: plan again into an empty folder"
            raise InputError(f"{name} in {self.store.place} is not the one of its plan.json", hint)
        return parse_rows(data)


def name_of(model: str, store: Storage) -> str:
    """How a plan names its model: a path from the plan's folder, else from the home, so that it names no user.

    A path outside the home stays as it is for a plan on a remote store.
    """
    if not os.path.exists(model):
        return model
    path, home = Path(os.path.abspath(model)), Path.home()
    from_plan = path if store.is_remote else Path(os.path.relpath(path, store.root))
    if not from_plan.is_absolute() and home.name not in from_plan.parts:
        return f"./{from_plan.as_posix()}"
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def shard_file(shard: int) -> str:
    return f"plan/{shard:05}.jsonl"


def versions() -> dict[str, str]:
    """The versions of what changes pixels."""
    installed = {"diffgen": __version__}
    for package in VERSIONED:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def check_versions(about: Mapping[str, Any], here: Mapping[str, str], where: str) -> None:
    """Raise InputError for a worker with other packages than the plan was made with."""
    for package, planned in about["versions"].items():
        if here.get(package) != planned:
            raise InputError(
                f"{where} has {package} {here.get(package, 'none')}, the plan was made with {planned}",
                "install the same versions everywhere, or plan again into an empty folder",
            )


def write_plan(store: Storage, rows: Iterable[Row], about: Mapping[str, Any]) -> BatchPlan:
    """Write a plan, `plan.json` last. `about` has at least shard_size and format.

    A folder that has the very same plan is left as it is. Raises CannotWrite for a folder with another plan.
    """
    size, digests, count = about["shard_size"], [], 0
    existing = _read(store) if store.exists(FILE) else None
    for number, part in enumerate(_parts(rows, size)):
        data = b"".join(row.line() for row in part)
        digests.append(hashlib.sha256(data).hexdigest())
        count += len(part)
        if existing is None:
            store.put(shard_file(number), data)
        elif existing["shards"][number : number + 1] != digests[-1:]:
            raise _other_plan(store)
    content = {"schema": SCHEMA, **about, "versions": versions(), "rows": count, "shards": digests}
    content["sha256"] = hashlib.sha256(canonical(content)).hexdigest()
    if existing is None:
        store.put(FILE, json.dumps(content, indent=1).encode() + b"\n")
    elif existing != content:
        raise _other_plan(store)
    return BatchPlan(store, content)


def read_plan(store: Storage) -> BatchPlan:
    """The plan in a folder. Raises InputError if there is none, or if it is broken."""
    if not store.exists(FILE):
        raise InputError(f"there is no plan in {store.place}", f"make one: diffgen batch plan PROMPTS -o {store.place}")
    return BatchPlan(store, _read(store))


def _read(store: Storage) -> dict[str, Any]:
    where, hint = f"{FILE} in {store.place}", "plan again into an empty folder"
    try:
        content = json.loads(store.read(FILE))
        own = content.pop("sha256")
        if content["schema"] != SCHEMA:
            raise InputError(f"{where} has the schema {str(content['schema'])[:40]!r}, not {SCHEMA}", hint)
        if hashlib.sha256(canonical(content)).hexdigest() != own:
            raise InputError(f"{where} has changed since it was written", hint)
        if wrong := next((key for key, fits in ABOUT.items() if not fits(content[key])), None):
            raise InputError(f"{where} has an impossible {wrong}: {str(content[wrong])[:80]!r}", hint)
        if len(content["shards"]) != -(-content["rows"] // content["shard_size"]):
            raise InputError(f"{where} has {len(content['shards'])} shards for {content['rows']} rows", hint)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} is broken", hint) from error
    return {**content, "sha256": own}


def _parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while part := list(islice(iterator, size)):
        yield part


def _other_plan(store: Storage) -> CannotWrite:
    return CannotWrite(f"{store.place} has another plan", "choose another -o, or run the plan that is there")
