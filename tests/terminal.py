"""A terminal that knows the few escape codes that a drawing in place needs; any other fails."""

from __future__ import annotations

import re
from typing import Any

CODES = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])")
Colour = Any  # (r, g, b), or a palette's number, or None


class Screen:
    """Lines of cells (character, foreground, background); they never scroll away."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[list[tuple[str, Colour, Colour]]] = [[]]
        self.row = self.column = 0
        self.front: Colour = None
        self.back: Colour = None
        self.styled = False

    @property
    def plain(self) -> bool:
        return not self.styled

    @property
    def text(self) -> str:
        return "\n".join("".join(cell[0] for cell in line) for line in self.lines)

    def write(self, text: str) -> None:
        at = 0
        while at < len(text):
            if match := CODES.match(text, at):
                self._obey(*match.groups())
                at = match.end()
                continue
            self._put(text[at])
            at += 1

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            while len(self.lines) <= self.row:
                self.lines.append([])
        else:
            assert character.isprintable(), repr(character)
            if self.column == self.columns:
                self._put("\r")
                self._put("\n")
            line = self.lines[self.row]
            line += [(" ", None, None)] * (self.column + 1 - len(line))
            line[self.column] = (character, self.front, self.back)
            self.column += 1

    def _obey(self, numbers: str, code: str) -> None:
        if code == "A":
            self.row -= int(numbers or 1)
            assert self.row >= 0
        elif code == "K":
            assert numbers == "2"
            self.lines[self.row] = []
        elif code == "m":
            self._style([int(n or 0) for n in numbers.split(";")])
        else:
            assert (code, numbers) in (("l", "?25"), ("h", "?25")), (numbers, code)  # the cursor

    def _style(self, numbers: list[int]) -> None:
        while numbers:
            first = numbers.pop(0)
            if first in (38, 48):
                kind = numbers.pop(0)
                colour = numbers.pop(0) if kind == 5 else tuple(numbers.pop(0) for _ in range(3))
                if first == 38:
                    self.front = colour
                else:
                    self.back = colour
                self.styled = True
            elif first == 0:
                self.front = self.back = None
                self.styled = False
            else:
                self.styled = True
