"""A diffusion process with a network: its output, its training loss, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from schedulers import NoiseSchedule
from schedulers.draws import Generators

from .likelihood import bits_per_dim_ode, variational_bound
from .loss import hybrid_loss, simple_loss, stop_mean, vlb_loss, weight_table
from .names import OBJECTIVES
from .reverse import Clip, Model, ReverseProcess


class GaussianDiffusion(ReverseProcess):
    """A diffusion process with a network: the meaning of its output, its training loss, sampling and likelihood.

    prediction  "epsilon", "sample", "v_prediction" or "flow_prediction"
    variance    "fixed_small" (β̃_t), "fixed_large" (β_t), or "learned_range": the output has 2C channels, half of them v
    objective   "simple", which does not train v; "hybrid", L_simple + vlb_weight·L_vlb; or "vlb"
    weight      of the squared error of x̂0 in L_simple: a name of `names.WEIGHTS`, a function of the SNR, or None for
                the plain squared error of the output
    levels      the number of values of the data, evenly from −1 to 1

    Raises ValueError for an unknown name, and for a combination that cannot work.
    """

    def __init__(
        self,
        noise: NoiseSchedule,
        prediction: str = "epsilon",
        variance: str = "fixed_small",
        *,
        objective: str = "simple",
        weight: str | Callable[[Tensor], Tensor] | None = None,
        vlb_weight: float = 0.001,
        levels: int = 256,
    ) -> None:
        super().__init__(noise, prediction, variance)
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")
        if objective == "hybrid" and variance != "learned_range":
            raise ValueError("the hybrid objective trains a learned variance: it needs variance='learned_range'")
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.objective, self.vlb_weight, self.levels = objective, vlb_weight, levels
        self.loss_weight = weight_table(self, weight)

    def __repr__(self) -> str:
        return f"<{self.objective} loss of {self.prediction} on {self.noise!r}, variance {self.variance}>"

    def weights(self, t: Tensor, x0: Tensor) -> Tensor:
        """The factors of the output's squared error at times t, shaped to multiply x0."""
        return self.at("loss_weight", t, x0)

    def loss(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """DDPM algorithm 1, line 5: the loss of model(x_t, t) for each example, [B], by the chosen objective."""
        x_t = self.q_sample(x0, t, noise)
        output = model(x_t, t)
        if self.objective == "vlb":
            return vlb_loss(self, output, x0, x_t, t, self.levels)
        simple = self.weights(t, x0).flatten() * simple_loss(self, output, x0, x_t, t, noise)
        if self.objective == "simple":
            return simple
        return hybrid_loss(
            simple, vlb_loss(self, stop_mean(self, output, x_t), x0, x_t, t, self.levels), self.vlb_weight
        )

    def bits_per_dim(
        self,
        model: Model,
        x0: Tensor,
        generator: Generators = None,
        *,
        clip: Clip = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """DDPM eq. 5: the variational bound of each example, [B] bits per dimension; T evaluations of the network."""
        return variational_bound(self, model, x0, generator, levels=self.levels, clip=clip, progress=progress).sum(0)

    def bits_per_dim_ode(
        self,
        model: Model,
        x0: Tensor,
        generator: Generators = None,
        *,
        steps: int | None = None,
        probes: int | None = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """The same by the probability-flow ODE, [B] bits per dimension; see `likelihood.bits_per_dim_ode`."""
        return bits_per_dim_ode(
            self, model, x0, generator, levels=self.levels, steps=steps, probes=probes, progress=progress
        )
