"""A file with its final name is complete: existing names, full disks, kills, concurrent processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from diffgen.errors import CannotWrite
from diffgen.images import publish as module
from diffgen.images.publish import publish


def run(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_bytes_arrive_and_nothing_else_stays(tmp_path):
    data = os.urandom(100_000)
    publish(tmp_path / "a.png", data)
    assert (tmp_path / "a.png").read_bytes() == data
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_name_that_is_taken_is_refused_or_replaced(tmp_path):
    path = tmp_path / "a.png"
    publish(path, b"first")
    with pytest.raises(CannotWrite, match="exists"):
        publish(path, b"second")
    assert path.read_bytes() == b"first"
    publish(path, b"third", overwrite=True)
    assert path.read_bytes() == b"third"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("target", ["victim", "nowhere"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_is_not_followed(tmp_path, target, overwrite):
    (tmp_path / "victim").write_bytes(b"untouched")
    link = tmp_path / "a.png"
    link.symlink_to(target)
    if overwrite:
        publish(link, b"new", overwrite=True)
        assert not link.is_symlink()
        assert link.read_bytes() == b"new"
    else:
        with pytest.raises(CannotWrite, match="exists"):
            publish(link, b"new")
    assert (tmp_path / "victim").read_bytes() == b"untouched"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_is_that_of_a_file_made_by_open(tmp_path, umask):
    before = os.umask(umask)
    try:
        publish(tmp_path / "ours", b"")
        (tmp_path / "plain").write_bytes(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/a.png", "no such folder"), ("file/a.png", "a file, not a folder"), ("x" * 300, "too long")],
)
def test_refusals_are_in_words(tmp_path, name, reason):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CannotWrite, match=reason):
        publish(tmp_path / name, b"data")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_never_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    for overwrite in (False, True):
        with pytest.raises(CannotWrite):
            publish(tmp_path / "folder", b"data", overwrite=overwrite)
    assert os.listdir(tmp_path) == ["folder"]


FULL = """
import os, resource, sys
from pathlib import Path
from diffgen.errors import CannotWrite
from diffgen.images.publish import publish
folder, data = Path(sys.argv[1]), os.urandom(10_000)
(folder / "old").write_bytes(b"old")
for limit in range(0, 10_000, 500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for name, overwrite in (("new", False), ("old", True)):
        try:
            publish(folder / name, data, overwrite)
        except CannotWrite as error:
            assert "limit" in error.message, error.message
        else:
            raise AssertionError(f"written past {limit} bytes")
        assert os.listdir(folder) == ["old"], os.listdir(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
publish(folder / "new", data)
assert (folder / "new").read_bytes() == data
assert (folder / "old").read_bytes() == b"old"
"""


def test_no_room_at_any_byte_leaves_nothing_behind(tmp_path):
    assert run(FULL, tmp_path).wait(20) == 0


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "a.png", b"data")
    assert os.listdir(tmp_path) == []


def test_without_hard_links_names_are_still_not_replaced(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")  # what exFAT answers

    monkeypatch.setattr(os, "link", no_links)
    publish(tmp_path / "a.png", b"first")
    with pytest.raises(module.Exists):
        publish(tmp_path / "a.png", b"second")
    assert (tmp_path / "a.png").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.png"]


WRITER = """
import sys
from pathlib import Path
from diffgen.images.publish import publish
print("ready", flush=True)
for i in range(10**6):
    publish(Path(sys.argv[1]) / f"{i}", bytes([i % 256]) * 300_000)
"""


def test_a_kill_at_any_time_leaves_only_complete_files(tmp_path):
    for delay in (0.05, 0.11, 0.17):
        folder = tmp_path / str(delay)
        folder.mkdir()
        process = run(WRITER, folder)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        names = [name for name in os.listdir(folder) if not name.startswith(".diffgen-")]
        assert len(os.listdir(folder)) - len(names) <= 1
        for name in names:
            assert (folder / name).read_bytes() == bytes([int(name) % 256]) * 300_000


RACER = """
import sys
from pathlib import Path
from diffgen.images.publish import Exists, publish
print("ready", flush=True); sys.stdin.readline()
won = 0
for i in range(200):
    try:
        publish(Path(sys.argv[1]) / f"{i}", sys.argv[2].encode() * 1000)
        won += 1
    except Exists:
        pass
print(won)
"""


def test_of_two_processes_exactly_one_gets_each_name(tmp_path):
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [
        subprocess.Popen([*command, mark], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for mark in "ab"
    ]
    for racer in racers:
        racer.stdout.readline()
    won = [racer.communicate("go\n", timeout=20)[0] for racer in racers]
    contents = [(tmp_path / str(i)).read_bytes() for i in range(200)]
    assert [contents.count(mark * 1000) for mark in (b"a", b"b")] == [int(n) for n in won]
    assert len(os.listdir(tmp_path)) == 200
