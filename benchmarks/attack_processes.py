"""The parts of `benchmarks/attack.py` that need processes: kills, full disks, two at once, signals, pixels, privacy.

The processes are forked from one that has the imports, so that a start costs no second.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from PIL import Image
from training_runs import command, contents

from diffgen.images.publish import TEMPORARY
from diffgen.models.gate import read_header

PRELOADED = [
    "diffgen.cli.pictures", "diffgen.pipelines.generate", "diffgen.training.start", "diffgen.training.pixels",
    "diffgen.comparison.measure", "diffgen.comparison.search", "diffgen.batch.run", "torch._dynamo",
]  # fmt: skip
Faults = dict[str, str]
Add = Callable[[str, Faults], None]

# What each command needs, and what it writes: everything stands below "made". {good} is the folder of good files.
WORK: dict[str, list[str]] = {
    "generate": ["generate", "a", "-n", "60", "-m", "{good}/model", "--steps", "1", "--seed", "1", "-o", "made/"],
    "train": ["train", "{good}/data", "-o", "made", "--config", "long.toml"],
    "compare": ["compare", "-m", "mixture", "--schedulers", "euler,heun", "--nfe", "4", "--seeds", "0-9", "-o", "made"],
    "tune": ["tune", "-m", "mixture", "--scheduler", "dpmpp_2m", "--nfe", "3", "--noises", "8", "--iterations", "8",
             "-o", "made/g.json"],
    "batch": ["batch", "run", "made", "--part", "0/1"],
    "export": ["models", "export", "{good}/model", "-o", "made/model"],
}  # fmt: skip
RESUMED = ("train", "compare")  # with --resume


def start(folder: Path, *args: str, environment: dict[str, str] | None = None) -> BaseProcess:
    """`diffgen ARGS` in that folder; its output goes to the files out and err there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=command, args=([*args], str(folder), environment or {}, None))
    process.start()
    return process


def finish(folder: Path, *args: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit code, stderr) of `diffgen ARGS` in that folder."""
    process = start(folder, *args, environment=environment)
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode if process.exitcode is not None else -1, (folder / "err").read_text(errors="replace")


def prepare(folder: Path, good: Path, work: str) -> list[str]:
    """An empty folder that has what a command needs; its words."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    from hostile import CONFIG

    (folder / "long.toml").write_text(
        CONFIG.replace("steps = 2\n", "steps = 60\n").replace("_every = 2", "_every = 10")
    )
    if work == "batch":
        rows = "".join(f"picture {i}\n" for i in range(24))
        (folder / "p.txt").write_text(rows)
        options = ("--steps", "1", "--size", "16", "--shard-size", "2", "--seed", "1")
        finish(folder, "batch", "plan", "p.txt", "-o", "made", "-m", f"{good}/model", *options)
    if work in ("tune", "export"):
        (folder / "made").mkdir()
    return [word.format(good=good) for word in WORK[work]]


def partial(path: Path) -> str | None:
    """What is incomplete in a file that has its final name; None if nothing is."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                tar.getmembers()
        elif path.suffix == ".html" and b"</html>" not in path.read_bytes()[-100:]:
            return "no end"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def partials(paths: list[Path]) -> Faults:
    """The fault of files of which some are incomplete."""
    incomplete = [f"{path.name}: {why}" for path in paths if (why := partial(path))]
    return {"partial": "; ".join(incomplete)} if incomplete else {}


def finished_files(folder: Path) -> list[Path]:
    """The files with final names below a folder: not logs, locks, or what is inside something unfinished."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [
        path
        for path in paths
        if not any(part.startswith(TEMPORARY) for part in path.relative_to(folder).parts)
        and path.name != ".lock"
        and path.suffix != ".jsonl"
    ]


