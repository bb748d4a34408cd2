"""compare and tune as commands on the bundled model, a run and the mixture: what they write and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import diffgen
import schedulers
from diffgen.comparison import plan
from diffgen.comparison.results import Results
from diffgen.comparison.run import Comparison
from diffgen.comparison.subjects import PipelineSubject, subject_of
from diffgen.comparison.tables import distribution_table
from diffgen.comparison.verdict import failure
from diffgen.models.find import find
from diffgen.training.data import open_data
from diffgen.training.evaluate import evaluate

RUN = """
[network]
width = 8
multipliers = [1]
attention = [false]
blocks = 1
[diffusion]
T = 30
noise = "cosine"
prediction = "v_prediction"
[train]
steps = 20
batch_size = 32
held_out_every = 20
[sample]
count = 2
steps = 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffgen.cli import run as command

    place = tmp_path_factory.mktemp("runs")
    (place / "run.toml").write_text(RUN)
    assert command(["train", "digits", "-o", str(place / "digits"), "--config", str(place / "run.toml"), "-q"]) == 0
    return place / "digits"


def test_the_bundled_model_gives_the_pictures_of_generate(diffgen_, tmp_path: Path) -> None:
    """The native loop with the guided network gives the pixels of the pipeline; every cell is there."""
    code, out, err = diffgen_(
        "compare", "a red apple", "--schedulers", "dpmpp_2m,euler_ancestral", "--nfe", "4", "--seeds", "7",
        "--guidance", "3", "--reference", "heun:8", "-o", "c", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)["result"]
    assert {path.name for path in Path("c").iterdir()} >= {"report.html", "results.json", "results.csv", "grid.png"}
    pictures = {c["scheduler"]: np.asarray(Image.open(Path("c") / c["image"])) for c in result["cells"]}
    for scheduler in ("dpmpp_2m", "euler_ancestral"):
        options = {"steps": 4, "guidance": 3.0, "scheduler": scheduler}
        options["grid"] = schedulers.info(scheduler).grid  # not the one that it ships for 4 steps
        expected = diffgen.load("emoji").generate("a red apple", seed=7, **options)[0]
        assert np.abs(np.asarray(expected).astype(int) - pictures[scheduler].astype(int)).max() <= 1
    assert all(cell["nfe"] == 4 and cell["status"] == "done" for cell in result["cells"])
    assert [cell["error"] is None for cell in result["cells"]] == [False, True]


@pytest.mark.parametrize(
    "family",
    [
        "sd1",
        "sdxl",
        "sd3",
        "flux",
        "flux-schnell",
        "flux-kontext",
        "chroma",
        "z-image",
        "flux2",
        "flux2-klein",
        "qwen-image",
        "unconditional",
    ],
)
def test_every_family_gives_the_pictures_of_generate(tmp_path: Path, family: str) -> None:
    """Also with a scheduler that draws noise from the generator of the seed."""
    model = str(tiny.build(tmp_path / "model", family=family))
    prompt, guidance = ([], ()) if family == "unconditional" else (["a red apple"], (3.0,))
    subject, prompts, guidance = subject_of(model, prompt, guidance, "cpu", "float32")
    entries = plan.parse_entries(["dpmpp_2m", "euler_ancestral"], noise=subject.noise)
    axes = plan.Axes(entries, (3,), (5,), prompts, guidance)
    comparison = Comparison(subject, axes, None, tmp_path / "made")
    records = [comparison.folder.record(task.key) for task in comparison.make()]
    generator = diffgen.load(model, "cpu", "float32")
    options = {} if family == "unconditional" else {"guidance": 3.0}
    for cell, record in zip(comparison.cells, records, strict=True):
        assert record is not None
        picture = np.asarray(Image.open(tmp_path / "made" / record["image"]).convert("RGB"))
        again = generator.generate(*prompt, seed=5, steps=3, scheduler=cell.entry.label, **options)[0].convert("RGB")
        assert np.abs(np.asarray(again).astype(int) - picture.astype(int)).max() <= 1


