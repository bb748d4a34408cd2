"""The training loop that both stages of the recipe share: AdamW, warm-up then cosine to zero, EMA, exact resume.

Step k draws everything from generators seeded with (seed, k), so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def train(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss_at: Callable[[int, torch.Generator], torch.Tensor],
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    ema_decay: float = 0.999,
    save_every: int = 250,
    at_checkpoint: Callable[[int, dict[str, torch.Tensor]], None],
) -> dict[str, torch.Tensor]:
    """Run `steps` steps on `loss_at(step, generator)`; return the EMA weights as {"module/parameter": tensor}."""
    weights = {f"{m}/{k}": p for m, module in modules.items() for k, p in module.named_parameters()}
    ema = {k: p.detach().clone() for k, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=1e-4, fused=True)
    checkpoint, timing, start = folder / f"{name}.safetensors", folder / f"{name}.timing.json", 0
    before = json.loads(timing.read_text())["seconds"] if timing.exists() else 0.0
    if checkpoint.exists():
        start = load_checkpoint(checkpoint, weights, ema, optimizer)
        print(f"{name}: resumed at step {start}", flush=True)
    began, recent = time.perf_counter(), []
    for step in range(start, steps):
        warm_up, progress = min(1.0, (step + 1) / 100), step / steps
        optimizer.param_groups[0]["lr"] = learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * progress))
        torch.manual_seed(seed * 10_000_019 + step)  # for layers that draw from the global generator
        loss = loss_at(step, torch.Generator().manual_seed(seed * 10_000_019 + step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in weights.values()], 1 - decay)
        recent.append(loss.detach())
        if (step + 1) % 50 == 0:
            value = torch.stack(recent).mean().item()
            recent.clear()
            rate = (step + 1 - start) / (time.perf_counter() - began)
            left = (steps - step - 1) / rate / 60
            print(f"{name} {step + 1}/{steps}  loss {value:.4f}  {rate:.2f} steps/s  {left:.0f} min left", flush=True)
            if not math.isfinite(value):
                raise SystemExit(f"{name}: the loss is not finite at step {step + 1}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, weights, ema, optimizer)
            timing.write_text(json.dumps({"seconds": round(before + time.perf_counter() - began)}))
            at_checkpoint(step + 1, ema)
    return ema


def save_checkpoint(path: Path, step: int, weights: dict, ema: dict, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"weights/{k}": p.detach().contiguous() for k, p in weights.items()}
    tensors |= {f"ema/{k}": p.contiguous() for k, p in ema.items()}
    for key, parameter in weights.items():
        tensors |= {
            f"{slot}/{key}": optimizer.state[parameter][slot].contiguous() for slot in ("exp_avg", "exp_avg_sq")
        }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


@torch.no_grad()
def load_checkpoint(path: Path, weights: dict, ema: dict, optimizer: torch.optim.Optimizer) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        step = int(f.metadata()["step"])
    tensors = load_file(path)
    for key, parameter in weights.items():
        parameter.copy_(tensors[f"weights/{key}"])
        ema[key].copy_(tensors[f"ema/{key}"])
        slots = {
            slot: torch.empty_like(parameter).copy_(tensors[f"{slot}/{key}"]) for slot in ("exp_avg", "exp_avg_sq")
        }
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **slots}
    return step
