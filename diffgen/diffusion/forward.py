"""The forward process of DDPM (Ho et al. 2020, section 2): add noise, step by step or all at once.

Times t are LongTensor [B], 0-based: t = 0 is the first step. Pictures and noise are [B, …] of a floating dtype. Tables
are float64 and are used in float32, or in float64 for float64 pictures; never in a half-precision dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schedulers import NoiseSchedule


class ForwardProcess:
    """The paper's q, for a noise schedule with a table of T levels. Raises ValueError for one without a table."""

    def __init__(self, noise: NoiseSchedule) -> None:
        if not noise.alphas_cumprod:
            raise ValueError(f"the forward process needs a noise schedule with a table; {noise!r} has none")
        self.noise = noise
        self.T = noise.T
        self.beta = torch.tensor(noise.betas, dtype=torch.float64)
        self.alpha_bar = torch.tensor(noise.alphas_cumprod, dtype=torch.float64)
        self.alpha_bar_before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        # x_t = alpha·x0 + sigma·ε, as everywhere in `schedulers`; the paper's α_t is 1 − beta
        self.alpha, self.sigma = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        # q(x_{t-1} | x_t, x_0), DDPM eq. 7: the two factors of its mean, and its variance β̃_t, which is 0 at t = 0
        self.mean_of_x0 = self.alpha_bar_before.sqrt() * self.beta / (1 - self.alpha_bar)
        self.mean_of_x_t = (1 - self.beta).sqrt() * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)
        self.beta_tilde = self.beta * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def at(self, table: str, t: Tensor, x: Tensor) -> Tensor:
        """The entries t of a table (the name of an attribute) on x's device, shaped to multiply x [B, …].

        Raises ValueError if t is not a LongTensor [B], if it lies outside 0 … T−1 (checked on a CPU only), and if x has
        an integer dtype.
        """
        if t.dtype != torch.int64 or t.shape != x.shape[:1]:
            raise ValueError(f"t must be a LongTensor [{x.shape[0]}], got {t.dtype} {list(t.shape)}")
        on_cpu = t.device.type == "cpu"  # on another device the check would wait for it
        if on_cpu and bool(((t < 0) | (t >= self.T)).any()):
            raise ValueError(f"t must lie in 0 … {self.T - 1}, got {t.min().item()} … {t.max().item()}")
        if not x.is_floating_point():
            raise ValueError(f"pictures must be floating point, in the model's range; got {x.dtype}")
        key = (table, x.device, torch.promote_types(x.dtype, torch.float32))
        if key not in self._copies:  # copied once for each device: a copy in each call would stall it
            self._copies[key] = getattr(self, table).to(key[2]).to(x.device)
        return self._copies[key][t].reshape(-1, *[1] * (x.ndim - 1))

    def q_step(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """DDPM eq. 2: one step of q(x_t | x_{t-1}) = N(√(1 − β_t)·x_{t-1}, β_t·I)."""
        beta = self.at("beta", t, x)
        return ((1 - beta).sqrt() * x + beta.sqrt() * noise).to(x.dtype)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """DDPM eq. 4: all steps at once, q(x_t | x_0) = N(√ᾱ_t·x_0, (1 − ᾱ_t)·I)."""
        return (self.at("alpha", t, x0) * x0 + self.at("sigma", t, x0) * noise).to(x0.dtype)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """DDPM eq. 6 and 7: (mean, variance) of q(x_{t-1} | x_t, x_0), shaped like x_t; variance 0 at t = 0."""
        mean = self.at("mean_of_x0", t, x_t) * x0 + self.at("mean_of_x_t", t, x_t) * x_t
        return mean, self.at("beta_tilde", t, x_t).expand_as(mean)
