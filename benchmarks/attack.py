"""Attack the program, and count what falls.

    python benchmarks/attack.py [--seed 1] [--mutations 8] [--count 100] [--only files,readers]

Every part prints a line for each fault, with what repeats it; the table at the end has the counts, which must be zero.

    files    hostile files of every kind, given to the command
    readers  mutations, given to the functions that read
    kills    kill -9 at random moments of six commands, which then run again
    disks    the same commands on disks that are full at every k-th write (needs the right to mount)
    pairs    two processes in one folder
    signals  Ctrl-C, SIGTERM and SIGHUP at random moments
    pixels   one request by every way
    privacy  everything below a home of an odd name
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

FAULTS = (
    "executed", "tracebacks", "wrong codes", "over time", "over memory", "over length", "control characters", "lost",
    "partial", "stale", "differing", "leaks",
)  # fmt: skip


class Counts:
    """The counts of one part."""

    def __init__(self, part: str) -> None:
        self.part, self.tried, self.faults = part, 0, Counter[str]()

    def add(self, what: str, faults: dict[str, str]) -> None:
        """Count one attack and print its faults."""
        self.tried += 1
        for name, text in faults.items():
            self.faults[name] += 1
            print(f"{self.part}: {name}: {what}: {text!r}"[:600], flush=True)


def attack_files(folder: Path, seed: int, mutations: int) -> Counts:
    """Give every hostile file to the command that reads such files."""
    from hostile import KINDS, corpus, watched

    counts = Counts("files")
    for kind in KINDS:
        usual = watched(kind.command, folder)  # also imports what this command needs
        usual = watched(kind.command, folder)
        counts.add(f"{kind.name}, good", usual.faults(kind.codes))
        for case in corpus(folder, seed, mutations, (kind,)):
            with case.in_place(folder):
                outcome = watched(case.command, folder)
            counts.add(f"{kind.name}, {case.name}", outcome.faults(kind.codes, usual.seconds + 1))
    return counts


def attack_readers(folder: Path, seed: int, mutations: int) -> Counts:
    """Give mutations to the functions that read."""
    from hostile import KINDS, read_fault

    counts = Counts("readers")
    for number, kind in enumerate(KINDS):
        good = (folder / kind.file).read_bytes()
        for i in range(mutations * 40):
            one = (seed * 1000 + number) * 10_000 + 5000 + i
            counts.add(f"{kind.name}, mutation {one}", read_fault(kind, folder, good, one))
    return counts


FILES: dict[str, Callable[[Path, int, int], Counts]] = {"files": attack_files, "readers": attack_readers}
PROCESSES = ("kills", "disks", "pairs", "signals", "pixels", "privacy")


def attack_processes(part: str, folder: Path, seed: int, count: int) -> Counts:
    """One of the parts that need processes."""
    from attack_processes import PARTS

    counts = Counts(part)
    PARTS[part](folder, seed, count, counts.add)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutations", type=int, default=8, help="of each kind of file")
    parser.add_argument("--count", type=int, default=100, help="of kills, disks and signals")
    parser.add_argument("--only", default=",".join((*FILES, *PROCESSES)))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "good")
        folder.mkdir()
        os.environ.update(HOME=place, XDG_CONFIG_HOME=f"{place}/config", OMP_NUM_THREADS="1")
        from hostile import good_files
        from tiny import build  # type: ignore[import-not-found]

        good_files(folder, build(Path(place, "tiny"), closed=True))
        os.environ["DIFFGEN_MODELS"] = str(folder / "models.toml")
        all_counts = []
        for part in arguments.only.split(","):
            if part in FILES:
                all_counts.append(FILES[part](folder, arguments.seed, arguments.mutations))
            else:
                all_counts.append(attack_processes(part, folder, arguments.seed, arguments.count))
    print(f"\n{'':10}{'tried':>8}", *(f"{name:>18}" for name in FAULTS))
    for counts in all_counts:
        print(f"{counts.part:10}{counts.tried:8}", *(f"{counts.faults[name]:18}" for name in FAULTS))
    sys.exit(any(counts.faults.total() for counts in all_counts))


if __name__ == "__main__":
    main()
