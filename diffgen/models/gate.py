"""The gate: check what a model folder holds, on the files themselves, before anything is loaded.

Nothing in a file is imported or executed. Component classes come from the table in `families`, weights are safetensors
by content, JSON is read with bounds, Python files are never opened. A file that fails raises InputError, which names
the file and, in weights, the tensor. The loader checks whether names and shapes fit the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import schedulers
from diffgen.errors import InputError
from schedulers.explicit import Explicit

from . import families, gguf, quantized
from .quantized import Tensor

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

MAX_JSON = 2**20  # bytes of a configuration file
MAX_TOKENIZER_FILE = 32 * 2**20
MAX_HEADER = 8 * 2**20
MAX_GRIDS = 64
LISTS = {"latents_mean", "latents_std"}  # of a configuration: a number for each channel
FACTORS = {"scaling_factor", "shift_factor", *LISTS}  # what latents are scaled with
GRID_NAME = re.compile(r"\w[\w.-]{0,99}\.json", re.ASCII)
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
DTYPES = {  # bytes per element
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8},
    **dict.fromkeys(quantized.WHOLE, 1),
}
MARKERS = ("v_pred", "ztsnr", "scaled_fp8")  # tensors without elements; their names say what a checkpoint is
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CONVERT = (
    "only safetensors is read: a pickle can run code. Get the model in safetensors form, or have it converted "
    "(huggingface.co/spaces/safetensors/convert)"
)


@dataclass(frozen=True)
class Component:
    """A part of the pipeline that has passed the gate."""

    name: str  # unet, transformer, vae, text_encoder, text_encoder_2, tokenizer, scheduler, …
    library: str
    class_name: str
    folder: Path
    config: dict[str, Any]  # config.json or scheduler_config.json; of a tokenizer: special tokens that override its own
    weights: tuple[Path, ...] = ()
    tensors: Mapping[str, Tensor] | None = None  # None for a part without weights
    alone: bool = False  # its weights are a file of their own, chosen by the user

    @property
    def parameters(self) -> int:
        """The number of its weights."""
        return sum(math.prod(tensor.shape) for tensor in (self.tensors or {}).values())


@dataclass(frozen=True)
class Index:
    """What a folder holds, by its model_index.json and the configurations of its network and scheduler."""

    pipeline: str  # the pipeline's class name, one of families.PIPELINES
    family: str  # one of families.FAMILIES
    variant: str | None  # one of the family's variants
    pairs: dict[str, families.Pair]  # (library, class) of each component that is read
    companions: dict[str, families.Pair]  # of the components that text to image does not need: families.COMPANIONS


@dataclass(frozen=True)
class Checked:
    """A model that has passed the gate: its components, and every file that it is read from."""

    folder: Path
    family: str
    components: Mapping[str, Component]
    files: tuple[Path, ...]
    pipeline: str = "StableDiffusionPipeline"
    variant: str | None = None
    companions: Mapping[str, families.Pair] = field(default_factory=dict)  # see check_companion
    file: Path | None = None  # the single-file checkpoint; a component with the weights (file,) has its tensors under
    # the file's names, in the original layout
    unused: tuple[str, ...] = ()  # tensors of a single file that belong to no component
    grids: tuple[Path, ...] = ()  # tuned grids that the folder holds

    @property
    def network(self) -> Component:
        """The denoiser: the UNet or the transformer."""
        return self.components[self.row.denoiser]

    @property
    def row(self) -> families.Family:
        """Its family's row in the table."""
        return families.FAMILIES[self.family]

    @property
    def guidance_is_input(self) -> bool:
        """Whether the network itself reads the guidance scale: see `families.guidance_is_input`."""
        return families.guidance_is_input(self.family, self.network.config)

    @property
    def reads_mask(self) -> bool:
        """Whether the network itself reads the mask of inpainting."""
        return self.variant == "inpaint" or self.row.reads == "mask"

    @property
    def tokens(self) -> int | None:
        """How many tokens of a prompt are read; None: the pipeline's default."""
        return self.row.tokens.get(self.variant)

    @property
    def defaults(self) -> families.Defaults:
        """How such a model is sampled unless its card or the user says otherwise."""
        return families.defaults_of(self.family, self.variant)


