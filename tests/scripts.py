"""Import scripts of samples/, which import one another by their plain names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def scripts_of(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """The folder's modules by name; afterwards those names are free again for another folder's."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    yield importlib.import_module
    sys.path.remove(str(folder))
    for name in {path.stem for path in folder.glob("*.py")} - before:
        sys.modules.pop(name, None)
