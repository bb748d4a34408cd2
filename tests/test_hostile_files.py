"""Files from somebody else: no program starts, no path is followed, every error is short and has its exit code."""

from __future__ import annotations

import ast
import json
import math
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import KINDS, Kind, corpus, good_files, read_fault, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training_runs import write_config

import diffgen
from diffgen.comparison.compare import without_folders
from diffgen.environment import outdated
from diffgen.errors import CannotWrite, InputError, UsageError, shortened
from diffgen.images.lock import locked
from diffgen.images.metadata import encode_png
from diffgen.images.publish import LOCK, publish, sweep
from diffgen.images.read import MAX_CHUNK, MAX_CHUNKS, read_image, read_kind, read_texts
from diffgen.prompts.styles import Style, apply_styles

Command = Callable[..., tuple[int, str, str]]
COMPARE = ("compare", "a red apple", "--schedulers", "euler", "--nfe", "2", "--seeds", "0", "--reference", "euler:4")


def refused(result: tuple[int, str, str], code: int = 3) -> str:
    """The error of a command that ended with this code, which is short and names no Python error."""
    exit_code, out, err = result
    assert (exit_code, out) == (code, ""), err
    assert len(err) <= 2000
    assert len(err.splitlines()) <= 3
    for name in ("Traceback", "Error:", "Exception", "--debug"):
        assert name not in err
    return err


# The corpus

HOST = "h0st-of-zoe"


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A good file of each kind, made below a home of an odd name; not to be changed."""
    home = tmp_path_factory.mktemp("h0me-of-Zoë")
    (folder := home / "good").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr(socket, "gethostname", lambda: HOST)
        patch.setattr(platform, "node", lambda: HOST)
        patch.setenv("DIFFGEN_MODELS", str(folder / "models.toml"))
        good_files(folder, tiny)
        yield folder


@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda number: KINDS[number].name)
def test_no_hostile_file_of_a_kind_does_harm(good: Path, number: int) -> None:
    """A third of the corpus, in turn; `benchmarks/attack.py` has all of it, and bounds of time and memory."""
    kind = KINDS[number]
    usual = watched(kind.command, good)
    assert usual.faults(kind.codes, math.inf, sys.maxsize) == {}
    for case in [*corpus(good, 1, 3, (kind,))][number % 3 :: 3]:
        with case.in_place(good):
            faults = watched(case.command, good).faults(kind.codes, math.inf, sys.maxsize)
        assert faults == {}, case.name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_reader_raises_nothing_but_our_errors(good: Path, kind: Kind) -> None:
    content = (good / kind.file).read_bytes()

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32))
    def read(seed: int) -> None:
        assert read_fault(kind, good, content, seed).keys() <= {"over time"}

    read()


def test_what_is_passed_on_names_no_user_and_no_machine(good: Path) -> None:
    """Runs, comparisons, batches, pictures: made below that home, they do not name it."""
    names = [b"h0me-of", HOST.encode()]
    files = [path for name in ("run", "c", "batch", "x.png") for path in [good / name, *(good / name).rglob("*")]]
    assert len(files) > 30
    for path in files:
        content = path.read_bytes() if path.is_file() else b""
        assert not [name for name in names if name in content or name in os.fsencode(path.relative_to(good))], path


# Comparisons


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "c"
    diffgen.compare("a red apple", schedulers="euler", nfe=2, seeds="0", reference="euler:4", out=folder)
    return folder


def test_a_cell_of_a_comparison_cannot_start_a_program(compared: Path, tmp_path: Path, diffgen_: Command,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Pillow would give an EPS to Ghostscript: the file is not opened as one, and the record's name is not followed."""
    shutil.copytree(compared, "c")
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    Path("evil.eps").write_bytes(eps)
    for file in Path("c/cells").glob("*.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"image": "../evil.eps"}))
    assert diffgen_(*COMPARE, "-o", "c", "--resume")[0] == 0
    names = {cell["image"] for cell in json.loads(Path("c/results.json").read_text())["cells"]}
    assert all(name.startswith("images/") and name.endswith(".png") for name in names)
    for file in Path("c/images").iterdir():
        file.write_bytes(eps + b"IEND\xaeB`\x82")  # ends as a complete PNG does
    assert "images/" in refused(diffgen_(*COMPARE, "-o", "c", "--resume", "-q"))
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": "x"},
        {"nfe": -1},
        {"network_calls": [1]},
        {"peak_memory": 1e99},
        {"pixels_sha256": 5},
        {"seed": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_cell_with_an_impossible_record_is_made_again(compared: Path, diffgen_: Command, change: Any) -> None:
    shutil.copytree(compared, "c")
    before = json.loads(Path("c/results.json").read_text())["cells"][0]
    file = Path("c/cells") / f"{before['key']}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert diffgen_(*COMPARE, "-o", "c", "--resume")[0] == 0
    after = json.loads(Path("c/results.json").read_text())["cells"][0]
    assert (after["pixels_sha256"], after["nfe"]) == (before["pixels_sha256"], before["nfe"])


def test_a_cell_with_another_result_is_made_again_or_refused(compared: Path, diffgen_: Command) -> None:
    shutil.copytree(compared, "c")
    key = json.loads(Path("c/results.json").read_text())["cells"][0]["key"]
    file = f"c/cells/{key}.safetensors"
    x0 = load_file(file)["x0"]
    save_file({"x0": torch.zeros(3)}, file)
    assert diffgen_(*COMPARE, "-o", "c", "--resume")[0] == 0
    assert torch.equal(load_file(file)["x0"], x0)
    save_file({"x0": x0 * torch.nan}, file)
    assert "not finite" in refused(diffgen_(*COMPARE, "-o", "c", "--resume", "-q"))


def test_a_comparison_names_no_folder_of_the_user(compared: Path) -> None:
    content = (compared / "results.json").read_text() + (compared / "report.html").read_text()
    assert str(compared.parent) not in content
    assert "-o c" in content


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "/home/ann/x.safetensors"], ["-m", "x.safetensors"]),
        (["-o/home/ann/c"], ["-oc"]),
        (["--model=~/m", "--out", "here/c"], ["--model=m", "--out", "here/c"]),
        (["--grids", "/g/a.json,karras"], ["--grids", "a.json,karras"]),
        (["/imagine a cat", "--", "-o", "/x"], ["/imagine a cat", "--", "-o", "x"]),
    ],
)
def test_words_of_a_command_without_folders(words: list[str], expected: list[str]) -> None:
    assert without_folders(words) == expected