def check_folder(folder: str | Path, name: str | None = None) -> Checked:
    """Check every file that a diffusers folder's model is read from. Raises InputError for the first that fails.

    `name` is the model's name where it is not the folder's (in a download cache).
    """
    folder = Path(folder)
    index = read_index(folder, name)
    files = [folder / "model_index.json"]
    components = {
        name: check_component(folder / name, name, pair, families.FAMILIES[index.family].parts[name].kind, files)
        for name, pair in index.pairs.items()
    }
    grids = check_grids(folder)
    return Checked(
        folder,
        index.family,
        components,
        (*files, *grids),
        index.pipeline,
        index.variant,
        dict(index.companions),
        grids=tuple(grids),
    )


def check_grids(folder: Path) -> dict[Path, Explicit]:
    """The tuned grids that a model's folder holds, grids/*.json, in the order of their names. Raises InputError."""
    place = folder / "grids"
    paths = sorted(path for path in place.iterdir() if path.suffix == ".json") if place.is_dir() else []
    if len(paths) > MAX_GRIDS:
        raise InputError(f"{place}: {len(paths)} grids, at most {MAX_GRIDS} are read")
    grids = {}
    for path in paths:
        if not GRID_NAME.fullmatch(path.name):
            raise InputError(f"{place}: {short(path.name)} is not a plain file name")
        read_json(path)
        try:
            grids[path] = schedulers.tuned(path)
        except (ValueError, OSError) as error:
            raise InputError(f"{place}: {error}") from error
    return grids


def check_companion(checked: Checked, name: str) -> Component:
    """Check a companion that the folder names (`--safety` needs two) like its other parts. Raises InputError."""
    if name not in checked.companions:
        raise InputError(f"{checked.folder}: the model has no {name}")
    kind = families.COMPANIONS[name].kind
    return check_component(checked.folder / name, name, checked.companions[name], kind, [])


def read_index(folder: Path, name: str | None = None) -> Index:
    """What a folder is, by our own table; its weights are not read. Raises InputError."""
    path = folder / "model_index.json"
    index = read_json(path)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in families.PIPELINES:
        hint = f"read here: {', '.join(families.PIPELINES)}"
        raise InputError(f"{path}: a pipeline of the class {short(pipeline)}", hint)
    named = _named_parts(path, index)
    unet = read_json(folder / "unet" / "config.json") if "unet" in named else {}
    family = families.family_of(pipeline, set(named), unet)
    assert family is not None  # the class is in the table
    pairs, companions = {}, {}
    for part, pair in named.items():
        companion = families.COMPANIONS.get(part)
        if part not in family.parts and companion is not None and pair in companion.classes:
            companions[part] = pair
            continue
        if part not in family.parts or not _may_be(family.parts[part], pair):
            raise InputError(
                f"{path}: the component {short(part)} is of the class {short(list(pair))}",
                f"nothing that a file names is imported; {family.title} in diffusers' own classes is read",
            )
        what = family.parts[part]
        if not (what.optional and what.kind == "network" and not (folder / part).exists()):
            pairs[part] = pair
    for tokenizer in (part for part, what in family.parts.items() if part.startswith("tokenizer") and what.optional):
        encoder = tokenizer.replace("tokenizer", "text_encoder")
        if encoder not in pairs:
            pairs.pop(tokenizer, None)  # nothing to do without its encoder
        elif tokenizer not in pairs:
            raise InputError(f"{path}: {encoder} without {tokenizer}")
    missing = [part for part, what in family.parts.items() if part not in pairs and not what.optional]
    if missing:
        raise InputError(f"{path}: no {', '.join(missing)}", f"{family.title} has {', '.join(family.parts)}")
    network = unet if "unet" in pairs else read_json(folder / family.denoiser / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    variant = families.variant_of(family, name or called(folder), pipeline, network, scheduler, index)
    return Index(pipeline, family.name, variant, pairs, companions)


def _named_parts(path: Path, index: Mapping[str, Any]) -> dict[str, families.Pair]:
    """{component: (library, class)} of a model_index.json, without those that are null."""
    pairs = {}
    for name, value in index.items():
        if name.startswith("_") or name in families.SETTINGS or not isinstance(value, list | dict):
            continue  # plain values, which are not read
        if value == [None, None]:
            continue
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)):
            raise InputError(f"{path}: {short(name)} is not a pair of library and class: {short(value)}")
        pairs[name] = (value[0], value[1])
    return pairs


def _may_be(part: families.Part, pair: families.Pair) -> bool:
    if part.kind == "scheduler":
        return pair[0] == "diffusers" and pair[1].isidentifier()
    return pair in part.classes


