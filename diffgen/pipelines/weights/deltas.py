"""What an adapter adds to a weight, by the kind of adapter: LoRA, LoKr, LoHa, and DoRA around any of them.

A weight W is [out, in] or [out, in, kh, kw]. Training and reading share these formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def low_rank(up: Tensor, down: Tensor) -> Tensor:
    """B·A, Hu et al. 2021, arXiv 2106.09685, eq. 3: [out, …] from B [out, r] and A [r, …]."""
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """W1 ⊗ W2 (LoKr, Yeh et al. 2023, arXiv 2309.14859): [a·b, c·d, …] from W1 [a, c] and W2 [b, d, …]."""
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())


def lokr(tensors: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    """(W1 ⊗ W2, the rank) of the tensors of a file; each factor is whole or a product. Raises KeyError."""
    factors, rank = [], None
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            factors.append(tensors[name])
        else:
            a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
            factors.append(low_rank(a, b))
            rank = len(b)
    return kronecker(*factors), rank


def loha(tensors: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """((A1·B1) ∘ (A2·B2), the rank): Hyeon-Woo et al. 2021, arXiv 2108.06098. Raises KeyError."""
    a1, b1, a2, b2 = (tensors[name] for name in LOHA)
    return low_rank(a1, b1) * low_rank(a2, b2), len(b1)


def decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA adds: m·(W + ΔW)/‖W + ΔW‖ − W (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    `magnitude` has a number for each row, [out] or [out, 1], or for each column, [1, in]; the norm is over the rest.
    """
    changed = weight + delta
    by_column = magnitude.ndim > 1 and len(magnitude) == 1 and len(weight) > 1
    dims = [i for i in range(weight.ndim) if i != int(by_column)]
    norm = torch.linalg.vector_norm(changed, dim=dims, keepdim=True)
    return (magnitude.reshape(norm.shape) / norm) * changed - weight
