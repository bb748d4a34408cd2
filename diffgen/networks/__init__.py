"""The networks that are trained here from scratch: a UNet and a small DiT.

Both are called as network(x, t, label=None, context=None) and say by `config` how to build them again.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from .dit import DiT
from .unet import UNet

NETWORKS: dict[str, type[UNet] | type[DiT]] = {"unet": UNet, "dit": DiT}

__all__ = ["NETWORKS", "DiT", "UNet", "build"]


def build(description: dict[str, Any]) -> nn.Module:
    """The network of {"name": "unet" or "dit", **config}, with fresh weights.

    Raises ValueError for an unknown name or argument, one that is missing, or a value that doesn't fit.
    """
    config = dict(description)
    name = config.pop("name", None)
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; {_meant(str(name), NETWORKS)}there are {', '.join(NETWORKS)}")
    known = inspect.signature(NETWORKS[name]).parameters
    unknown = [key for key in config if key not in known]
    if unknown:
        said = f"{_meant(unknown[0], known)}it takes {', '.join(known)}"
        raise ValueError(f"a {name} has no {', '.join(map(repr, unknown))}; {said}")
    if "channels" not in config:
        raise ValueError(f"channels is missing: {name} needs to know the pictures' channels")
    return NETWORKS[name](**config)


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""