def called(folder: Path) -> str:
    """The name of a model: its folder's, or org/name in a download cache (models--org--name/snapshots/commit)."""
    path = Path(os.path.abspath(folder))
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def file_hashes(checked: Checked) -> dict[str, str]:
    """{path in the folder: SHA-256 in hex} of every file that the model is read from. Raises InputError.

    A single file has one entry, its name: its configurations are diffgen's own.
    """
    hashes = {}
    for path in checked.files:
        hashes[name_of(checked, path)] = sha256_of(path)
    return hashes


def sha256_of(path: Path) -> str:
    """SHA-256 in hex of a regular file. Raises InputError."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(checked: Checked, hashes: Mapping[str, str]) -> str:
    """SHA-256 in hex of the network's weights file, or of the whole single-file checkpoint.

    Several weights files: of their hashes' hex digits in the order of the names. `hashes` come from `file_hashes`.
    """
    digests = [hashes[name_of(checked, path)] for path in checked.network.weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def name_of(checked: Checked, path: Path) -> str:
    """A file of a model in its hashes: its path in the folder, as if it lay there where it is a file of its own."""
    for part in checked.components.values():
        if part.alone and path in part.weights:
            return f"{part.name}/{path.name}"
    return path.name if path == checked.file else path.relative_to(checked.folder).as_posix()


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """An object from a file of at most `limit` bytes: UTF-8, no key twice, no NaN or Infinity. Raises InputError."""
    return _parse(read_bytes(path, limit), path)


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises InputError."""
    with _open(path) as file:
        _check_size(file, path, limit)
        return file.read(limit)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by its header. Raises InputError, which names the tensor, if it is not sound.

    Sound means: header at most 8 MiB, at most 20,000 tensors, none twice, known dtypes, positive integer shapes, and
    the tensors' bytes fill the file exactly, without gap or overlap. The tensors themselves are not read. Those that
    make up one weight of few bits are one: see `quantized.joined`.
    """
    return read_safetensors(path)[1]


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, checked as by `read_header`. The metadata is untrusted text."""
    metadata, tensors, read = _read_safetensors(path)
    return metadata, quantized.joined(path, tensors, read)


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor], quantized.Read]:
    """(metadata, tensors as the file has them, a reader of small ones)."""
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
            raise InputError(f"{path}: the tensor {short(name)} {kind} (bytes {begin} to {stop}, after {end})")
        end = stop
    body = size - 8 - length
    if end > body:
        hint = "copy or download it again"
        raise InputError(f"{path}: cut off, the tensor {short(spans[-1][1])} ends at byte {end} of {body}", hint)
    if end < body:
        raise InputError(f"{path}: {body - end} bytes after the last tensor, {short(spans[-1][1])}")
    tensors = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    begins = {name: begin for (begin, _), name in spans}

    def read(name: str) -> bytes:
        with _open(path) as file:
            file.seek(8 + length + begins[name])
            return file.read(quantized.MAX_STATE)[: entries[name]["data_offsets"][1] - begins[name]]

    return metadata, tensors, read


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors or GGUF file, by its content. Metadata of GGUF is not used: it is empty."""
    with _open(path) as file:
        if file.peek(4)[:4] == gguf.MAGIC:
            return {}, {name: Tensor(span.dtype, span.shape) for name, span in gguf.read_spans(file, path).items()}
    return read_safetensors(path)


def _check_tensor(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Check a tensor's entry in the header; its bytes [begin, end). Raises InputError."""
    where = f"{path}: the tensor {short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where} has the dtype {short(dtype)}", f"read here: {', '.join(DTYPES)}")
    if (
        not (_whole_numbers(shape, 1) or (name.split(".")[-1] in MARKERS and shape == [0]))
        or len(shape) > MAX_DIMENSIONS
    ):
        raise InputError(f"{where} has the shape {short(shape)}")
    if not _whole_numbers(offsets, 0) or len(offsets) != 2:
        raise InputError(f"{where} has the data_offsets {short(offsets)}")
    needed = math.prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise InputError(f"{where} has {offsets[1] - offsets[0]} bytes, its shape {short(shape)} needs {short(needed)}")
    return offsets[0], offsets[1]


def _whole_numbers(values: Any, low: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and low <= value < 2**63 for value in values)


