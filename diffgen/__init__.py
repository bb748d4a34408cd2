"""diffgen: pictures from prompts, a native DDPM, and schedulers that are compared with what is exactly known.

    import diffgen
    pictures = diffgen.load("emoji").generate("a red apple", seed=7)   # a list of PIL images, metadata in `.info`

Importing this package imports no torch; calling its functions does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .comparison.compare import compare
    from .comparison.tune import tune
    from .loading import load
    from .training.evaluate import evaluate
    from .training.finetune import finetune
    from .training.train import train

# name: the module that defines it, imported at the first use
FUNCTIONS = {
    "compare": "comparison.compare",
    "evaluate": "training.evaluate",
    "finetune": "training.finetune",
    "load": "loading",
    "train": "training.train",
    "tune": "comparison.tune",
}
__all__ = ["__version__", "compare", "evaluate", "finetune", "load", "train", "tune"]


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{FUNCTIONS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FUNCTIONS})
