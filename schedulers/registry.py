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
}
# Labels of A1111 for other grids than those of nearly the same name here, which are ComfyUI's.
A1111_GRIDS = {"Beta": "beta_sigma", "Align Your Steps": "ays_11", "KL Optimal": "kl_optimal_a1111"}


_CFG_PP = "CFG++ needs the network's output without the prompt too, and a scheduler receives the guided output alone"
# Names of other tools that have no place here, with the reason.
REFUSED = {
    **dict.fromkeys(
        (
            *(f"{name}_cfg_pp" for name in ("euler", "euler_ancestral", "euler_a", "dpmpp_2s_ancestral", "dpmpp_2m")),
            *(f"{name}_cfg_pp" for name in ("res_multistep", "res_multistep_ancestral", "gradient_estimation")),
            *("DDIM CFG++", "CFG++ DDIM"),
        ),
        _CFG_PP,
    ),
    "UnCLIPScheduler": "it steps to a time that only its own pipelines pass",
    "KarrasVeScheduler": "it is no longer part of diffusers; edm is the same method",
    "SCMScheduler": "its models predict in a parametrization of their own (TrigFlow)",
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
        reason = next((why for name, why in REFUSED.items() if _plain(name) == _plain(label)), None)
        if reason is not None:
            raise UnknownName("scheduler", label, sorted(SOLVERS), reason=reason)
        alone = {plain: entry.name for plain, entry in _labels(tuple(SOLVERS)).items()}
        both = {_plain(name + grid): f"{name} {grid}" for name in SOLVERS for grid in GRIDS}
        close = difflib.get_close_matches(_plain(label), both, n=1, cutoff=0.85)
        close = close or difflib.get_close_matches(_plain(label), alone, n=1)
        raise UnknownName("scheduler", label, sorted(SOLVERS), (alone | both)[close[0]] if close else None)
    return match


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
        raise UnknownName("grid", name, grid_names())
    try:
        grids.named(canonical + colon + number)
    except ValueError:  # a wrong number
        raise UnknownName("grid", name, grid_names(), canonical) from None
    return canonical + colon + number


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
        if label.lower().endswith("_k") and rest[:-1] in table:
            return table[rest[:-1]]._replace(grid="karras")
        if rest.removesuffix("automatic") in table:
            return table[rest.removesuffix("automatic")]
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
