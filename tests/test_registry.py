"""Names of other tools, wrong names, and names from plug-ins."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import schedulers
from schedulers import registry

ROOT = Path(__file__).parent.parent

LABELS: dict[str, tuple[str, str | None]] = {
    # AUTOMATIC1111
    "Euler a": ("euler_ancestral", None),
    "Euler": ("euler", None),
    "DDIM": ("euler", None),
    "PLMS": ("pndm", None),
    "LMS Karras": ("lms", "karras"),
    "Heun": ("heun", None),
    "DPM2 Karras": ("dpm2", "karras"),
    "DPM2 a Karras": ("dpm2_ancestral", "karras"),
    "DPM++ 2S a Karras": ("dpmpp_2s_ancestral", "karras"),
    "DPM++ 2M": ("dpmpp_2m", None),
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ 2M SGM Uniform": ("dpmpp_2m", "sgm_uniform"),
    "DPM++ 2M Uniform": ("dpmpp_2m", "linspace"),
    "DPM++ 2M Automatic": ("dpmpp_2m", None),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "DPM adaptive": ("dpm_adaptive", None),
    "Restart": ("restart", None),
    "UniPC": ("unipc", None),
    "LCM": ("lcm", None),
    # ComfyUI
    "dpm_2_ancestral": ("dpm2_ancestral", None),
    "dpmpp_sde_gpu": ("dpmpp_sde", None),
    "dpmpp_3m_sde_gpu": ("dpmpp_3m_sde", None),
    "uni_pc": ("unipc", None),
    "ipndm_v": ("ipndm_v", None),
    "res_multistep": ("res_multistep", None),
    "er_sde": ("er_sde", None),
    "sa_solver": ("sa_solver", None),
    "ddpm": ("ddpm", None),
    # InvokeAI
    "euler_a": ("euler_ancestral", None),
    "euler_k": ("euler", "karras"),
    "kdpm_2": ("dpm2", None),
    "kdpm_2_a_k": ("dpm2_ancestral", "karras"),
    "dpmpp_2m_sde_k": ("dpmpp_2m_sde", "karras"),
    "unipc_k": ("unipc", "karras"),
    "deis_k": ("deis", "karras"),
    # stable-diffusion.cpp
    "dpm++2s_a": ("dpmpp_2s_ancestral", None),
    "dpm++2m": ("dpmpp_2m", None),
    "ddim_trailing": ("euler", "trailing"),
    # k-diffusion
    "k_dpmpp_2m": ("dpmpp_2m", None),
    "sample_euler_ancestral": ("euler_ancestral", None),
    # diffusers
    "DDIMScheduler": ("euler", None),
    "DDPMScheduler": ("ddpm", None),
    "PNDMScheduler": ("pndm", None),
    "LMSDiscreteScheduler": ("lms", None),
    "EulerDiscreteScheduler": ("euler", None),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", None),
    "HeunDiscreteScheduler": ("heun", None),
    "KDPM2DiscreteScheduler": ("dpm2", None),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_ancestral", None),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", None),
    "DPMSolverSinglestepScheduler": ("dpmpp_2s", None),
    "DPMSolverSDEScheduler": ("dpmpp_sde", None),
    "DEISMultistepScheduler": ("deis", None),
    "UniPCMultistepScheduler": ("unipc", None),
    "SASolverScheduler": ("sa_solver", None),
    "LCMScheduler": ("lcm", None),
    "TCDScheduler": ("tcd", None),
    "IPNDMScheduler": ("ipndm", None),
    "FlowMatchEulerDiscreteScheduler": ("euler", None),
    "FlowMatchHeunDiscreteScheduler": ("heun", None),
    "CMStochasticIterativeScheduler": ("consistency", None),
    "DDIMInverseScheduler": ("ddim_inverse", None),
}


@pytest.mark.parametrize("label", LABELS)
def test_names_of_other_tools(label: str) -> None:
    assert schedulers.resolve(label) == LABELS[label]
    assert schedulers.resolve(label.upper()) == LABELS[label]
    assert schedulers.info(label).name == LABELS[label][0]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("DPM++ 2M Beta", ("dpmpp_2m", "beta_sigma")),  # AUTOMATIC1111
        ("DPM++ 2M Align Your Steps", ("dpmpp_2m", "ays_11")),
        ("DPM++ 3M SDE KL Optimal", ("dpmpp_3m_sde", "kl_optimal_a1111")),
        ("Euler a Turbo", ("euler_ancestral", "trailing")),  # Forge
        ("euler_beta", ("euler", "beta_t")),  # ComfyUI
        ("euler kl_optimal", ("euler", "kl_optimal")),
    ],
)
def test_grids_are_those_of_the_tool_that_spells_them_so(label: str, expected: tuple[str, str]) -> None:
    assert schedulers.resolve(label) == expected


def test_every_name_and_alias_is_its_own() -> None:
    for name in schedulers.names():
        s = schedulers.info(name)
        assert all(schedulers.resolve(label)[0] == name for label in (name, s.a1111, *s.aliases))
        assert schedulers.check_grid(s.grid) == s.grid


@pytest.mark.parametrize(
    ("label", "name", "options"),
    [
        ("DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde", {"variant": "heun"}),
        ("uni_pc_bh1", "unipc", {"variant": "bh1"}),
        ("uni_pc", "unipc", {"variant": "bh1", "order": 3, "end": "lowered"}),  # ComfyUI
        ("uni_pc_bh2", "unipc", {"variant": "bh2", "order": 3, "end": "lowered"}),
        ("UniPC", "unipc", {"variant": "bh1", "order": 3, "end": "lowered"}),  # AUTOMATIC1111
        ("unipc", "unipc", {}),
        ("unipc_k", "unipc", {}),  # InvokeAI
        ("comfyui_deis", "deis", {"variable": "t"}),
        ("comfyui_ipndm_v", "ipndm_v", {"variant": "diff-sampler"}),
    ],
)
def test_labels_with_options(label: str, name: str, options: dict[str, Any]) -> None:
    s = schedulers.get(label)
    assert (s.name, s.options) == (name, options)


def test_labels_name_existing_solvers_grids_and_options() -> None:
    for label, (name, grid, options) in registry.LABELS.items():
        schedulers.get(label)
        assert name in schedulers.names(), label
        assert grid is None or grid in schedulers.grid_names()
        schedulers.info(name).check(options)


def test_an_explicit_grid_and_option_win() -> None:
    assert schedulers.get("DPM++ 2M Karras").grid_name == "karras"
    assert schedulers.get("DPM++ 2M Karras", grid="trailing").grid_name == "trailing"
    assert schedulers.get("euler_k", grid="SGM Uniform").grid_name == "sgm_uniform"
    assert schedulers.get("DPM++ 2M SDE Heun", variant="midpoint").options == {"variant": "midpoint"}


@pytest.mark.parametrize(
    ("grid", "canonical"),
    [
        ("Karras", "karras"),
        ("normal", "linspace"),
        ("beta", "beta_t"),
        ("Beta", "beta_sigma"),
        ("Align Your Steps", "ays_11"),
        ("align_your_steps", "ays"),
        ("KL Optimal", "kl_optimal_a1111"),
        ("kl_optimal", "kl_optimal"),
    ],
)
def test_names_that_other_tools_have_for_grids(grid: str, canonical: str) -> None:
    assert schedulers.check_grid(grid) == canonical


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: schedulers.get("eulr"), "unknown scheduler 'eulr': did you mean 'euler'?"),
        (lambda: schedulers.get("DPM++ 2M Karas"), "did you mean 'dpmpp_2m karras'?"),
        (lambda: schedulers.get("nonsense_thing"), "unknown scheduler 'nonsense_thing': there are consistency, "),
        (lambda: schedulers.info("zzz"), "unknown scheduler 'zzz': there are consistency, "),
        (lambda: schedulers.get("euler", grid="karas"), "unknown grid 'karas': did you mean 'karras'?"),
        (lambda: schedulers.get("heun", etta=1), "unknown option of heun 'etta': there are none"),
        (lambda: schedulers.get("euler", etta=1), "unknown option of euler 'etta': did you mean 'eta'?"),
    ],
)
def test_unknown_names(make: Any, says: str) -> None:
    with pytest.raises(schedulers.UnknownName) as excinfo:
        make()
    assert says in str(excinfo.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unipc", {"order": 7}),
        ("unipc", {"variant": "bh3"}),
        ("unipc", {"order": 2.0}),
        ("euler", {"eta": -1.0}),
        ("euler", {"eta": float("nan")}),
    ],
)
def test_values_that_an_option_cannot_take(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name}: {next(iter(options))} = "):
        schedulers.get(name, **options)


def test_names_are_read_without_torch() -> None:
    code = """
