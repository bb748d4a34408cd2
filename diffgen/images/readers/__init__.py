"""How a picture was made, by what its file carries: a reader for each tool, and the command that does the same here.

A reader is a function of what a file carries (`images.read.Carried`): `Made`, or None where its tool's marks are not
there. Nothing of a file is executed, imported or looked up on disk; texts are bounded, control characters left out.
"""

from __future__ import annotations

from pathlib import Path

from diffgen.errors import InputError

from ..read import Carried
from . import a1111, comfyui, fooocus, invokeai, kohya, mflux, novelai, sdcpp
from .made import Made

# Those with a mark of their own first: several tools also write AUTOMATIC1111's text.
READERS = (sdcpp.read, fooocus.read, novelai.read, invokeai.read, comfyui.read, mflux.read, kohya.read, a1111.read)


def read_tool_metadata(path: str | Path, carried: Carried) -> Made:
    """How the picture in a file was made, by the metadata that a tool wrote. Raises InputError if there is none."""
    for read in READERS:
        if (made := read(carried)) is not None:
            return made
    raise InputError(f"{path} says nothing about how it was made{_seen(carried)}", "many sites and editors remove it")


def _seen(carried: Carried) -> str:
    names = sorted(key for key in carried.texts if key.isprintable() and not key.startswith("XML:"))[:10]
    return f" that is understood here; it carries {', '.join(name[:40] for name in names)}" if names else ""
