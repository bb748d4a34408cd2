"""The networks for training from scratch: a UNet and a small DiT.

Both are called as network(x, t, label=None, context=None); their `config` holds the arguments that rebuild them.
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
    """Build the network of {"name": "unet" or "dit", **config}, with fresh weights.

    Raises ValueError for an unknown name or argument, a missing argument, or a wrong value.
    """
    config = dict(description)
    name = config.pop("name", None)
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; {_suggestion(str(name), NETWORKS)}there are {', '.join(NETWORKS)}")
    parameters = inspect.signature(NETWORKS[name]).parameters
    unknown = [key for key in config if key not in parameters]
    if unknown:
        hint = f"{_suggestion(unknown[0], parameters)}it takes {', '.join(parameters)}"
        raise ValueError(f"a {name} has no {', '.join(map(repr, unknown))}; {hint}")
    if "channels" not in config:
        raise ValueError(f"channels is missing: {name} needs the number of channels of the pictures")
    return NETWORKS[name](**config)


def _suggestion(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}? " if near else ""