def test_two_comparisons_in_one_folder(tmp_path: Path, diffgen_: Command) -> None:
    with locked(tmp_path / "c", "comparing"):
        command = [sys.executable, "-m", "diffgen", *COMPARE, "-o", str(tmp_path / "c"), "--resume"]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 6
    assert f"another process is comparing in {tmp_path}/c: process {os.getpid()} on {socket.gethostname()}, since " in (
        second.stderr
    )
    assert (tmp_path / "c/.lock").read_bytes() == b""  # no host is named when nobody holds it


# Pictures


def png_header(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize(("width", "height"), [(1, 67_108_864), (67_108_864, 1), (2**15 + 1, 2)])
def test_a_picture_with_a_very_long_side_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_header(width, height, (b"IDAT", zlib.compress(b"\0\0"))))
    for read in (read_image, read_kind):
        with pytest.raises(InputError, match="too large"):
            read(path)


def test_texts_are_read_without_the_pixels(tmp_path: Path) -> None:
    """Before and behind the pixels, of which there are too few; a chunk that would cost memory is refused."""
    path = tmp_path / "x.png"
    late = (b"IDAT", b"no pixels"), (b"tEXt", b"b\0" + b"late"), (b"IEND", b"")
    path.write_bytes(png_header(8192, 8192, (b"tEXt", b"a\0early"), *late))
    assert read_texts(path) == {"a": "early", "b": "late"}
    with pytest.raises(InputError, match="truncated or broken"):
        read_image(path)
    path.write_bytes(png_header(8, 8, (b"tEXt", b"a\0" + bytes(MAX_CHUNK)), *late))
    with pytest.raises(InputError, match="at most 8388608"):
        read_texts(path)
    path.write_bytes(png_header(8, 8, *[(b"tEXt", b"a\0")] * MAX_CHUNKS, *late))
    with pytest.raises(InputError, match="more than 100000 chunks"):
        read_texts(path)


def test_a_record_of_a_larger_picture_is_not_obeyed(tiny: Path, tmp_path: Path, diffgen_: Command) -> None:
    (image,) = diffgen.load(str(tiny), device="cpu").generate("a", seed=1, steps=1)
    record = json.loads(image.info["diffgen"])
    Path("x.png").write_bytes(encode_png(image, record | {"width": 8192, "height": 8192}))
    began = time.process_time()
    assert "its record says 8192x8192" in refused(diffgen_("reproduce", "x.png", "-m", tiny))
    assert time.process_time() - began < 5


