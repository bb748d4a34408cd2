"""Tuned grids in a model's own folder: chosen where they fit, reported, reproduced and checked."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

import diffgen
import schedulers
from diffgen.cli.inspect import command_line
from diffgen.errors import InputError
from diffgen.generation.record import read_picture_info, read_record
from diffgen.models import find, gate, hub
from diffgen.models.by_hash import network_hash
from diffgen.models.info import info
from diffgen.pipelines.plan import make_plan

BUNDLED = find.BUNDLED / "emoji"
HASH = network_hash(find.find("emoji"))


def grid(**changes: Any) -> dict[str, Any]:
    """A grid file's content for three steps at guidance 3, written by hand."""
    content = {
        "schema": "diffgen.grid/1",
        "solver": "dpmpp_2m",
        "nfe": 3,
        "sigmas": [14.6, 1.9, 0.35],
        "model_times": [995.0, 520.0, 110.0],
        "corrections": [[0.0, 0.0], [0.05, 0.0], [0.1, -0.02]],
        "model_hash": HASH,
        "guidance": 3.0,
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


@pytest.fixture
def shipping(tmp_path: Path):
    """Build a copy of the bundled model that ships these grids and has these defaults in its card."""

    def build(defaults: dict[str, Any] | None = None, **grids: Any) -> find.Model:
        folder = tmp_path / "model"
        shutil.copytree(BUNDLED, folder, copy_function=link)
        shutil.rmtree(folder / "grids", ignore_errors=True)
        (folder / "grids").mkdir()
        for name, content in (grids or {"three": grid()}).items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / "grids" / f"{name}.json").write_text(text)
        card = json.loads((BUNDLED / "card.json").read_text("utf-8"))
        card["defaults"] = {"steps": 25, "guidance": 2.0, "scheduler": "dpmpp_2m", "grid": "karras"} | (defaults or {})
        card.pop("sha256", None)
        (folder / "card.json").unlink()
        (folder / "card.json").write_text(json.dumps(card), "utf-8")
        return find.find(str(folder))

    return build


def link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def chosen(model: find.Model, **options: Any) -> str:
    """The grid of a plan."""
    return Path(make_plan(model, "a red apple", seed=1, **options).grid).name


def test_a_grid_is_chosen_only_where_it_fits(shipping) -> None:
    model = shipping()
    fits = {"steps": 3, "guidance": 3.0}
    assert chosen(model, **fits) == "three.json"
    assert chosen(model, **fits, scheduler="DPMSolverMultistepScheduler") == "three.json"  # another name of the solver
    assert chosen(model) == "karras"  # 25 steps at guidance 2
    assert chosen(model, steps=4, guidance=3.0) == "karras"
    assert chosen(model, steps=3) == "karras"  # at guidance 2
    assert chosen(model, **fits, scheduler="unipc") == schedulers.info("unipc").grid
    assert chosen(model, **fits, scheduler="DPM++ 2M Karras") == "karras"
    assert chosen(model, **fits, grid="exponential") == "exponential"
    assert not make_plan(model, "a red apple", seed=1, **fits).notes


@pytest.mark.parametrize(
    ("defaults", "steps"),
    [
        ({"steps": 3, "guidance": 3.0, "scheduler": "dpmpp_2m", "grid": "karras"}, 3),
        ({"steps": 20, "guidance": 3.0, "scheduler": "dpmpp_2m", "grid": "grids/three.json"}, 20),
        ({"grid": "grids/three.json"}, 25),  # the family's; the file has its own steps and guidance
    ],
)
def test_the_card_may_make_a_grid_the_default(shipping, defaults: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """Options that do not fit the grid use the ordinary number of steps and the scheduler's own grid."""
    model = shipping()
    card = model.folder / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text("utf-8")) | {"defaults": defaults}), "utf-8")

    def order(**options: Any) -> tuple[str, int]:
        plan = make_plan(model, "a red apple", seed=1, **options)
        return Path(plan.grid).name, plan.steps

    plan = make_plan(model, "a red apple", seed=1)
    assert (Path(plan.grid).name, plan.steps, plan.guidance, plan.scheduler) == ("three.json", 3, 3.0, "dpmpp_2m")
    assert order(scheduler="dpmpp_2m", guidance=3) == ("three.json", 3)
    assert order(steps=9) == ("karras", 9)
    assert order(guidance=5.0) == ("karras", steps)
    assert order(scheduler="unipc") == (schedulers.info("unipc").grid, steps)
    assert order(grid="exponential") == ("exponential", steps)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert order(image=str(tmp_path / "a.png"), guidance=3.0) == ("karras", steps)
    assert order(upscale=2.0, guidance=3.0) == ("karras", steps)


