"""Packages of the extras `diffgen[batch]` and `diffgen[ray]`, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from diffgen.errors import UsageError


def need(module: str, what: str, extra: str = "batch") -> Any:
    """Import a module of an extra. Raises UsageError that names the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(f"{what} need the package {package}", f"pip install 'diffgen[{extra}]'") from error
