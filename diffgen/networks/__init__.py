"""The networks that are trained here from scratch: a UNet and a small DiT.

Both are called as network(x, t, label=None, context=None) and say by `config` how to build them again.
"""

from __future__ import annotations

import inspect
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
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    known = inspect.signature(NETWORKS[name]).parameters
    unknown = [key for key in config if key not in known]
    if unknown:
        raise ValueError(f"a {name} has no {', '.join(map(repr, unknown))}; it takes {', '.join(known)}")
    if "channels" not in config:
        raise ValueError(f"channels is missing: {name} needs to know the pictures' channels")
    return NETWORKS[name](**config)
