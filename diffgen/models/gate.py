"""The gate: what a model folder may hold, checked on the files themselves before anything is loaded.

Nothing in a file is imported or executed. Component classes come from the table below, weights are safetensors by
content, JSON is read with bounds, Python files are never opened. What fails is refused with InputError, which names
the file and, in weights, the tensor. Whether names and shapes fit the model is checked by the loader.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from diffgen.errors import InputError

# The pipelines that are read, and what we call their family.
FAMILIES = {"StableDiffusionPipeline": "stable-diffusion"}

# The (library, class) pairs that each component may be. A scheduler's class is only a word: it is never imported.
COMPONENTS = {
    "unet": {("diffusers", "UNet2DConditionModel")},
    "vae": {("diffusers", "AutoencoderKL")},
    "text_encoder": {("transformers", "CLIPTextModel")},
    "tokenizer": {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")},
}
WITH_WEIGHTS = ("unet", "vae", "text_encoder")
LEFT_OUT = {
    "safety_checker": {("stable_diffusion", "StableDiffusionSafetyChecker")},
    "feature_extractor": {
        ("transformers", name) for name in ("CLIPImageProcessor", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
    },
    "image_encoder": {("transformers", "CLIPVisionModelWithProjection")},
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")

MAX_JSON = 2**20  # bytes of a configuration file
MAX_TOKENIZER_FILE = 32 * 2**20
MAX_HEADER = 8 * 2**20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}  # bytes per element
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CONVERT = (
    "only safetensors is read: a pickle can run code. Get the model in safetensors form, or have it converted "
    "(huggingface.co/spaces/safetensors/convert)"
)


@dataclass(frozen=True)
class Tensor:
    """What a weights file's header says of a tensor."""

    dtype: str  # F16, BF16, F32, F64, I32, I64
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """A part of the pipeline whose files have passed."""

    name: str  # unet, vae, text_encoder, tokenizer, scheduler
    library: str
    class_name: str
    folder: Path
    config: dict[str, Any]  # config.json or scheduler_config.json; {} for the tokenizer
    weights: tuple[Path, ...] = ()
    tensors: Mapping[str, Tensor] | None = None  # None for what has no weights


@dataclass(frozen=True)
class Checked:
    """A folder that has passed: its components, and every file that the model is read from."""

    folder: Path
    family: str
    components: Mapping[str, Component]
    files: tuple[Path, ...]


def check_folder(folder: str | Path) -> Checked:
    """Check every file that a diffusers folder's model is read from. Raises InputError for the first that fails."""
    folder = Path(folder)
    family, pairs = read_index(folder)
    files = [folder / "model_index.json"]
    components = {
        name: _check_component(folder / name, name, library, class_name, files)
        for name, (library, class_name) in pairs.items()
    }
    return Checked(folder, family, components, tuple(files))


def read_index(folder: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    """(family, {component: (library, class)}) of a folder's model_index.json, by our own table."""
    path = folder / "model_index.json"
    index = read_json(path)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise InputError(f"{path}: a pipeline of the class {_short(pipeline)}", f"read here: {', '.join(FAMILIES)}")
    pairs = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list | dict):
            continue  # plain data that nobody asks
        if value == [None, None]:
            continue
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)):
            raise InputError(f"{path}: {_short(name)} is not a pair of library and class: {_short(value)}")
        library, class_name = value
        if (library, class_name) in LEFT_OUT.get(name, ()):
            continue
        known = (library, class_name) in COMPONENTS.get(name, ())
        if not known and not (name == "scheduler" and library == "diffusers" and class_name.isidentifier()):
            raise InputError(
                f"{path}: the component {_short(name)} is of the class {_short([library, class_name])}",
                "nothing that a file names is imported; Stable Diffusion 1 and 2 in diffusers' own classes are read",
            )
        pairs[name] = (library, class_name)
    missing = [name for name in (*COMPONENTS, "scheduler") if name not in pairs]
    if missing:
        raise InputError(f"{path}: no {', '.join(missing)}", "all five parts of the pipeline must be in the folder")
    return FAMILIES[pipeline], pairs


