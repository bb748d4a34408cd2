"""Docstrings for the site: their lists of parameters, `name    what it is`, become lists of Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROW = re.compile(r"(\w[\w, .*]*?) {2,}(\S.*)")


def as_markdown(text: str) -> str:
    """The text with each `name  description` line, and the indented lines that continue it, as an item of a list."""
    lines: list[str] = []
    item = False
    for line in text.splitlines():
        if match := ROW.fullmatch(line):
            if not item:
                lines.append("")
            lines.append(f"- `{match[1]}`: {match[2]}")
            item = True
        elif item and line.startswith("  ") and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            if item and line.strip():
                lines.append("")
            item = False
            lines.append(line)
    return "\n".join(lines)


class Lists(griffe.Extension):
    """Rewrite every docstring as it is read."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