def test_a_record_of_very_many_threads_takes_a_few(tiny: Path, diffgen_: Command) -> None:
    (image,) = diffgen.load(str(tiny), device="cpu").generate("a", seed=1, steps=1)
    Path("x.png").write_bytes(encode_png(image, json.loads(image.info["diffgen"]) | {"threads": 100_000}))
    before = torch.get_num_threads()
    try:
        diffgen_("reproduce", "x.png", "-m", tiny)
        assert torch.get_num_threads() <= 4 * (os.cpu_count() or 1)
    finally:
        torch.set_num_threads(before)


# Values that are wrong


@pytest.mark.parametrize("merges", [[5], [None], ["a b c"], [["a"]]])
def test_a_tokenizer_with_wrong_merges(tiny: Path, diffgen_: Command, merges: Any) -> None:
    shutil.copytree(tiny, "m")
    folder = Path("m/tokenizer")
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}))
    assert "merge" in refused(diffgen_("generate", "a", "-m", "m", "-q"))


@pytest.mark.parametrize(
    ("key", "value"), [("scaling_factor", "nan"), ("shift_factor", "x"), ("latents_mean", "x"), ("latents_std", [None])]
)
def test_an_autoencoder_whose_factors_are_no_numbers(tiny: Path, diffgen_: Command, key: str, value: Any) -> None:
    shutil.copytree(tiny, "m")
    path = Path("m/vae/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert key in refused(diffgen_("generate", "a", "-m", "m", "-q"))


@pytest.mark.parametrize(
    "values",
    [
        {"sigmas": 5},
        {"times": "x"},
        {"sigmas": [2.0, 1.0], "gains": [1e308, 1e308]},
        {"sigmas": [2.0, 1.0], "corrections": [[1e308], [-1e308]]},
    ],
)
def test_a_grid_with_impossible_numbers(diffgen_: Command, tiny: Path, values: dict[str, Any]) -> None:
    grid = {"schema": "diffgen.grid/1", "solver": "dpmpp_2m", "nfe": 2, **values}
    Path("g.json").write_text(json.dumps(grid))
    refused(diffgen_("generate", "a", "-m", tiny, "--grid", "g.json", "-q"))


def test_a_whole_number_of_any_length_where_a_number_is_meant(diffgen_: Command) -> None:
    Path("c.toml").write_text("[train]\nlearning_rate = " + "9" * 400)
    assert "train.learning_rate" in refused(diffgen_("train", "digits", "-o", "r", "--config", "c.toml", "-q"))
    info = {"sd-metadata": json.dumps({"model_weights": "x", "image": {"seed": 10**400, "steps": 10**400}})}
    Path("x.png").write_bytes(png_header(1, 1, *((b"tEXt", f"{k}\0{v}".encode()) for k, v in info.items()),
                                         (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")))  # fmt: skip
    code, _, err = diffgen_("inspect", "x.png")
    assert code in (0, 3)
    assert "OverflowError" not in err


def test_a_list_of_models_with_an_unknown_user(diffgen_: Command, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    Path("models.toml").write_text('x = "~nosuchuser/a"\n')
    monkeypatch.setenv("DIFFGEN_MODELS", str(Path("models.toml").resolve()))
    code, _, err = diffgen_("generate", "a", "-m", tiny, "--dry-run")
    assert code == 0, err


def test_a_run_with_weights_of_another_type(diffgen_: Command) -> None:
    assert diffgen_("train", "digits", "-o", "r", "--config", write_config(Path(), steps=2), "-q")[0] == 0
    checkpoint = max(Path("r/checkpoints").iterdir(), key=lambda folder: int(folder.name))
    from diffgen.training import run as runs

    for dtype in (torch.float64, torch.int64):
        path = checkpoint / "ema.safetensors"
        save_file({name: t.to(dtype) for name, t in load_file(path).items()}, path)
        with pytest.raises(InputError, match="weights of the type"):
            runs.load_network(runs.read_run("r"), checkpoint=checkpoint)


@pytest.mark.parametrize("content", [b"no json\n", b"\xff\xfe\n", b"5\n", b"{}\n"])
def test_a_log_that_is_no_log(tmp_path: Path, diffgen_: Command, content: bytes) -> None:
    train = ("train", "digits", "-o", "r", "--config", write_config(Path(), steps=20), "-q")
    assert diffgen_(*train)[0] == 0
    shutil.rmtree("r/checkpoints/20")
    path, size = Path("r/metrics.jsonl"), os.path.getsize("r/metrics.jsonl")
    path.write_bytes((content * size)[: size - 1] + b"\n")
    before = path.read_bytes()
    assert "metrics.jsonl" in refused(diffgen_(*train, "--resume"))
    assert path.read_bytes() == before


# Too much


def test_long_texts_are_cut_in_messages(diffgen_: Command) -> None:
    assert shortened("a" * 1400) == "a" * 1400
    assert len(InputError("b" * 10**6, "c" * 10**6).message) <= 1400
    Path("r").mkdir()
    Path("r/run.json").write_text(json.dumps({"schema": "x" * 1_000_000}))
    refused(diffgen_("generate", "-m", "r", "-q"))
    refused(diffgen_("generate", "a", "--scheduler", "\x1b" * 100_000), code=2)


def test_styles_that_multiply_a_prompt_are_refused() -> None:
    with pytest.raises(UsageError, match="with its styles"):
        apply_styles(["s"], "x" * 60_000, styles={"s": Style("s", "{prompt}" * 5000)})


def test_a_wildcards_file_of_very_many_lines_is_refused(diffgen_: Command) -> None:
    Path("wildcards").mkdir()
    Path("wildcards/a.txt").write_text("b\n" * 300_000)
    assert "lines" in refused(diffgen_("generate", "__a__", "--dry-run"))


def test_a_command_makes_at_most_so_many_pictures(diffgen_: Command) -> None:
    Path("p.txt").write_text("a\n" * 60_000)
    assert "number of pictures" in refused(diffgen_("generate", "--prompt-file", "p.txt", "-n", "2", "--dry-run"), 2)


def test_a_graph_in_which_everything_is_linked_is_read_at_once(diffgen_: Command) -> None:
    nodes = {str(i): {"class_type": "X", "inputs": {f"a{k}": [str(j), 0] for k, j in enumerate(range(i + 1, 800, 7))}}
             for i in range(800)}  # fmt: skip
    nodes |= {f"s{k}": {"class_type": "SaveImage", "inputs": {"images": ["0", 0]}} for k in range(20)}
    Path("x.png").write_bytes(png_header(1, 1, (b"tEXt", b"prompt\0" + json.dumps(nodes).encode()),
                                         (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")))  # fmt: skip
    began = time.process_time()
    diffgen_("inspect", "x.png")
    assert time.process_time() - began < 2


def test_a_configuration_that_is_a_pipe_is_not_waited_for(diffgen_: Command) -> None:
    os.mkfifo("c.toml")
    assert "not a regular file" in refused(diffgen_("train", "digits", "-o", "r", "--config", "c.toml", "-q"))


def test_a_size_far_from_the_models_own_is_warned_of_with_an_estimate(diffgen_: Command, tiny: Path) -> None:
    """The tiny model was made for 32x32: 16 times the pixels take 16 to 256 times as long."""
    command = ("generate", "a", "-m", tiny, "--dry-run", "--size")
    assert "16 times the pixels of 32x32" in (err := diffgen_(*command, "128")[2])
    assert "16 to 256 times as long" in err
    assert "far from 32x32" in diffgen_(*command, "8")[2]
    assert "32x32" not in diffgen_(*command, "64")[2].replace("64x64", "")


def test_a_package_with_known_holes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "pillow-9.0.0.dist-info").mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 9.0.0\n")
    assert outdated() == []
    monkeypatch.syspath_prepend(tmp_path)
    (warning,) = outdated()
    assert warning.startswith("pillow 9.0.0 has known holes")
    assert "pip install 'pillow>=12" in warning


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's limits")
def test_out_of_address_space(tiny: Path, tmp_path: Path) -> None:
    """While the libraries are loaded, long before there is a model.

    OpenBLAS, which SciPy has, would try for ever to get its memory: it is loaded before the limit is set.
    """
    code = f"""
import resource, sys
import scipy.linalg
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 150 * 2**20,) * 2)
import diffgen.cli
sys.argv[1:] = ["generate", "a", "-m", {str(tiny)!r}]
diffgen.cli.main()
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert (process.returncode, process.stdout) == (4, ""), process.stderr
    assert "error: out of memory; make something smaller, raise the limit (ulimit -v)" in process.stderr
    assert os.listdir(tmp_path) == []


def test_a_path_of_very_many_folders(diffgen_: Command, tiny: Path) -> None:
    refused(diffgen_("generate", "a", "-m", tiny, "-q", "-o", "a/" * 2000 + "x.png", "--steps", "1"), code=6)


def test_a_model_that_cannot_be_read(diffgen_: Command) -> None:
    refused(diffgen_("generate", "a", "-m", "/proc/self/mem", "-q"))


# What killed processes leave


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """A file that a living process writes stays; so do folders and files of other names."""
    left, young, other, folder = (tmp_path / name for name in (".diffgen-1", ".diffgen-2", ".other", ".diffgen-3"))
    for file in (left, young, other):
        file.write_bytes(b"half")
    folder.mkdir()
    for path in (left, other, folder):
        os.utime(path, (1, 1))
    os.utime(young, (2**32, 2**32))  # young, however long this test takes
    code = f"""
import fcntl, os, sys, time
file = open({str(tmp_path / ".diffgen-4")!r}, "wb")
fcntl.flock(file, fcntl.LOCK_EX)
os.utime(file.name, (1, 1))
print("ready", flush=True)
time.sleep(60)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        publish(tmp_path / "x.png", b"whole")
        assert sorted(os.listdir(tmp_path)) == [".diffgen-2", ".diffgen-3", ".diffgen-4", ".other", "x.png"]
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/mounts").exists(), reason="needs /proc")
def test_tune_begins_only_if_it_can_write(diffgen_: Command, tmp_path: Path) -> None:
    """/proc takes no new file from anybody, root included."""
    command = ("tune", "-m", "mixture", "--scheduler", "dpmpp_2m", "--nfe", "3", "-q")
    began = time.process_time()
    refused(diffgen_(*command, "-o", "/proc/g.json"), code=6)
    refused(diffgen_("schedulers", "plot", "-o", "/proc/g.png"), code=6)
    refused(diffgen_("models", "export", "emoji", "-o", "/proc/m"), code=6)
    refused(diffgen_("models", "export", "emoji", "m", "-o", "m"), code=2)
    assert time.process_time() - began < 2


def test_a_lock_is_free_after_its_holder_was_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from diffgen.images.lock import locked
with locked(Path({str(tmp_path)!r}), "training"):
    print("ready", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with (
            pytest.raises(CannotWrite, match=f"training in .*: process {holder.pid} on "),
            locked(tmp_path, "training"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path, "training"):
        assert stat.S_ISREG((tmp_path / ".lock").stat().st_mode)


def test_a_process_can_wait_for_another(tmp_path: Path) -> None:
    first, messages = locked(tmp_path, "training"), []
    first.__enter__()

    def waiting(message: str) -> None:
        messages.append(message)
        if len(messages) == 2:
            first.__exit__(None, None, None)

    with locked(tmp_path, "training", waiting):
        assert messages == [messages[0]] * 2
        assert f"process {os.getpid()} on" in messages[0]
        with pytest.raises(CannotWrite, match="another process is training"), locked(tmp_path, "training"):
            pass


def test_a_folder_is_swept_if_nobody_holds_its_lock(tmp_path: Path) -> None:
    left, living, other = (tmp_path / name for name in (".diffgen-left", ".diffgen-living", ".diffgen-other"))
    other.mkdir()  # no lock in it: it belongs to something that is locked as a whole
    with locked(living, "writing"):
        with locked(left, "writing"):
            (left / "half").write_bytes(b"x")
        for folder in (left, living):
            os.utime(folder / LOCK, (1, 1))
        sweep(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [living.name, other.name]


def test_a_run_names_no_machine(diffgen_: Command) -> None:
    assert diffgen_("train", "digits", "-o", "r", "--config", write_config(Path(), steps=2), "-q")[0] == 0
    for path in Path("r").rglob("*"):
        assert socket.gethostname() not in path.name
        if path.is_file():
            assert str(Path.home()).encode() not in path.read_bytes()


# (call or import, the only files that may have it)
DANGEROUS = (
    ("Image.open", {"images/read.py"}),  # by any format: some start programs
    ("torch.load", set()),
    ("pickle", {"serve/worker.py"}),  # the pipe to the worker, whose other end is this program's
    ("subprocess", {"batch/local.py"}),  # its own workers, and nvidia-smi
    ("os.system", set()),
    ("os.popen", set()),
    ("eval", set()),
    ("exec", set()),
)


def test_dangerous_calls_stand_in_one_place() -> None:
    """No code outside the named files opens a picture by any format, unpickles, starts programs, or runs a text."""
    root = Path(diffgen.__file__).parent
    for path in [*root.rglob("*.py"), *(root.parent / "schedulers").rglob("*.py")]:
        names = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                names.add(ast.unparse(node.func))
            elif isinstance(node, ast.Import):
                names |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
        for name, files in DANGEROUS:
            assert name not in names or path in {root / file for file in files}, f"{path} has {name}"
