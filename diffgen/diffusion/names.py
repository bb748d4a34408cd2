"""The variances, objectives and loss weights that there are. Imports no torch, so that configurations can read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
OBJECTIVES = ("simple", "hybrid", "vlb")


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR-γ (Hang et al. 2023, section 3.4): min(SNR, γ)."""
    return snr.clamp(max=gamma)


def p2(snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """P2 (Choi et al. 2022): the weight of epsilon divided by (k + SNR)^γ."""
    return snr / (k + snr) ** gamma


# The factor w(SNR) of the squared error of x̂0, from the signal-to-noise ratio [T].
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x0": lambda snr: snr.new_ones(snr.shape),
    "epsilon": lambda snr: snr,  # DDPM's L_simple
    "v": lambda snr: snr + 1,  # Progressive Distillation, section 4
    "min_snr": min_snr,
    "p2": p2,
}
