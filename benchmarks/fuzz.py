"""Fuzz the functions that read files, guided by the code that they reach (atheris).

    pip install atheris
    python benchmarks/fuzz.py checkpoint -max_total_time=60 [CORPUS]

The first argument is a kind of `tests/hostile.py`, or `list`; the others are libFuzzer's. It ends at the first error
that is not ours, and writes the file that raised it. Without atheris: `python benchmarks/attack.py --only readers`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["diffgen", "schedulers"]):
        from hostile import KINDS, good_files  # type: ignore[import-not-found]

        from diffgen.errors import DiffgenError
    if sys.argv[1:2] == ["list"] or not sys.argv[1:]:
        print("\n".join(kind.name for kind in KINDS))
        return
    name = sys.argv.pop(1)
    kind = next(kind for kind in KINDS if kind.name == name)
    from tiny import build  # type: ignore[import-not-found]

    folder = Path(tempfile.mkdtemp()) / "good"
    folder.mkdir()
    good_files(folder, build(folder.parent / "tiny", closed=True))
    path = folder / kind.file
    seeds = folder.parent / "seeds"
    seeds.mkdir()
    (seeds / "good").write_bytes(path.read_bytes())
    os.chdir(folder)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(DiffgenError):
            kind.reader(path)

    atheris.Setup([*sys.argv, str(seeds)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
