"""The command line of `diffgen train`: errors before torch is imported, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from training_runs import write_config

from diffgen.images.sheet import GAP, LINE, PAPER, labelled_sheet, sheet
from diffgen.training.curve import LEFT, TOP, curve, points_of, steps_of, thinned, ticks

ROOT = Path(__file__).parent.parent
Result = tuple[int, str, str]


def test_errors_without_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[train]\nstepz = 3\n")
    (tmp_path / "range.toml").write_text("[train]\nlearning_rate = -1\n")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from diffgen.cli import run
assert run(["train", "--help"]) == 0
for line, code in (
    ("train digits", 2), ("train -o run", 2), ("train digits -o run --stepz 3", 2),
    ("train digits -o run --steps 0", 2), ("train digits -o run --steps x", 2),
    ("train digits -o run --batch-size 0", 2), ("train digits -o run --seed -1", 2),
    ("train digits -o run --checkpoint-every 0", 2), ("train digits -o run --device toaster", 2),
    ("train digits -o run --parallel all", 2), ("train digits -o run --config nothing.toml", 3),
    ("train digits -o run --config bad.toml", 3), ("train digits -o run --config range.toml", 3),
):
    assert run(line.split()) == code, line
assert "torch" not in sys.modules
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "error: bad.toml: unknown key train.stepz; did you mean train.steps?" in process.stderr
    assert "error: range.toml: train.learning_rate is -1.0: it must lie between 0 and 10" in process.stderr
    assert sorted(os.listdir(tmp_path)) == ["bad.toml", "range.toml"]


@pytest.mark.parametrize(("rank", "documents"), [("0", 1), ("1", 0)])
def test_one_process_of_torchrun_prints_the_document(tmp_path: Path, rank: str, documents: int) -> None:
    command = [sys.executable, "-m", "diffgen", "train", "digits", "-o", "run", "--steps", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": rank}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout.count('"ok": false')) == (2, documents)


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["digitz", "-o", "run"], 3, "did you mean 'digits'?"),
        (["digits", "-o", "run", "--config", "dit.toml"], 3, "dit.toml: [network]: a dit has no 'blocks'"),
        (["digits", "-o", "run", "--init", "nothing"], 3, "nothing: No such file"),
        (["digits", "-o", "run", "--device", "cuda:99"], 2, "torch finds no such device"),
        (["digits", "-o", "run", "--config", "size.toml"], 3, "size.toml: data.size, data.channels: digits is 8x8"),
        (
            ["digits", "-o", "run", "--config", "parts.toml"],
            3,
            "parts.toml: a batch of 2 cannot be divided into 4",
        ),
        (["digits", "-o", "run", "--config", "parts.toml", "--batch-size", "3"], 2, "a batch of 3 cannot be divided"),
        (["digits", "-o", "none/../file/run"], 6, "a part of the path is a file"),
    ],
)
def test_errors_with_torch(diffgen_: Callable[..., Result], args: list[str], code: int, text: str) -> None:
    Path("dit.toml").write_text('[network]\nname = "dit"\nblocks = 3\n')
    Path("parts.toml").write_text("[train]\nbatch_size = 2\naccumulate = 4\n")
    Path("size.toml").write_text("[data]\nsize = 32\n")
    Path("file").write_text("")
    Path("none").mkdir()
    exit_code, out, err = diffgen_("train", *args)
    assert (exit_code, out) == (code, ""), err
    assert text in err
    assert not Path("run").exists()


def test_a_dry_run_prints_an_estimate(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    code, out, _ = diffgen_("train", "digits", "-o", "run", "--config", write_config(tmp_path), "--dry-run")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["data", "parameters", "memory", "time"]
    assert "digits: 1,797 pictures, 8x8, grey, 10 classes" in out
    assert "for 40 steps" in out
    assert not Path("run").exists()


def test_on_a_terminal_there_is_a_bar_with_loss_and_rate(tmp_path: Path) -> None:
    terminal, their_end = os.openpty()
    output = bytearray()

    def read() -> None:
        try:
            while data := os.read(terminal, 4096):
                output.extend(data)
        except OSError:  # Linux's way to say that the other end is closed
            pass

    config = write_config(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "diffgen", "train", "digits", "-o", "run", "--config", config],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=their_end,
        text=True,
    )
    os.close(their_end)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    out, _ = process.communicate(timeout=120)
    reader.join(10)
    assert (process.returncode, out) == (0, "run\n")
    for text in (b"images/s", b"/40", b"loss 0.", b"held-out loss", b"1,797 pictures", b"tensorboard --logdir run"):
        assert text in output


def test_a_sheet_has_its_pictures_where_they_belong() -> None:
    pictures = [Image.new("L", (8, 4), value) for value in (10, 20, 30)]
    picture = sheet([pictures[:2], pictures[2:]], gap=2)
    assert (picture.mode, picture.size) == ("L", (2 * 34 + 2, 2 * 18 + 2))  # 8 × 4 enlarged by 4
    assert [picture.getpixel(at) for at in ((2, 2), (33, 17), (36, 2), (2, 20), (0, 0), (36, 20))] == [
        10, 10, 20, 30, PAPER, PAPER,
    ]  # fmt: skip
    clear = sheet([[Image.new("RGBA", (40, 40), (255, 0, 0, 0)), Image.new("RGBA", (40, 40), (255, 0, 0, 255))]])
    assert (clear.mode, clear.size) == ("RGB", (2 * 42 + 2, 44))
    assert (clear.getpixel((5, 5)), clear.getpixel((50, 5))) == ((PAPER,) * 3, (255, 0, 0))
    with pytest.raises(ValueError, match="at least one picture"):
        sheet([[]])


def test_labels_leave_out_what_the_font_cannot_draw() -> None:
    """A sheet whose labels have Chinese characters too is that of the rest, without boxes."""
    pictures = [Image.new("RGB", (64, 64), "white")]
    mixed, plain = (labelled_sheet("step 5", {"weights": pictures}, [name]) for name in ("红 red 苹果", "red"))
    assert mixed.tobytes() == plain.tobytes()


def test_a_labelled_sheet_names_its_pictures() -> None:
    pictures = [Image.new("L", (8, 8), value) for value in (0, 100, 255)]
    plain = labelled_sheet("step 5", {"weights": pictures, "average": pictures[::-1]}, columns=2)
    picture = labelled_sheet("step 5", {"weights": pictures, "average": pictures[::-1]}, ["a", "b", "c"], 2)
    assert picture.height == plain.height + 4 * LINE  # two rows in each of two groups
    top = GAP + 2 * (LINE + GAP) + LINE
    assert [picture.getpixel((GAP + 10 + x, top + y)) for x, y in ((0, 1), (64 + GAP, 1), (0, 64 + LINE + GAP))] == [
        (0, 0, 0), (100, 100, 100), (255, 255, 255),
    ]  # fmt: skip
    labels = picture.crop((0, top - LINE, picture.width, top))
    assert {PAPER, 255} <= {colour[0] for _, colour in labels.getcolors(10**6)}  # type: ignore[misc, index, union-attr]
    with pytest.raises(ValueError, match="at least one picture"):
        labelled_sheet("step 5", {"weights": []})


def test_a_curve_of_losses() -> None:
    lines = [b'{"step": 10, "loss": 1.0}', b'{"step": 20, "loss": 0.1, "held_out_ema": 0.2}', b"[1]", b"half a li"]
    assert points_of(lines) == {"loss": [(10, 1.0), (20, 0.1)], "held_out_raw": [], "held_out_ema": [(20, 0.2)]}
    picture = curve(lines, [10])
    assert picture is not None
    assert picture.getpixel((LEFT + (picture.width - LEFT - 20) // 2, TOP + 200)) == (0x99, 0x99, 0x99)
    assert curve([b'{"step": 10, "loss": 0.0}', b'{"step": 1, "loss": "x"}']) is None
    assert thinned([(float(i), 1.0) for i in range(4001)])[-1] == (4000.0, 1.0)
    assert len(thinned([(float(i), 1.0) for i in range(4001)])) == 1334
    assert ticks(0.09, 1.1) == pytest.approx([0.1, 0.2, 0.5, 1])
    assert ticks(0.21, 0.24) == pytest.approx([0.21, 0.22, 0.23, 0.24])
    assert (steps_of(230), steps_of(1)) == ([0, 50, 100, 150, 200], [0, 1])
