"""Show pictures in the terminal while they form."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from diffgen.generation.model import Generator
from diffgen.generation.plan import Picture
from diffgen.images.preview import colours_of, half_blocks

SECONDS = 0.15  # the shortest time between two previews


class View:
    """The current picture above the progress bar, redrawn in place, as a renderable of rich. Finished pictures stay."""

    def __init__(self, colours: str) -> None:
        self.colours = colours
        self.console: Any = None  # set by the progress bar that shows this
        self._text: Any = None
        self._last = float("-inf")
        self._changed = False

    @property
    def color_system(self) -> str:
        """Rich's name of the colour system."""
        return "truecolor" if self.colours == "24bit" else "256"

    def watch(self, generator: Generator) -> Callable[[Any, int, Any], None]:
        """An `on_denoised` callback that shows the first picture of each batch."""

        def update(shots: Any, i: int, x0: Any) -> None:
            if time.monotonic() - self._last >= SECONDS:
                self._text = self._drawn(generator.sketch(x0[0]))
                self._last = time.monotonic()
                self._changed = True

        return update

    def changed(self) -> bool:
        """Whether there is something new to show since the last call."""
        changed, self._changed = self._changed, False
        return changed

    def finished(self, picture: Picture) -> None:
        """Print the finished picture, which stays on the screen; the next one begins below it."""
        self._text = None
        if picture.image is not None:
            self.console.print(self._drawn(picture.image))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        if self._text is not None:
            yield self._text

    def _drawn(self, image: Any) -> Any:
        """The picture as coloured text for rich."""
        from rich.text import Text

        lines = half_blocks(image, self.console.width - 1, self.console.height - 3, self.colours)
        return Text.from_ansi("\n".join(lines), no_wrap=True, overflow="crop")


def view_of(quiet: bool) -> View | None:
    """The view for this terminal; None with --quiet, without a terminal, or without colours."""
    colours = None if quiet else colours_of(os.environ, sys.stderr.isatty(), sys.stderr.encoding)
    return None if colours is None else View(colours)