def test_the_users_list_overrides_the_card(shipping) -> None:
    model = shipping({"grid": "grids/three.json", "guidance": 3.0})

    def order(**defaults: Any) -> tuple[str, int, str]:
        plan = make_plan(replace(model, defaults=defaults), "a red apple", seed=1)
        return Path(plan.grid).name, plan.steps, plan.scheduler

    assert order() == order(scheduler="DPM++ 2M") == ("three.json", 3, "dpmpp_2m")
    assert order(steps=9) == ("karras", 9, "dpmpp_2m")
    assert order(scheduler="unipc") == (schedulers.info("unipc").grid, 25, "unipc")
    assert order(grid="exponential")[0] == "exponential"


def test_a_grid_for_any_guidance(shipping) -> None:
    model = shipping({"grid": "grids/three.json"}, three=grid(guidance=None))
    assert chosen(model) == chosen(model, guidance=5.0) == chosen(model, steps=3) == "three.json"
    assert chosen(model, steps=4) == "karras"


def test_a_refiner_is_another_model(tmp_path: Path) -> None:
    model, refiner = (tiny.build(tmp_path / name, family=name) for name in ("sdxl", "sdxl-refiner"))
    (model / "grids").mkdir()
    content = grid(model_hash=None, sigmas=[14.0, 1.9, 0.35])
    (model / "grids" / "three.json").write_text(json.dumps(content))
    fits = {"steps": 3, "guidance": 3.0, "scheduler": "dpmpp_2m"}
    assert chosen(find.find(str(model)), **fits) == "three.json"
    assert chosen(find.find(str(model)), **fits, refiner=str(refiner)) == schedulers.info("dpmpp_2m").grid


def test_own_grid_says_whether_the_model_chooses_it(shipping) -> None:
    """Otherwise, the command that reproduces the picture has to name it."""
    model = shipping(three=grid(), two=grid(sigmas=[14.6, 2.0, 0.3]))
    three, two = (str(model.folder / "grids" / f"{name}.json") for name in ("three", "two"))
    fits = {"steps": 3, "guidance": 3.0}

    def own(**options: Any) -> bool:
        return make_plan(model, "a red apple", seed=1, **options).own_grid

    assert own(**fits)
    assert own(grid=three)  # it brings steps and guidance
    assert not own(grid=two)  # without it, three would be taken
    assert not own(grid=three, steps=5)
    assert not own(grid=three, upscale=2.0)
    assert not own()


def test_the_card_names_one_of_several(shipping) -> None:
    model = shipping({"grid": "grids/b.json", "steps": 3, "guidance": 3.0}, a=grid(), b=grid(sigmas=[14.6, 2.0, 0.3]))
    assert chosen(model) == "b.json"


@pytest.mark.parametrize("name", ["grids/none.json", "../grid.json", "/etc/grid.json", "three.json"])
def test_the_card_cannot_name_other_files(shipping, name: str) -> None:
    with pytest.raises(InputError, match=r"card\.json: there is no grid"):
        make_plan(shipping({"grid": name}), "a red apple")


def test_a_generated_picture_is_reproduced(diffgen_, shipping) -> None:
    model = shipping({"steps": 3, "guidance": 3.0})
    code, _, err = diffgen_("generate", "a red apple", "-m", model.folder, "--seed", "3", "-o", "a.png")
    assert code == 0, err
    assert "dpmpp_2m on three.json (model default), 3 steps (model default)" in err
    code, out, _ = diffgen_("generate", "a red apple", "-m", model.folder, "--dry-run", "--json")
    assert (code, json.loads(out)["result"]["grid"]) == (0, "three.json")
    record = read_record("a.png")
    assert (record["grid"], record["grid_from"], record["steps"], record["nfe"]) == ("three.json", "model", 3, 3)
    assert record["model_hash"] == HASH  # the hash does not cover the grid
    code, out, err = diffgen_("reproduce", "a.png", "-m", model.folder)
    assert (code, out) == (0, "identical pixels\n"), err

    line, _ = command_line(read_picture_info("a.png"))
    assert "--grid" not in line  # steps, guidance and scheduler select the model's grid
    code, _, err = diffgen_(*line.split()[1:2], "a red apple", *line.split("apple'")[1].split(), "-m", model.folder,
                            "-o", "b.png")  # fmt: skip
    assert code == 0, err
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is interpolated
        native = diffgen.load(str(model.folder))
        scheduler = native.scheduler(make_plan(model, "a red apple", seed=3))
    assert [p.t for p in scheduler.grid().points[:-1]] == [995.0, 520.0, 110.0]

    (model.folder / "grids" / "three.json").write_text(json.dumps(grid(notes="another file")))
    code, _, err = diffgen_("reproduce", "a.png", "-m", model.folder)
    assert code == 3
    assert "the grid 'three.json'" in err


