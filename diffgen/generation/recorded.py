"""How a picture's record holds options: checks of its JSON values, and each option's value read back from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from diffgen.images.metadata import base_name
from diffgen.images.readers.picture_info import plain_number

Record = Mapping[str, Any]
Fits = Callable[[Any], bool]  # is a JSON value possible?


class Files(Protocol):
    """Finds the files that a record names."""

    def picture(self, what: str, entry: Record, mode: str) -> Any:
        """The picture of {name, sha256}: `what` is image, mask, reference or map, `mode` Pillow's."""

    def file(self, what: str, entry: Record) -> Any:
        """The LoRA or embedding of {name, sha256}."""

    def control_model(self, entry: Record) -> Any:
        """The ControlNet of {kind, model, model_sha256}."""

    def refiner(self, record: Record) -> Any:
        """The refiner of {refiner, refiner_hash}."""


# Checks of JSON values


def whole(low: int, high: int) -> Fits:
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float) -> Fits:
    return lambda value: type(value) in (int, float) and low <= value <= high


def optional(fits: Fits) -> Fits:
    return lambda value: value is None or fits(value)


def numbers(count: int, low: float, high: float) -> Fits:
    fits = number(low, high)
    return lambda value: isinstance(value, list) and len(value) == count and all(map(fits, value))


def texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def table(checks: Mapping[str, Fits]) -> Fits:
    return lambda value: isinstance(value, dict) and all(fits(value.get(key)) for key, fits in checks.items())


def file(value: Any) -> bool:
    """{name, sha256, …}: the name may be null."""
    return (
        isinstance(value, dict) and sha256(value.get("sha256")) and (value.get("name") is None or name(value["name"]))
    )


def files(checks: Mapping[str, Fits]) -> Fits:
    """A list of at most 100 files, each with further keys."""
    fits = table(checks)
    return lambda value: isinstance(value, list) and len(value) <= 100 and all(file(one) and fits(one) for one in value)


def text(value: Any) -> bool:
    return isinstance(value, str)


def sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def name(value: Any) -> bool:
    """A text without folders."""
    return isinstance(value, str) and value == base_name(value)


# The value of an option whose record is not that value itself; None where the record has none


def image(record: Record, files: Files) -> Any:
    return files.picture("image", record["image"], "RGB") if record.get("image") else None


def mask(record: Record, files: Files) -> Any:
    return files.picture("mask", record["mask"], "L") if record.get("mask") else None


def references(record: Record, files: Files) -> list[Any]:
    return [files.picture("reference", one, "RGB") for one in record.get("references") or ()]


def controls(record: Record, files: Files) -> list[str]:
    entries = record.get("controls") or ()
    return [f"{one['kind']}={files.picture('map', one, 'RGB')}:{plain_number(one['scale'])}" for one in entries]


def control_models(record: Record, files: Files) -> list[str]:
    return [f"{one['kind']}={files.control_model(one)}" for one in record.get("controls") or ()]


def loras(record: Record, files: Files) -> list[str]:
    return [f"{files.file('the LoRA', one)}:{plain_number(one['scale'])}" for one in record.get("loras") or ()]


def embeddings(record: Record, files: Files) -> list[str]:
    return [f"{one['word']}={files.file('the embedding', one)}" for one in record.get("embeddings") or ()]


def refiner(record: Record, files: Files) -> Any:
    return files.refiner(record) if record.get("refiner") else None


def safety(record: Record, files: Files) -> bool:
    return record.get("safety") != "off"


def entry(key: str, part: str) -> Callable[[Record, Files], Any]:
    """A part of the table at a key of the record."""
    return lambda record, files: (record.get(key) or {}).get(part)
