"""What a scheduler hands to diffusers' pipelines and training scripts: configuration, outputs, the index of a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from schedulers.noise import NoiseSchedule

RELATIVE_ROUNDING = 2.0**-8  # of a time in bfloat16


class Config(dict):
    """A dictionary whose keys can be read as attributes, as pipelines do."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key. Warns where a class of diffusers begins to build itself from this configuration."""
        if key == "_use_default_values" and "solver" in self:
            warnings.warn(
                f"a scheduler of diffusers is built from the configuration of {self['solver']} on {self['grid']}: it "
                "keeps the noise schedule and the prediction, not solver, grid and options. DDIMPipeline does this in "
                "its constructor; set pipe.scheduler afterwards",
                stacklevel=4,
            )
        return super().get(key, default)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class StepOutput(Config):
    """What `Scheduler.step` returns, with the behaviour of diffusers' outputs: keys, attributes, numbers, a tuple.

    `prev_sample` is the next state, `pred_original_sample` the clean picture that the network predicts.
    """

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The values in the order of the keys."""
        return tuple(self.values())


def index_of_view(time: Any, times: Tensor) -> int | None:
    """The index in `times` of a tensor that is a view into it, without reading the device; None for another tensor."""
    if not isinstance(time, Tensor) or time.device != times.device or time.is_meta:
        return None
    if time.numel() == 0 or time.untyped_storage().data_ptr() != times.untyped_storage().data_ptr():
        return None
    return int(time.storage_offset() - times.storage_offset())


def index_of_value(time: float, times: Sequence[float], expected: int | None = None) -> int:
    """The index of the nearest of `times`, within the rounding of bfloat16. Raises ValueError if none is that near.

    If several times are equally near, `expected` if it is among them, else the last: a step of several evaluations
    ends at a time where the next one begins, and a run begins with a step.
    """
    distance = min((abs(t - time) for t in times), default=float("inf"))
    if not distance <= RELATIVE_ROUNDING * abs(time) + 1e-5:
        raise ValueError(f"the time {time:g} is not among the timesteps, which are {brief(times)}")
    nearest = [i for i, t in enumerate(times) if abs(t - time) <= distance + 1e-6 * abs(time)]
    return expected if expected in nearest else nearest[-1]


def is_default_ramp(sigmas: Sequence[float]) -> bool:
    """Whether these are 1, 1 − 1/n, …, 1/n, which the pipelines of flows pass if their caller chose no list."""
    n = len(sigmas)
    return all(abs(sigma - (1 - k / n)) < 1e-4 for k, sigma in enumerate(sigmas))


def distilled_times(noise: NoiseSchedule, n: int, original: int, strength: float) -> list[int]:
    """n of the `original` even times on which a latent consistency model is distilled, below a share of the noise.

    The times are i·⌊T/original⌋ − 1 for i up to original·strength; number ⌊k·count/n⌋ from above is taken. Raises
    ValueError where there are fewer than n.
    """
    count = int(original * strength)
    if not noise.alphas_cumprod or not 0 < n <= count or original > noise.T:
        raise ValueError(
            f"{n} steps of {original} times · strength {strength:g} ({count}) are not possible on {noise!r}"
        )
    return [(count - k * count // n) * (noise.T // original) - 1 for k in range(n)]


def brief(times: Sequence[float]) -> str:
    """The first two and the last of these times, in words."""
    ends = times if len(times) < 5 else [*times[:2], times[-1]]
    texts = [f"{t:g}" for t in ends]
    return ", ".join(texts if len(times) < 5 else [*texts[:2], "…", texts[2]]) or "not set"
