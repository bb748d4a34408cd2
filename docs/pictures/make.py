"""The pictures of the guide, made by the commands that stand there: `python docs/pictures/make.py [NAME…]`.

Those of docs/ways.md and docs/prompts.md go to docs/pictures/, those of docs/seeing.md to docs/seeing/; page.py says
how a page asks for them. With names only those are written, but all blocks before them on their page are run, whose
files they may use.
`python samples/gallery/make.py` does the same for the gallery.
"""

from __future__ import annotations

import sys
from pathlib import Path

from page import Page, remake

DOCS = Path(__file__).resolve().parent.parent
PAGES = (
    Page(DOCS / "ways.md", DOCS / "pictures"),
    Page(DOCS / "seeing.md", DOCS / "seeing"),
    Page(DOCS / "prompts.md", DOCS / "pictures"),
)

if __name__ == "__main__":
    remake(PAGES, sys.argv[1:])