import sys, schedulers
assert len(schedulers.names()) > 25 and len(schedulers.grid_names()) > 14
schedulers.info("DPM++ 2M Karras").options, schedulers.resolve("unipc_k"), schedulers.plugin_errors()
assert "torch" not in sys.modules
schedulers.NonFinite
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Plug-ins


def python(code: str, path: Path) -> Any:
    """Run code in a second process with the packages in `path`; return the JSON that it prints."""
    code = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(path)!r}]\nimport json, schedulers\n{code}"
    process = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_the_sample_plugin_is_installed_and_run_by_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "samples" / "plugin", tmp_path / "source")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--no-index", "--target", tmp_path / "site", tmp_path / "source"], check=True)
    output = python(
        """
import torch
from schedulers.testing import check_solver
s = schedulers.get("heavy_ball", beta=1.0)     # β = 1 is euler
euler = schedulers.get("euler", grid="karras")
x = torch.linspace(-3, 3, 32).reshape(2, 4, 2, 2)
results = [s.sample(lambda x, t: torch.tanh(x), x, 6) for s in (s, euler)]
check_solver("heavy_ball")
print(json.dumps([bool(torch.allclose(*results, atol=1e-5)), s.nfe(6), "heavy_ball" in schedulers.names(),
                  schedulers.plugin_errors()]))
""",
        tmp_path / "site",
    )
    assert output == [True, 6, True, {}]


