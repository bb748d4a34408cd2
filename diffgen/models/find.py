"""One function resolves a model's name."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from diffgen.errors import InputError

from . import gate

BUNDLED = Path(__file__).parent / "bundled"
DEFAULT = "emoji"


@dataclass(frozen=True)
class Model:
    """A model on this machine. Its files are not checked yet: `gate.check_folder(model.folder)`."""

    name: str  # a base name
    folder: Path
    family: str
    bundled: bool
    source: str  # "bundled" or "folder"


def find(name: str | None = None) -> Model:
    """The model meant by a name: a diffusers folder of that path, else a bundled model; None is the default, `emoji`.

    Raises InputError: nothing of that name (with what is near and what there is), or a kind that is not read.
    """
    if name is None:
        return _bundled(DEFAULT)
    path = Path(name)
    if _is_model(path):
        family, _ = gate.read_index(path)
        return Model(path.resolve().name, path, family, bundled=False, source="folder")
    if name in bundled_names():
        return _bundled(name)
    raise InputError(*_why_not(name))


def bundled_names() -> list[str]:
    """The models that come with diffgen."""
    return sorted(path.name for path in BUNDLED.iterdir() if _is_model(path)) if BUNDLED.is_dir() else []


def bundled_models() -> list[Model]:
    return [_bundled(name) for name in bundled_names()]


def _bundled(name: str) -> Model:
    folder = BUNDLED / name
    if not _is_model(folder):
        raise InputError(f"the bundled model {name!r} is not in this installation", "install diffgen again")
    family, _ = gate.read_index(folder)
    return Model(name, folder, family, bundled=True, source="bundled")


def _is_model(folder: Path) -> bool:
    return os.path.isfile(folder / "model_index.json")


def _why_not(name: str) -> tuple[str, str]:
    """What is wrong with a name that is no model, and what to do."""
    here = ", ".join(f"{bundled} (bundled)" for bundled in bundled_names())
    reads = f"this version reads the bundled models and local diffusers folders. Here: {here}"
    suffix = Path(name).suffix.lower()
    if suffix in gate.PICKLES:
        return f"{name!r} is a pickle by its name", gate.CONVERT
    if suffix in (".safetensors", ".gguf", ".onnx"):
        return f"{name!r} is a single file", reads
    if os.path.isfile(os.path.join(name, "run.json")):
        return f"{name!r} is a training run", reads
    if os.path.isdir(name):
        return f"{name!r} is not a diffusers model: it has no model_index.json", reads
    if os.path.lexists(name):
        return f"{name!r} is not a model folder", reads
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return f"there is no folder {name!r}, and models of a hub are not downloaded", reads
    near = difflib.get_close_matches(name.lower(), bundled_names(), n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no model {name!r}", guess + reads
