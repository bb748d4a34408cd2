"""Do caches of blocks beat fewer steps? python benchmarks/caches.py [--steps N]

A small transformer of FLUX.1's kind learns the bundled digits as a flow. Then both are compared at equal numbers of
block calls: the distance to the solution of 400 steps from the same noises, with Euler. A cache is worth a flag only
where its row is below the line of fewer steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel

from diffgen.training.data import open_data

SIDE = 8  # pixels, each of which is a token
BATCH = 32
IDS = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).reshape(
    -1, 3
)


def network() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=1, num_layers=2, num_single_layers=4, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def velocity(net: Any, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    text = torch.nn.functional.one_hot(labels, 16).float()
    return net(
        hidden_states=x, encoder_hidden_states=text[:, None], pooled_projections=text, timestep=t, img_ids=IDS,
        txt_ids=torch.zeros(1, 3), return_dict=False,
    )[0]  # fmt: skip


def train(net: Any, steps: int) -> None:
    data = open_data("digits")
    assert data.labels is not None
    pictures, labels = data.images.reshape(-1, SIDE**2, 1) / (data.levels - 1) * 2 - 1, data.labels
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 100) * (1 - step / steps) ** 0.5
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        noise, t = torch.randn(BATCH, SIDE**2, 1, generator=generator), torch.rand(BATCH, generator=generator)
        x = (1 - t)[:, None, None] * pictures[rows] + t[:, None, None] * noise
        loss = (velocity(net, x, t, labels[rows]) - (noise - pictures[rows])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


@contextmanager
def counted(net: Any) -> Iterator[list[int]]:
    """Count the calls of attention inside, one in each block that really runs."""
    calls = [0]
    blocks = [*net.transformer_blocks, *net.single_transformer_blocks]

    def count(*_: Any) -> None:
        calls[0] += 1

    handles = [block.attn.register_forward_hook(count) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def solve(net: Any, noise: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    x, times = noise, torch.linspace(1, 0, steps + 1)
    for t, s in pairwise(times):
        with net.cache_context("cond"):
            x = x + (s - t) * velocity(net, x, t.expand(len(x)), labels)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    net = network()
    train(net, parser.parse_args().steps)
    net.eval().requires_grad_(False)
    noise, labels = torch.randn(32, SIDE**2, 1, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 10
    exact = solve(net, noise, labels, 400)
    print(f"diffusers {diffusers.__version__}\n| way | block calls | distance |\n|---|---|---|")
    plain = {}
    for steps in (30, 26, 22, 20, 18, 16, 14, 12, 10, 8, 6):
        with counted(net) as calls:
            x = solve(net, noise, labels, steps)
        plain[calls[0]] = distance(x, exact)
        print(f"| {steps} steps | {calls[0]} | {plain[calls[0]]:.4f} |", flush=True)
    for steps in (30, 20):
        for threshold in (0.02, 0.05, 0.08, 0.12, 0.2, 0.3):
            net.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            with counted(net) as calls:
                x = solve(net, noise, labels, steps)
            net.disable_cache()
            fewer = np.interp(calls[0], sorted(plain), [plain[key] for key in sorted(plain)])
            error = distance(x, exact)
            verdict = "wins" if error < 0.95 * fewer else "loses" if error > fewer else "equal"
            row = f"{steps} steps, first block {threshold:g} | {calls[0]} | {error:.4f}"
            print(f"| {row}, {verdict} against {fewer:.4f} |", flush=True)


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x - exact).square().mean().sqrt())


if __name__ == "__main__":
    main()