PLUGINS = """
from schedulers import solver

def make(name, **more):
    def function(x, grid, noise):
        for p, q in grid.pairs():
            x = (yield x, p).x0
        return x
    function.__name__ = name
    return solver(order=1, reference="none", **more)(function)
"""
MODULES = {
    "good": "mine = make('mine', aliases=('my own',))",
    "taken": "euler = make('euler')",
    "alias_taken": "other = make('other', aliases=('DPM++ 2M',))",
    "wrong_name": "thing = make('something')",
    "bare": "def bare(x, grid, noise): pass",
    "broken": "raise RuntimeError('out of order')",
    "exits": "raise SystemExit(3)",
    "grids": "from schedulers import grids\ndef half(noise, n): return grids.karras(noise, 2 * n)[::2]\nfive = 5",
}
ENTRIES = """
[diffgen.solvers]
mine = good:mine
euler = taken:euler
other = alias_taken:other
thing = wrong_name:thing
bare = bare:bare
broken = broken:broken
exits = exits:exits
absent = not_there:absent

[diffgen.grids]
half = grids:half
karras = grids:half
number = grids:five
"""


def test_plugins_that_are_wrong_are_reported_and_left_out(tmp_path: Path) -> None:
    for name, body in MODULES.items():
        (tmp_path / f"{name}.py").write_text(PLUGINS + body)
    info = tmp_path / "sample-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    before, after, errors, works = python(
        """
before = sorted(schedulers.registry.SOLVERS)
assert schedulers.resolve("euler") and "good" not in sys.modules         # ours are found without the plug-ins
s = schedulers.get("my own", grid="half")
print(json.dumps([before, schedulers.names(), schedulers.plugin_errors(),
                  [s.name, s.grid_name, s.nfe(4), schedulers.get("DPM++ 2M").name, schedulers.info("DDIM").reference]]))
""",
        tmp_path,
    )
    assert set(after) - set(before) == {"mine"}
    assert works == ["mine", "half", 4, "dpmpp_2m", schedulers.info("euler").reference]
    undecorated = "the entry point must name a function {} with the decorator schedulers.solver"
    assert {name: reason.partition(": ")[2] for name, reason in errors.items()} == {
        "diffgen.solvers: euler": "ValueError: the name 'euler' is taken, by schedulers.solvers.euler",
        "diffgen.solvers: other": "ValueError: the name 'dpmpp2m' is taken twice, by dpmpp_2m and other",
        "diffgen.solvers: thing": "ValueError: " + undecorated.format("thing"),
        "diffgen.solvers: bare": "ValueError: " + undecorated.format("bare"),
        "diffgen.solvers: broken": "RuntimeError: out of order",
        "diffgen.solvers: exits": "SystemExit: 3",
        "diffgen.solvers: absent": "ModuleNotFoundError: No module named 'not_there'",
        "diffgen.grids: karras": "ValueError: the name 'karras' is taken",
        "diffgen.grids: number": "ValueError: the entry point must name a function of (noise, n)",
    }


