"""Make the gallery's pictures from the commands in its README: `python samples/gallery/make.py [NAME…]`.

With names, only those pictures are made. docs/pictures/page.py has the format of the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "docs" / "pictures"))

from page import Page, remake  # noqa: E402

PAGE = Page(HERE / "README.md", HERE, independent=True)

if __name__ == "__main__":
    remake([PAGE], sys.argv[1:])
