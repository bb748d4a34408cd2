"""`diffgen schedulers`: list, show and plot."""

from __future__ import annotations

import functools
import json
import os
import pty
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import schedulers
from diffgen.models.find import find
from diffgen.models.gate import check_folder
from diffgen.pipelines.plan import noise_and_prediction
from schedulers import NoiseSchedule
from schedulers.grids import build
from schedulers.solver import SOLVERS

ROOT = Path(__file__).parent.parent
Result = tuple[int, str, str]


@pytest.fixture
def diffgen_(diffgen_: Callable[..., Result]) -> Callable[..., Result]:
    """Run `diffgen schedulers …` in this process, in an empty folder: (exit code, stdout, stderr)."""
    return functools.partial(diffgen_, "schedulers")


def result_of(output: Result) -> dict[str, Any]:
    assert output[0] == 0, output
    document = json.loads(output[1])
    assert document["ok"]
    return document["result"]


# list


def test_list_has_the_columns_of_the_interface(diffgen_: Callable[..., Result]) -> None:
    entries = result_of(diffgen_("list", "--json"))["schedulers"]
    keys = {"name", "aliases", "order", "evaluations_per_step", "stochastic", "native_only", "reference", "options"}
    assert [entry["name"] for entry in entries] == schedulers.names()
    for entry in entries:
        assert set(entry) == keys
        s = schedulers.info(entry["name"])
        assert all(entry[key] == getattr(s, key) for key in keys - {"aliases"})
        assert entry["aliases"] == list(s.aliases)
        assert all(schedulers.resolve(alias)[0] == s.name for alias in entry["aliases"])


def test_list_in_a_file_is_plain_lines(diffgen_: Callable[..., Result]) -> None:
    code, out, err = diffgen_("list")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for name in schedulers.names():
        s = schedulers.info(name)
        words = lines[name].split()
        assert words[1:3] == [str(s.order), str(s.evaluations_per_step)]
        assert ("stochastic" in words) == s.stochastic
        assert all(alias in lines[name] for alias in s.aliases)


