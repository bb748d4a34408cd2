"""Which scheduler for so many function evaluations? Measured, not derived."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from schedulers.noise import NoiseSchedule

if TYPE_CHECKING:
    from schedulers.scheduler import Scheduler

# For noise up to σ/α = the key: (at most so many evaluations, solver, options, grid).
Row = tuple[float, str, dict[str, Any], str]
TABLES: dict[float, tuple[Row, ...]] = {
    30.0: (  # Stable Diffusion's; searched on scaled_linear
        (4, "unipc", {"order": 3}, "exponential"),
        (6, "ipndm", {"order": 3}, "polyexponential:0.75"),
        (9, "deis", {"order": 3}, "karras:9"),
        (19, "deis", {"order": 3}, "karras:12"),
        (math.inf, "deis", {"order": 4}, "karras"),
    ),
    1000.0: (  # DDPM's linear, EDM; searched on both
        (14, "ipndm", {"order": 3}, "ays_svd"),
        (math.inf, "deis", {"order": 4}, "polyexponential:0.7"),
    ),
    math.inf: (  # to pure noise or nearly: flows, cosine, zero terminal SNR; searched on flow, looked at on the others
        (4, "unipc", {"order": 2}, "trailing"),
        (31, "ipndm", {"order": 3}, "beta_t"),
        (math.inf, "deis", {"order": 4}, "beta_t"),
    ),
}


def recommend(nfe: int, *, noise: str | NoiseSchedule = "scaled_linear", prediction: str = "epsilon") -> Scheduler:
    """The scheduler that measurements speak for at a budget of `nfe` evaluations; run it for `.steps_for(nfe)` steps.

        s = schedulers.recommend(10, noise=noise, prediction=prediction)
        x0 = s.sample(denoiser, x, steps=s.steps_for(10))

    Chosen among all deterministic solvers here, their orders and variants, on all grids, by the median distance to the
    exact solution on Gaussian mixtures in four dimensions, of six components with deviation 0.6 or 0.3 and means from
    N(0, 0.7²), N(0, 1) or N(0, 1.5²): `benchmarks/error_per_nfe.py --search`. Mixtures are not pictures, and guidance
    is not in them: take it as a place to start, and compare on the model itself. Below four evaluations, all are bad.
    `noise` and `prediction` as in `get`. Raises ValueError for nfe < 1 and for what cannot work.
    """
    from schedulers.scheduler import get

    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe must be a whole number, at least 1; got {nfe!r}")
    schedule = NoiseSchedule.named(noise) if isinstance(noise, str) else noise
    rows = next(table for most, table in TABLES.items() if schedule.noisiest.rho <= most)
    name, options, grid = next(row[1:] for row in rows if nfe <= row[0])
    return get(name, noise=schedule, prediction=prediction, grid=grid, **options)
