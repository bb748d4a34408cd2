"""Grids that are lists of noise levels: Align Your Steps and GITS.

A list was made for one number of steps. Other numbers interpolate it linearly in ln σ. The range of a list is stretched
to that of the noise schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from schedulers.grids import grid, ramp
from schedulers.noise import NoiseSchedule, Point

AYS = "Align Your Steps, Sabour et al. 2024 (2404.14507): its list for ten steps and the end"
INTERPOLATED = "ln σ between the {} of the list, at {}"
LAST_DROPPED = INTERPOLATED.format("11 levels", "the first n of n + 1 even places")
LAST_KEPT = INTERPOLATED.format("11 levels", "n even places")

# The times of Stable Diffusion's noise schedule, or σ/α
AYS_SD15 = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
AYS_SDXL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)
AYS_SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)
AYS_32_SD15 = (
    14.615, 11.2395, 8.64363, 6.64729, 5.57251, 4.71649, 3.99196, 3.51956, 3.1349, 2.79229, 2.48774, 2.21664, 1.97508,
    1.77932, 1.61475, 1.46541, 1.31485, 1.16642, 1.03476, 0.915737, 0.807482, 0.712024, 0.621739, 0.530652, 0.45291,
    0.374915, 0.274618, 0.201153, 0.141059, 0.0668288, 0.0316612, 0.015,
)  # fmt: skip
AYS_32_SDXL = (
    14.615, 11.1492, 8.50522, 6.48827, 5.43707, 4.60399, 3.89855, 3.27407, 2.74397, 2.29969, 1.95449, 1.67109, 1.42878,
    1.23181, 1.0679, 0.925794, 0.802909, 0.696601, 0.604369, 0.528526, 0.467733, 0.413934, 0.362582, 0.310085, 0.265189,
    0.223265, 0.176539, 0.139592, 0.105874, 0.0551937, 0.0287733, 0.015,
)  # fmt: skip
AYS_GITS_SD15 = (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.24, 0.156, 0.104, 0.094, 0.029)
AYS_GITS_SDXL = (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029)

# t·100/999 of the lists for 2, 3, … 20 steps, the end included
GITS = [
    tuple(int(place) for place in row.split())
    for row in """
    100 29 0
    100 49 18 0
    100 61 33 11 0
    100 66 42 21 6 0
    100 83 57 34 15 3 0
    100 83 62 42 23 8 1 0
    100 83 62 45 29 15 6 1 0
    100 83 66 50 34 21 11 4 1 0
    100 83 66 51 38 27 17 9 4 1 0
    100 83 67 54 42 30 21 13 7 3 1 0
    100 83 68 56 45 34 25 17 11 6 3 1 0
    100 86 71 61 49 38 29 21 15 10 6 3 1 0
    100 86 71 62 50 40 31 23 17 12 8 5 3 1 0
    100 88 78 68 58 48 38 30 23 17 12 8 5 3 1 0
    100 88 78 68 58 48 38 30 23 17 13 9 6 4 2 1 0
    100 88 78 68 58 48 38 30 23 17 13 10 7 5 3 2 1 0
    100 88 78 68 59 50 41 33 26 20 15 11 8 6 4 3 2 1 0
    100 88 78 68 59 50 42 34 27 21 16 12 9 7 5 4 3 2 1 0
    100 88 78 68 59 50 42 34 27 21 17 13 10 8 6 5 4 3 2 1 0
    """.strip().splitlines()
]


@grid(LAST_DROPPED, AYS)
def ays(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Align Your Steps' list for Stable Diffusion 1.5, as its authors use it: the last level becomes 0."""
    return _listed(noise, n, _levels(AYS_SD15), n + 1)


@grid(LAST_DROPPED, AYS)
def ays_sdxl(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Align Your Steps' list for SDXL."""
    return _listed(noise, n, _levels(AYS_SDXL), n + 1)


@grid(LAST_DROPPED, AYS)
def ays_svd(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Align Your Steps' list for Stable Video Diffusion."""
    return _listed(noise, n, AYS_SVD, n + 1)


@grid(LAST_KEPT, AYS + "; AUTOMATIC1111 and Forge")
def ays_11(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Align Your Steps' list for Stable Diffusion 1.5, as AUTOMATIC1111 uses it: the last level is a step too."""
    return _listed(noise, n, _levels(AYS_SD15), n)


@grid(LAST_KEPT, AYS + "; AUTOMATIC1111 and Forge")
def ays_11_sdxl(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Align Your Steps' list for SDXL, as AUTOMATIC1111 uses it."""
    return _listed(noise, n, _levels(AYS_SDXL), n)


@grid(INTERPOLATED.format("32 levels", "n even places"), "Forge")
def ays_32(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Forge's list of 32 levels for Stable Diffusion 1.5; in Forge it goes on to σ = 0.015."""
    return _listed(noise, n, AYS_32_SD15, n)


@grid(INTERPOLATED.format("32 levels", "n even places"), "Forge")
def ays_32_sdxl(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Forge's list of 32 levels for SDXL; in Forge it goes on to σ = 0.015."""
    return _listed(noise, n, AYS_32_SDXL, n)


@grid(LAST_KEPT, "Forge; the levels by GITS, Chen et al. 2024 (2405.11326)")
def ays_gits(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Forge's list of 11 levels that GITS found, for Stable Diffusion 1.5."""
    return _listed(noise, n, AYS_GITS_SD15, n)


@grid(LAST_KEPT, "Forge; the levels by GITS, Chen et al. 2024 (2405.11326)")
def ays_gits_sdxl(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """Forge's list of 11 levels that GITS found, for SDXL."""
    return _listed(noise, n, AYS_GITS_SDXL, n)


@grid(
    "a list for each n from 2 to 20, the last level dropped; above, ln σ between the levels of the list for 20",
    "GITS, Chen et al. 2024 (2405.11326), coefficient 1.2; ComfyUI's GITSScheduler, stable-diffusion.cpp",
)
def gits(noise: NoiseSchedule, n: int) -> Sequence[Point]:
    """The paths that GITS found for Stable Diffusion 1.5, which bend least under Euler's steps."""
    places = GITS[min(max(n, 2), 20) - 2]
    return _listed(noise, n, _levels(tuple(place * 9.99 for place in places)), n + 1)


@lru_cache
def _levels(times: tuple[float, ...]) -> tuple[float, ...]:
    noise = NoiseSchedule.scaled_linear()
    return tuple(noise.at(t=t).rho for t in times)


def _listed(noise: NoiseSchedule, n: int, sigmas: tuple[float, ...], count: int) -> Sequence[Point]:
    """The first n of `count` points, interpolated in ln σ; the range of the list is stretched to the schedule's."""
    heights = [math.log(s / sigmas[-1]) / math.log(sigmas[0] / sigmas[-1]) for s in sigmas]  # 1 … 0

    def level(u: float, big: float, small: float) -> float:
        place = u * (n - 1) / max(count - 1, 1) * (len(sigmas) - 1)
        i = min(int(place), len(sigmas) - 2)
        return small * (big / small) ** (heights[i] + (place - i) * (heights[i + 1] - heights[i]))

    return ramp(noise, n, level)
