"""The notebooks run from start to end, here with small numbers; what they print is checked where it is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "samples" / "notebooks"
SMALL: dict[str, dict[str, Any]] = {
    "ddpm": {"STEPS": 3, "COUNT": 1, "T": 60},
    "solver": {"STEPS": (16, 32, 64)},
    "choosing": {"BUDGETS": [4], "SEEDS": range(2), "ITERATIONS": 2},
    "lora": {"STEPS": 2, "THINGS": "apple", "PROMPTS": ["an owl, flat style"]},
}


def cells(name: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))["cells"]
    return content


def run(name: str) -> dict[str, Any]:
    """The variables at the end of a notebook, whose first code cell has the numbers that SMALL replaces."""
    plt.switch_backend("agg")
    variables: dict[str, Any] = {}
    for cell in cells(name):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), variables)
            variables |= SMALL[name]
            plt.close("all")
    return variables


def test_every_notebook_is_listed() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_the_notebook_was_executed_and_names_no_folder_of_its_author(name: str) -> None:
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [cell for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    text = (NOTEBOOKS / f"{name}.ipynb").read_text("utf-8")
    assert not [folder for folder in ("/home/", "/root/", "/tmp/", "/Users/") if folder in text]


def test_the_paper_in_code() -> None:
    variables = run("ddpm")
    assert variables["samples"].shape == (20, 1, 8, 8)
    assert repr(variables["learned"]).startswith("<hybrid loss of epsilon on ")
    assert bool(variables["bits"].isfinite().all())


def test_the_solver_of_the_notebook_is_dpmpp_2m_and_of_second_order() -> None:
    errors = run("solver")["errors"]
    assert errors["my_solver"] == pytest.approx(errors["dpmpp_2m"], rel=1e-3)  # in float32
    assert np.log2(errors["my_solver"][-2] / errors["my_solver"][-1]) == pytest.approx(2, abs=0.2)


def test_choosing() -> None:
    variables = run("choosing")
    assert {row.scheduler for row in variables["results"].rows} >= {"euler", "heun", "dpmpp_2m", "unipc", "deis"}
    assert variables["grid"].nfe == 4


def test_the_lora_changes_the_picture() -> None:
    variables = run("lora")
    assert variables["result"].step == 2
    assert repr(variables["generator"]).startswith("<emoji: Stable Diffusion 1, ")
    without, with_lora = variables["row"](), variables["row"](loras=[variables["run"]])
    assert np.asarray(without[0]).tolist() != np.asarray(with_lora[0]).tolist()
