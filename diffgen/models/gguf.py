"""Read the header of a GGUF file: which tensors it holds, and where. Everything in it is checked before it is used.

The format: ggml-org/ggml docs/gguf.md, versions 2 and 3, little-endian. Metadata is checked and passed over: neither an
architecture nor a chat template of a file is used. The tensors themselves are not read here.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from diffgen.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 64 * 2**20  # bytes; a language model's file has its vocabulary there
MAX_KEYS = 1_000
MAX_TENSORS = 20_000
MAX_NAME = 256  # bytes
MAX_TEXT = 2**20  # bytes
MAX_LIST = 4_096  # entries of an array; of a vocabulary:
MAX_VOCABULARY = 2**20
MAX_DIMENSIONS = 4

# {number in the file: (name, elements in a block, bytes of a block)}
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}
BLOCKS = {name: (elements, size) for name, elements, size in TYPES.values()}
VALUES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # {type of a metadata value: its bytes}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class Span:
    """A tensor of a GGUF file."""

    dtype: str  # a name of TYPES
    shape: tuple[int, ...]  # rows first, as in PyTorch
    begin: int  # bytes from the beginning of the file
    bytes: int


def read_spans(file: BufferedReader, path: Path) -> dict[str, Span]:
    """The tensors of an open GGUF file. Raises InputError, which names the key or the tensor, if it is not sound.

    Sound means: every count and length fits what is left of the file and its bound, no key or name twice, known types,
    whole blocks in a row, and tensors that fill the file from the header on without gap or overlap, except for what
    the alignment needs.
    """
    size = os.fstat(file.fileno()).st_size
    head = _Head(path, file.read(min(size, MAX_HEADER)), size)
    head.take(len(MAGIC), "the magic")
    version = head.number("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        kind = "a big-endian file" if swapped else f"of version {version}"
        raise InputError(f"{path}: a GGUF file, {kind}; read here: versions 2 and 3, little-endian")
    tensors, keys = head.number("Q", "the number of tensors"), head.number("Q", "the number of keys")
    if not 0 < tensors <= MAX_TENSORS:
        raise InputError(f"{path}: a GGUF file of {tensors} tensors, from 1 to {MAX_TENSORS} are read")
    if keys > MAX_KEYS:
        raise InputError(f"{path}: a GGUF file of {keys} keys, at most {MAX_KEYS} are read")
    alignment = _alignment(head, keys)
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = head.text(MAX_NAME, "a tensor's name")
        if name in entries:
            raise InputError(f"{path}: the tensor {name!r} is there twice")
        entries[name] = _entry(head, name, alignment)
    begin = -(-head.at // alignment) * alignment
    return _spans(path, entries, begin, size, alignment)


def _alignment(head: _Head, keys: int) -> int:
    """Pass over the metadata; the alignment of the tensors, 32 bytes unless the file names another."""
    alignment = 32
    seen = set()
    for _ in range(keys):
        key = head.text(MAX_NAME, "a key")
        if key in seen:
            raise InputError(f"{head.path}: the key {key!r} is there twice")
        seen.add(key)
        kind = head.number("I", key)
        if key == "general.alignment":
            alignment = head.number("I", key) if kind == 4 else 0
            if not 8 <= alignment <= 4096 or alignment & (alignment - 1):
                raise InputError(f"{head.path}: {key} is no power of two from 8 to 4096")
        elif kind == ARRAY:
            kind, count = head.number("I", key), head.number("Q", key)
            if count > (MAX_VOCABULARY if key.startswith("tokenizer.") else MAX_LIST):
                raise InputError(f"{head.path}: {key!r} has {count} entries")
            if kind == TEXT:
                for _ in range(count):
                    head.take(head.length(MAX_TEXT, key), key)
            else:
                head.take(count * _bytes_of(head, key, kind), key)
        elif kind == TEXT:
            head.text(MAX_TEXT, key)
        else:
            head.take(_bytes_of(head, key, kind), key)
    return alignment


def _bytes_of(head: _Head, key: str, kind: int) -> int:
    if kind not in VALUES:
        raise InputError(f"{head.path}: {key!r} has a value of the type {kind}, which is not read")
    return VALUES[kind]


def _entry(head: _Head, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, offset, bytes) of a tensor."""
    where = f"{head.path}: the tensor {name!r}"
    count = head.number("I", name)
    if not 1 <= count <= MAX_DIMENSIONS:
        raise InputError(f"{where} has {count} dimensions, from 1 to {MAX_DIMENSIONS} are read")
    shape = tuple(head.number("Q", name) for _ in range(count))[::-1]
    if not all(shape) or math.prod(shape) >= 2**63:
        raise InputError(f"{where} has the shape {list(shape)}")
    number, offset = head.number("I", name), head.number("Q", name)
    if number not in TYPES:
        names = ", ".join(BLOCKS)
        raise InputError(f"{where} is of the type {number}, which is not read", f"read here: {names}")
    dtype, elements, size = TYPES[number]
    if shape[-1] % elements:
        raise InputError(f"{where} has rows of {shape[-1]} elements, {dtype} has blocks of {elements}")
    if offset % alignment:
        raise InputError(f"{where} begins at {offset}, which is no multiple of {alignment}")
    return dtype, shape, offset, math.prod(shape) // elements * size


def _spans(
    path: Path, entries: dict[str, tuple[str, tuple[int, ...], int, int]], begin: int, size: int, alignment: int
) -> dict[str, Span]:
    end = 0
    for name, (_, _, offset, length) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        next_one = -(-end // alignment) * alignment
        if offset != next_one:
            kind = "overlaps the one before" if offset < end else "leaves a gap before it"
            raise InputError(
                f"{path}: the tensor {name!r} {kind} (it begins at {offset}, the one before ends at {end})"
            )
        end = offset + length
        if begin + end > size:
            hint = "copy or download it again"
            raise InputError(f"{path}: cut off, the tensor {name!r} ends at byte {begin + end} of {size}", hint)
    rest = size - begin - end
    if rest >= alignment:
        raise InputError(f"{path}: {rest} bytes after the last tensor")
    return {name: Span(dtype, shape, begin + offset, n) for name, (dtype, shape, offset, n) in entries.items()}


class _Head:
    """The first bytes of a file, from which numbers and texts are taken one after the other."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.at = 0

    def take(self, count: int, what: str) -> bytes:
        """The next bytes. Raises InputError beyond the end of the file, or of what a header may have."""
        if count > len(self.data) - self.at:
            long = len(self.data) < self.size and self.at + count <= self.size
            reason = f"a header of more than {MAX_HEADER} bytes" if long else f"cut off within the header ({what!r})"
            raise InputError(f"{self.path}: {reason}", "" if long else "copy or download it again")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]
        return value

    def length(self, limit: int, what: str) -> int:
        """The length of a text, which is at most `limit`."""
        if (length := self.number("Q", what)) > limit:
            raise InputError(f"{self.path}: {what!r} has a text of {length} bytes, at most {limit} are read")
        return length

    def text(self, limit: int, what: str) -> str:
        data = self.take(self.length(limit, what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what!r} is not UTF-8") from error
