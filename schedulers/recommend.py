"""Recommend a scheduler for a number of function evaluations, from measurements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from schedulers.noise import NoiseSchedule

if TYPE_CHECKING:
    from schedulers.scheduler import Scheduler

# For schedules with σ/α up to the key: (number of evaluations up to which the row holds, solver, options, grid).
Row = tuple[float, str, dict[str, Any], str]
TABLES: dict[float, tuple[Row, ...]] = {
    30.0: (  # Stable Diffusion; searched on scaled_linear
        (4, "unipc", {"order": 3}, "exponential"),
        (6, "ipndm", {"order": 3}, "polyexponential:0.75"),
        (9, "deis", {"order": 3}, "karras:9"),
        (19, "deis", {"order": 3}, "karras:12"),
        (math.inf, "deis", {"order": 4}, "karras"),
    ),
    1000.0: (  # DDPM's linear and EDM; searched on both
        (14, "ipndm", {"order": 3}, "ays_svd"),
        (math.inf, "deis", {"order": 4}, "polyexponential:0.7"),
    ),
    math.inf: (  # pure noise or nearly: flows, cosine, zero terminal SNR; searched on flow, checked on the others
        (4, "unipc", {"order": 2}, "trailing"),
        (31, "ipndm", {"order": 3}, "beta_t"),
        (math.inf, "deis", {"order": 4}, "beta_t"),
    ),
}


def recommend(nfe: int, *, noise: str | NoiseSchedule = "scaled_linear", prediction: str = "epsilon") -> Scheduler:
    """The scheduler with the least error at `nfe` evaluations; run it for `.steps_for(nfe)` steps.

        s = schedulers.recommend(10, noise=noise, prediction=prediction)
        x0 = s.sample(denoiser, x, steps=s.steps_for(10))

    `benchmarks/error_per_nfe.py --search` chose it among all deterministic solvers, their orders and variants, on all
    grids, by the median distance to the exact solution of Gaussian mixtures: four dimensions, six components with
    deviation 0.6 or 0.3 and means from N(0, 0.7²), N(0, 1) or N(0, 1.5²). Mixtures are not pictures and have no
    guidance, so start from it and compare on your model. Below four evaluations every solver has a large error.
    `noise` and `prediction` are those of `get`. Raises ValueError for nfe < 1 and for a combination that cannot work.
    """
    from schedulers.scheduler import get

    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe must be a whole number, at least 1; got {nfe!r}")
    schedule = NoiseSchedule.named(noise) if isinstance(noise, str) else noise
    rows = next(table for most, table in TABLES.items() if schedule.noisiest.rho <= most)
    name, options, grid = next(row[1:] for row in rows if nfe <= row[0])
    return get(name, noise=schedule, prediction=prediction, grid=grid, **options)