def file_hashes(checked: Checked) -> dict[str, str]:
    """{path in the folder: SHA-256 in hex} of every file that the model is read from. Raises InputError."""
    hashes = {}
    for path in checked.files:
        with _open(path) as file:
            hashes[path.relative_to(checked.folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def model_hash(checked: Checked, hashes: Mapping[str, str]) -> str:
    """SHA-256 in hex of the UNet's weights file; of several, of their hashes' hex digits in the order of the names.

    `hashes` is what `file_hashes` said of the folder.
    """
    digests = [hashes[path.relative_to(checked.folder).as_posix()] for path in checked.components["unet"].weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """An object from a file of at most `limit` bytes: UTF-8, no key twice, no NaN or Infinity. Raises InputError."""
    with _open(path) as file:
        _check_size(file, path, limit)
        return _parse(file.read(limit), path)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by its header. Raises InputError, which names the tensor, if it is not sound.

    Sound means: header at most 8 MiB, at most 20,000 tensors, none twice, known dtypes, whole positive shapes, and the
    tensors' bytes fill the file exactly, without gap or overlap. The tensors themselves are not read.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        head = file.read(min(length, MAX_HEADER, max(size - 8, 0)))
    if not head.startswith(b"{"):
        raise InputError(f"{path}: {_what(start + head[:32])}", CONVERT)
    if length > MAX_HEADER:
        raise InputError(f"{path}: a header of {length} bytes, at most {MAX_HEADER} are read")
    if len(head) < length:
        raise InputError(f"{path}: cut off within the header ({size} bytes)", "copy or download it again")
    entries = _parse(head, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ is not a table of texts")
    if not 0 < len(entries) <= MAX_TENSORS:
        raise InputError(f"{path}: {len(entries)} tensors, from 1 to {MAX_TENSORS} are read")
    spans = sorted((_check_tensor(path, name, entry), name) for name, entry in entries.items())
    end = 0
    for (begin, stop), name in spans:
        if begin != end:
            kind = "overlaps the one before" if begin < end else "leaves a gap before it"
            raise InputError(f"{path}: the tensor {_short(name)} {kind} (bytes {begin} to {stop}, after {end})")
        end = stop
    body = size - 8 - length
    if end > body:
        hint = "copy or download it again"
        raise InputError(f"{path}: cut off, the tensor {_short(spans[-1][1])} ends at byte {end} of {body}", hint)
    if end < body:
        raise InputError(f"{path}: {body - end} bytes after the last tensor, {_short(spans[-1][1])}")
    return {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def _check_tensor(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The bytes [begin, end) of a tensor whose entry in the header is sound."""
    where = f"{path}: the tensor {_short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where} has the dtype {_short(dtype)}", f"read here: {', '.join(DTYPES)}")
    if not _whole_numbers(shape, 1) or len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{where} has the shape {_short(shape)}")
    if not _whole_numbers(offsets, 0) or len(offsets) != 2:
        raise InputError(f"{where} has the data_offsets {_short(offsets)}")
    needed = math.prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise InputError(
            f"{where} has {offsets[1] - offsets[0]} bytes, its shape {_short(shape)} needs {_short(needed)}"
        )
    return offsets[0], offsets[1]


def _whole_numbers(values: Any, low: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and low <= value < 2**63 for value in values)


def _check_component(folder: Path, name: str, library: str, class_name: str, files: list[Path]) -> Component:
    """Check one component's files and append them to `files`."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder, but model_index.json names the component")
    if name == "tokenizer":
        present = [folder / file for file in TOKENIZER_FILES if (folder / file).exists()]
        names = {path.name for path in present}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise InputError(f"{folder}: neither tokenizer.json nor vocab.json with merges.txt")
        for path in present:
            if path.suffix == ".json":
                read_json(path, MAX_TOKENIZER_FILE)
            else:
                with _open(path) as file:
                    _check_size(file, path, MAX_TOKENIZER_FILE)
        files += present
        return Component(name, library, class_name, folder, {})
    config = folder / ("scheduler_config.json" if name == "scheduler" else "config.json")
    component_config = read_json(config)
    files.append(config)
    if name not in WITH_WEIGHTS:
        return Component(name, library, class_name, folder, component_config)
    weights, tensors = _check_weights(
        folder, "model" if library == "transformers" else "diffusion_pytorch_model", files
    )
    files += weights
    return Component(name, library, class_name, folder, component_config, weights, tensors)


def _check_weights(folder: Path, stem: str, files: list[Path]) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The weights files of a component, in the order of their names, and all their tensors."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if os.path.lexists(folder / name):
            return (folder / name,), read_header(folder / name)
    index = folder / f"{stem}.safetensors.index.json"
    if os.path.lexists(index):
        files.append(index)
        return _check_shards(folder, index)
    seen = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in seen if name.lower().endswith(PICKLES)]
    if pickles:
        raise InputError(f"{folder}: the weights are there only as a pickle, {_short(pickles[0])}", CONVERT)
    raise InputError(f"{folder}: no {stem}.safetensors", f"there is: {_short(', '.join(seen))}" if seen else "")


def _check_shards(folder: Path, index: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    places = read_json(index, MAX_HEADER).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: weight_map is no table of tensors and files")
    tensors: dict[str, Tensor] = {}
    shards = sorted(set(places.values()))
    for shard in shards:
        if not shard.endswith(".safetensors") or any(c in shard for c in "/\\:\0") or shard.startswith("."):
            raise InputError(f"{index}: the file name {_short(shard)} is not a plain name in the same folder")
        held = read_header(folder / shard)
        for name in held:
            if places.get(name) != shard:
                raise InputError(
                    f"{folder / shard}: holds the tensor {_short(name)}, which the index does not place there"
                )
        tensors |= held
        if len(tensors) > MAX_TENSORS:
            raise InputError(f"{index}: more than {MAX_TENSORS} tensors")
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise InputError(f"{index}: the tensor {_short(missing[0])} is not in {_short(places[missing[0]])}")
    return tuple(folder / shard for shard in shards), tensors


def _open(path: Path) -> BufferedReader:
    """Open a regular file (or a link to one) for reading; never waits on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def _check_size(file: BufferedReader, path: Path, limit: int) -> None:
    if (size := os.fstat(file.fileno()).st_size) > limit:
        raise InputError(f"{path}: {size} bytes, at most {limit} are read")


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise InputError(f"{path}: {_short(key)} is there twice")
            table[key] = value
        return table

    def finite(word: str) -> float:
        if not math.isfinite(number := float(word)):
            raise InputError(f"{path}: {_short(word)} is not a finite number")
        return number

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON ({_short(str(error))})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def _what(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start.startswith((b"PK\x03\x04", b"\x80")):  # as torch.save writes them
        return "a pickle or zip archive, not safetensors, whatever its name says"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, the weights themselves were not downloaded (git lfs pull)"
    return "not a safetensors file"


def _short(value: Any) -> str:
    """What a file says, for a message: escaped and cut."""
    shortener = reprlib.Repr()
    shortener.maxstring = 100
    return shortener.repr(value)
