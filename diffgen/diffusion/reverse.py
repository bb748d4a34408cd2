"""The reverse process of DDPM (section 3.2), with the learned variance of Improved DDPM (Nichol & Dhariwal 2021).

The network's output is the `prediction`, [B, C, …]; with learned_range it is [B, 2C, …], and the second half is v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from schedulers import NoiseSchedule
from schedulers.draws import Generators, normal
from schedulers.noise import Point
from schedulers.prediction import Denoised, check, target

from .forward import ForwardProcess
from .names import VARIANCES

Model = Callable[[Tensor, Tensor], Tensor]  # model(x [B, …], t LongTensor [B])
Clip = tuple[float, float] | None  # the range to which x̂0 is limited


class ReverseProcess(ForwardProcess):
    """The paper's p_θ: the meaning of the network's output, the variance of a step, and sampling.

    Raises ValueError for a prediction that cannot work with the noise schedule, and for an unknown variance.
    """

    def __init__(self, noise: NoiseSchedule, prediction: str = "epsilon", variance: str = "fixed_small") -> None:
        super().__init__(noise)
        check(prediction, noise)
        if variance not in VARIANCES:
            raise ValueError(f"unknown variance {variance!r}; there are {', '.join(VARIANCES)}")
        self.prediction, self.variance = prediction, variance
        # x̂0 and ε̂ are linear in (x_t, output), so their values at (1, 0) and (0, 1) are the factors
        points = [Point(t, a, s) for t, (a, s) in enumerate(zip(self.alpha.tolist(), self.sigma.tolist(), strict=True))]
        of_x = [Denoised(1.0, 0.0, p, prediction) for p in points]
        of_output = [Denoised(0.0, 1.0, p, prediction) for p in points]
        self.x0_of_x = torch.tensor([d.x0 for d in of_x], dtype=torch.float64)
        self.x0_of_output = torch.tensor([d.x0 for d in of_output], dtype=torch.float64)
        self.eps_of_x = torch.tensor([d.eps for d in of_x], dtype=torch.float64)
        self.eps_of_output = torch.tensor([d.eps for d in of_output], dtype=torch.float64)
        # for logarithms β̃_0 := β̃_1, as in Improved DDPM's code, or β_0 if there is only one step
        first = self.beta_tilde[1:2] if self.T > 1 else self.beta[:1]
        self.log_beta, self.log_beta_tilde = self.beta.log(), torch.cat([first, self.beta_tilde[1:]]).log()

    def split(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the prediction, v) of the output; v is None with a fixed variance. Raises ValueError for a wrong shape."""
        learned = self.variance == "learned_range"
        shape = [x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:]] if learned else list(x_t.shape)
        if list(model_output.shape) != shape:
            raise ValueError(
                f"the model's output has the shape {list(model_output.shape)}; a picture of {list(x_t.shape)} with "
                f"{self.variance} needs {shape}"
            )
        if not learned:
            return model_output, None
        output, v = model_output.chunk(2, dim=1)
        return output, v

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The output that the network is trained to give for x_t: a·x0 + b·ε, shaped like x0."""
        return target(self.prediction, Point(t, self.at("alpha", t, x0), self.at("sigma", t, x0)), x0, noise)

    def predict_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """DDPM eq. 15: x̂0, the clean picture that x_t and the output imply (algebra: `schedulers.prediction`)."""
        return self.at("x0_of_x", t, x_t) * x_t + self.at("x0_of_output", t, x_t) * output

    def predict_eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """ε̂, the noise that x_t and the output imply."""
        return self.at("eps_of_x", t, x_t) * x_t + self.at("eps_of_output", t, x_t) * output

    def p_mean(self, output: Tensor, x_t: Tensor, t: Tensor, clip: Clip = None) -> Tensor:
        """DDPM eq. 11: μ_θ, the mean of q(x_{t-1} | x_t, x_0) with x̂0, limited to the range `clip`, as x_0."""
        x0 = self.predict_x0(output, x_t, t)
        return self.q_posterior(x0 if clip is None else x0.clamp(*clip), x_t, t)[0]

    def p_log_variance(self, v: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Improved DDPM eq. 15: f·ln β_t + (1 − f)·ln β̃_t, f = (v + 1)/2; fixed_small is f = 0, fixed_large f = 1."""
        if v is None:
            return self.at("log_beta" if self.variance == "fixed_large" else "log_beta_tilde", t, x_t)
        f = (v + 1) / 2
        return f * self.at("log_beta", t, x_t) + (1 - f) * self.at("log_beta_tilde", t, x_t)

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, *, clip: Clip = None
    ) -> tuple[Tensor, Tensor]:
        """DDPM eq. 1: (mean, variance) of p_θ(x_{t-1} | x_t), both of x_t's shape.

        The variance of fixed_small is β̃_t (0 at t = 0), of fixed_large β_t (DDPM section 3.2). `clip` is the range of
        the data: (−1, 1) for pixels, None for latents.
        """
        output, v = self.split(model_output, x_t)
        mean = self.p_mean(output, x_t, t, clip)
        if v is not None:
            return mean, self.p_log_variance(v, x_t, t).exp()
        return mean, self.at("beta" if self.variance == "fixed_large" else "beta_tilde", t, x_t).expand_as(mean)

    def p_sample(
        self, model: Model, x_t: Tensor, t: Tensor, generator: Generators = None, *, clip: Clip = None
    ) -> Tensor:
        """DDPM algorithm 2, lines 3 and 4: one step x_t → x_{t-1}. The last step, t = 0, adds no noise."""
        mean, variance = self.p_mean_variance(model(x_t, t), x_t, t, clip=clip)
        deviation = variance.sqrt() * (t > 0).reshape(-1, *[1] * (x_t.ndim - 1))
        return mean + deviation * normal(x_t.shape, generator, x_t.device)

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        shape: Sequence[int],
        generator: Generators = None,
        *,
        device: torch.device | str = "cpu",
        clip: Clip = None,
        progress: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """DDPM algorithm 2: the whole reverse process from a standard normal, float32 [B, …].

        `generator` is one for all images, or a sequence with one for each image, which then does not depend on its
        batch. `progress(t, x)` is called after each step t = T−1 … 0 with its result x_{t-1}.
        """
        x = normal(shape, generator, device)
        for step in reversed(range(self.T)):
            x = self.p_sample(model, x, torch.full((shape[0],), step, device=device), generator, clip=clip)
            if progress is not None:
                progress(step, x)
        return x