def test_calls_of_the_network_are_counted_separately(diffgen_, tmp_path: Path) -> None:
    """A guided evaluation is one NFE and two calls of the network. The prompt has two lines."""
    model = tiny.build(tmp_path / "model")
    options = ["-m", model, "--schedulers", "euler,heun", "--nfe", "3", "--seeds", "0", "--reference", "none"]
    options += ["--guidance", "1,3", "-o", "c", "--json"]
    code, out, err = diffgen_("compare", "a red apple\nand a circle", *options)
    assert code == 0, err
    cells = json.loads(out)["result"]["cells"]
    assert [(c["guidance"], c["nfe"], c["network_calls"]) for c in cells] == [(1.0, 3, 3)] * 2 + [(3.0, 3, 6)] * 2
    page = (Path("c") / "report.html").read_text()
    assert "1 per evaluation at guidance 1, 2 per evaluation at guidance 3" in page
    with Image.open("c/grid.png") as picture:
        assert picture.width > 100


def test_prompts_are_checked_as_in_generate(diffgen_) -> None:
    options = ["--schedulers", "euler", "--nfe", "2", "--seeds", "0", "--reference", "none", "--dry-run"]
    for prompt, says in (
        ("a {red|blue} apple", "leaves a choice to the seed"),
        ("a {red apple", "brace is never closed"),
        ("bad \udcff", "not valid UTF-8"),
    ):
        code, _, err = diffgen_("compare", prompt, *options)
        assert code == 2
        assert says in err
    _, _, err = diffgen_("compare", "a qwertzuiop", *options)
    assert "never saw 'qwertzuiop'" in err


def test_a_batch_of_two_prompts_equals_each_alone() -> None:
    subject, _, _ = subject_of("emoji", ["a cat"], [2.0], "cpu", "auto")
    assert isinstance(subject, PipelineSubject)
    x = torch.cat([subject.start(seed)[0] for seed in (1, 2)])
    t = torch.tensor([700.0, 700.0])
    with torch.inference_mode():
        both = subject.network(["a cat", "a red apple"], 2.0)(x, t)
        alone = [subject.network([p], 2.0)(x[i : i + 1], t[:1]) for i, p in enumerate(("a cat", "a red apple"))]
    assert torch.allclose(both, torch.cat(alone), atol=2e-5)


def test_a_run_against_its_data(diffgen_, run: Path) -> None:
    options = ("compare", "3", "-m", run, "--schedulers", "ddim,ddpm", "--nfe", "4", "--seeds", "0-1")
    options += ("--data", "digits", "--samples", "60", "--reference", "dpmpp_2m:8", "-o", "c", "--json")
    code, out, err = diffgen_(*options)
    assert code == 0, err
    measured = json.loads(out)["result"]["distribution"]
    assert [row["scheduler"] for row in measured["rows"]] == ["euler", "ddpm"]
    assert measured["samples"] == 60
    evaluated = evaluate(run, open_data("digits"), samples=60, steps=4, scheduler="ddim", guidance=1.0, bits=False)
    for name, value in measured["rows"][0]["values"].items():
        assert value == pytest.approx(evaluated.metrics[name].value, rel=1e-5), name
        assert measured["scales"][name]["floor"] == pytest.approx(evaluated.metrics[name].floor)
    spread = {name: scale["deviation"] for name, scale in measured["scales"].items() if scale["deviation"] is not None}
    assert spread == pytest.approx(evaluated.floor_deviation, rel=1e-5)
    page = Path("c/report.html").read_text()
    assert "Against the data" in page
    scale = measured["scales"]["sliced_wasserstein"]
    assert f"{scale['floor']:.3g} ± {scale['deviation']:.2g}" in page
    before = {path: path.stat().st_mtime_ns for path in Path("c/distributions").iterdir()}
    code, _, err = diffgen_(*options, "--resume")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in Path("c/distributions").iterdir()} == before
    stored = json.loads(Path("c/results.json").read_text())
    assert failure(Results.from_json(stored)) is None
    stored["distribution"]["rows"][1] |= {"values": None, "reason": "the values are <not> finite"}
    Path("c/results.json").write_text(json.dumps(stored))
    assert (
        str(failure(Results.from_json(stored)))
        == "the pictures of 1 setting could not be measured: the values are <not> finite"
    )
    assert diffgen_("compare", "--report", "c")[0] == 0
    assert '<td colspan="' in Path("c/report.html").read_text()
    assert "the values are &lt;not&gt; finite</td>" in Path("c/report.html").read_text()
    assert list(distribution_table(Results.from_json(stored).distribution))[2][-1] == "the values are <not> finite"