def result_of(work: str, folder: Path) -> Any:
    """What a command made, for a comparison with the same command that was not disturbed."""
    out = folder / "made"
    if work == "train":
        return contents(out)
    if work == "compare":
        cells = json.loads((out / "results.json").read_text())["cells"]
        return [(cell["key"], cell["pixels_sha256"], cell["nfe"], cell["status"]) for cell in cells]
    if work in ("generate", "batch"):
        pictures = [path for path in finished_files(out) if path.suffix == ".png"]
        digests = sorted(Image.open(path).tobytes() for path in pictures)
        return digests if work == "batch" else None
    if work == "tune":
        return json.loads((out / "g.json").read_text())["sigmas"] if (out / "g.json").exists() else None
    return {path.name: path.read_bytes() for path in finished_files(out)}


def age(folder: Path) -> None:
    """Make what is unfinished old, so that the next process need not wait to see that it was left."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        for inner in [path, *path.rglob(".lock")]:
            os.utime(inner, (1, 1))


def attack_kills(good: Path, seed: int, count: int, add: Add) -> None:
    """Kill each command at random moments, and run it again."""
    choose = random.Random(seed)
    for work in WORK:
        reference = good.parent / "reference"
        words = prepare(reference, good, work)
        finish(reference, *words)  # the first start of the server of processes
        words, begin = prepare(reference, good, work), time.monotonic()
        code, err = finish(reference, *words)
        seconds, expected = time.monotonic() - begin, result_of(work, reference)
        add(f"{work}, undisturbed", {} if code == 0 else {"wrong codes": f"{code}: {err}"})
        for number in range(-(-count // len(WORK))):
            folder = good.parent / "killed"
            words = prepare(folder, good, work)
            process = start(folder, *words)
            process.join(moment := choose.random() * seconds)
            process.kill()
            process.join()
            before = finished_files(folder / "made")
            faults = partials(before)
            pictures = {path: path.read_bytes() for path in before if path.suffix == ".png" and work == "generate"}
            age(folder)
            if work in ("tune", "export") and before:
                for path in (folder / "made").iterdir():
                    if not path.name.startswith(TEMPORARY):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            code, err = finish(folder, *words, *["--resume"] * (work in RESUMED))
            if code != 0:
                faults["wrong codes"] = f"{code}: {err}"
            if left := [path.name for path in folder.rglob(f"{TEMPORARY}*")]:
                faults["stale"] = str(left)
            if any(not path.exists() or path.read_bytes() != data for path, data in pictures.items()):
                faults["lost"] = "a picture"
            if code == 0 and (result := result_of(work, folder)) != expected:
                faults["differing"] = "another result than undisturbed"
                if isinstance(result, dict):
                    names = (name for name in {*result, *expected} if result.get(name) != expected.get(name))
                    faults["differing"] = ", ".join(sorted(names))
            add(f"{work}, kill {number} after {moment:.2f} of {seconds:.2f} s", faults)


@contextlib.contextmanager
def disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of that size at a folder. Raises OSError without the right to mount one."""
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)], capture_output=True
    )
    if mounted.returncode:
        raise OSError(mounted.stderr.decode())
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def attack_disks(good: Path, seed: int, count: int, add: Add) -> None:
    """Run each command on disks of growing sizes: they are full at every k-th write."""
    choose = random.Random(seed)
    for work in WORK:
        reference = good.parent / "reference"
        finish(reference, *prepare(reference, good, work))
        needed = sum(-(-path.stat().st_size // 4096) * 4 for path in (reference / "made").rglob("*") if path.is_file())
        for _ in range(-(-count // len(WORK))):
            size = choose.randrange(4, max(needed * 9 // 10, 8), 4)
            folder = good.parent / "full"
            words = prepare(folder, good, work)
            aside = good.parent / "aside"
            shutil.rmtree(aside, ignore_errors=True)
            if (folder / "made").exists():
                shutil.copytree(folder / "made", aside)
                shutil.rmtree(folder / "made")
            try:
                with disk(folder / "made", size):
                    if aside.exists():
                        with contextlib.suppress(shutil.Error, OSError):
                            shutil.copytree(aside, folder / "made", dirs_exist_ok=True)
                    if work == "batch" and partial(folder / "made/plan.json"):
                        continue  # not even the plan fits
                    code, err = finish(folder, *words)
                    files = finished_files(folder / "made")
                    faults = partials(files)
                    if code != 6 or "disk is full" not in err:
                        faults["wrong codes"] = f"{code}: {err[-300:]}"
                    if left := [path.name for path in folder.rglob(f"{TEMPORARY}*")]:
                        faults["stale"] = str(left)
                    add(f"{work}, a disk of {size} KB", faults)
            except OSError as error:
                print(f"disks: not tried: {error}")
                return


def attack_pairs(good: Path, seed: int, count: int, add: Add) -> None:
    """Two processes in one folder."""
    folder = good.parent / "pairs"
    words = prepare(folder, good, "generate")
    words[words.index("-n") + 1] = "200"
    both = [start(folder, *words) for _ in range(2)]
    for process in both:
        process.join(300)
    files = finished_files(folder / "made")
    faults = partials(files)
    if len(files) != 400 or any(process.exitcode for process in both):
        faults["lost"] = f"{len(files)} of 400 pictures, {[process.exitcode for process in both]}"
    add("generate 2 x 200", faults)
    for work in ("train", "compare"):
        words = prepare(folder, good, work)
        first = start(folder, *words)
        while not list((folder / "made").glob("*.json*")) and not list((folder / "made").glob("cells/*")):
            first.join(0.01)
        second, err = finish(folder, *words, "--resume")
        faults = {}
        if second != 6 or f"process {first.pid} on {socket.gethostname()}, since" not in err:
            faults["wrong codes"] = f"{second}: {err}"
        third, err = finish(folder, *words, "--resume", "--wait")
        first.join(300)
        if (first.exitcode, third) != (0, 0) or "another process" not in err:
            faults["lost"] = f"{first.exitcode}, {third}: {err}"
        add(f"{work}, the second is refused, the third waits", faults)


def attack_signals(good: Path, seed: int, count: int, add: Add) -> None:
    """Signals at random moments: the exit code, and no second one is needed."""
    choose = random.Random(seed)
    folder = good.parent / "signals"
    for number in range(count):
        sent = choose.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        work = choose.choice(("generate", "train", "compare"))
        words = prepare(folder, good, work)
        endless = {"generate": ("-n", "9999"), "train": ("--steps", "1000000"), "compare": ("--seeds", "0-499")}
        process = start(folder, *words, *endless[work])
        process.join(0.3 + choose.random())
        assert process.pid is not None
        os.kill(process.pid, sent)
        begin = time.monotonic()
        process.join(60)
        faults = partials(finished_files(folder / "made"))
        if process.exitcode != 128 + sent:
            faults["wrong codes"] = f"{process.exitcode}: {(folder / 'err').read_text()[-300:]}"
        if time.monotonic() - begin > 20:
            faults["over time"] = f"{time.monotonic() - begin:.1f} s"
        process.kill()
        add(f"{work}, {sent.name}, number {number}", faults)


def attack_pixels(good: Path, seed: int, count: int, add: Add) -> None:
    """The same request by every way: equal bits."""
    import diffgen

    folder = good.parent / "pixels"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    options = ["--steps", "2", "--scheduler", "dpmpp_2m", "-m", f"{good}/model", "-q"]

    def pixels(pattern: str) -> list[bytes]:
        return [Image.open(path).tobytes() for path in sorted(folder.glob(pattern))]

    generator = diffgen.load(f"{good}/model", device="cpu")
    settings: Any = {"steps": 2, "scheduler": "dpmpp_2m"}
    expected = [generator.generate("a", seed=number, **settings)[0].tobytes() for number in (3, 4, 5)]

    def check(what: str, got: list[bytes], wanted: list[bytes]) -> None:
        add(what, {} if got == wanted else {"differing": f"{len(got)} pictures"})

    finish(folder, "generate", "a", "-n", "3", "--seed", "3", "-o", "count/", *options)
    check("-n 3", pixels("count/*.png"), expected)
    for number in (5, 3, 4):
        finish(folder, "generate", "a", "--seed", str(number), "-o", "order/{seed}.png", *options)
    check("each alone, in another order", pixels("order/*.png"), expected)
    finish(folder, "generate", "a", "--seeds", "5,3,4", "-o", "seeds/{seed}.png", *options)
    check("--seeds in another order", pixels("seeds/*.png"), expected)
    (folder / "p.jsonl").write_text("".join(f'{{"prompt": "a", "seed": {n}}}\n' for n in (4, 5, 3)))
    finish(folder, "generate", "--prompt-file", "p.jsonl", "-o", "file/{seed}.png", *options)
    check("prompt file", pixels("file/*.png"), expected)
    lines = "".join(f"a --seed {n} -o shell/{{seed}}.png\n" for n in (5, 4, 3))
    words = [sys.executable, "-m", "diffgen", "shell", "-m", f"{good}/model", "-q"]
    settings_lines = ":set steps 2\n:set scheduler dpmpp_2m\n"
    subprocess.run(words, cwd=folder, input=settings_lines + lines, text=True, capture_output=True, check=False)
    check("shell", pixels("shell/*.png"), expected)
    finish(folder, "batch", "plan", "p.jsonl", "-o", "batch", *options)
    finish(folder, "batch", "run", "batch", "--part", "0/1", "-q")
    check("batch", sorted(pixels("batch/*/*.png")), sorted(expected))
    together = [image.tobytes() for image in generator.generate("a", seed=3, count=3, batch_size=3, **settings)]
    apart = [abs(x - y) for one, other in zip(together, expected, strict=True) for x, y in zip(one, other, strict=True)]
    add("batch of 3, next to alone", {} if max(apart) <= 1 else {"differing": f"by {max(apart)}"})
    for number in (3, 4, 5):
        (image,) = generator.generate("a", seed=number, batch_size=3, **settings)
        check(f"in a batch of 3 that is not full, seed {number}", [image.tobytes()], [together[number - 3]])
    image, *_ = generator.generate("a", seeds="5,3", batch_size=3, **settings)
    check("another place in the batch", [image.tobytes()], [together[2]])
    server = [sys.executable, "-m", "diffgen", "serve", "--port", "0", "-m", f"{good}/model", "-o", "gallery", "-q"]
    process = subprocess.Popen(server, cwd=folder, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        words = ["generate", "a", "--server", url, "-n", "3", "--seed", "3", "-o", "served/", *options]
        words[words.index("-m") : words.index("-m") + 2] = []
        finish(folder, *words)
        check("server", pixels("served/*.png"), expected)
    finally:
        process.terminate()
        process.wait(30)


def attack_privacy(good: Path, seed: int, count: int, add: Add) -> None:
    """Work below a home of an odd name, and look for it, for the host and the user in everything that is written."""
    home = good.parent / "h0me-of-Zoë"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    shutil.copytree(good, home / "good")
    environment = {"HOME": str(home), "USER": "zoë-secret", "LOGNAME": "zoë-secret", "HF_TOKEN": "hf_secret"}
    words = {work: prepare(home / work, home / "good", work) for work in WORK}
    words["evaluate"] = [
        "evaluate",
        f"{home}/train/made",
        "--data",
        f"{home}/good/data",
        "-o",
        f"{home}/evaluate/made.json",
    ]
    for work, line in words.items():
        folder = home / work
        folder.mkdir(exist_ok=True)
        line = [f"{folder}/made" if word == "made" else word for word in line]
        code, err = finish(folder, *line, environment=environment)
        faults = {} if code == 0 else {"wrong codes": f"{code}: {err}"}
        secrets, host = [home.name, "zoë-secret", "hf_secret"], socket.gethostname()
        if len(host) > 5:  # a shorter one is in every random file
            secrets.append(host)
        for path in (path for path in folder.rglob("*") if path.is_file() and path.name not in ("err", "out", "p.txt")):
            data = path.read_bytes()
            for secret in secrets:
                forms = {secret.encode(), json.dumps(secret)[1:-1].encode()}
                if secret in path.name or any(form in data for form in forms):
                    faults["leaks"] = f"{path.relative_to(folder)}: {secret}"
        add(work, faults)


PARTS = {
    "kills": attack_kills,
    "disks": attack_disks,
    "pairs": attack_pairs,
    "signals": attack_signals,
    "pixels": attack_pixels,
    "privacy": attack_privacy,
}
