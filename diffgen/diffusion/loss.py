"""The training objectives: L_simple and its weights, L_vlb, the hybrid, and importance sampling of times for L_vlb.

A weight is the factor w(SNR) of ‖x0 − x̂0‖², so that every prediction is trained on the same objective. Without a
weight, each prediction has the plain squared error of its own output, which is the weight SNR for epsilon, 1 for
sample, SNR + 1 for v_prediction and (√SNR + 1)² for flow_prediction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from schedulers.draws import Generators, normal

from .likelihood import bound_term
from .names import WEIGHTS
from .reverse import ReverseProcess


def weight_table(process: ReverseProcess, weight: str | Callable[[Tensor], Tensor] | None) -> Tensor:
    """The factor of the output's squared error that gives the squared error of x̂0 the weight w(SNR), float64 [T].

    `weight` is a name of `names.WEIGHTS`, a function of the SNR, or None for 1. Raises ValueError for another name.
    """
    if weight is None:
        return torch.ones_like(process.beta)
    if isinstance(weight, str):
        if weight not in WEIGHTS:
            raise ValueError(f"unknown weight {weight!r}; there are {', '.join(WEIGHTS)}")
        weight = WEIGHTS[weight]
    return weight(process.alpha_bar / (1 - process.alpha_bar)) * process.x0_of_output.square()


def simple_loss(
    process: ReverseProcess, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """DDPM eq. 14: L_simple = E‖ε − ε_θ(x_t, t)‖², as the mean over the elements of each picture, [B].

    With another prediction than epsilon the target is that prediction's a·x0 + b·ε. A learned variance is left out.
    """
    output, _ = process.split(model_output, x_t)
    return (process.target(x0, t, noise) - output).square().flatten(1).mean(1)


def vlb_loss(process: ReverseProcess, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, levels: int) -> Tensor:
    """DDPM eq. 5: T·L_t, [B] bits per dimension; its mean over uniform t is L_vlb without L_T, which is constant."""
    return process.T * bound_term(process, model_output, x0, x_t, t, levels)


def stop_mean(process: ReverseProcess, model_output: Tensor, x_t: Tensor) -> Tensor:
    """The output with gradients through v only. Raises ValueError if the variance is not learned."""
    output, v = process.split(model_output, x_t)
    if v is None:
        raise ValueError("the hybrid objective trains a learned variance: it needs variance='learned_range'")
    return torch.cat([output.detach(), v], dim=1)


def hybrid_loss(simple: Tensor, vlb: Tensor, vlb_weight: float) -> Tensor:
    """Improved DDPM eq. 16: L_hybrid = L_simple + λ·L_vlb; `vlb` must have no gradient of the mean (`stop_mean`)."""
    return simple + vlb_weight * vlb


def offset_noise(noise: Tensor, strength: float, generator: Generators = None) -> Tensor:
    """Offset noise (Guttenberg 2023): noise [B, C, …] plus `strength` times one normal number per picture and channel.

    It trains the network to change the mean of a picture. Pass the result to `loss` as the noise.
    """
    shape = [*noise.shape[:2], *[1] * (noise.ndim - 2)]
    return noise + strength * normal(shape, generator, noise.device).to(noise.dtype)


class ImportanceSampler:
    """Improved DDPM eq. 18: L_vlb = E_{t ~ p}[L_t / p_t] with p_t ∝ √E[L_t²], which has less variance than a uniform t.

        t, weight = sampler.sample(batch, generator)
        loss = d.loss(model, x0, t, noise)
        sampler.update(t, loss.detach())
        (weight * loss).mean().backward()

    E[L_t²] is the mean over the last `history` losses of each t; until every t has that many, t is uniform. The
    fraction `uniform` of p stays uniform, so that no t is forgotten.
    """

    def __init__(self, T: int, history: int = 10, uniform: float = 0.001) -> None:
        self.uniform = uniform
        self.losses = torch.zeros(T, history, dtype=torch.float64)
        self.counts = torch.zeros(T, dtype=torch.int64)  # losses of each t; the next goes to column counts % history

    def probabilities(self) -> Tensor:
        """p_t, float64 [T], on the CPU."""
        T, history = self.losses.shape
        even = torch.full((T,), 1 / T, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        if self.counts.min() < history or size.sum() == 0:
            return even
        return (1 - self.uniform) * size / size.sum() + self.uniform * even

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(t [n], weight [n]) on the CPU: the mean of weight·loss is an unbiased estimate of the loss at uniform t."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Record losses [B], unweighted, of all processes. Values that are not finite are ignored."""
        history = self.losses.shape[1]
        for step, value in zip(t.tolist(), loss.double().tolist(), strict=True):
            if abs(value) < float("inf"):
                self.losses[step, self.counts[step] % history] = value
                self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The state for a checkpoint: without it a resumed run would draw other times."""
        return {"losses": self.losses, "seen": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`. Raises ValueError for the state of another T or history."""
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"the state has (T, history) {list(state['losses'].shape)}, not {list(self.losses.shape)}")
        self.losses, self.counts = state["losses"].clone(), state["seen"].clone()
