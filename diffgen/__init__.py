"""diffgen: pictures from prompts, a native DDPM, and schedulers that are compared with what is exactly known.

    import diffgen
    pictures = diffgen.load("emoji").generate("a red apple", seed=7)   # a list of PIL images, metadata in `.info`

Importing this package imports no torch; `load` does.
"""

from __future__ import annotations

from .loading import load
from .version import __version__

__all__ = ["__version__", "load"]
