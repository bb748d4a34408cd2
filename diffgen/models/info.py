"""Describe a model without loading it."""

from __future__ import annotations

import difflib
import fnmatch
import re
from pathlib import Path
from typing import Any

from diffgen.errors import InputError

from . import families, find, gate, single_file
from .cache import files_of
from .find import Model

# The keys of a card (card.json in the model's folder), with the values that apply without one.
CARD: dict[str, Any] = {
    "licence": None,
    "resolution": None,
    "concepts": None,
    "styles": None,
    "held_out": None,
    "words": None,
    "compositions": None,
    "defaults": {},
    "figures": {},
}

# What a model composes: the lists of a card's `compositions`, and what they hold. Its `names` are the things' others.
COMPOSITIONS: dict[str, type] = {
    "things": str,
    "colours": str,
    "counts": int,
    "relations": str,
    "backgrounds": str,
    "sizes": str,
    "held_out": dict,
}
WORDS = {str: "texts", int: "whole numbers", dict: "objects"}


def info(model: Model) -> dict[str, Any]:
    """Describe a model: name, folder, file, family, variant, bundled, source, revision, bytes (of its files and
    those beside them), prediction, the family's defaults, the tuned grids that it ships, and its card.

    Without a card: the resolution from the configuration, the licence from README.md's head, None for the rest. The
    user's list overrides the card's defaults. Raises InputError for broken files; weights are read no further than
    their headers.
    """
    folder = model.folder
    if model.is_run:
        return _run(model)
    card = folder / "card.json"
    written = gate.read_json(card) if model.file is None and card.is_file() else {}
    about = {key: written.get(key, default) for key, default in CARD.items()}
    for key in ("concepts", "styles", "words"):
        names = about[key] or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{card}: {key} is not a list of texts")
    _check_compositions(card, about["compositions"])
    if model.file is None:
        configs = {name: _config(folder, name) for name in ("unet", "transformer", "vae", "scheduler")}
        about["licence"] = about["licence"] or _licence(folder / "README.md")
        size = sum({path.resolve(): path.stat().st_size for path in files_of(folder)}.values())
    else:
        checked = find.check(model)
        configs = {name: part.config for name, part in checked.components.items()}
        about["licence"] = single_file.recognise(model.file).metadata.get("modelspec.license")
        size = sum(path.stat().st_size for path in checked.files)
    about["resolution"] = about["resolution"] or _resolution(model.family, configs)
    if model.defaults:
        about["defaults"] = {**(about["defaults"] if isinstance(about["defaults"], dict) else {}), **model.defaults}
    return {
        "name": model.name,
        "folder": str(folder),
        "file": None if model.file is None else str(model.file),
        "family": model.family,
        "variant": model.variant,
        "bundled": model.bundled,
        "source": model.source,
        "revision": model.revision,
        "bytes": size,
        "prediction": _prediction(model.family, configs["scheduler"]),
        "family_defaults": families.defaults_of(model.family, model.variant)._asdict(),
        "grids": [] if model.file is not None else _grids(folder),
        **about,
    }


