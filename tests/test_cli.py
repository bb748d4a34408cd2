"""The command: its stdout, its exit codes, and the files that it leaves when it is stopped."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import diffgen
import schedulers
from diffgen.cli.commands import COMMANDS
from diffgen.generation.write import Inside, write_pictures
from diffgen.images.naming import Outputs
from diffgen.loading import count_pictures, make_plans, read_prompts
from diffgen.prompts.tokens import read_vocabulary

ROOT = Path(__file__).parent.parent
ESC = "\x1b"
Result = tuple[int, str, str]


def info(path: str | Path) -> dict[str, Any]:
    with Image.open(path) as image:
        image.load()
        return {key: value for key, value in image.info.items() if key != "xmp"}  # Pillow's own copy


def same_pixels(a: Image.Image, path: str | Path) -> bool:
    with Image.open(path) as b:
        return a.tobytes() == b.convert("RGB").tobytes()


# Pictures and results


def test_the_command_equals_load_and_generate(tiny: Path, tmp_path: Path) -> None:
    """In its own process, where the environment asks for colour: same pixels, same metadata, no colour codes."""
    options = ["--seed", "7", "-n", "2", "--scheduler", "DPM++ 2M Karras", "--steps", "4", "--guidance", "3", "--json"]
    process = subprocess.run(
        [sys.executable, "-m", "diffgen", "generate", "a red \x1b[31m apple", "-m", tiny, "-o", "made/", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "GITHUB_ACTIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert ESC not in process.stdout + process.stderr
    document = json.loads(process.stdout)
    assert (document["schema"], document["ok"], document["command"]) == ("diffgen.result/1", True, "generate")
    result = document["result"]
    assert (result["scheduler"], result["grid"], result["steps"], result["nfe"], result["model"]) == (
        "dpmpp_2m", "karras", 4, 4, "tiny",
    )  # fmt: skip
    images = diffgen.load(str(tiny)).generate(
        "a red \x1b[31m apple", count=2, seed=7, scheduler="dpmpp_2m", grid="karras", steps=4, guidance=3
    )
    for i, (entry, image) in enumerate(zip(result["images"], images, strict=True)):
        assert set(entry) == {"path", "prompt", "seed", "width", "height", "pixels_sha256"}
        assert (entry["seed"], entry["width"], entry["height"]) == (7 + i, 32, 32)
        assert not os.path.isabs(entry["path"])
        assert same_pixels(image, tmp_path / entry["path"])
        assert info(tmp_path / entry["path"]) == image.info
        assert json.loads(image.info["diffgen"])["pixels_sha256"] == entry["pixels_sha256"]
    assert sorted(os.listdir(tmp_path / "made")) == sorted(Path(entry["path"]).name for entry in result["images"])


def test_python_writes_what_the_command_writes(
    diffgen_: Callable[..., Result], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines with options, steps and attention maps give the same files and the same result."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red apple", "count": 2}\n{"prompt": "a blue apple"}\n')
    monkeypatch.chdir(tmp_path)
    options: Any = {"seed": 7, "steps": 2, "attention": ["apple"], "keep_steps": True}
    lines = read_prompts((), "prompts.jsonl")
    outputs = Outputs("ours/", count_pictures(lines, options))
    inside = Inside(outputs, "ours-steps", True, "ours-maps", False)
    generator = diffgen.load(str(tiny), device="cpu")
    ours = write_pictures(generator, make_plans(generator.model, lines, options), outputs, inside=inside)

    flags = ["--seed", 7, "--steps", 2, "--attention", "apple", "--save-steps", "theirs-steps"]
    flags += ["--attention-out", "theirs-maps", "--prompt-file", "prompts.jsonl", "-m", tiny, "-o", "theirs/"]
    code, out, err = diffgen_("generate", *flags, "--json")
    assert code == 0, err
    theirs = json.loads(out.replace("theirs", "ours"))["result"]
    mine = json.loads(json.dumps({**ours.as_json(), "inside": ours.inside}))
    assert len(mine["images"]) == 3
    assert {key: theirs[key] for key in mine if key != "seconds"} == {
        key: mine[key] for key in mine if key != "seconds"
    }
    for path in [file for folder in ("ours", "ours-steps", "ours-maps") for file in Path(folder).iterdir()]:
        assert path.read_bytes() == Path(str(path).replace("ours", "theirs", 1)).read_bytes()


def test_stdout_is_a_path_a_line_and_warnings_name_the_words(diffgen_: Callable[..., Result], tiny: Path) -> None:
    code, out, err = diffgen_("generate", "a red zebra", "a red apple", "-n", 2, "-m", tiny, "--seed", 5)
    assert code == 0
    paths = out.splitlines()
    assert paths == [
        f"outputs/{i:06}-{seed}-{prompt}.png"
        for i, (prompt, seed) in enumerate(
            [("a-red-zebra", 5), ("a-red-zebra", 6), ("a-red-apple", 5), ("a-red-apple", 6)], start=1
        )
    ]
    assert "warning: tiny never saw 'zebra'" in err
    assert err.count("warning") == 1
    assert "seed 5" in err
    assert json.loads(info(paths[0])["diffgen"])["warnings"]
    assert not json.loads(info(paths[2])["diffgen"])["warnings"]


def test_quiet_says_nothing(diffgen_: Callable[..., Result], tiny: Path) -> None:
    assert diffgen_("generate", "a red zebra", "-m", tiny, "-q", "-o", "x.png") == (0, "x.png\n", "")


def test_the_seed_is_random_printed_and_recorded(diffgen_: Callable[..., Result], tiny: Path) -> None:
    seeds = []
    for name in ("a.png", "b.png"):
        _, _, err = diffgen_("generate", "a", "-m", tiny, "-o", name)
        seed = json.loads(info(name)["diffgen"])["seed"]
        assert f"seed {seed}" in err
        seeds.append(seed)
    assert seeds[0] != seeds[1]


def test_several_to_one_file_are_numbered(diffgen_: Callable[..., Result], tiny: Path) -> None:
    assert diffgen_("generate", "a", "-m", tiny, "-o", "x.png", "-n", 3)[1].split() == ["x-1.png", "x-2.png", "x-3.png"]
    assert diffgen_("generate", "a", "-m", tiny, "-o", "{seed}.png", "--seed", 3)[1] == "3.png\n"


def test_prompts_come_from_files_and_stdin(
    diffgen_: Callable[..., Result], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("# two\nblue\n\ngreen\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"red\n")))
    _, out, _ = diffgen_("generate", "-", "--prompt-file", "prompts.txt", "-m", tiny, "--json", "--metadata", "none")
    images = json.loads(out)["result"]["images"]
    assert [image["prompt"] for image in images] == ["red", "blue", "green"]
    assert info(images[0]["path"]) == {}


def test_hidden_aliases_from_other_programs(diffgen_: Callable[..., Result], tiny: Path) -> None:
    _, out, _ = diffgen_("generate", "a", "-m", tiny, "--dry-run", "--json", "--cfg-scale", 4, "--sampler", "k_euler")
    result = json.loads(out)["result"]
    assert (result["guidance"], result["scheduler"]) == (4, "euler")


def test_a_dry_run_makes_nothing(diffgen_: Callable[..., Result], tiny: Path) -> None:
    code, out, _ = diffgen_("generate", "a", "b", "-n", 2, "--seed", 3, "-m", tiny, "--dry-run")
    assert (code, out) == (0, "3\ta\n4\ta\n3\tb\n4\tb\n")
    _, out, _ = diffgen_("generate", "a", "-m", tiny, "--dry-run", "--json", "-s", "64x48", "--steps", 9)
    result = json.loads(out)["result"]
    assert result["dry_run"] is True
    assert (result["steps"], result["images"][0]["width"], result["images"][0]["height"]) == (9, 64, 48)
    assert not Path("outputs").exists()


# Lists


def test_schedulers_list(diffgen_: Callable[..., Result]) -> None:
    _, out, _ = diffgen_("schedulers", "list", "--json")
    entries = json.loads(out)["result"]["schedulers"]
    assert [entry["name"] for entry in entries] == schedulers.names()
    keys = {"name", "aliases", "order", "evaluations_per_step", "stochastic", "native_only", "reference", "options"}
    assert all(set(entry) == keys for entry in entries)
    _, text, _ = diffgen_("schedulers", "list")
    assert all(name in text for name in schedulers.names() + schedulers.grid_names())


def test_models_info_and_list(diffgen_: Callable[..., Result], tiny: Path) -> None:
    _, out, _ = diffgen_("models", "info", tiny, "--json")
    result = json.loads(out)["result"]
    assert (result["family"], result["licence"], result["resolution"]) == ("sd1", "CC0-1.0", 32)
    assert result["concepts"] == ["red apple", "green circle", "piñata"]
    assert result["held_out"] == [["piñata", "flat"]]
    assert result["bytes"] == sum(path.stat().st_size for path in tiny.rglob("*") if path.is_file())
    _, text, _ = diffgen_("models", "info", tiny)
    assert "CC0-1.0" in text
    assert json.loads(diffgen_("models", "list", "--json")[1])["ok"] is True


def test_the_default_model_is_never_taken_from_the_current_folder(
    diffgen_: Callable[..., Result], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "emoji").symlink_to(tiny)
    monkeypatch.setattr("diffgen.models.find.BUNDLED", tmp_path / "bundle")
    Path("emoji").mkdir()
    Path("emoji/model_index.json").write_text("{}")
    assert json.loads(diffgen_("models", "info", "--json")[1])["result"]["bundled"] is True
    assert diffgen_("generate", "a", "--dry-run")[0] == 0
    assert diffgen.load().model.bundled
    assert "\\" not in diffgen_("generate", "-h")[1] + diffgen_("models", "info", "-h")[1]


def test_version_and_help(diffgen_: Callable[..., Result]) -> None:
    assert diffgen_("--version")[:2] == (0, f"diffgen {diffgen.__version__}\n")
    assert diffgen_()[:2] == diffgen_("-h")[:2]
    _, text, _ = diffgen_("generate", "-h")
    for option in (
        "--negative",
        "--prompt-file",
        "--size",
        "--grid",
        "--overwrite",
        "--dry-run",
        "--offline",
        "Examples",
    ):
        assert option in text
    assert "--cfg-scale" not in text


# Errors


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["generate", "a", "--steps", "0"], 2, "--steps"),
        (["generate", "a", "--steps", "many"], 2, "--steps"),
        (["generate", "a", "-n", "0"], 2, "--count"),
        (["generate", "a", "--seed", "-1"], 2, "--seed"),
        (["generate", "a", "--guidance", "nan"], 2, "--guidance"),
        (["generate", "a", "-s", "12by3"], 2, "--size"),
        (["generate", "a", "--scheduler", "eulr"], 2, "did you mean 'euler'"),
        (["generate", "a", "--grid", "karas"], 2, "did you mean 'karras'"),
        (["generate", "a", "--device", "toaster"], 2, "--device"),
        (["generate", "a", "--dtype", "int8"], 2, "--dtype"),
        (["generate", "a", "--metadata", "some"], 2, "--metadata"),
        (["generate", "a", "--stepz", "3"], 2, "--steps"),
        (["generate", ""], 2, "prompt is empty"),
        (["generate"], 2, "there is no prompt"),
        (["generate", "-"], 2, "stdin has no prompt"),
        (["generate", "--prompt-file", "nothing.txt"], 3, "nothing.txt"),
        (["generate", "--prompt-file", "latin1.txt"], 3, "latin1.txt, line 2"),
        (["generate", "a", "-o", "x.jpg"], 2, ".png"),
        (["generate", "a", "-o", "{sead}.png"], 2, "{sead}"),
        (["generate", "a", "-o", "there.png"], 6, "there.png"),
        (["generate", "a", "-o", "there.png/x.png"], 6, "there.png"),
        (["generate", "a", "-m", "nothing"], 3, "nothing"),
        (["generate", "a", "-m", "there.png"], 3, "there.png"),
        (["models", "info", "nothing"], 3, "nothing"),
        (["models", "nothing"], 2, "nothing"),
        (["nothing"], 2, "nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_or_one_document(
    diffgen_: Callable[..., Result], tiny: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, text: str
) -> None:
    Path("there.png").write_bytes(b"")
    Path("latin1.txt").write_bytes(b"a\n\xe9\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    if args[0] == "generate" and "-m" not in args:
        args = [*args, "-m", str(tiny)]
    exit_code, out, err = diffgen_(*args)
    assert (exit_code, out) == (code, "")
    assert re.fullmatch(r"error: .+\n", err), err
    assert text in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    exit_code, out, err = diffgen_(*args, "--json")
    document = json.loads(out)
    assert (exit_code, document["ok"], document["schema"]) == (code, False, "diffgen.result/1")
    assert document["error"]["code"] == code
    assert " ".join(args).startswith(document["command"])
    assert text in document["error"]["message"] + document["error"]["hint"]
    assert sorted(os.listdir()) == ["latin1.txt", "there.png"]


def test_a_missing_device_is_an_error(diffgen_: Callable[..., Result], tiny: Path) -> None:
    code, _, err = diffgen_("generate", "a", "-m", tiny, "--device", "cuda:99")
    assert code == 2
    assert "error: --device cuda:99: torch finds no such device" in err


def test_an_existing_file_is_replaced_only_with_overwrite(diffgen_: Callable[..., Result], tiny: Path) -> None:
    Path("x.png").write_bytes(b"mine")
    assert diffgen_("generate", "a", "-m", tiny, "-o", "x.png")[0] == 6
    assert Path("x.png").read_bytes() == b"mine"
    assert diffgen_("generate", "a", "-m", tiny, "-o", "x.png", "--overwrite")[0] == 0
    assert info("x.png")["diffgen"]


def test_a_partly_failed_batch_saves_the_rest_and_lists_the_failures(
    diffgen_: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    from test_generate import TEXT
    from tiny import changed

    token = read_vocabulary(tiny / "tokenizer")[0]["green</w>"]
    folder = changed(tiny, tmp_path / "bad", TEXT, lambda t: t["embeddings.token_embedding.weight"][token].fill_(3e38))
    code, out, err = diffgen_("generate", "red", "green", "-n", 2, "--seed", 1, "-m", folder, "-o", "made/", "--json")
    document = json.loads(out)
    assert (code, document["error"]["code"]) == (5, 5)
    assert [image["prompt"] for image in document["result"]["images"]] == ["red", "red"]
    assert [(entry["prompt"], entry["seed"]) for entry in document["result"]["failed"]] == [("green", 1), ("green", 2)]
    assert "2 of 4 pictures" in err
    assert "'green' (seed 2)" in err
    assert len(os.listdir("made")) == 2


def test_help_shows_no_type_for_flags(diffgen_: Callable[..., Result]) -> None:
    names = [[name, *inner] for name, row in COMMANDS.items() for inner in ([[n] for n in row.commands] or [[]])]
    for words in ([], ["models"], *names):
        code, out, _ = diffgen_(*words, "--help")
        assert code == 0
        assert "--help" in out
        assert "bool" not in out, words


@pytest.mark.parametrize(
    ("args", "help_of"),
    [
        (["nothing"], "diffgen"),
        (["models", "nothing"], "diffgen models"),
        (["models", "info", "--nothing"], "diffgen models info"),
        (["generate", "--steps", "many"], "diffgen generate"),
    ],
)
def test_a_usage_error_names_an_existing_help(diffgen_: Callable[..., Result], args: list[str], help_of: str) -> None:
    assert diffgen_(*args)[2].endswith(f"; see: {help_of} --help\n")
    assert diffgen_(*help_of.split()[1:], "--help")[0] == 0


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["a cat"], 'diffgen generate "a cat"'),
        (["a", "red", "apple", "--steps", "3"], 'diffgen generate "a red apple"'),
        (['a "big" cat', "-n", "2"], """diffgen generate 'a "big" cat'"""),
        (["nothing"], 'diffgen generate "nothing"'),
    ],
)
def test_a_prompt_without_a_command_gets_a_suggestion(
    diffgen_: Callable[..., Result], args: list[str], command: str
) -> None:
    code, _, err = diffgen_(*args)
    assert code == 2
    assert f"; to make a picture of it: {command}; see:" in err


def test_a_misspelt_command_gets_a_suggestion(diffgen_: Callable[..., Result]) -> None:
    for args in (["genrate", "a cat"], ["genrate"]):
        code, _, err = diffgen_(*args)
        assert code == 2
        assert "Did you mean 'generate'?" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_a_closed_pipe_is_silent_and_a_full_disk_is_one_line(tiny: Path, option: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for target, code, error in ((writer, 1, ""), (full, 6, "error: .*No space left.*\n")):
        process = subprocess.run(
            [sys.executable, "-m", "diffgen", "models", "info", tiny, option],
            cwd=ROOT,
            stdout=target,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(target)
        assert process.returncode == code
        assert re.fullmatch(error, process.stderr), process.stderr


def test_a_traceback_only_with_debug(diffgen_: Callable[..., Result], tiny: Path) -> None:
    assert "Traceback" not in diffgen_("generate", "a", "-m", "nothing")[2]
    assert "Traceback" in diffgen_("generate", "a", "-m", "nothing", "--debug")[2]


# Interruption


def test_an_interrupted_command_leaves_only_complete_pictures(tiny: Path, tmp_path: Path) -> None:
    """Two processes with thousands of pictures each: one gets SIGINT, one SIGKILL, while it writes them."""
    terminal, their_end = os.openpty()
    processes: dict[int, subprocess.Popen[str]] = {}
    for number in (signal.SIGINT, signal.SIGKILL):
        command = ["generate", "a", "-n", "9999", "-m", str(tiny), "-o", f"{number}/", "--json"]
        processes[number] = subprocess.Popen(
            [sys.executable, "-m", "diffgen", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=their_end,
            text=True,
        )
    os.close(their_end)
    output = bytearray()
    reader = threading.Thread(target=_drain, args=(terminal, output), daemon=True)
    reader.start()
    for number, process in processes.items():
        while len(list(tmp_path.glob(f"{number}/*.png"))) < 3:
            assert process.poll() is None
            threading.Event().wait(0.05)
        process.send_signal(number)
    out, _ = processes[signal.SIGINT].communicate(timeout=30)
    nothing, _ = processes[signal.SIGKILL].communicate(timeout=30)
    reader.join(timeout=10)
    assert (processes[signal.SIGINT].returncode, processes[signal.SIGKILL].returncode) == (130, -signal.SIGKILL)
    for path in tmp_path.glob("*/*.png"):
        assert info(path)["diffgen"]  # decoded to its last row
    document = json.loads(out)
    assert document["error"]["code"] == 130
    paths = [image["path"] for image in document["result"]["images"]]
    assert sorted(paths) == sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "2").iterdir())
    assert nothing == ""
    # Their stderr is a terminal: it shows a progress bar, and stdout is still one document.
    assert ESC.encode() in output
    assert b"error: interrupted" in output
    seed = int(document["result"]["images"][-1]["seed"])
    assert f"for the others: --seed {seed + 1} --count {9999 - len(paths)}".encode() in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interruption_during_imports_is_reported(tiny: Path, tmp_path: Path, number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "diffgen", "generate", "a", "-m", tiny, "--steps", "1000", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),  # nohup would have it ignored
    )
    assert process.stderr is not None
    assert "seed" in process.stderr.readline()  # printed before torch is imported
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    for _ in range(3):  # the signal may come several times
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, json.loads(out)["error"]["code"]) == (code, code)
    assert re.fullmatch(r"error: .+\n", err), err
    assert not list(tmp_path.iterdir())


def _drain(descriptor: int, into: bytearray) -> None:
    """Read a terminal until its other end is closed."""
    try:
        while data := os.read(descriptor, 4096):
            into += data
    except OSError:  # raised on Linux when it is closed
        pass