def check_component(folder: Path, name: str, pair: families.Pair, kind: str, files: list[Path]) -> Component:
    """Check one component's files and append them to `files`."""
    library, class_name = pair
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder, but model_index.json names the component")
    if kind == "tokenizer":
        files += check_tokenizer(folder)
        return Component(name, library, class_name, folder, {})
    configs = {"scheduler": "scheduler_config.json", "processor": "preprocessor_config.json"}
    config = folder / configs.get(kind, "config.json")
    component_config = read_json(config)
    files.append(config)
    _check_numbers(config, component_config)
    quantized.check_method(config, component_config)
    if kind != "network":
        return Component(name, library, class_name, folder, component_config)
    weights, tensors = _check_weights(folder, "diffusion_pytorch_model" if library == "diffusers" else "model", files)
    files += weights
    return Component(name, library, class_name, folder, component_config, weights, tensors)


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for a factor of latents that is no number."""
    for key in FACTORS & config.keys():
        value = config[key]
        numbers = value if key in LISTS and isinstance(value, list) else [value]
        if value is not None and not all(type(one) in (int, float) for one in numbers):
            raise InputError(f"{path}: {key} is {short(value)}, not {'numbers' if key in LISTS else 'a number'}")


def check_tokenizer(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder, each within its bounds. Raises InputError."""
    present = [folder / file for file in TOKENIZER_FILES if os.path.lexists(folder / file)]
    names = {path.name for path in present}
    if not names & {"tokenizer.json", "spiece.model"} and not {"vocab.json", "merges.txt"} <= names:
        raise InputError(f"{folder}: neither tokenizer.json nor vocab.json with merges.txt")
    for path in present:
        if path.suffix == ".json":
            read_json(path, MAX_TOKENIZER_FILE)
        else:
            with _open(path) as file:
                _check_size(file, path, MAX_TOKENIZER_FILE)
    return present


def _check_weights(folder: Path, stem: str, files: list[Path]) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The weights files of a component, in the order of their names, and all their tensors."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if os.path.lexists(folder / name):
            return (folder / name,), read_header(folder / name)
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
        if os.path.lexists(index := folder / name):
            files.append(index)
            return _check_shards(folder, index)
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        raise InputError(f"{folder}: the only weights are a pickle, {short(pickles[0])}", CONVERT)
    raise InputError(f"{folder}: no {stem}.safetensors", f"there is: {short(', '.join(names))}" if names else "")


def _check_shards(folder: Path, index: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    places = read_json(index, MAX_HEADER).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: weight_map is no table of tensors and files")
    tensors: dict[str, Tensor] = {}
    readers: dict[str, quantized.Read] = {}
    shards = sorted(set(places.values()))
    for shard in shards:
        if not shard.endswith(".safetensors") or any(c in shard for c in "/\\:\0") or shard.startswith("."):
            raise InputError(f"{index}: the file name {short(shard)} is not a plain name in the same folder")
        _, entries, readers[shard] = _read_safetensors(folder / shard)
        for name in entries:
            if places.get(name) != shard:
                raise InputError(
                    f"{folder / shard}: holds the tensor {short(name)}, but the index does not place it there"
                )
        tensors |= entries
        if len(tensors) > MAX_TENSORS:
            raise InputError(f"{index}: more than {MAX_TENSORS} tensors")
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise InputError(f"{index}: the tensor {short(missing[0])} is not in {short(places[missing[0]])}")
    tensors = quantized.joined(index, tensors, lambda name: readers[places[name]](name))
    return tuple(folder / shard for shard in shards), tensors


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file (or a link to one) for reading; never waits on a pipe. Raises InputError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a folder cannot even be opened as a file
        os.close(descriptor)
        raise InputError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading. Raises InputError for every refusal of the system, while it is read too."""
    try:
        with open_file(path) as file:
            yield file
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _check_size(file: BufferedReader, path: Path, limit: int) -> None:
    if (size := os.fstat(file.fileno()).st_size) > limit:
        raise InputError(f"{path}: {size} bytes, at most {limit} are read")


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise InputError(f"{path}: {short(key)} is there twice")
            table[key] = value
        return table

    def finite(word: str) -> float:
        if not math.isfinite(number := float(word)):
            raise InputError(f"{path}: {short(word)} is not a finite number")
        return number

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON ({short(str(error))})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def _what(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start.startswith((b"PK\x03\x04", b"\x80")):  # as torch.save writes them
        return "a pickle or zip archive, not safetensors, whatever its name is"
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: the weights themselves were not downloaded (git lfs pull)"
    return "not a safetensors file"


def short(value: Any) -> str:
    """A value from a file, for a message: escaped and cut."""
    shortener = reprlib.Repr()
    shortener.maxstring = 100
    return shortener.repr(value)
