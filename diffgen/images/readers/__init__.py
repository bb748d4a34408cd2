"""How a picture was made, by what its file carries: a reader for each tool, and the command that does the same here.

A reader is a function of what a file carries (`images.read.Carried`): `PictureInfo`, or None where its tool's marks are
missing. Nothing of a file is executed, imported or looked up on disk; texts are bounded, control characters left out.
"""

from __future__ import annotations

from diffgen.errors import InputError

from ..read import Carried, Source
from . import a1111, comfyui, fooocus, invokeai, kohya, mflux, novelai, sdcpp
from .picture_info import PictureInfo

# Readers with a mark of their own first: several tools also write AUTOMATIC1111's text.
READERS = {
    "sdcpp": ("stable-diffusion.cpp", sdcpp.read),
    "fooocus": ("Fooocus", fooocus.read),
    "novelai": ("NovelAI", novelai.read),
    "invokeai": ("InvokeAI", invokeai.read),
    "comfyui": ("ComfyUI", comfyui.read),
    "mflux": ("mflux", mflux.read),
    "kohya": ("kohya's sd-scripts", kohya.read),
    "a1111": ("AUTOMATIC1111 or Forge", a1111.read),
}  # PictureInfo.tool: the tool's title and its reader


def read_tool_metadata(path: Source, carried: Carried) -> PictureInfo:
    """How the picture in a file was made, by the metadata that a tool wrote. Raises InputError if there is none."""
    name = "the picture" if isinstance(path, bytes) else path
    for _, read in READERS.values():
        if (info := read(carried)) is not None:
            return info
    raise InputError(
        f"{name} says nothing about how it was made{_text_names(carried)}", "many sites and editors remove it"
    )


def _text_names(carried: Carried) -> str:
    names = sorted(key for key in carried.texts if key.isprintable() and not key.startswith("XML:"))[:10]
    return f" that is understood here; it carries {', '.join(name[:40] for name in names)}" if names else ""
