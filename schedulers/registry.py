"""The names of solvers and grids, here and in other tools, with a suggestion for an unknown name.

Nothing here imports torch. Other packages add solvers and grids by the entry points `diffgen.solvers` and
`diffgen.grids`. They are loaded for a name that is not built in, and for the list of all names. A plug-in that cannot
be loaded, or whose name is taken, is left out and reported by `plugin_errors`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from schedulers.explicit import is_grid_file
from schedulers.grids import GRIDS
from schedulers.solver import SOLVERS, Solver

from . import grids, lists  # noqa: F401  (lists registers its grids)
from . import solvers as _solvers  # noqa: F401  (registers them)

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Other tools' names for a solver with options. The plain names are in the solvers' decorators. A1111 is AUTOMATIC1111.
# The `_k` names of InvokeAI mean the Karras grid. A name that a solver here has too is spelled as here, or follows the
# tool's: comfyui_deis.
_UNIPC = {"order": 3, "end": "lowered"}  # of the other tools
LABELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "DPM++ 2M SDE Heun": ("dpmpp_2m_sde", None, {"variant": "heun"}),  # A1111
    "UniPC": ("unipc", None, {"variant": "bh1", **_UNIPC}),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", None, {"variant": "heun"}),  # ComfyUI
    "dpmpp_2m_sde_heun_gpu": ("dpmpp_2m_sde", None, {"variant": "heun"}),
    "uni_pc": ("unipc", None, {"variant": "bh1", **_UNIPC}),
    "uni_pc_bh2": ("unipc", None, {"variant": "bh2", **_UNIPC}),
    "comfyui_deis": ("deis", None, {"variable": "t"}),
    "comfyui_ipndm_v": ("ipndm_v", None, {"variant": "diff-sampler"}),
    "comfyui_sa_solver": (
        "sa_solver",
        None,
        {"predictor_order": 3, "corrector_order": 4, "tau_at": "end", "end": "lowered", "variant": "exact"},
    ),
    "uni_pc_bh1": ("unipc", None, {"variant": "bh1"}),
    "edm_euler": ("euler", "karras", {}),  # InvokeAI: diffusers' EDM classes, on their own ramp
    "edm_dpmpp_2m": ("dpmpp_2m", "karras", {}),
    "Euler EDM": ("euler", "karras", {}),  # SD.Next
    "DPM++ 2M EDM": ("dpmpp_2m", "karras", {}),
    "Euler SGM": ("euler", "sgm_uniform", {}),
    "DPM++ 1S": ("dpm_solver", None, {"order": 1, "of": "x0", "method": "singlestep"}),
    "DPM++ Cosine": ("dpmpp_2m_sde", None, {}),
    "DPM SDE": ("dpmpp_sde", None, {}),
    "LMSD": ("lms", None, {}),
    "DPM-Solver++": ("dpm_solver", None, {"of": "x0"}),
    "res_2s": ("seeds_2", None, {"eta": 0.0, "variant": "heun"}),  # RES4LYF, stable-diffusion.cpp
}
# Labels of A1111 for other grids than those of nearly the same name here, which are ComfyUI's.
A1111_GRIDS = {"Beta": "beta_sigma", "Align Your Steps": "ays_11", "KL Optimal": "kl_optimal_a1111"}


# Names of other tools that have no place here, with the reason.
_OWN = "it is made for one model, whose own pipeline uses it"
_TOKENS = "it draws discrete tokens; the schedulers here are for noise that is added to pictures or latents"
_SPLIT = "it divides the ancestral noise in its own way; euler_ancestral and dpmpp_2s_ancestral run on flows too"
_UNPUBLISHED = "it is an experiment without a published method"
_FLOW = "the scheduler of that name without FlowMatch runs on flows"
REFUSED = {
    # diffusers
    "UnCLIPScheduler": "it steps to a time that only its own pipelines pass",
    "KarrasVeScheduler": "it is no longer part of diffusers; edm is the same method",
    "SCMScheduler": "its models predict in a parametrization of their own (TrigFlow)",
    "FlowMapEulerDiscreteScheduler": "flow maps are told both times of a step, and networks here one",
    "LTXEulerAncestralRFScheduler": _SPLIT,
    "RePaintScheduler": "it goes back and forth between times, for its own inpainting pipeline",
    "ScoreSdeVeScheduler": "its networks predict the unscaled score, and it draws inside its own pipeline's corrector",
    "DDPMWuerstchenScheduler": "its times are ratios that only its own pipelines use",
    "ConsistencyDecoderScheduler": _OWN,
    **dict.fromkeys(("HeliosScheduler", "HeliosDMDScheduler", "MiniMaxH3Scheduler", "PiflowScheduler"), _OWN),
    "RFD4ProteinaScheduler": _OWN,
    **dict.fromkeys(("AmusedScheduler", "VQDiffusionScheduler", "DiscreteDDIMScheduler"), _TOKENS),
    **dict.fromkeys(("BlockRefinementScheduler", "EntropyBoundScheduler"), _TOKENS),
    # ComfyUI and its extensions
    "cfgpp_ud10_ab": _UNPUBLISHED,
    "er_sde_cns": "its noise depends on frequencies (2605.30332), and noise here is white; er_sde is the solver",
    # Forge, reForge
    **dict.fromkeys(("[Forge] Flux Realistic", "[Forge] Flux Realistic (Slow)", "Kohaku_LoNyu_Yog"), _UNPUBLISHED),
    **dict.fromkeys(("Euler SMEA", "Euler Dy", "Euler SMEA Dy"), "it resizes the latents inside a step"),
    **dict.fromkeys(("Euler Negative", "Euler Dy Negative", "DPM++ SDE CFG++", "DPM++ 3M SDE CFG++"), _UNPUBLISHED),
    **dict.fromkeys(("Euler a RF", "DPM++ 2s a RF"), _SPLIT),
    **dict.fromkeys(
        (f"ODE ({name})" for name in ("Bosh 3", "Fehlberg 2", "Adaptive Heun", "Dormand-Prince 5", "Custom")),
        "it chooses its steps with a general ODE solver; dpm_adaptive does so with one for diffusion",
    ),
    # SD.Next
    **dict.fromkeys(("VDM Solver", "VDMScheduler"), "its noise level is a continuous time of its own models (VDM)"),
    **dict.fromkeys(
        ("BDIA DDIM", "BDIA"), "it steps back exactly from stored pairs of states; ddim_inverse is for inversion"
    ),
    **dict.fromkeys(("DC Solver", "DCSolver"), "its corrections are found for each model; diffgen tune does that"),
    **dict.fromkeys(
        ("CMSI", "TDD", "UFOGen", "PeRFlow"),
        "it is for distilled models of one kind; lcm, tcd and consistency are the ones of this sort here",
    ),
    **dict.fromkeys((f"DPM2++ {kind} FlowMatch" for kind in ("2M", "2S", "SDE", "2M SDE", "3M SDE")), _FLOW),
}
_RESOLUTION = "this shift depends on the resolution: the noise schedule of a flow has it (dynamic)"
REFUSED_GRIDS = {
    **dict.fromkeys(("flux", "flux2", "ltx2"), _RESOLUTION),  # stable-diffusion.cpp
    **dict.fromkeys(("logit_normal", "llada_image"), "it is for one family of models, with that family's numbers"),
    "lcm": "the times that a model was distilled on: use lcm on linspace, or original_inference_steps in diffusers",
}


class UnknownName(ValueError):  # noqa: N818
    """A scheduler, grid or option that does not exist. The message suggests the nearest name, or lists all."""

    def __init__(
        self, kind: str, name: str, names: Iterable[str], near: str | None = None, reason: str | None = None
    ) -> None:
        if reason is not None:
            super().__init__(f"{kind} {name!r} does not exist here: {reason}")
            return
        names = list(names)
        if near is None:
            near = next(iter(difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)), None)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(names)}" if names else "there are none"
        super().__init__(f"unknown {kind} {name!r}: {hint}")


class Label(NamedTuple):
    """The meaning of a name: a solver, a grid (None if the name has none), and options."""

    name: str
    grid: str | None
    options: dict[str, Any]


def names() -> list[str]:
    """Canonical names of the solvers."""
    _load_plugins()
    return sorted(SOLVERS)


def grid_names() -> list[str]:
    """Canonical names of the grids."""
    _load_plugins()
    return sorted(GRIDS)


def info(name: str) -> Solver:
    """The solver with this name or alias. Raises UnknownName."""
    return SOLVERS[parse(name).name]


def resolve(label: str) -> tuple[str, str | None]:
    """(solver, grid or None) of a name: "DPM++ 2M Karras" is ("dpmpp_2m", "karras"). Raises UnknownName."""
    return parse(label)[:2]


def parse(label: str) -> Label:
    """As `resolve`, with the options of the name. Raises UnknownName."""
    match = _parse(label)
    if match is None:
        _load_plugins()
        match = _parse(label)
    if match is None:
        if (reason := _refusal(REFUSED, label)) is not None:
            raise UnknownName("scheduler", label, sorted(SOLVERS), reason=reason)
        alone = {plain: entry.name for plain, entry in _labels(tuple(SOLVERS)).items()}
        both = {_plain(name + grid): f"{name} {grid}" for name in SOLVERS for grid in GRIDS}
        close = difflib.get_close_matches(_plain(label), both, n=1, cutoff=0.85)
        close = close or difflib.get_close_matches(_plain(label), alone, n=1)
        raise UnknownName("scheduler", label, sorted(SOLVERS), (alone | both)[close[0]] if close else None)
    return match


def special_names(name: str) -> list[str]:
    """Other tools' names for a solver on a grid or with options: "uni_pc_bh1 (variant=bh1)"."""
    return [
        f"{label} ({', '.join([*([grid] if grid else []), *(f'{key}={value}' for key, value in options.items())])})"
        if grid or options
        else label
        for label, (solver, grid, options) in LABELS.items()
        if solver == name
    ]


