"""What there is to know of a model, without loading it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from diffgen.errors import InputError

from . import gate
from .find import Model

# What a card (card.json in the model's folder) may say, and what stands there if it doesn't.
CARD: dict[str, Any] = {
    "licence": None,
    "resolution": None,
    "concepts": None,
    "styles": None,
    "held_out": None,
    "defaults": {},
    "figures": {},
}


def info(model: Model) -> dict[str, Any]:
    """name, folder, family, bundled, source, bytes (of the whole folder), prediction, and what the card says.

    Without a card: the resolution that the configuration means, the licence that README.md's head names, None for
    the rest. Raises InputError for broken files; weights are not looked at.
    """
    card = model.folder / "card.json"
    said = gate.read_json(card) if card.is_file() else {}
    known = {key: said.get(key, default) for key, default in CARD.items()}
    for key in ("concepts", "styles"):
        names = known[key] or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{card}: {key} is no list of texts")
    known["resolution"] = known["resolution"] or _resolution(model.folder)
    known["licence"] = known["licence"] or _licence(model.folder / "README.md")
    scheduler = gate.read_json(model.folder / "scheduler" / "scheduler_config.json")
    return {
        "name": model.name,
        "folder": str(model.folder),
        "family": model.family,
        "bundled": model.bundled,
        "source": model.source,
        "bytes": _bytes(model.folder),
        "prediction": scheduler.get("prediction_type", "epsilon"),
        **known,
    }


def _resolution(folder: Path) -> int | None:
    """Side of the pictures in pixels: the UNet's sample size times the VAE's factor, 2 per level but the last."""
    size = gate.read_json(folder / "unet" / "config.json").get("sample_size")
    levels = gate.read_json(folder / "vae" / "config.json").get("block_out_channels")
    if type(size) is int and isinstance(levels, list) and 0 < len(levels) < 10:
        return size * 2 ** (len(levels) - 1)
    return None


def _licence(readme: Path) -> str | None:
    """The `license:` of a model card's head, as hubs write it."""
    if not readme.is_file():
        return None
    with readme.open("rb") as file:
        head = file.read(4096).decode("utf-8", "replace")
    named = re.search(r"^license:[ \t]*(\S+)", head, re.MULTILINE) if head.startswith("---") else None
    return named[1] if named else None


def _bytes(folder: Path) -> int:
    return sum(
        os.stat(os.path.join(where, name)).st_size
        for where, _, names in os.walk(folder)
        for name in names
        if os.path.isfile(os.path.join(where, name))
    )
