"""Classifier-free guidance (Ho & Salimans 2022), in an interval of times, with rescaled contrast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance, eq. 6 with scale = 1 + w: uncond + scale·(cond − uncond); 1 is off."""
    return uncond + scale * (cond - uncond)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Lin et al. 2023 (2305.08891), section 3.4: guided·(φ·std(cond)/std(guided) + 1 − φ), std over each picture.

    It reduces the excess contrast of a large scale; φ = 0 is off, the paper has 0.7.
    """
    dims = list(range(1, cond.ndim))
    return guided * (phi * cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True) + 1 - phi)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    no_condition: Tensor,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    phi: float = 0.0,
    pair: bool = False,
) -> Callable[[Tensor, Tensor], Any]:
    """The guided network as a function of (x, t), for `GaussianDiffusion.sample` and `Scheduler.sample`.

    `model(x, t, condition)` runs on `condition` and `no_condition` [B, …], such as labels or embeddings, in one batch
    of 2B. `interval` (Kynkäänniemi et al. 2024) is the range of times (low, high), both included, in which guidance is
    on; outside it the output is the conditional one, at half the cost. A noise level σ/α of that paper is the time
    `noise.at(lam=-log(level)).t`. If the output has 2C channels, the learned variance is the conditional one.
    With `pair` the network gives (output, output without the condition), as CFG++ needs; where guidance is off, both
    are the conditional one.
    """

    def call(x: Tensor, t: Tensor) -> Any:
        if scale == 1:
            return unguided(x, t)
        on = None if interval is None else (t >= interval[0]) & (t <= interval[1])
        if on is not None and not bool(on.any()):
            return unguided(x, t)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, no_condition]))
        cond, uncond = both.chunk(2)
        C = x.shape[1]
        output = guide(cond[:, :C], uncond[:, :C], scale)
        if phi:
            output = rescale(output, cond[:, :C], phi)
        outputs = torch.cat([output, cond[:, C:]], dim=1), uncond
        if on is not None:
            guides = on.reshape(-1, *[1] * (x.ndim - 1))
            outputs = torch.where(guides, outputs[0], cond), torch.where(guides, uncond, cond)
        return outputs if pair else outputs[0]

    def unguided(x: Tensor, t: Tensor) -> Any:
        output = model(x, t, condition)
        return (output, output) if pair else output

    return call
