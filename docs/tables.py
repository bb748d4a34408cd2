"""Write the tables of docs/schedulers.md from the registry: python docs/tables.py

A test compares the page with them, so that it stays up to date.
"""

from __future__ import annotations

import re
from pathlib import Path

import schedulers
from schedulers.grids import GRIDS, describe
from schedulers.registry import LABELS
from schedulers.solver import SOLVERS

PAGE = Path(__file__).parent / "schedulers.md"


def solvers() -> str:
    """The table of the built-in solvers. Solvers of installed plug-ins are left out."""
    rows = [
        ["name", "also called", "order", "evaluations a step", "stochastic", "the same algorithm", "when to use it"]
    ]
    for name, s in sorted(SOLVERS.items()):
        if s.is_plugin:
            continue
        special = [
            f"{k} ({', '.join(f'{o}={v}' for o, v in options.items())})"
            for k, (n, _, options) in LABELS.items()
            if n == name
        ]
        others = [*([s.a1111] if s.a1111.lower() != name else []), *s.aliases, *special]
        cost = f"{s.evaluations_per_step}{', native only' * s.native_only}"
        rows.append([f"`{name}`", ", ".join(others), str(s.order), cost, "yes" * s.stochastic, s.same, s.when])
    return table(rows)


def grids() -> str:
    """The table of the built-in grids. Grids of installed plug-ins are left out."""
    rows = [["name", "also called", "points", "formula", "source"]]
    for name in sorted(name for name, function in GRIDS.items() if function.__module__.startswith("schedulers.")):
        about = describe(name)
        rows.append([f"`{name}`", ", ".join(about.aliases), about.about, about.formula, about.reference])
    return table(rows)


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def written(page: str) -> str:
    """The page with both tables up to date."""
    for name, content in {"solvers": solvers(), "grids": grids()}.items():
        block = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page = block.sub(lambda match, content=content: match[1] + content + match[2], page)
    return page


if __name__ == "__main__":
    schedulers.names()
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
