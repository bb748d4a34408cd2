"""The rows of a plan: one picture each, from the lines of a prompt file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from diffgen.errors import DiffgenError, InputError, UsageError
from diffgen.generation.checks import MAX_SEED, which_seeds
from diffgen.generation.options import Options, json_types
from diffgen.loading import make_plan
from diffgen.prompts.files import Line, Types, iterate_lines, line_of
from diffgen.prompts.wildcards import Wildcards
from diffgen.prompts.words import check_prompt
from diffgen.storage import Storage

from .extras import need

if TYPE_CHECKING:
    from diffgen.models.find import Model

WHICH = ("seed", "seeds", "count")  # options that say which pictures, not how they look
OPTION_SETS = 1024  # checked plans that are kept


@dataclass(frozen=True)
class Row:
    """One picture of a plan. Its choices are made."""

    key: str  # the number of the row, in nine digits
    prompt: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)  # where it differs from the options of the plan

    def line(self) -> bytes:
        """The row as a line of a plan."""
        return canonical({"key": self.key, "prompt": self.prompt, "seed": self.seed, **self.options}) + b"\n"

    @property
    def again(self) -> dict[str, Any]:
        """The row as a line of a prompt file."""
        return {"prompt": self.prompt, "seed": self.seed, **self.options}


def canonical(value: Any) -> bytes:
    """JSON in one form: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_rows(data: bytes) -> list[Row]:
    """The rows in the lines of a shard of a plan."""
    rows = []
    for line in data.splitlines():
        values = json.loads(line)
        rows.append(Row(values.pop("key"), values.pop("prompt"), values.pop("seed"), values))
    return rows


def read_prompts(source: str) -> Iterator[Line]:
    """Yield the lines of a prompt file: text, JSON lines, CSV or parquet, here or on a store that fsspec knows.

    Columns of CSV and parquet have the names of the keys of JSON lines; empty values are not set.
    Raises InputError, with the place of the line.
    """
    folder, _, name = source.rpartition("/")
    store = Storage(folder or ("/" if source.startswith("/") else "."))
    types, kind = json_types(), name.lower().rpartition(".")[2]
    with store.open(name) as file:
        if kind == "parquet":
            yield from _parquet_lines(file, name, types)
        elif kind == "csv":
            yield from _csv_lines(io.TextIOWrapper(file, "utf-8-sig", newline=""), name, types)
        else:
            yield from iterate_lines(cast(Any, file), name, types)


def _parquet_lines(file: Any, name: str, types: Types) -> Iterator[Line]:
    parquet, number = need("pyarrow.parquet", "parquet files"), 0
    try:
        opened = parquet.ParquetFile(file)
        for batch in opened.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield _line({k: v for k, v in values.items() if v is not None}, f"{name}, row {number}", types)
    except DiffgenError:
        raise
    except Exception as error:  # pyarrow's own, on a broken file
        raise InputError(f"cannot read prompts from {name}: {error}") from error


def _csv_lines(file: Any, name: str, types: Types) -> Iterator[Line]:
    reader = csv.DictReader(file, strict=True)
    try:
        for values in reader:
            where = f"{name}, line {reader.line_num}"
            if None in values:
                raise InputError(f"{where}: more values than columns")
            typed = {k: _typed(v, types.get(k.replace("-", "_"), (str,))) for k, v in values.items() if v}
            yield _line(typed, where, types)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read prompts from {name}: {error}", "it must be CSV in UTF-8 with a header"
        ) from error


def _typed(text: str, types: tuple[type, ...]) -> Any:
    """The value of a cell: a number where the option is one and the text is one, else the text."""
    for kind in (int, float):
        if kind in types:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _line(values: Mapping[str, Any], where: str, types: Types) -> Line:
    line = line_of(values, where, types)
    return Line(line.prompt, line.options, where)


def rows_of(model: Model, lines: Iterable[Line], options: Options) -> Iterator[Row]:
    """Yield the rows of the lines, checked, their choices made.

    Picture i of a line has the seed `seed + i`; where neither the line nor the options set a seed, it is the number of
    the row. Raises what `make_plan` does, with the place of the line.
    """
    wildcards = Wildcards(options.get("wildcards"))

    @lru_cache(maxsize=OPTION_SETS)
    def check(own: bytes, prompt: str) -> None:
        make_plan(model, prompt, **cast(Options, json.loads(own) | {"seed": 0}))

    number = 0
    for line in lines:
        values = {**options, **line.options}
        try:
            drawn = not values.keys() & {"seed", "seeds"}
            which = which_seeds(values.get("count", 1), values.get("seed", 0), values.get("seeds"))
            how = {name: value for name, value in values.items() if name not in WHICH}
            check_prompt(line.prompt)
            check(canonical(how), line.prompt if model.is_run else "a")
            own = {name: value for name, value in line.options.items() if name not in WHICH}
            negative = values.get("negative", "")
            for index in range(which["count"]):
                seed = (
                    number % (MAX_SEED + 1)
                    if drawn
                    else which["seeds"][index]
                    if which["seeds"]
                    else which["seed"] + index
                )
                prompt, expanded = line.prompt, negative
                if not model.is_run and values.get("prompt_syntax", "a1111") != "plain":
                    prompt, expanded = wildcards.expand(line.prompt, seed, negative)
                changed = {"negative": expanded} if expanded != options.get("negative", "") else {}
                yield Row(f"{number:09}", prompt, seed, own | changed)
                number += 1
        except DiffgenError as error:
            error.message = f"{line.where}: {error.message}" if line.where else error.message
            raise
    if not number:
        raise UsageError("there is no prompt to plan", "write one prompt a line")
