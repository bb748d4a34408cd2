"""What does the network's output mean?

A prediction is two numbers (a, b) at each noise level: output = a·x0 + b·ε. With x = α·x0 + σ·ε that gives back

    x0 = (b·x − σ·output) / (α·b − σ·a)        ε = (α·output − a·x) / (α·b − σ·a)

and the training target is a·x0 + b·ε. Where the denominator is 0 the output does not determine x0: refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from .noise import NoiseSchedule, Point

PREDICTIONS: dict[str, Callable[[Point], tuple[Any, Any]]] = {
    "epsilon": lambda p: (0.0, 1.0),  # DDPM section 3.2
    "sample": lambda p: (1.0, 0.0),  # x0 itself
    "v_prediction": lambda p: (-p.sigma, p.alpha),  # Progressive Distillation, appendix D
    "flow_prediction": lambda p: (-1.0, 1.0),  # rectified flow: ε − x0
}


def target(prediction: str, p: Point, x0: Any, eps: Any) -> Any:
    """What the network should have put out: a·x0 + b·ε."""
    a, b = PREDICTIONS[prediction](p)
    return a * x0 + b * eps


def check(prediction: str, noise: NoiseSchedule) -> None:
    """Raise ValueError for an unknown prediction, or one that cannot work from the noisiest point of this schedule."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; there are {', '.join(PREDICTIONS)}")
    p = noise.noisiest
    a, b = PREDICTIONS[prediction](p)
    if p.alpha * b - p.sigma * a == 0:
        raise ValueError(
            f"{prediction} prediction cannot work with {noise!r}: at t = {p.t:g} there is no signal (α = 0), so the output "
            "does not determine the picture; use v_prediction, sample or flow_prediction"
        )


class Denoised:
    """The answer to a solver's question: the state `x` as it came back, the raw `output`, and what follows from them."""

    def __init__(self, x: Any, output: Any, p: Point, prediction: str) -> None:
        self.x, self.output, self._p = x, output, p
        self._a, self._b = PREDICTIONS[prediction](p)
        self._det = p.alpha * self._b - p.sigma * self._a

    @cached_property
    def x0(self) -> Any:
        """The clean picture that x and the output imply."""
        if self._b == 0:
            return self.output if self._a == 1 else self.output / self._a
        return self.x * (self._b / self._det) - self.output * (self._p.sigma / self._det)

    @cached_property
    def eps(self) -> Any:
        """The noise that x and the output imply."""
        if self._a == 0:
            return self.output if self._b == 1 else self.output / self._b
        return self.output * (self._p.alpha / self._det) - self.x * (self._a / self._det)