def check_grid(name: str) -> str:
    """The canonical name of a grid, with its number ("karras:5"), or the path of a grid file, which is read.

    Raises UnknownName, and ValueError for a file as `tuned` does.
    """
    if is_grid_file(name):
        grids.tuned(name)
        return name
    plain, colon, number = A1111_GRIDS.get(name, name).partition(":")
    canonical = _grid_labels(tuple(GRIDS)).get(_plain(plain))
    if canonical is None:
        canonical = _grid_labels(tuple(grid_names())).get(_plain(plain))
    if canonical is None:
        raise UnknownName("grid", name, grid_names(), reason=_refusal(REFUSED_GRIDS, name))
    try:
        grids.named(canonical + colon + number)
    except ValueError:  # a wrong number
        raise UnknownName("grid", name, grid_names(), canonical) from None
    return canonical + colon + number


def _refusal(table: dict[str, str], label: str) -> str | None:
    """The reason why a name has no place here; None for a name that no table has."""
    return next((reason for name, reason in table.items() if _plain(name) == _plain(label)), None)


def _parse(label: str) -> Label | None:
    if label in LABELS and LABELS[label][0] in SOLVERS:
        return Label(*LABELS[label])
    for ending, grid in A1111_GRIDS.items():
        if label.endswith(f" {ending}") and (match := _parse(label.removesuffix(f" {ending}"))):
            return match._replace(grid=grid)
    table, plain = _labels(tuple(SOLVERS)), _plain(label)
    for start in ("", "k", "sample"):  # k-diffusion's functions are called k_euler and sample_euler
        rest = plain.removeprefix(start)
        if rest in table:
            return table[rest]
        for ending, grid in _grid_labels(tuple(GRIDS)).items():
            if rest.endswith(ending) and rest.removesuffix(ending) in table:
                return table[rest.removesuffix(ending)]._replace(grid=grid)
        for ending in ("_k", "_ka"):  # InvokeAI's; AUTOMATIC1111's
            if label.lower().endswith(ending) and (short := rest[: 1 - len(ending)]) in table:
                return table[short]._replace(grid="karras")
        for ending in ("automatic", "flowmatch"):
            if rest.removesuffix(ending) in table:
                return table[rest.removesuffix(ending)]
    return None


