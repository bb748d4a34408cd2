"""Looking at pictures while they are made: in the terminal, as strips of what was predicted, as maps of attention."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffgen.generation.model import Generator
from diffgen.generation.plan import Picture
from diffgen.images.naming import Beside, Outputs, slug
from diffgen.images.preview import colours_of, half_blocks
from diffgen.images.strip import animation, strip

ATTENTION = "attention"  # the folder of the maps, unless another is named
SECONDS = 0.15  # at least, between two looks at a picture that is being made


class Seen:
    """The files about each picture, in folders of their own; what could not be written is refused before any work."""

    def __init__(
        self, outputs: Outputs, steps: str | None, attention: bool, attention_out: str | None, overwrite: bool
    ) -> None:
        self.steps = None if steps is None else Beside(steps, outputs, "--save-steps", overwrite)
        self.attention: Beside | None = None
        if attention:
            self.attention = Beside(attention_out or ATTENTION, outputs, "--attention-out", overwrite)

    def write(self, picture: Picture, path: Path) -> dict[str, Any]:
        """Write what there is about a picture that lies at `path`; the paths. Raises CannotWrite."""
        found: dict[str, Any] = {}
        if self.steps is not None:
            files = {"steps.png": _png(strip(picture.steps)), "steps.gif": animation(picture.steps)}
            found["steps"] = [str(file) for file in self.steps.write(path, files)]
        if self.attention is not None and picture.image is not None:
            from diffgen.images.heat import overlay  # imports numpy

            found["attention"] = {}
            for word, heat in picture.attention.items():
                name = f"{slug(word, 40)}.png"
                (file,) = self.attention.write(path, {name: _png(overlay(picture.image, heat, word))})
                found["attention"][word] = str(file)
        return found


class View:
    """The picture above the progress bar, redrawn in place; finished ones stay. A renderable of rich."""

    def __init__(self, colours: str) -> None:
        self.colours = colours
        self.console: Any = None  # set by the progress bar that shows this
        self._text: Any = None
        self._last = float("-inf")
        self._changed = False

    @property
    def color_system(self) -> str:
        """The colours, as rich calls them."""
        return "truecolor" if self.colours == "24bit" else "256"

    def watch(self, generator: Generator) -> Callable[[Any, int, Any], None]:
        """What `pictures` calls after each evaluation: shows the first picture of those that are made at once."""

        def look(shots: Any, i: int, x0: Any) -> None:
            if time.monotonic() - self._last >= SECONDS:
                self._text = self._drawn(generator.sketch(x0[0]))
                self._last = time.monotonic()
                self._changed = True

        return look

    def changed(self) -> bool:
        """Is there something new to show, since this was asked before?"""
        changed, self._changed = self._changed, False
        return changed

    def finished(self, picture: Picture) -> None:
        """The picture as it came out stays on the screen; the next one begins below it."""
        self._text = None
        if picture.image is not None:
            self.console.print(self._drawn(picture.image))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        if self._text is not None:
            yield self._text

    def _drawn(self, image: Any) -> Any:
        """The picture as a text of rich."""
        from rich.text import Text

        lines = half_blocks(image, self.console.width - 1, self.console.height - 3, self.colours)
        return Text.from_ansi("\n".join(lines), no_wrap=True, overflow="crop")


def view_of(quiet: bool) -> View | None:
    """The view for this terminal, or None: stderr is none, or shows no colours, or nothing is to be said."""
    colours = None if quiet else colours_of(os.environ, sys.stderr.isatty(), sys.stderr.encoding)
    return None if colours is None else View(colours)


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