def test_a_grid_of_another_model_is_refused(diffgen_, shipping) -> None:
    model = shipping({"steps": 3, "guidance": 3.0}, three=grid(model_hash="0" * 64))
    code, _, err = diffgen_("generate", "a red apple", "-m", model.folder, "-o", "a.png")
    assert code == 3
    assert "tuned for another model" in err
    assert diffgen_("generate", "a red apple", "-m", model.folder, "--grid", "karras", "-o", "a.png", "-q")[0] == 0


def test_models_info_and_verify_list_grids(diffgen_, shipping) -> None:
    model = shipping()
    assert info(model)["grids"] == [{"file": "grids/three.json", "scheduler": "dpmpp_2m", "steps": 3, "guidance": 3.0}]
    code, out, _ = diffgen_("models", "info", model.folder)
    assert code == 0
    assert "grids/three.json (dpmpp_2m, 3 steps, guidance 3.0)" in out
    code, out, _ = diffgen_("models", "verify", model.folder, "--json")
    assert code == 0
    files = {file["path"]: file["state"] for file in json.loads(out)["result"]["files"]}
    assert files["grids/three.json"] == "not recorded"
    assert network_hash(model) == HASH


def test_models_info_shows_the_steps_of_the_default_grid(diffgen_, shipping) -> None:
    model = shipping({"grid": "grids/three.json"})
    _, out, _ = diffgen_("models", "info", model.folder)
    assert "defaults         steps 3 (25 where that grid does not fit), guidance 2.0" in out
    _, out, _ = diffgen_("models", "info", model.folder, "--json")
    assert json.loads(out)["result"]["defaults"]["steps"] == 25  # the card's value


def test_a_card_with_an_immense_number_is_refused(shipping) -> None:
    with pytest.raises(InputError, match="by the model's card"):
        make_plan(shipping({"guidance": 10**400}), "a red apple")


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "heun", "gains": [0.1, 0.1, 0.1]},  # two evaluations a step
        {"sigmas": [1e6, 1.9, 0.35]},  # above the model's noise levels
    ],
)
def test_a_grid_that_does_not_fit_the_model_is_refused(diffgen_, shipping, changes: dict[str, Any]) -> None:
    model = shipping(three=grid(**changes))
    options = ("--steps", "3", "--guidance", "3", "--scheduler", changes.get("solver", "dpmpp_2m"), "-o", "a.png")
    code, _, err = diffgen_("generate", "a red apple", "-m", model.folder, *options)
    assert code == 3, err
    assert "three.json" in err


@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        ("dpmpp_2m-8.json", True),
        ("a b.json", False),
        (".a.json", False),
        ("a/b.json", False),
        ("a" * 101 + ".json", False),
    ],
)
def test_only_names_that_the_gate_accepts_are_fetched(name: str, fetched: bool) -> None:
    """A name that the gate would refuse is not fetched with a model."""
    assert bool(hub.TEXTS.fullmatch(f"grids/{name}")) == bool(gate.GRID_NAME.fullmatch(name)) == fetched


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"schema": "diffgen.grid/1", "schema": "diffgen.grid/1"}',
        '{"schema": NaN}',
        json.dumps(grid(schema="diffgen.grid/2")),
        json.dumps(grid(solver=None)),
        json.dumps(grid(sigmas=[1.0, 2.0, 3.0])),
        json.dumps(grid(sigmas=[10**400, 2.0, 1.0])),
        json.dumps(grid(guidance=10**400)),
        json.dumps(grid(guidance=True)),
        json.dumps(grid(gains=[0.0] * 2)),
        json.dumps(grid()).replace("3.0}", "3.0, " + '"notes": ' + "[" * 5000 + "]" * 5000 + "}"),
        json.dumps(grid(corrections=[[0.0] * 4] * 3)),
        json.dumps(grid(notes="x" * 2**20)),
    ],
)
def test_a_broken_grid_is_refused_with_the_model(shipping, content: str) -> None:
    model = shipping(three=content)
    with pytest.raises(InputError, match=r"three\.json"):
        make_plan(model, "a red apple")
    with pytest.raises(InputError, match=r"three\.json"):
        info(model)


def test_other_files_in_the_folder_of_grids(shipping) -> None:
    model = shipping()
    (model.folder / "grids" / "three.png").write_text("no matter")
    (model.folder / "grids" / "readme").mkdir()
    assert [path.name for path in find.check(model).grids] == ["three.json"]
    (model.folder / "grids" / "a b.json").write_text(json.dumps(grid()))
    with pytest.raises(InputError, match="is not a plain file name"):
        find.check(model)
    (model.folder / "grids" / "a b.json").unlink()
    (model.folder / "grids" / "four.json").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        find.check(model)
    (model.folder / "grids" / "four.json").rmdir()
    for k in range(64):
        (model.folder / "grids" / f"{k}.json").write_text(json.dumps(grid()))
    with pytest.raises(InputError, match="65 grids, at most 64"):
        find.check(model)