@pytest.mark.parametrize("name", registry.REFUSED)
def test_a_name_that_has_no_place_here_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(registry.UnknownName, match="does not exist here: ") as raised:
        registry.parse(name)
    assert registry.REFUSED[name] in str(raised.value)
    assert name in str(raised.value)


@pytest.mark.parametrize("name", registry.REFUSED_GRIDS)
def test_a_grid_that_has_no_place_here_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(registry.UnknownName, match=f"grid '{name}' does not exist here: ") as raised:
        registry.check_grid(name)
    assert registry.REFUSED_GRIDS[name] in str(raised.value)


def test_every_class_of_diffusers_exists_or_is_refused_by_name() -> None:
    import diffusers

    classes = [name for name in dir(diffusers) if name.endswith("Scheduler") and name != "FlaxScheduler"]
    assert len(classes) > 40
    for name in classes:
        assert name in registry.REFUSED or schedulers.resolve(name)


COMFYUI = (  # comfy/samplers.py, September 2026
    "euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpm_2 "
    "dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu "
    "dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde "
    "dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis cfgpp_ud10_ab res_multistep res_multistep_cfg_pp "
    "res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation gradient_estimation_cfg_pp er_sde "
    "seeds_2 seeds_3 sa_solver sa_solver_pece ddim uni_pc uni_pc_bh2"
)
SD_CPP = (
    "euler euler_a heun dpm2 dpm++2s_a dpm++2m dpm++2mv2 dpm++2m_sde dpm++2m_sde_bt ipndm ipndm_v lcm ddim_trailing "
    "tcd res_multistep res_2s er_sde euler_cfg_pp euler_a_cfg_pp euler_ge lms"
)
FORGE = (
    "DPM++ 2M, DPM++ SDE, DPM++ 2M SDE, DPM++ 2M SDE Heun, DPM++ 2S a, DPM++ 3M SDE, Euler a, Euler, LMS, Heun, DPM2, "
    "DPM2 a, DPM fast, DPM adaptive, Restart, HeunPP2, IPNDM, IPNDM_V, DEIS, DDPM, DDIM, DDIM CFG++, PLMS, UniPC, LCM, "
    "[Forge] Flux Realistic, k_dpm_ad, k_dpm_fast, k_dpmpp_2m_ka, k_lms_ka, k_dpm_2_a_ka"
)
SD_NEXT = (
    "Euler SGM, Euler EDM, Euler FlowMatch, DPM++ 1S, DPM++ 2M EDM, DPM++ Cosine, DPM SDE, Heun FlowMatch, DC Solver, "
    "VDM Solver, BDIA DDIM, LMSD, CMSI, UniPC FlowMatch, DPM2 FlowMatch, DPM2++ 2M FlowMatch, TDD, PeRFlow, UFOGen"
)
GRIDS = (
    "simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic kl_optimal discrete ays gits "
    "smoothstep lcm bong_tangent ltx2 logit_normal flux2 flux llada_image polyexponential uniform turbo"
)


def test_every_name_that_other_tools_offer_exists_or_is_refused_by_name() -> None:
    solvers = [*COMFYUI.split(), *SD_CPP.split(), *FORGE.split(", "), *SD_NEXT.split(", ")]
    unknown = []
    for names, read in ((solvers, registry.parse), (GRIDS.split(), registry.check_grid)):
        for name in names:
            try:
                read(name)
            except registry.UnknownName as error:
                unknown += [name] * ("does not exist here: " not in str(error))
    assert not unknown
