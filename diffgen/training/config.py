"""The configuration of a run: TOML, typed and checked; unknown keys are errors. No torch at import.

    job = "pixels"                       # what is trained

    [data]                               # how the pictures are read
    size = 32

    [network]                            # "unet" or "dit", and its sizes, as in `diffgen.networks`
    name = "unet"
    width = 64                           # default: 32 for pictures of up to 16 x 16 pixels, else 64

    [diffusion]
    noise = "cosine"

    [train]
    steps = 5000

    [sample]                             # the sheets of samples
    steps = 20

Missing keys have the defaults below. `samples/` has commented files.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgen.diffusion.names import OBJECTIVES, VARIANCES, WEIGHTS
from diffgen.errors import InputError
from diffgen.models.gate import read_bytes
from schedulers.noise import NoiseSchedule
from schedulers.prediction import PLAIN

MAX_FILE = 2**20  # bytes of a configuration file


def setting(
    default: Any, low: float | None = None, high: float | None = None, *, of: tuple[Any, ...] = (), length: int = 0
) -> Any:
    """A key with its default, and its range (inclusive) or its choices.

    `length` is that of a list of numbers; without one, the numbers of a list must differ.
    """
    limits = {"low": low, "high": high, "of": of, "length": length, "distinct": not length}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Data:
    """How to read the pictures."""

    size: int | None = setting(None, 1, 1024)  # side to scale and crop pictures to; default: their own
    channels: int | None = setting(None, of=(1, 3, 4))  # grey, RGB, RGBA; default: the smallest that holds all
    classes: bool = True  # train by class, if the data have classes
    flip: bool = False  # mirror half of the pictures
    crop: int = setting(0, 0, 512)  # shift pictures by up to so many pixels; mirrored pixels fill the gap
    colour: float = setting(0.0, 0, 1)  # how much brightness, contrast and saturation vary
    augment: float = setting(0.0, 0, 1)  # how often each of ADA's changes is made; the network is told, so none shows
    held_out: float = setting(0.1, 0, 0.9)  # the fraction of each class that is not trained on
    memory: str = setting("auto", of=("auto", "ram", "map"))
    shuffle_shards: int = setting(0, 0, 10**6)  # shards whose pictures are mixed at a time; 0: all
    cache: float = setting(20.0, 0.001, 10**6)  # GB for copies of remote shards


@dataclass(frozen=True)
class Diffusion:
    """The process and its objective: `diffgen.diffusion.GaussianDiffusion`."""

    noise: str = setting("linear", of=NoiseSchedule.TABLES)
    T: int = setting(1000, 1, 100_000)
    prediction: str = setting("epsilon", of=tuple(PLAIN))
    variance: str = setting("fixed_small", of=VARIANCES)
    objective: str | None = setting(None, of=OBJECTIVES)  # default: hybrid for a learned variance
    weight: str | None = setting(None, of=tuple(WEIGHTS))
    vlb_weight: float = setting(0.001, 0, 1000)
    times: str = setting("stratified", of=("stratified", "uniform", "importance"))  # how t is drawn
    offset_noise: float = setting(0.0, 0, 1)
    label_dropout: float = setting(0.1, 0, 1)  # how often the class is dropped, for guidance


@dataclass(frozen=True)
class Train:
    """The table that all jobs share: length, optimizer, precision, intervals."""

    steps: int = setting(5000, 1, 10**9)
    batch_size: int = setting(128, 1, 10**6)  # of all processes together
    accumulate: int = setting(1, 1, 10**4)  # parts into which a process divides its batch
    seed: int = setting(0, 0, 2**32 - 1)
    learning_rate: float = setting(1e-3, 0, 10)
    warmup: int = setting(100, 0, 10**9)  # steps until the learning rate is reached
    schedule: str = setting("constant", of=("constant", "cosine", "linear"))  # after the warm-up; the others fall to 0
    decay: float = setting(1.0, 0.001, 1)  # the last part of the run, in which the rate falls
    betas: tuple[float, ...] = setting((0.9, 0.99), 0, 0.999999, length=2)
    weight_decay: float = setting(0.0, 0, 10)
    optimizer: str = setting("adamw", of=("adamw", "adamw8bit", "adafactor", "prodigy"))  # prodigy: learning_rate = 1
    rates: dict[str, Any] = field(default_factory=dict)  # factors of the rate, by network: {text_encoder = 0.5}
    clip: float = setting(1.0, 0, 10**6)  # the largest norm of the gradient; 0: no clipping
    ema: tuple[float, ...] = setting((0.1,), 0.005, 0.25)  # lengths of the averages, as parts of the run; see ema.py
    precision: str = setting("auto", of=("auto", "float32", "bfloat16"))
    compile: bool = False  # torch.compile: a slow start, then faster on a GPU
    parallel: str = setting("ddp", of=("ddp", "fsdp"))  # with torchrun: a copy in each process, or parts of one
    log_every: int = setting(50, 1, 10**9)
    held_out_every: int = setting(500, 1, 10**9)
    checkpoint_every: int = setting(1000, 1, 10**9)
    keep: int = setting(2, 1, 10**6)  # checkpoints


@dataclass(frozen=True)
class Sample:
    """The sheets of samples, and the defaults of `generate` for this run."""

    every: int = setting(1000, 1, 10**9)
    count: int = setting(32, 1, 1024)  # samples of the weights, and as many of their average
    scheduler: str = "dpmpp_2m"
    steps: int = setting(20, 1, 1000)
    guidance: float = setting(1.0, 0, 100)


@dataclass(frozen=True)
class Config:
    """The configuration of the job "pixels"."""

    job: str = setting("pixels", of=("pixels",))
    data: Data = Data()
    network: dict[str, Any] = field(default_factory=lambda: {"name": "unet"})
    diffusion: Diffusion = Diffusion()
    train: Train = Train()
    sample: Sample = Sample()


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file, unchecked. Raises InputError."""
    try:
        return tomllib.loads(read_bytes(path, MAX_FILE).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise InputError(f"{path}: broken TOML ({error})") from error


def parse(tables: Mapping[str, Any], where: str | Path, kind: Any = Config) -> Any:
    """Make a configuration of that kind, a dataclass of tables. Raises InputError, naming file and key."""
    return _table(tables, kind, str(where), "", kind)


def to_dict(config: Any) -> dict[str, Any]:
    """The tables of a configuration with all keys, as JSON values; the inverse of `parse`."""
    return dataclasses.asdict(config, dict_factory=lambda pairs: {k: _plain(v) for k, v in pairs if v is not None})


def with_values(tables: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace some keys of the tables: {"train.steps": 20}."""
    changed = {name: dict(table) if isinstance(table, Mapping) else table for name, table in tables.items()}
    for key, value in values.items():
        table, name = key.split(".")
        if not isinstance(inner := changed.setdefault(table, {}), dict):
            continue  # `parse` refuses it
        inner[name] = value
    return changed


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`train.steps: 20, now 30` for each key that differs."""
    a, b = _flat(before), _flat(after)
    missing = "missing"
    return [
        f"{key}: {a.get(key, missing)}, now {b.get(key, missing)}"
        for key in sorted({*a, *b})
        if a.get(key, missing) != b.get(key, missing)
    ]


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _table(values: Any, kind: Any, where: str, prefix: str, root: Any) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: {prefix.rstrip('.')} is {values!r}, not a table")
    types_of, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    read_values = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{where}: unknown key {prefix + name}", key_hint(name, prefix, kind, root))
        expected, key = types_of[name], f"{where}: {prefix}{name}"
        if dataclasses.is_dataclass(expected):
            read_values[name] = _table(value, expected, where, f"{prefix}{name}.", root)
        else:
            read_values[name] = _value(value, expected, fields[name].metadata, key)
    return kind(**read_values)


def key_hint(name: str, prefix: str, kind: Any, root: Any) -> str:
    """A hint for an unknown key: the nearest one of the table `kind` or of the configuration `root`, or all keys."""
    own = [f.name for f in dataclasses.fields(kind)]
    if near := difflib.get_close_matches(name, own, n=1, cutoff=0.5):
        return f"did you mean {prefix}{near[0]}?"
    tables = {f.name: f.default for f in dataclasses.fields(root) if dataclasses.is_dataclass(f.default)}
    keys = [(table, f.name) for table, default in tables.items() for f in dataclasses.fields(default)]
    near = difflib.get_close_matches(name, {key for _, key in keys}, n=1, cutoff=0.7)
    if elsewhere := [f"{table}.{key}" for table, key in keys if key in near]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"there are {', '.join(prefix + key for key in own)}"


def _value(value: Any, expected: Any, limits: Mapping[str, Any], key: str) -> Any:
    """The value, converted to its type. Raises InputError outside its range or its choices."""
    options = [t for t in typing.get_args(expected) if t is not type(None)] if _is_union(expected) else [expected]
    (expected,) = options
    if typing.get_origin(expected) is tuple:
        length, (of_what, _) = limits.get("length"), typing.get_args(expected)
        if of_what is str:
            if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                raise InputError(f"{key} is {value!r}, not a list of strings")
            return tuple(value)
        if not isinstance(value, list | tuple) or not value or (length and len(value) != length):
            raise InputError(f"{key} is {value!r}, not a list of {f'{length} ' if length else ''}numbers")
        numbers = tuple(_value(item, float, limits, key) for item in value)
        if limits.get("distinct") and len({f"{number:g}" for number in numbers}) < len(numbers):
            raise InputError(f"{key} is {value!r}: two of them are the same")
        return numbers
    if typing.get_origin(expected) is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{key} is {value!r}, not a table")
        return dict(value)
    if expected is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf  # a file's whole number may have any length
    if type(value) is not expected:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise InputError(f"{key} is {value!r}, not {words[expected]}")
    of, low, high = limits.get("of"), limits.get("low"), limits.get("high")
    if of and value not in of:
        near = difflib.get_close_matches(str(value), map(str, of), n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"{key} is {value!r}", f"{guess}there are {', '.join(map(str, of))}")
    if low is not None and not (low <= value <= high and math.isfinite(value)):
        raise InputError(f"{key} is {value!r}: it must lie between {low:g} and {high:g}")
    return value


def _is_union(expected: Any) -> bool:
    return typing.get_origin(expected) in (types.UnionType, typing.Union)
