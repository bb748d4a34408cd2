"""The gallery's pictures, made by the commands of its README: `python samples/gallery/make.py [NAME…]`.

With names, only those pictures are made. docs/pictures/page.py says how a page asks for its pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "docs" / "pictures"))

from page import Page, remake  # noqa: E402

PAGE = Page(HERE / "README.md", HERE, apart=True)

if __name__ == "__main__":
    remake([PAGE], sys.argv[1:])
