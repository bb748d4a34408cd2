"""The training objective."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from schedulers.noise import Point
from schedulers.prediction import target

from .forward import ForwardProcess


def simple_loss(
    forward: ForwardProcess, prediction: str, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """DDPM eq. 14: L_simple = E‖ε − ε_θ(x_t, t)‖², as the mean over the elements of each picture, [B].

    With another prediction than epsilon the target is that prediction's a·x0 + b·ε.
    """
    output = model(forward.q_sample(x0, t, noise), t)
    if output.shape != x0.shape:
        raise ValueError(f"the model's output has the shape {list(output.shape)}, and the picture {list(x0.shape)}")
    p = Point(t, forward.at(forward.alpha_bar.sqrt(), t, x0), forward.at((1 - forward.alpha_bar).sqrt(), t, x0))
    error = target(prediction, p, x0, noise) - output
    return error.square().flatten(1).mean(1)
