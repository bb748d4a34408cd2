"""Many pictures, and many training steps, in one process: memory stays flat, and no file or thread is left open.

    python benchmarks/soak.py [--pictures 500] [--steps 20000]

Memory is the resident memory of the process, the mean of ten readings after a tenth of the work and of ten at its end:
the second may be at most 2 % larger. Threads and open files are those at the same places; they must be equal.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

GROWTH = 1.02


class Readings:
    """Memory, files and threads while some work goes on."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.rows: list[tuple[int, int, int]] = []

    def step(self) -> None:
        self.done += 1
        if self.done % max(self.total // 100, 1) == 0:
            status = Path("/proc/self/status").read_text()
            memory, threads = (int(re.findall(rf"{key}:\s+(\d+)", status)[0]) for key in ("VmRSS", "Threads"))
            self.rows.append((memory, len(os.listdir("/proc/self/fd")), threads))

    def report(self) -> bool:
        """Print what was read; whether it stayed flat."""
        early, late = self.rows[9:19], self.rows[-10:]
        before, after = (fmean(row[0] for row in rows) / 1024 for rows in (early, late))
        opened = {row[1:] for row in early} | {row[1:] for row in late}
        flat = after <= GROWTH * before and len(opened) == 1
        print(
            f"{self.done} {self.what}: {before:.1f} MiB, at the end {after:.1f} MiB ({after / before - 1:+.2%}); "
            f"(files, threads): {sorted(opened)}: {'flat' if flat else 'NOT FLAT'}",
            flush=True,
        )
        return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()

    from tiny import build  # type: ignore[import-not-found]
    from training_runs import CONFIG  # type: ignore[import-not-found]

    import diffgen
    from diffgen.generation.write import write_pictures
    from diffgen.images.naming import Outputs
    from diffgen.loading import make_plan
    from diffgen.training.listener import Listener

    with tempfile.TemporaryDirectory() as place:
        generator = diffgen.load(build(Path(place, "tiny"), closed=True), device="cpu")
        plan = make_plan(generator.model, "a", seed=1, count=arguments.pictures, steps=2)
        pictures = Readings("pictures", arguments.pictures)

        class Written(diffgen.generation.write.Listener):  # type: ignore[name-defined,misc]
            def written(self, picture: object, path: Path) -> None:
                pictures.step()

        write_pictures(generator, [plan], Outputs(f"{place}/out/", len(plan)), listener=Written())
        steps = Readings("training steps", arguments.steps)

        class Stepping(Listener):
            def step(self, step: int, steps_: int) -> None:
                steps.step()

        config = Path(place, "c.toml")
        text = CONFIG.format(dropout=0.1, steps=arguments.steps, log_every=100)
        config.write_text(re.sub(r"(held_out_every|checkpoint_every|every) = \d+", r"\1 = 1000", text))
        diffgen.train("digits", f"{place}/run", config=config, listener=Stepping())
    sys.exit(not all([pictures.report(), steps.report()]))


if __name__ == "__main__":
    main()
