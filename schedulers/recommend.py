"""Recommend a scheduler for a number of function evaluations, from measurements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from schedulers.noise import NoiseSchedule

if TYPE_CHECKING:
    from schedulers.scheduler import Scheduler

Row = tuple[float, str, dict[str, Any], str]  # evaluations up to which the row holds, solver, options, grid


class Kind(NamedTuple):
    """Noise schedules that share their rows."""

    name: str  # as the documentation calls them
    most: float  # their largest σ/α is at most this; of a flow, its shift
    flow: bool
    rows: tuple[Row, ...]

    def fits(self, noise: NoiseSchedule) -> bool:
        """Whether a noise schedule is of this kind, or of an earlier one."""
        return self.flow is noise.is_flow and (noise.shift if self.flow else noise.noisiest.rho) <= self.most


KINDS = (
    Kind(
        "Stable Diffusion's noise (`scaled_linear`)",
        30.0,
        False,
        (
            (4, "gradient_estimation", {}, "karras:12"),
            (7, "ipndm", {"order": 3}, "polyexponential:0.75"),
            (9, "deis", {"order": 3}, "karras:9"),
            (13, "deis", {"order": 3}, "karras:12"),
            (29, "deis", {"order": 4}, "polyexponential:0.8"),
            (math.inf, "deis", {"order": 4}, "karras"),
        ),
    ),
    Kind(
        "DDPM's and EDM's noise (`linear`, `edm`)",
        1000.0,
        False,
        (
            (4, "unipc", {"order": 3}, "ays_svd"),
            (5, "gradient_estimation", {}, "kl_optimal"),
            (13, "ipndm", {"order": 3}, "laplace:1.5"),
            (29, "ipndm", {"order": 4}, "kl_optimal"),
            (math.inf, "deis", {"order": 4}, "polyexponential:0.65"),
        ),
    ),
    Kind(
        "flows with a shift up to 1.5",
        1.5,
        True,
        (
            (4, "unipc", {"order": 2, "variant": "bh1"}, "trailing:0.45"),
            (6, "unipc", {"order": 2}, "trailing:0.5"),
            (13, "ipndm", {"order": 3}, "smoothstep"),
            (29, "unipc", {"order": 3, "end": "lowered"}, "beta57:1"),
            (math.inf, "deis", {"order": 4}, "beta_t:0.5"),
        ),
    ),
    Kind(
        "flows with a larger shift (SD3, Flux)",
        math.inf,
        True,
        (
            (5, "gradient_estimation", {}, "beta57"),
            (6, "dpmpp_2m", {}, "beta57"),
            (13, "ipndm", {"order": 3}, "beta57:0.4"),
            (17, "ipndm", {"order": 3}, "beta57"),
            (29, "ipndm", {"order": 4}, "beta57:0.6"),
            (math.inf, "deis", {"order": 4}, "beta_t:0.4"),
        ),
    ),
    Kind(
        "other schedules that begin at pure noise (`cosine`, zero terminal SNR)",
        math.inf,
        False,
        (
            (4, "dpmpp_2m", {}, "beta_t:0.4"),
            (5, "res_multistep", {}, "beta57:0.4"),
            (6, "dpmpp_2m", {}, "beta57:0.4"),
            (13, "ipndm", {"order": 3}, "beta_t:0.5"),
            (29, "ipndm", {"order": 3}, "beta57"),
            (math.inf, "deis", {"order": 4}, "beta_t:0.4"),
        ),
    ),
)


def kind_of(noise: NoiseSchedule) -> Kind:
    """The kind of a noise schedule: the first that fits."""
    return next(kind for kind in KINDS if kind.fits(noise))


def recommend(nfe: int, *, noise: str | NoiseSchedule = "scaled_linear", prediction: str = "epsilon") -> Scheduler:
    """The scheduler with the least error at `nfe` evaluations; run it for `.steps_for(nfe)` steps.

        s = schedulers.recommend(10, noise=noise, prediction=prediction)
        x0 = s.sample(denoiser, x, steps=s.steps_for(10))

    `benchmarks/error_per_nfe.py --search` chose it among deterministic solvers, their orders and variants, on all
    grids, by the distance to the exact solution of Gaussian mixtures in 2, 4, 9 and 16 dimensions. On flows it did so
    with the shifts 1, 3 and 6, both with these mixtures and with mixtures as much larger as the shift is. Mixtures are
    not pictures and have no guidance, so start from it and compare on your model. Below four evaluations every solver
    has a large error. `noise` and `prediction` are those of `get`. Raises ValueError for nfe < 1 and for a combination
    that cannot work.
    """
    from schedulers.scheduler import get

    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe must be a whole number, at least 1; got {nfe!r}")
    schedule = NoiseSchedule.named(noise) if isinstance(noise, str) else noise
    name, options, grid = next(row[1:] for row in kind_of(schedule).rows if nfe <= row[0])
    return get(name, noise=schedule, prediction=prediction, grid=grid, **options)


def advice(solver: str) -> str:
    """Where `recommend` takes a solver, in words: "8 to 13 evaluations on …; …"; empty if nowhere."""
    parts = []
    for kind in KINDS:
        spans: list[tuple[float, float]] = []
        least: float = 1
        for most, name, *_ in kind.rows:
            if name == solver:
                joined = spans[-1:] if spans and spans[-1][1] == least - 1 else []
                spans[len(spans) - len(joined) :] = [(joined[0][0] if joined else least, most)]
            least = most + 1
        if spans:
            parts.append(f"{' and '.join(_span(*s) for s in spans)} evaluations on {kind.name}")
    return "; ".join(parts)


def _span(least: float, most: float) -> str:
    """A range of numbers of evaluations, in words."""
    if most == math.inf:
        return f"{least:g} or more"
    return f"up to {most:g}" if least == 1 else f"{least:g}" if least == most else f"{least:g} to {most:g}"