def test_a_grid_of_another_model_is_reported_with_its_exit_code(diffgen_) -> None:
    grid = find("emoji").folder / "grids" / "dpmpp_2m-4.json"
    options = ("--schedulers", "dpmpp_2m", "--grids", f"karras,{grid}", "--nfe", "4", "--seeds", "0-1", "-o", "c")
    code, out, err = diffgen_("compare", "-m", "mixture", *options)
    assert code == 3, err
    assert "2 cells cannot be made" in err
    assert "tuned for another model than mixture" in err
    assert "report.html" in out
    assert Path("c/report.html").is_file()


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["a"], 2, "add -o FOLDER"),
        (["a", "-o", "c", "--schedulers", "eular"], 2, "did you mean 'euler'"),
        (["a", "-o", "c", "--nfe", "0"], 2, "--nfe"),
        (["a", "-o", "c", "--seeds", "x"], 2, "--seeds"),
        (["a", "-o", "c", "--guidance", "many"], 2, "--guidance"),
        (["a", "-o", "c", "--grids", "nothing.json"], 3, "nothing.json"),
        (["-m", "mixture", "a", "-o", "c"], 2, "neither prompts"),
        (["-m", "mixture", "-o", "c", "--reference", "lcm:50"], 2, "draws noise"),
        (["-m", "mixture", "-o", "c", "--reference", "heun"], 2, "SCHEDULER:NFE"),
        (["-m", "mixture", "-o", "c", "--data", "digits"], 2, "--data is for a training run"),
        (["-m", "nothing", "a", "-o", "c"], 3, "there is no model 'nothing'"),
        (["-o", "c"], 2, "needs a prompt"),
        (["--report", "nowhere"], 3, "holds no comparison"),
        (["--report", "nowhere", "--nfe", "5"], 2, "it takes no --nfe"),
        (["a", "--report", "nowhere", "--dry-run"], 2, "it takes no --dry-run, a prompt"),
    ],
)  # fmt: skip
def test_compare_refuses(diffgen_, args: list[str], code: int, says: str) -> None:
    got, out, err = diffgen_("compare", *args, "--json")
    assert (got, json.loads(out)["ok"]) == (code, False)
    assert says in err
    assert not Path("c/results.json").exists()


def test_a_folder_that_is_in_use_is_left_alone(diffgen_, tmp_path: Path) -> None:
    Path("c").mkdir()
    Path("c/mine.txt").write_text("mine")
    code, _, err = diffgen_("compare", "-m", "mixture", "-o", "c")
    assert code == 6
    assert "--resume" in err
    assert [path.name for path in Path("c").iterdir()] == ["mine.txt"]
    assert diffgen_("compare", "-m", "mixture", "-o", "c/mine.txt")[0] == 6


def test_a_dry_run_counts_and_writes_nothing(diffgen_) -> None:
    code, out, _ = diffgen_(
        "compare",
        "-m",
        "mixture",
        "--schedulers",
        "euler,heun",
        "--nfe",
        "4,5",
        "--seeds",
        "0-2",
        "--dry-run",
        "--json",
    )
    result = json.loads(out)["result"]
    assert code == 0
    assert (result["cells"], result["to_do"]) == (12, 15)
    assert result["evaluations"] == 3 * (4 + 5 + 3 + 5)
    assert list(Path().iterdir()) == []


