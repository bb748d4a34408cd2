"""The user's own list of models: models.toml in diffgen's configuration folder.

sd15 = "/models/v1-5-pruned-emaonly.safetensors"

[anything]
path = "~/models/anything-v3"            # a folder or a file; or instead
hub = "org/name@revision"                # a model in the download cache
base = "org/name"                        # a diffusers folder for what a single file lacks; optional
components = {vae = "ae.safetensors"}    # files of single parts; optional
prediction = "v_prediction"              # of a single file, where nothing in it says so; optional
defaults = {steps = 20, guidance = 5}    # and scheduler, grid, size; optional
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgen.errors import InputError

from . import cache, gate

MAX_ENTRIES = 1000
NAME = re.compile(r"\w[\w.-]{0,99}")
KEYS: dict[str, type] = {"path": str, "hub": str, "base": str, "prediction": str, "components": dict, "defaults": dict}
PREDICTIONS = ("epsilon", "v_prediction")
DEFAULTS: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "guidance": (int, float),
    "scheduler": (str,),
    "grid": (str,),
    "size": (int, str, list),
}


@dataclass(frozen=True)
class Entry:
    """A name in the list and its model, which is either `path` or `hub`."""

    name: str
    path: Path | None = None
    hub: str | None = None
    base: str | None = None
    prediction: str | None = None
    components: dict[str, Path] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


def list_file() -> Path:
    """The path of the list."""
    from platformdirs import user_config_dir

    return Path(user_config_dir("diffgen", appauthor=False)) / "models.toml"


def models_folder() -> Path:
    """The folder for models that users put there by hand: DIFFGEN_MODELS, or `models` beside other data of diffgen."""
    from platformdirs import user_data_dir

    chosen = os.environ.get("DIFFGEN_MODELS")
    return Path(os.path.expanduser(chosen)) if chosen else Path(user_data_dir("diffgen", appauthor=False)) / "models"


def entries() -> dict[str, Entry]:
    """The user's models by name; none if there is no list. Raises InputError, which names the entry."""
    path = list_file()
    if not os.path.exists(path):
        return {}
    try:
        table = tomllib.loads(gate.read_bytes(path, gate.MAX_JSON).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}", "it is a TOML file of names and paths") from error
    if len(table) > MAX_ENTRIES:
        raise InputError(f"{path}: {len(table)} models, at most {MAX_ENTRIES} are read")
    return {name: _entry(path, name, value) for name, value in table.items()}


def _entry(path: Path, name: str, value: Any) -> Entry:
    where = f"{path}: {gate.short(name)}"
    if not NAME.fullmatch(name):
        raise InputError(f"{where} is not a valid name for a model", "letters, digits, _ . and -")
    if isinstance(value, str):
        local = value.startswith((".", "~", "/")) or not cache.ID.fullmatch(value)
        value = {"path" if local else "hub": value}
    if not isinstance(value, dict):
        raise InputError(f"{where} is neither a text nor a table")
    for key, setting in value.items():
        if key not in KEYS or not isinstance(setting, KEYS[key]):
            raise InputError(f"{where}: {gate.short(key)} = {gate.short(setting)}", f"it may have: {', '.join(KEYS)}")
    if ("path" in value) == ("hub" in value):
        raise InputError(f"{where} must have either a path or a hub id")
    if "hub" in value and not cache.ID.fullmatch(value["hub"]):
        raise InputError(f"{where}: hub = {gate.short(value['hub'])}", "it is org/name or org/name@revision")
    if value.get("prediction", "epsilon") not in PREDICTIONS:
        raise InputError(f"{where}: prediction = {gate.short(value['prediction'])}", " or ".join(PREDICTIONS))
    components = value.get("components", {})
    if not all(isinstance(file, str) for file in components.values()):
        raise InputError(f"{where}: components = {gate.short(components)}", "it is a table of parts and files")
    defaults = value.get("defaults", {})
    for key, setting in defaults.items():
        if key not in DEFAULTS or isinstance(setting, bool) or not isinstance(setting, DEFAULTS[key]):
            hint = f"it may have: {', '.join(DEFAULTS)}"
            raise InputError(f"{where}: defaults: {gate.short(key)} = {gate.short(setting)}", hint)
    folder = Path(os.path.expanduser(value["path"])) if "path" in value else None
    return Entry(
        name,
        path.parent / folder if folder is not None else None,  # a relative path starts at the list
        value.get("hub"),
        value.get("base"),
        value.get("prediction"),
        {name: path.parent / os.path.expanduser(file) for name, file in components.items()},
        defaults,
    )


def without(name: str) -> tuple[Path, bytes]:
    """(path of the list, its bytes without that entry). The file is the user's: all other lines stay as they are.

    Raises InputError if there is no such entry, or if it is not a line or a table of its own.
    """
    path = list_file()
    if name not in entries():
        raise InputError(f"{path}: there is no {gate.short(name)}")
    text = gate.read_bytes(path, gate.MAX_JSON).decode("utf-8")
    kept, inside = [], False
    quoted = rf"(?:{re.escape(name)}|\"{re.escape(name)}\"|'{re.escape(name)}')"
    for line in text.splitlines(keepends=True):
        if line.startswith("["):
            inside = re.match(rf"\[\s*{quoted}\s*[\].]", line) is not None
        if not inside and not re.match(rf"{quoted}\s*=", line):
            kept.append(line)
    new = "".join(kept)
    try:
        same = tomllib.loads(new) == {key: value for key, value in tomllib.loads(text).items() if key != name}
    except ValueError:
        same = False
    if not same:
        raise InputError(f"{path}: {gate.short(name)} is not a line or a table of its own", "edit the file")
    return path, new.encode("utf-8")
