"""Make the guide's pictures from the commands on its pages: `python docs/pictures/make.py [NAME…]`.

The pictures of docs/ways.md and docs/prompts.md go to docs/pictures/, those of docs/seeing.md to docs/seeing/. page.py
has the format of the pages. With names, only those pictures are written. The blocks before them on their page still
run, because a block may use their files.
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