@pytest.mark.parametrize("colour", [True, False])
def test_list_on_a_terminal_is_a_table(colour: bool) -> None:
    """With colour unless NO_COLOR is set; it fits the window."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm", "COLUMNS": "100", **({} if colour else {"NO_COLOR": "1"})}
    with subprocess.Popen(
        [sys.executable, "-m", "diffgen", "schedulers", "list"], cwd=ROOT, env=env, stdout=theirs
    ) as process:
        os.close(theirs)
        out = b""
        while chunk := _read(ours):
            out += chunk
        assert process.wait() == 0
    os.close(ours)
    text = out.decode()
    assert all(name in text for name in schedulers.names())
    assert ("\x1b[1m" in text) is colour
    assert colour or max(map(len, text.splitlines())) <= 100


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def test_list_marks_compatible_solvers(diffgen_: Callable[..., Result], tiny: Path) -> None:
    """A solver is compatible if a pipeline can run it from the noisiest level on."""
    noise, prediction = noise_and_prediction(check_folder(find(str(tiny)).folder))
    entries = result_of(diffgen_("list", "-m", tiny, "--json"))["schedulers"]
    for entry in entries:
        s = schedulers.get(entry["name"], noise=noise, prediction=prediction)
        try:
            s.set_timesteps(4)
            runs = bool(s.timesteps[0] == s.timesteps.max())
        except ValueError:
            runs = False
        assert entry["compatible"] is runs, entry
        assert (entry["reason"] is None) is runs
    assert {entry["name"] for entry in entries if not entry["compatible"]} == {
        "dpm_adaptive",
        "dpm_fast",
        "ddim_inverse",
        "dpmpp_2m_inverse",
    }
    _, out, _ = diffgen_("list", "-m", tiny)
    assert next(line for line in out.splitlines() if line.startswith("euler ")).split()[3] == "yes"


def test_list_explains_why_no_solver_is_compatible(diffgen_: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}
    path.write_text(json.dumps(config))
    entries = result_of(diffgen_("list", "-m", folder, "--json"))["schedulers"]
    assert not any(entry["compatible"] for entry in entries)
    assert "no signal" in next(entry["reason"] for entry in entries if entry["name"] == "euler")
    assert diffgen_("list", "-m", "no-such-model")[0] == 3


# show


def test_show_knows_all(diffgen_: Callable[..., Result]) -> None:
    for name in [name for name, s in SOLVERS.items() if not s.is_plugin]:
        shown = result_of(diffgen_("show", name, "--json"))
        s = schedulers.info(name)
        assert (shown["name"], shown["options"], shown["reference"]) == (name, s.options, s.reference)
        assert (shown["formula"], shown["when"]) == (s.formula, s.when)
        assert shown["about"]
        for option, choices in shown["choices"].items():
            for choice in choices:
                schedulers.get(name, **{option: choice})
        _, out, _ = diffgen_("show", name)
        needed = [s.formula, s.when, s.reference, *s.aliases, *(f"{k} = {v!r}" for k, v in s.options.items())]
        assert all(text in out for text in needed)


def test_show_accepts_the_names_of_other_tools(diffgen_: Callable[..., Result]) -> None:
    shown = result_of(diffgen_("show", "DPM++ 2M SDE Heun Karras", "--json"))
    assert shown["name"] == "dpmpp_2m_sde"
    assert shown["implies"] == {"grid": "karras", "options": {"variant": "heun"}}
    assert "means here: grid karras, variant = 'heun'" in diffgen_("show", "DPM++ 2M SDE Heun Karras")[1]


def test_show_of_an_unknown_name(diffgen_: Callable[..., Result]) -> None:
    code, out, err = diffgen_("show", "eulr", "--json")
    error = json.loads(out)["error"]
    assert (code, error["code"]) == (2, 2)
    assert "did you mean 'euler'" in error["message"]
    assert "did you mean 'euler'" in err


# Grids


def test_list_of_grids(diffgen_: Callable[..., Result]) -> None:
    entries = result_of(diffgen_("list", "--grids", "--json"))["grids"]
    assert [entry["name"] for entry in entries] == schedulers.grid_names()
    assert set(entries[0]) == {"name", "aliases", "about", "formula", "reference", "parameter", "default"}
    code, out, err = diffgen_("list", "--grids")
    assert (code, err) == (0, "")
    for entry in entries:
        line = next(line for line in out.splitlines() if line.startswith(entry["name"] + " "))
        assert entry["about"] in line
        assert entry["formula"] in line
    assert diffgen_("list", "--grids", "-m", "emoji")[0] == 2


def test_show_of_a_grid(diffgen_: Callable[..., Result]) -> None:
    shown = result_of(diffgen_("show", "karras:5", "--steps", "4", "--json"))
    points = build("karras:5", NoiseSchedule.scaled_linear(), 4).points[:-1]
    assert (shown["name"], shown["parameter"], shown["default"], shown["steps"]) == ("karras", "rho", 7.0, 4)
    assert shown["t"] == [p.t for p in points]
    assert shown["sigma"] == [p.rho for p in points]
    out = diffgen_("show", "beta", "--noise", "flow")[1]
    assert out.startswith("beta_t ")
    assert "known as  beta\n" in out
    assert "t = (T − 1)·Q(1 − k/(n − 1))" in out
    assert "\nσ         1 " in out


def test_show_of_a_grid_file(diffgen_: Callable[..., Result]) -> None:
    Path("mine.json").write_text(
        '{"schema": "diffgen.grid/1", "solver": "euler", "nfe": 3, "sigmas": [14.0, 2.0, 0.5]}'
    )
    shown = result_of(diffgen_("show", "mine.json", "--json"))
    assert (shown["steps"], shown["about"]) == (3, "A grid file, tuned for euler, 3 steps.")
    assert shown["sigma"] == pytest.approx([14.0, 2.0, 0.5])
    code, _, err = diffgen_("show", "none.json")
    assert (code, "cannot read the grid none.json" in err) == (3, True)


def test_show_draws(diffgen_: Callable[..., Result]) -> None:
    """A grid, in two panels; a scheduler, with its errors in a third."""
    sizes = {}
    for name in ("karras", "euler"):
        shown = result_of(diffgen_("show", name, "-o", f"{name}.png", "--json"))
        assert shown["path"] == f"{name}.png"
        with Image.open(f"{name}.png") as picture:
            sizes[name] = picture.size
    assert sizes["euler"][0] * 2 == sizes["karras"][0] * 3
    code, out, err = diffgen_("show", "karras", "-o", "karras.png")
    assert (code, out, "it exists" in err) == (6, "", True)


def test_show_suggests_a_grid(diffgen_: Callable[..., Result]) -> None:
    code, _, err = diffgen_("show", "karas")
    assert (code, "did you mean 'karras'" in err) == (2, True)


# plot

FEW = ("--schedulers", "euler,heun,recommend", "--grids", "karras,beta_t,karras:5", "--nfe", "8,39,79")


def test_plot_draws_what_it_measured(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    drawn = result_of(diffgen_("plot", "-o", "p.png", "--steps", "6", *FEW, "--json"))
    assert drawn["path"] == "p.png"
    with Image.open(tmp_path / "p.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100
        assert set(picture.info) <= {"dpi"}
    noise = NoiseSchedule.scaled_linear()
    for name, points in drawn["grids"].items():
        expected = schedulers.get("euler", grid=name).grid(6).points[:-1]
        assert points["t"] == [p.t for p in expected]
        assert points["sigma"] == [p.rho for p in expected]
    assert build("karras", noise, 6)[0].t == drawn["grids"]["karras"]["t"][0]
    errors = {(row["scheduler"], row["nfe"]): row["error"] for row in drawn["errors"]}
    assert set(errors) == {("euler", 8), ("euler", 39), ("euler", 79), ("heun", 7), ("heun", 39), ("heun", 79)} | {
        ("recommend", n) for n in (8, 39, 79)
    }
    assert 1.8 < errors["euler", 39] / errors["euler", 79] < 2.2  # first order
    assert 3.5 < errors["heun", 39] / errors["heun", 79] < 4.8  # second
    assert all(errors["recommend", n] < 0.2 * min(errors["euler", n], errors["heun", n]) for n in (39, 79))


def test_plot_draws_a_grid_from_a_file(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    Path("mine.json").write_text(
        '{"schema": "diffgen.grid/1", "solver": "euler", "nfe": 3, "sigmas": [14.0, 2.0, 0.5]}'
    )
    few = ("--schedulers", "euler", "--nfe", "5", "--grids", "mine.json,karras", "--steps", "3")
    drawn = result_of(diffgen_("plot", "-o", "p.png", *few, "--json"))
    assert drawn["grids"]["mine.json"]["sigma"] == pytest.approx([14.0, 2.0, 0.5])
    Path("mine.json").write_text("{}")
    code, _, err = diffgen_("plot", "-o", "q.png", *few)
    assert (code, "cannot read the grid mine.json: no grid" in err) == (3, True)


def test_plot_as_svg_is_the_same_each_time(diffgen_: Callable[..., Result], tmp_path: Path) -> None:
    few = ("--schedulers", "euler", "--nfe", "5", "--grids", "trailing", "--noise", "flow")
    for name in ("a.svg", "b.svg"):
        code, out, _ = diffgen_("plot", "-o", name, *few)
        assert (code, out) == (0, f"{name}\n")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["-o", "p.jpg"], 2, ".png or .svg"),
        (["-o", "p.png", "--schedulers", "eulr"], 2, "did you mean 'euler'"),
        (["-o", "p.png", "--schedulers", "dpmpp_sde"], 2, "dpmpp_sde draws noise"),
        (["-o", "p.png", "--schedulers", ","], 2, "names nothing"),
        (["-o", "p.png", "--grids", "karas"], 2, "did you mean 'karras'"),
        (["-o", "p.png", "--grids", "missing.json"], 3, "cannot read the grid missing.json"),
        (["-o", "p.png", "--grids", "karras:x"], 2, "did you mean 'karras'"),
        (["-o", "p.png", "--nfe", "5,x"], 2, "'x'"),
        (["-o", "p.png", "--steps", "0"], 2, "from 1 to 1000"),
        (["-o", "p.png", "--noise", "pink"], 2, "unknown noise schedule"),
        (["-o", "there.png"], 6, "it exists"),
        (["-o", "nowhere/p.png", "--schedulers", "euler", "--nfe", "2"], 6, "no such folder"),
    ],
)
def test_plot_refuses(diffgen_: Callable[..., Result], tmp_path: Path, args: list[str], code: int, text: str) -> None:
    (tmp_path / "there.png").write_bytes(b"mine")
    got, out, err = diffgen_("plot", *args)
    assert (got, out) == (code, "")
    assert text in err
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"mine"
    if code == 6 and args[1] == "there.png":
        few = ("--schedulers", "euler", "--nfe", "2", "--grids", "karras", "--overwrite")
        assert diffgen_("plot", *args, *few)[0] == 0
        assert (tmp_path / "there.png").read_bytes().startswith(b"\x89PNG")
