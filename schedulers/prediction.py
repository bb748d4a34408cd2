"""The prediction: what the network's output means.

A prediction is two numbers (a, b) at each noise level: output = a·x0 + b·ε. With x = α·x0 + σ·ε it follows that

    x0 = (b·x − σ·output) / (α·b − σ·a)        ε = (α·output − a·x) / (α·b − σ·a)

The training target is a·x0 + b·ε. If the denominator is 0, the output does not determine x0, and `check` raises.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

from schedulers.noise import NoiseSchedule, Point, ops

Pair = Callable[[Point], tuple[Any, Any]]  # (a, b) at a point


def _edm(sigma_data: float, sign: int) -> Pair:
    """EDM eq. 7, solved for the network: F = (x0 − c_skip·x)/c_out, where x = x0 + σ·ε."""

    def pair(p: Point) -> tuple[Any, Any]:
        norm = sign * sigma_data * ops(p.sigma).sqrt(p.sigma**2 + sigma_data**2)
        return p.sigma / norm, -(sigma_data**2) / norm

    return pair


PLAIN: dict[str, Pair] = {  # on every schedule
    "epsilon": lambda p: (0.0, 1.0),  # DDPM section 3.2
    "sample": lambda p: (1.0, 0.0),  # x0 itself
    "v_prediction": lambda p: (-p.sigma, p.alpha),  # Progressive Distillation, appendix D
    "flow_prediction": lambda p: (-1.0, 1.0),  # rectified flow: ε − x0
}
EDM_SIGNS = {  # on edm schedules, whose sigma_data `bind` uses
    "edm": 1,  # the F of EDM's preconditioning
    "edm_v": -1,  # the same with the other sign: diffusers' EDM classes with v_prediction, Stable Video
}
PREDICTIONS = PLAIN | {name: _edm(0.5, sign) for name, sign in EDM_SIGNS.items()}


def bind(prediction: str, noise: NoiseSchedule) -> Pair:
    """(a, b) of a prediction on this schedule, with its sigma_data."""
    if prediction in EDM_SIGNS:
        return _edm(noise.sigma_data, EDM_SIGNS[prediction])
    return PREDICTIONS[prediction]


def input_scale(prediction: str, noise: NoiseSchedule, p: Point) -> float:
    """The factor of the state in the network's input: 1, or EDM's c_in = 1/√(σ² + σ_data²)."""
    if prediction in EDM_SIGNS:
        return 1 / math.sqrt(p.sigma**2 + noise.sigma_data**2)
    return 1.0


def target(prediction: str, p: Point, x0: Any, eps: Any) -> Any:
    """The output that the network is trained to give: a·x0 + b·ε."""
    a, b = PREDICTIONS[prediction](p)
    return a * x0 + b * eps


def check(prediction: str, noise: NoiseSchedule) -> None:
    """Raise ValueError for an unknown prediction, or one that cannot work from the noisiest point of this schedule."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; there are {', '.join(PREDICTIONS)}")
    if prediction in EDM_SIGNS and noise.name != "edm":
        raise ValueError(f"{prediction} is the preconditioning of an edm schedule; this is {noise!r}")
    p = noise.noisiest
    a, b = bind(prediction, noise)(p)
    if p.alpha * b - p.sigma * a == 0:
        raise ValueError(
            f"{prediction} prediction cannot work with {noise!r}: at t = {p.t:g} there is no signal (α = 0), so the "
            "output does not determine the picture; use v_prediction, sample or flow_prediction"
        )


class Denoised:
    """One evaluation: the state `x` (a pipeline may have edited it), the raw `output`, and the x0 and eps they imply.

    If the output has twice the channels of x, the second half is a learned variance, which x0 and eps ignore. `limit`
    changes x0 (see `clip` and `threshold`); eps is then the rest of x. `without` is the output without the prompt,
    where the output is guided and the solver needs both (see solvers/cfg_pp.py).
    """

    def __init__(
        self,
        x: Any,
        output: Any,
        p: Point,
        prediction: str | Pair,
        limit: Callable[[Any], Any] | None = None,
        without: Any = None,
    ) -> None:
        self.x, self.output, self._p, self._limit = x, output, p, limit
        self._without = None if without is None else Denoised(x, without, p, prediction, limit)
        self._a, self._b = (PREDICTIONS[prediction] if isinstance(prediction, str) else prediction)(p)
        self._det = p.alpha * self._b - p.sigma * self._a

    @property
    def unconditional(self) -> Denoised:
        """The evaluation of the same state without the prompt; this one, if there is no other."""
        return self if self._without is None else self._without

    @cached_property
    def predicted(self) -> Any:
        """The output without a learned variance."""
        twice = getattr(self.output, "ndim", 0) > 1 and self.output.shape[1] == 2 * self.x.shape[1]
        return self.output[:, : self.x.shape[1]] if twice else self.output

    @cached_property
    def x0(self) -> Any:
        """The clean picture that x and the output imply."""
        if self._b == 0:
            x0 = self.predicted if self._a == 1 else self.predicted / self._a
        else:
            x0 = combine(self._b / self._det, self.x, -self._p.sigma / self._det, self.predicted)
        return x0 if self._limit is None else self._limit(x0)

    @cached_property
    def eps(self) -> Any:
        """The noise that x and the output imply."""
        if self._limit is not None:
            return combine(1 / self._p.sigma, self.x, -self._p.alpha / self._p.sigma, self.x0)
        if self._a == 0:
            return self.predicted if self._b == 1 else self.predicted / self._b
        return combine(self._p.alpha / self._det, self.predicted, -self._a / self._det, self.x)


def combine(a: Any, x: Any, b: Any, y: Any) -> Any:
    """a·x + b·y; two passes instead of three for tensors with Python numbers as weights."""
    if isinstance(a, float) and isinstance(b, float) and hasattr(x, "add_"):
        return (x * a).add_(y, alpha=b)
    return a * x + b * y


def clip(x0: Any, limit: float) -> Any:
    """x0 inside [−limit, limit]."""
    return x0.clamp(-limit, limit)


def threshold(x0: Any, ratio: float, limit: float) -> Any:
    """x0 clipped to ±s and divided by s, the quantile `ratio` of an image's |x0|, 1 to `limit` (Imagen section 2.3)."""
    size = sys.modules["torch"].quantile(x0.abs().reshape(len(x0), -1), ratio, dim=1).clamp(1, limit)
    size = size.reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-size, size) / size
