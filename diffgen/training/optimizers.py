"""The optimizers, one row each. All state of a parameter is in tensors that a checkpoint can hold.

`OPTIMIZERS[name].make(groups, config)` builds one; `.slots(p)` gives the state that a parameter begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import Train

BLOCK = 256  # values of a moment that share a scale, in eight bits
Slots = dict[str, Tensor]


class Row(NamedTuple):
    """An optimizer: how it is built, and the state of a parameter before the first step."""

    make: Callable[[list[dict[str, Any]], Train], torch.optim.Optimizer]
    slots: Callable[[Tensor], Slots]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in eight bits (Dettmers et al. 2021, arXiv 2110.02861): blocks of 256 values share a scale.

    A value is one of 256 of a map that is dense near zero. Biases and other parameters of less than 4096 values keep
    their moments in float32.
    """

    def __init__(self, groups: Iterable[Any], betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": torch.zeros(()), **eight_bit_slots(p)}
                state["step"] += 1
                n, g = state["step"].item(), p.grad.float()
                m = _read(state, "exp_avg", p).lerp_(g, 1 - b1)
                v = _read(state, "exp_avg_sq", p).mul_(b2).addcmul_(g, g, value=1 - b2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                size = (v / (1 - b2**n)).sqrt_().add_(1e-8)
                p.addcdiv_(m, size, value=-group["lr"] / (1 - b1**n))
                _write(state, "exp_avg", m)
                _write(state, "exp_avg_sq", v)


@lru_cache(maxsize=2)
def dynamic_map(signed: bool) -> Tensor:
    """256 values in [−1, 1] or [0, 1], ascending: seven decades, each twice as fine as the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (6 - decade) if signed else 2 ** (7 - decade)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        values += ((edges[:-1] + edges[1:]) / 2 * 10.0**-decade).tolist()
    if signed:
        values += [-value for value in values[2:]]
    table = torch.tensor(sorted(values), dtype=torch.float32)
    return torch.cat([table, table[-1:].expand(256 - len(table))])


def eight_bit_slots(p: Tensor) -> Slots:
    if p.numel() < 16 * BLOCK:
        return {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
    blocks = -(-p.numel() // BLOCK)
    slots = {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero = int((dynamic_map(signed) == 0).nonzero()[0])
        slots[name] = torch.full((blocks, BLOCK), zero, dtype=torch.uint8, device=p.device)
        slots[f"{name}_scale"] = torch.zeros(blocks, 1, device=p.device)
    return slots


def _read(state: Slots, name: str, p: Tensor) -> Tensor:
    if f"{name}_scale" not in state:
        return state[name].clone()
    table = dynamic_map(name == "exp_avg").to(p.device)
    return (table[state[name].long()] * state[f"{name}_scale"]).flatten()[: p.numel()].reshape(p.shape)


def _write(state: Slots, name: str, value: Tensor) -> None:
    if f"{name}_scale" not in state:
        state[name].copy_(value)
        return
    codes = state[name]
    flat = torch.nn.functional.pad(value.flatten(), (0, codes.numel() - value.numel())).reshape(codes.shape)
    scale = flat.abs().amax(1, keepdim=True)
    table = dynamic_map(name == "exp_avg").to(value.device)
    nearest = torch.bucketize(flat / scale.clamp_min(torch.finfo().tiny), (table[1:] + table[:-1]) / 2)
    codes.copy_(nearest.to(torch.uint8))
    state[f"{name}_scale"].copy_(scale)


class Prodigy(torch.optim.Optimizer):
    """Adam that finds its own step size d (Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4).

    The learning rate is a factor of d: 1 is right. d begins at 1e-6 and grows with the distance from the first weights.
    """

    BEGIN = 1e-6

    def __init__(self, groups: Iterable[Any], betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(groups, {"lr": 1.0, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        used = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in used:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros(()), **prodigy_slots(p)}
        if not used:
            return
        first = self.state[used[0][1]]
        d, numerator = first["d"].clone(), first["numerator"].clone()
        n = first["step"].item() + 1
        total = torch.zeros_like(d)
        numerator *= used[0][0]["betas"][1] ** 0.5
        for group, p in used:
            state, g = self.state[p], p.grad.float()
            b1, b2 = group["betas"]
            corrected = group["lr"] * (1 - b2**n) ** 0.5 / (1 - b1**n)
            if group["lr"] > 0:
                numerator += (d / self.BEGIN) * d * corrected * torch.sum(g * (state["start"] - p))
            state["exp_avg"].mul_(b1).add_(d * g * (1 - b1))
            state["exp_avg_sq"].mul_(b2).add_(d * d * g * g * (1 - b2))
            state["s"].mul_(b2**0.5).add_((d / self.BEGIN) * d * corrected * g)
            total += state["s"].abs().sum()
        grown = torch.where(total > 0, torch.maximum(d, numerator / total.clamp_min(torch.finfo().tiny)), d)
        for group, p in used:
            state = self.state[p]
            b1, b2 = group["betas"]
            rate = grown * group["lr"] * (1 - b2**n) ** 0.5 / (1 - b1**n)
            p.sub_(rate * group["weight_decay"] * p)
            p.sub_(rate * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + grown * 1e-8))
            state["step"] += 1
            state["d"].copy_(grown)
            state["numerator"].copy_(numerator)


def prodigy_slots(p: Tensor) -> Slots:
    slots = {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq", "s")}
    one = torch.ones((), device=p.device)
    return slots | {"start": p.detach().float().clone(), "d": one * Prodigy.BEGIN, "numerator": one * 0}


def adafactor_slots(p: Tensor) -> Slots:
    if p.ndim < 2:
        return {"variance": torch.zeros_like(p)}
    rows, columns = list(p.shape), list(p.shape)
    rows[-1] = columns[-2] = 1
    return {"row_var": p.new_zeros(rows), "col_var": p.new_zeros(columns)}


def _betas(config: Train) -> tuple[float, float]:
    return config.betas[0], config.betas[1]


OPTIMIZERS = {
    "adamw": Row(
        lambda groups, c: torch.optim.AdamW(groups, betas=_betas(c), weight_decay=c.weight_decay, fused=True),
        lambda p: {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")},
    ),
    "adamw8bit": Row(lambda groups, c: AdamW8bit(groups, _betas(c), c.weight_decay), eight_bit_slots),
    "adafactor": Row(lambda groups, c: torch.optim.Adafactor(groups, weight_decay=c.weight_decay), adafactor_slots),
    "prodigy": Row(lambda groups, c: Prodigy(groups, _betas(c), c.weight_decay), prodigy_slots),
}