def test_an_interrupted_comparison_writes_what_is_done(tmp_path: Path) -> None:
    """A real process with hundreds of cells to make, interrupted after a few."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diffgen", "compare", "-m", "mixture", "--schedulers", "euler,heun", "--nfe", "8",
         "--seeds", "0-299", "-o", "c", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(diffgen.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while len(list(tmp_path.glob("c/cells/*.json"))) < 5:
        assert process.poll() is None
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "continue with --resume" in err
    document = json.loads(out)
    assert (document["ok"], document["error"]["code"]) == (False, 130)
    status = [cell["status"] for cell in document["result"]["cells"]]
    assert set(status) == {"done", "missing"}
    assert all(row["rank"] is None and row["missing"] for row in document["result"]["rows"])
    assert any("are not made yet" in sentence for sentence in document["result"]["verdict"])
    stored = json.loads((tmp_path / "c" / "results.json").read_text())
    assert [cell["status"] for cell in stored["cells"]] == status
    for name in ("report.html", "results.csv", "grid.png"):
        assert (tmp_path / "c" / name).stat().st_size > 500
    assert "not made yet" in (tmp_path / "c" / "report.html").read_text()


def test_impossible_cells_are_reported_before_the_start(diffgen_) -> None:
    grid = Path(diffgen.__file__).parent / "models/bundled/emoji/grids/dpmpp_2m-8.json"
    options = ["--schedulers", "dpmpp_2m", "--nfe", "8", "--seeds", "0-1", "--grids", f"{grid},karras", "--dry-run"]
    code, out, err = diffgen_("compare", "-m", "mixture", *options, "--json")
    assert code == 0
    assert json.loads(out)["result"]["impossible"] == 2
    assert "2 cells cannot be made" in err
    assert "tuned for another model" in err
    assert "2 schedulers, 1 budget, 2 seeds, 4 cells" in err
    assert diffgen_("compare", "-m", "nothing", "-o", "c")[0] == 3
    assert not Path("c").exists()


def test_the_page_is_written_again(diffgen_) -> None:
    assert (
        diffgen_("compare", "-m", "mixture", "--schedulers", "euler", "--nfe", "4", "--seeds", "0", "-o", "c")[0] == 0
    )
    page = Path("c/report.html").read_text()
    Path("c/report.html").unlink()
    code, out, _ = diffgen_("compare", "--report", "c")
    assert (code, out.strip()) == (0, "c/report.html")
    assert Path("c/report.html").read_text() == page
    Path("c/results.json").write_text('{"schema": "diffgen.compare/1"}')
    assert diffgen_("compare", "--report", "c")[0] == 3


def test_a_tuned_grid_from_the_command_to_a_picture(diffgen_) -> None:
    code, out, err = diffgen_(
        "tune", "-m", "mixture", "--scheduler", "dpmpp_2m", "--nfe", "4", "-o", "g.json", "--iterations", "40",
        "--noises", "4", "--batch-size", "4", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)["result"]
    assert result["ratio"] < 0.95
    with Image.open("g.png") as picture:
        assert picture.width > 500
    assert diffgen_("tune", "-m", "mixture", "--scheduler", "dpmpp_2m", "--nfe", "4", "-o", "g.json")[0] == 6
    code, out, err = diffgen_(
        "compare", "-m", "mixture", "--schedulers", "dpmpp_2m", "--grids", "karras,g.json", "--nfe", "4", "--seeds",
        "800-801", "-o", "c", "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = {row["grid"]: row["error"]["mean"] for row in json.loads(out)["result"]["rows"]}
    assert rows["g.json"] < rows["karras"]
    code, _, err = diffgen_("generate", "a red apple", "--grid", "g.json", "-o", "x.png")
    assert code == 3
    assert "tuned for another model" in err


def test_a_grid_of_one_step_can_be_used(diffgen_) -> None:
    options = ["--nfe", "1", "-o", "g.json", "--iterations", "16", "--noises", "4"]
    code, _, err = diffgen_("tune", "-m", "mixture", "--scheduler", "dpmpp_2m", *options)
    assert code == 0, err
    assert Path("g.png").is_file()
    options = ["--schedulers", "dpmpp_2m", "--grids", "g.json", "--nfe", "1,3", "--seeds", "0-1", "-o", "c", "--json"]
    code, out, err = diffgen_("compare", "-m", "mixture", *options)
    assert code == 0, err
    assert {cell["nfe"] for cell in json.loads(out)["result"]["cells"]} == {1}


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--scheduler", "dpmpp_2m", "--nfe", "4"], 2),
        (["--scheduler", "dpmpp_2m", "--nfe", "4", "-o", "g.txt"], 2),
        (["--scheduler", "dpmpp_2m", "--nfe", "0", "-o", "g.json"], 2),
        (["--scheduler", "heun", "--nfe", "4", "-o", "g.json"], 2),
        (["--scheduler", "ddpm", "--nfe", "4", "-o", "g.json"], 2),
        (["--scheduler", "dpmpp_2m", "--nfe", "4", "-o", "nowhere/g.json"], 6),
    ],
)
def test_tune_refuses(diffgen_, args: list[str], code: int) -> None:
    assert diffgen_("tune", "-m", "mixture", *args)[0] == code
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("damage", [("axes", {"seeds": []}), ("command", {}), ("axes", []), ("cells", ["x"])])
def test_a_damaged_comparison_makes_no_page(diffgen_, damage: tuple) -> None:
    content = {"schema": "diffgen.compare/1", "cells": [], "rows": [], "command": "", damage[0]: damage[1]}
    Path("c").mkdir()
    (Path("c") / "results.json").write_text(json.dumps(content))
    code, _, err = diffgen_("compare", "--report", "c")
    assert code == 3
    assert "damaged" in err
    assert "Traceback" not in err
