"""The DDPM paper in code.

    from diffgen.diffusion import GaussianDiffusion
    d = GaussianDiffusion(schedulers.NoiseSchedule.linear(1000), prediction="epsilon")
    loss = d.loss(model, x0, t, noise).mean()
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from schedulers import NoiseSchedule
from schedulers.prediction import check

from .forward import ForwardProcess
from .loss import simple_loss

__all__ = ["GaussianDiffusion"]


class GaussianDiffusion(ForwardProcess):
    """A diffusion process with a network that predicts `prediction`: "epsilon", "sample" or "v_prediction".

    Raises ValueError for a prediction that cannot work with the noise schedule.
    """

    def __init__(self, noise: NoiseSchedule, prediction: str = "epsilon") -> None:
        super().__init__(noise)
        check(prediction, noise)
        self.prediction = prediction

    def loss(self, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Per-example loss [B] of model(x_t, t) against the noise (or another prediction's target): DDPM eq. 14."""
        return simple_loss(self, self.prediction, model, x0, t, noise)
