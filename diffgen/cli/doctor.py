"""diffgen doctor: check this machine without the network, and suggest the next command."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffgen import devices, environment
from diffgen.errors import DiffgenError
from diffgen.models import cache, find, hub, listed
from diffgen.version import __version__

from .output import Debug, Json, Output, Quiet, UnfinishedError, table

# The oldest versions that are safe and that work, as in pyproject.toml.
FLOORS = {
    "torch": "2.10",
    "diffusers": "0.42.1",
    "transformers": "5.0",
    "safetensors": "0.6",
    "pillow": "12.3",
    "huggingface_hub": "1.0",
}


def doctor(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    environment.prepare(offline=True)
    say = Output("doctor", json, quiet)
    problems: list[str] = []
    versions = {"diffgen": __version__, "python": platform.python_version(), **_versions(problems)}
    device = _device(problems)
    folders = {"pictures": Path.cwd(), "download cache": cache.cache_dir(), "your list": listed.list_file().parent}
    places = {what: {"folder": str(path), **_place(path)} for what, path in folders.items()}
    if not places["pictures"]["writable"]:
        problems.append(f"cannot write to {folders['pictures']}: go to another folder, or use -o")
    models = _models(problems)
    result = {
        "versions": versions,
        "device": device,
        "places": places,
        "models": models,
        "cache_bytes": sum(
            {path.resolve(): path.stat().st_size for path in cache.files_of(cache.cache_dir())}.values()
        ),
        "problems": problems,
        "next": 'diffgen generate "a red apple"',
    }
    lines = table(
        [
            ["versions", ", ".join(f"{name} {number or 'missing'}" for name, number in versions.items())],
            ["device", _device_line(device)],
            *([what, _place_line(place)] for what, place in places.items()),
            ["models", ", ".join(models) or "none"],
            *(["problem", problem] for problem in problems),
            *([] if problems else [["next", str(result["next"])]]),
        ]
    )
    if problems:
        for line in () if json else lines:
            say.line(line)
        raise UnfinishedError(
            DiffgenError(problems[0], f"{len(problems)} problems in all" * (len(problems) > 1)), result
        )
    say.result(result, lines)


def _versions(problems: list[str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name, floor in FLOORS.items():
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is missing: pip install '{name}>={floor}'")
            continue
        if _numbers(str(versions[name])) < _numbers(floor):
            problems.append(f"{name} {versions[name]} is older than {floor}: pip install '{name}>={floor}'")
    return versions


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.split("+")[0])]


def _device(problems: list[str]) -> dict[str, Any]:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    common = {"threads": threads, "ram": _ram()}
    try:
        return devices.describe() | common
    except Exception as error:  # whatever a broken installation raises
        problems.append(f"torch does not start: {type(error).__name__}: {error}")
        return {"device": None, "name": None, "memory": None, "bf16": False} | common


def _ram() -> int | None:
    """The memory of the machine in bytes, or the limit of this process's control group if it is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return min(total, int(limit)) if limit.isdigit() else total


def _place(path: Path) -> dict[str, Any]:
    """Whether a folder can be written to or created, and the free bytes on its disk."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return {
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free": shutil.disk_usage(existing).free,
    }


def _models(problems: list[str]) -> list[str]:
    """The names of the models on this machine. Every file of the default model is checked."""
    names = []
    try:
        find.check(find.find())
        names += [f"{name} (bundled)" for name in find.bundled_names()]
        names += [f"{name} (list)" for name in listed.entries()]
    except DiffgenError as error:
        problems.append(error.message)
    return names + [f"{model.name} (cache)" for model in find.cached_models()]


def _device_line(device: dict[str, Any]) -> str:
    parts = [str(device["device"])]
    if device["name"]:
        parts.append(f"{device['name']}, {hub.size_text(device['memory'])}")
    if device["ram"]:
        parts.append(f"RAM {hub.size_text(device['ram'])}")
    return ", ".join([*parts, f"{device['threads']} threads", f"bfloat16 {'fast' if device['bf16'] else 'slow'}"])


def _place_line(place: dict[str, Any]) -> str:
    writable = "writable" if place["writable"] else "not writable"
    return f"{place['folder']} ({writable}, {hub.size_text(place['free'])} free)"
