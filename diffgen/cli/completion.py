"""Values that the shell completes: models, schedulers, grids. No torch.

diffgen --install-completion          # bash, zsh, fish or PowerShell, whichever runs it
diffgen generate "a cat" --scheduler dpm<TAB>
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def models() -> list[str]:
    """Bundled models, those of the user's list, and downloaded ones."""
    from diffgen.models import cache, find, listed

    return [*find.bundled_names(), *listed.entries(), *dict.fromkeys(snapshot.repo for snapshot in cache.snapshots())]


def schedulers() -> list[str]:
    """The canonical names of all schedulers."""
    import schedulers as package

    return package.names()


def grids() -> list[str]:
    """The names of all grids."""
    import schedulers as package

    return package.grid_names()


def both() -> list[str]:
    """What `schedulers show` describes."""
    return [*schedulers(), *grids()]


VALUES: dict[str, Callable[[], list[str]]] = {  # by the parameter of a command, or by "module.parameter"
    "model": models,
    "models.name": models,
    "scheduler": schedulers,
    "schedulers": schedulers,
    "schedulers.name": both,
    "grid": grids,
    "grids": grids,
}


def completions(values: Iterable[str], incomplete: str) -> list[str]:
    """The values that begin so. In a list with commas, the last item is completed."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{value}" for value in values if value.startswith(last)]


def complete_values(command: Any, module: str) -> None:
    """Let the parameters of a command complete their values; where there are none, the shell completes files."""
    from typer._completion_classes import CompletionItem  # a private module: typer exports no public name

    for param in command.params:
        values = VALUES.get(f"{module}.{param.name}") or VALUES.get(param.name)
        if values is None or getattr(param, "is_flag", False):
            continue

        def complete(ctx: Any, incomplete: str, values: Callable[[], list[str]] = values) -> list[Any]:
            try:
                return [CompletionItem(text) for text in completions(values(), incomplete)]
            except Exception:  # a broken list of models must not disturb the shell
                return []

        param.shell_complete = complete
