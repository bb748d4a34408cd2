"""The forward process of DDPM (Ho et al. 2020, section 2): noise comes in, step by step or all at once.

Times t are LongTensor [B], 0-based: t = 0 is the first step. Pictures and noise are [B, …]; every table is float64 and is
used in the dtype of the picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schedulers import NoiseSchedule


class ForwardProcess:
    """q of the paper, for a noise schedule with a table of T levels."""

    def __init__(self, noise: NoiseSchedule) -> None:
        if not noise.alphas_cumprod:
            raise ValueError(f"the forward process needs a schedule with a table of steps, and {noise!r} has none")
        self.noise = noise
        self.T = noise.T
        self.beta = torch.tensor(noise.betas, dtype=torch.float64)
        self.alpha_bar = torch.tensor(noise.alphas_cumprod, dtype=torch.float64)
        self.alpha_bar_before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        # β̃_t, the variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7); 0 at t = 0
        self.beta_tilde = self.beta * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    def at(self, table: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """table[t] in x's dtype and on its device, shaped to multiply x [B, …]. Raises ValueError for a t that does not fit."""
        if t.dtype != torch.int64 or t.shape != x.shape[:1]:
            raise ValueError(f"t must be a LongTensor [{x.shape[0]}], got {t.dtype} {list(t.shape)}")
        return table.to(x.device)[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    def q_step(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """DDPM eq. 2: one step of q(x_t | x_{t-1}) = N(√(1 − β_t)·x_{t-1}, β_t·I)."""
        beta = self.at(self.beta, t, x)
        return (1 - beta).sqrt() * x + beta.sqrt() * noise

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """DDPM eq. 4: all steps at once, q(x_t | x_0) = N(√ᾱ_t·x_0, (1 − ᾱ_t)·I)."""
        return self.at(self.alpha_bar.sqrt(), t, x0) * x0 + self.at((1 - self.alpha_bar).sqrt(), t, x0) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """DDPM eq. 6 and 7: (mean, variance) of q(x_{t-1} | x_t, x_0); the variance [B, 1, …] is 0 at t = 0."""
        of_x0 = self.alpha_bar_before.sqrt() * self.beta / (1 - self.alpha_bar)
        of_x_t = (1 - self.beta).sqrt() * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)
        mean = self.at(of_x0, t, x_t) * x0 + self.at(of_x_t, t, x_t) * x_t
        return mean, self.at(self.beta_tilde, t, x_t)