def _check_compositions(card: Path, compositions: Any) -> None:
    """Raise InputError unless it is None or has the lists that the page on the interface names."""
    if compositions is None:
        return
    if not isinstance(compositions, dict):
        raise InputError(f"{card}: compositions is not an object")
    for key, kind in COMPOSITIONS.items():
        values = compositions.get(key, [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise InputError(f"{card}: compositions.{key} is not a list of {WORDS[kind]}")
    names = compositions.get("names", {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{card}: compositions.names is not an object of texts")


def matching_names(about: dict[str, Any], pattern: str) -> list[str]:
    """What a model knows, by a shell-style pattern: its concepts, what it composes, and the words of its captions.

    Raises InputError, with the nearest names, if nothing matches.
    """
    compositions = about["compositions"] or {}
    lists = [
        about["concepts"],
        *(compositions.get(key) for key in ("things", "colours", "relations", "sizes")),
        about["words"],
    ]
    known = list(dict.fromkeys(str(name) for names in lists for name in names or ()))
    if not known:
        raise InputError(f"{about['name']} does not say what it knows", "only some models list their names")
    folded = pattern.casefold()
    if matching := [name for name in known if fnmatch.fnmatchcase(name.casefold(), folded)]:
        return matching
    inside = [name for name in known if folded.strip("*") and folded.strip("*") in name.casefold()]
    near = inside or difflib.get_close_matches(folded, known, n=3)
    hint = f"the nearest: {', '.join(near[:8])}" if near else "a pattern such as '*cat*' searches within names"
    raise InputError(f"{about['name']} knows no name like {pattern!r}", hint)


def defaults_in_words(about: dict[str, Any]) -> Any:
    """The defaults that `info` returns, in words: a tuned grid among them brings its own number of steps."""
    defaults = about["defaults"]
    if not isinstance(defaults, dict):
        return defaults
    own = next((grid["steps"] for grid in about["grids"] if grid["file"] == defaults.get("grid")), None)
    if own is None:
        return defaults
    otherwise = f" ({defaults['steps']} where that grid does not fit)" if "steps" in defaults else ""
    return {**defaults, "steps": f"{own}{otherwise}"}


def compositions_in_words(about: dict[str, Any]) -> str | None:
    """What a model composes, as `info` returns it, in words: "402 things, 8 colours, …"; None if that is not known."""
    compositions = about["compositions"]
    if compositions is None:
        return None
    numbers = {key: len(compositions.get(key, ())) for key in COMPOSITIONS}
    return ", ".join(f"{number} {key}" for key, number in numbers.items() if number).replace("_", "-") or "none"


def _run(model: Model) -> dict[str, Any]:
    """The same for a run of `diffgen train`, from its run.json, which `training.run` checks in full."""
    run = gate.read_json(model.folder / "run.json", 16 * gate.MAX_JSON)
    data, config = (run[key] if isinstance(run.get(key), dict) else {} for key in ("data", "config"))
    size = data.get("size")
    return {
        "name": model.name,
        "folder": str(model.folder),
        "file": None,
        "family": model.family,
        "variant": None,
        "bundled": False,
        "source": model.source,
        "revision": None,
        "bytes": sum({path.resolve(): path.stat().st_size for path in files_of(model.folder)}.values()),
        "prediction": run.get("prediction"),
        "family_defaults": {},
        "grids": [],
        **CARD,
        "resolution": size[0] if isinstance(size, list) and len(set(map(str, size))) == 1 else size,
        "concepts": data.get("classes"),
        "defaults": config.get("sample", {}),
    }


def _grids(folder: Path) -> list[dict[str, Any]]:
    return [
        {"file": f"grids/{path.name}", "scheduler": grid.solver, "steps": grid.steps, "guidance": grid.guidance}
        for path, grid in gate.check_grids(folder).items()
    ]


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    return gate.read_json(path) if path.exists() else {}


def _prediction(family: str, scheduler: dict[str, Any]) -> Any:
    row = families.FAMILIES[family]
    return row.prediction if row.is_flow else scheduler.get("prediction_type", "epsilon")


def _resolution(family: str, configs: dict[str, dict[str, Any]]) -> int | None:
    """Side of the pictures in pixels: the network's sample size times the VAE's factor, 2 per level except the last.

    Where the configuration names no sample size (FLUX.1), the family's size.
    """
    row = families.FAMILIES[family]
    size = configs.get(row.denoiser, {}).get("sample_size")
    if size is None:
        return row.defaults.size
    if "vae" not in row.parts:
        return size if type(size) is int else None
    levels = configs["vae"].get("block_out_channels")
    if type(size) is int and isinstance(levels, list) and 0 < len(levels) < 10:
        return size * 2 ** (len(levels) - 1)
    return None


def _licence(readme: Path) -> str | None:
    """The `license:` in the head of a model card, as hubs write it."""
    if not readme.is_file():
        return None
    with readme.open("rb") as file:
        head = file.read(4096).decode("utf-8", "replace")
    named = re.search(r"^license:[ \t]*(\S+)", head, re.MULTILINE) if head.startswith("---") else None
    return named[1] if named else None
