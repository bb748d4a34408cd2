"""Environment variables to set before torch, diffusers and transformers are imported."""

from __future__ import annotations

import os
import re

ALWAYS = {
    "OMP_WAIT_POLICY": "passive",  # idle OpenMP threads sleep: spinning ones halve the speed where cores are shared
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # diffgen itself reports what concerns the user
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def prepare(offline: bool = False) -> None:
    """Set the variables that the user has not set; with `offline`, switch the network off in any case."""
    for name, value in ALWAYS.items():
        os.environ.setdefault(name, value)
    if offline:
        os.environ.update(OFFLINE)


def outdated() -> list[str]:
    """A warning for each installed package that is older than the oldest without known holes, with what mends it.

    The oldest versions are those of pyproject.toml, as the installed package has them.
    """
    from importlib.metadata import PackageNotFoundError, requires, version  # imports the package email

    try:
        needed = requires("diffgen") or []
    except PackageNotFoundError:  # a copy that is not installed
        return []
    warnings = []
    for name, oldest in (match.groups() for text in needed if (match := re.fullmatch(r"([\w.-]+)>=([\d.]+)", text))):
        try:
            installed = version(name)
        except PackageNotFoundError:  # of an extra
            continue
        if _numbers(installed) < _numbers(oldest):
            warnings.append(f"{name} {installed} has known holes or errors: pip install '{name}>={oldest}'")
    return warnings


def _numbers(version: str) -> list[int]:
    """The numbers of a version, without what follows them: 2.13.0+cpu is [2, 13, 0]."""
    match = re.match(r"[\d.]*\d", version)
    return [int(number) for number in match[0].split(".")] if match else []
