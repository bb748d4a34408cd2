"""The command `shell`: its lines, the loaded model, and signals, in processes of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import diffgen
from diffgen.cli import loaded
from diffgen.cli.output import Output
from diffgen.cli.shell import Session
from diffgen.errors import UsageError
from diffgen.models.find import find

ROOT = Path(__file__).parent.parent


# The lines


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a red apple", ["a red apple"]),
        ("a red apple --steps 10 -n 2", ["a red apple", "--steps", "10", "-n", "2"]),
        ("a cat's t-shirt - blue", ["a cat's t-shirt - blue"]),
        ('"a red apple" "a cat" -n 2', ["a red apple", "a cat", "-n", "2"]),
        ("'a \"b\"'", ['a "b"']),
        ('a "big" cat -o "my pictures/"', ['a "big" cat', "-o", "my pictures/"]),
        ("--prompt-file x.txt", ["--prompt-file", "x.txt"]),
        ("{a|b}, (c:1.2)\\, -d", ["{a|b}, (c:1.2)\\,", "-d"]),
    ],
)
def test_a_line_is_a_prompt_and_options(line: str, words: list[str]) -> None:
    assert Session(Output("shell"), []).words(line) == ["generate", *words]


def test_lines_that_cannot_be_read() -> None:
    session = Session(Output("shell"), [])
    for line, word in (('a --negative "b', "quotes"), ("'", "quotes"), ('"-"', "prompt-file")):
        with pytest.raises(UsageError) as error:
            session.words(line)
        assert word in error.value.hint


def test_set_options_come_before_the_line() -> None:
    session = Session(Output("shell"), ["--offline"])
    session.command("set", "steps 10")
    session.command("set", "-m some folder")
    session.command("set", "vae-tiling")
    session.command("set", "n 3")
    assert session.words("a --steps 3") == [
        *("generate", "--steps", "10", "--model", "some folder", "--vae-tiling", "--count", "3"),
        *("--offline", "a", "--steps", "3"),
    ]
    session.command("set", "vae_tiling off")
    session.command("unset", "model")
    session.command("unset", "count")
    assert session.words("a") == ["generate", "--steps", "10", "--offline", "a"]
    for key in ("nothing 3", "steps", "tile maybe", "json on"):
        with pytest.raises(UsageError):
            session.command("set", key)


def test_the_model_stays_loaded(tiny: Path) -> None:
    model = find(str(tiny))
    with loaded.keeping():
        first = loaded.load(model, "cpu", "float32", "none", "none")
        assert loaded.load(find(str(tiny)), "cpu", "float32", "none", "none") is first
        other = loaded.load(model, "cpu", "bfloat16", "none", "none")
        assert other is not first
        assert loaded.load(model, "cpu", "float32", "none", "none") is not first  # only one is kept
    assert loaded.load(model, "cpu", "float32", "none", "none") is not loaded.load(
        model, "cpu", "float32", "none", "none"
    )


# Processes


class Shell:
    """`diffgen shell` in its own process, in `folder`, forked from a process that has the imports.

    Its output goes to files. Its stdin is a pipe, or the terminal with this name.
    """

    def __init__(self, folder: Path, *args: str, terminal: str | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["diffgen.pipelines.generate", "diffgen.cli.app"])
        self.io = Path(tempfile.mkdtemp())
        os.mkfifo(self.io / "in")
        self.process = context.Process(target=shell_process, args=(list(args), str(folder), str(self.io), terminal))
        self.process.start()
        self.stdin = None if terminal else open(self.io / "in", "w", buffering=1)  # noqa: SIM115

    def write(self, text: str) -> None:
        assert self.stdin is not None
        self.stdin.write(text)

    def end(self) -> int:
        """End the input and return the exit code."""
        if self.stdin is not None:
            self.stdin.close()
        self.process.join(60)
        assert self.process.exitcode is not None, self.err
        return self.process.exitcode

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def out(self) -> str:
        return (self.io / "out").read_text() if (self.io / "out").exists() else ""

    @property
    def err(self) -> str:
        return (self.io / "err").read_text() if (self.io / "err").exists() else ""

    def wait(self, until: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, self.err
            time.sleep(0.02)

    def wait_for(self, text: str) -> None:
        self.wait(lambda: text in self.err)


def shell_process(args: list[str], folder: str, io: str, terminal: str | None) -> None:  # in the new process
    os.chdir(folder)
    os.environ.update(HOME=folder, OMP_NUM_THREADS="1", TERM="dumb")
    os.environ.pop("XDG_CONFIG_HOME", None)
    os.dup2(os.open(terminal or f"{io}/in", os.O_RDONLY if terminal is None else os.O_RDWR), 0)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{io}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if terminal:
        os.dup2(0, 1)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["diffgen", "shell", *args]
    from diffgen.cli import main

    main()


def test_a_script(tmp_path: Path) -> None:
    lines = ("# two", "a red apple --seed 7 --steps 2", "", ":set steps 3", "a cat -o cats/ --seed 1", "a --steps 0",
             ":nope", ":quit", "never")  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "diffgen", "shell", "-o", "made/"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2  # of the last line that failed
    assert process.stdout.splitlines() == ["made/000001-7-a-red-apple.png", "cats/000001-1-a-cat.png"]
    assert process.stderr.count("error: ") == 2
    assert "error: --steps must be" in process.stderr
    assert "error: there is no :nope" in process.stderr
    image = diffgen.load("emoji", device="cpu").generate("a red apple", seed=7, steps=2)[0]
    with Image.open(tmp_path / process.stdout.split()[0]) as picture:
        assert picture.tobytes() == image.tobytes()
        assert json.loads(picture.info["diffgen"])["steps"] == 2
    assert sorted(os.listdir(tmp_path)) == ["cats", "made"]  # no history


def test_one_document(tmp_path: Path) -> None:
    shell = Shell(tmp_path, "--json", "-q")
    shell.write("a red apple --seed 7 --steps 2 -o x.png\na -o x.png\n:model nothing\n")
    assert shell.end() == 3
    document = json.loads(shell.out)
    assert (document["ok"], document["command"], document["error"]["code"]) == (False, "shell", 3)
    first, second, third = document["result"]["lines"]
    assert first["result"]["images"][0]["path"] == "x.png"
    assert (second["ok"], second["error"]["code"]) == (False, 6)
    assert (third["line"], third["ok"]) == (":model nothing", False)


def test_one_document_without_lines(diffgen_: Callable[..., tuple[int, str, str]], tiny: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
        code, out, err = diffgen_("shell", "--json", "-q", "-m", tiny)
        assert (code, err) == (0, "")
        assert json.loads(out)["result"] == {"lines": []}
        code, out, _ = diffgen_("shell", "--json", "-m", "nothing")
        assert (code, json.loads(out)["error"]["code"]) == (3, 3)


def test_a_signal_stops_the_picture_and_not_the_shell(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.wait_for("is loaded")
    shell.write("a cat --steps 1000 -o never.png --seed 1\n")
    shell.wait_for("1000 steps")
    time.sleep(0.5)
    shell.signal(signal.SIGINT)
    shell.wait_for("error: interrupted")
    shell.write("a cat --steps 2 -o cat.png --seed 1\n")
    shell.wait((tmp_path / "cat.png").exists)
    shell.write("a cat --steps 1000 -o never.png --seed 2\n")
    shell.wait_for("seed 2")
    shell.signal(signal.SIGINT)
    shell.wait(lambda: shell.err.count("error: interrupted") == 2)
    assert shell.end() == 130
    assert os.listdir(tmp_path) == ["cat.png"]


def test_sigterm_ends_the_shell(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.wait_for("is loaded")
    shell.write("a cat --steps 1000 -o never.png\n")
    shell.wait_for("1000 steps")
    shell.signal(signal.SIGTERM)
    shell.process.join(60)
    assert shell.process.exitcode == 143
    assert os.listdir(tmp_path) == []


def read_until(terminal: int, text: bytes) -> None:
    """Read what is printed on a terminal until it has this text."""
    output = b""
    while text not in output:
        assert select.select([terminal], [], [], 60)[0], output
        output += os.read(terminal, 4096)


def test_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C at the prompt drops the line, Ctrl-D quits; only the picture is written."""
    leader, follower = pty.openpty()
    shell = Shell(tmp_path, terminal=os.ttyname(follower))
    shell.wait_for("is loaded")
    os.close(follower)
    read_until(leader, b"diffgen> ")
    os.write(leader, b"half a li")
    read_until(leader, b"half a li")
    shell.signal(signal.SIGINT)
    read_until(leader, b"diffgen> ")
    os.write(leader, b"a cat --steps 2 -o cat.png\n")
    shell.wait((tmp_path / "cat.png").exists)
    os.write(leader, b":help\n")
    shell.wait_for(":unset")
    os.write(leader, b"\x04")
    assert shell.end() == 0
    os.close(leader)
    with Image.open(tmp_path / "cat.png") as image:
        assert json.loads(image.info["diffgen"])["prompt"] == "a cat"
    assert os.listdir(tmp_path) == ["cat.png"]