@cache
def _labels(_names: tuple[str, ...]) -> dict[str, Label]:
    table: dict[str, Label] = {}
    for s in SOLVERS.values():
        for label in _names_of(s):
            if label in table:
                raise ValueError(f"the name {label!r} is taken twice, by {table[label].name} and {s.name}")
            table[label] = Label(s.name, None, {})
    for label, (name, grid, options) in LABELS.items():
        if name in SOLVERS:
            table.setdefault(_plain(label), Label(name, grid, options))
    return table


@cache
def _grid_labels(_names: tuple[str, ...]) -> dict[str, str]:
    """Grid names by label, the longest first: a label that ends in "sgm_uniform" is not "uniform"."""
    table = {_plain(name): name for name in GRIDS} | {_plain(label): name for label, name in grids.ALIASES.items()}
    return dict(sorted(table.items(), key=lambda item: -len(item[0])))


def _names_of(s: Solver) -> set[str]:
    return {_plain(s.name), _plain(s.a1111), *map(_plain, s.aliases)}


def _plain(label: str) -> str:
    """A label without case and separators: the same for "DPM++ 2M", "dpmpp_2m" and "dpm++2m"."""
    return re.sub(r"[\s_\-]", "", label.lower().replace("++", "pp"))


# Plug-ins

_ERRORS: dict[str, str] = {}


def plugin_errors() -> dict[str, str]:
    """The plug-ins that were left out, with the reason: {"diffgen.solvers: name": reason}."""
    _load_plugins()
    return dict(_ERRORS)


@cache
def _load_plugins() -> None:
    from importlib.metadata import entry_points  # imports the package email

    for group, load in (("diffgen.solvers", _load_solver), ("diffgen.grids", _load_grid)):
        for entry in sorted(entry_points(group=group), key=lambda e: (e.name, e.value)):
            solvers_before, grids_before = dict(SOLVERS), dict(GRIDS)
            try:
                load(entry)
            except (Exception, SystemExit) as error:
                _ERRORS[f"{group}: {entry.name}"] = f"{entry.value}: {type(error).__name__}: {error}"
                for table, before in ((SOLVERS, solvers_before), (GRIDS, grids_before)):
                    table.clear()
                    table.update(before)  # type: ignore[arg-type]


def _load_solver(entry: EntryPoint) -> None:
    function = entry.load()
    solver = SOLVERS.get(entry.name)
    if solver is None or solver.function is not function:
        raise ValueError(f"the entry point must name a function {entry.name} with the decorator schedulers.solver")
    _labels(tuple(SOLVERS))


def _load_grid(entry: EntryPoint) -> None:
    if entry.name in GRIDS:
        raise ValueError(f"the name {entry.name!r} is taken")
    function = entry.load()
    if not callable(function):
        raise ValueError("the entry point must name a function of (noise, n)")
    GRIDS[entry.name] = function
