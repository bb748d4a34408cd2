"""Stage 1: the autoencoder, 64x64x3 <-> 8x8x16, trained from scratch on the emoji pictures.

    python samples/emoji/vae.py work/          # work/data.npz -> work/vae/ (a diffusers folder, float32)

One concept in twenty-five is kept out of the training; `psnr` is measured on those pictures.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a second busy process would slow it down many times

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from loop import train

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=(24, 48, 128, 128),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=8,
    mid_block_add_attention=False,
    sample_size=64,
)


def held_out(names: np.ndarray) -> np.ndarray:
    """True for the pictures of one concept in twenty-five, chosen by the hash of its name."""
    return np.array([hashlib.sha256(str(n).encode()).digest()[0] % 25 == 0 for n in names])


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast(dev: torch.device):
    """bf16 autocast where the hardware multiplies it quickly (CUDA, or a CPU with AMX), else float32."""
    amx = (
        dev.type == "cpu" and "amx_bf16" in Path("/proc/cpuinfo").read_text()
        if os.path.exists("/proc/cpuinfo")
        else False
    )
    return torch.autocast(dev.type, torch.bfloat16, enabled=amx or dev.type == "cuda")


def to_pictures(uint8: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    return uint8.permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Mirror, shift by up to 6 pixels (white comes in) and permute the colour channels of some pictures."""
    if torch.rand((), generator=g) < 0.5:
        x = x.flip(3)
    if torch.rand((), generator=g) < 0.5:
        dy, dx = torch.randint(0, 13, (2,), generator=g).tolist()
        x = F.pad(x, (6, 6, 6, 6), value=1.0)[:, :, dy : dy + 64, dx : dx + 64]
    if torch.rand((), generator=g) < 0.3:
        x = x[:, torch.randperm(3, generator=g)]
    return x


def gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Mean over pictures of the PSNR in dB of decode(mean of encode(x)), rounded to 8 bits."""
    values = []
    with torch.inference_mode():
        for batch in pictures.split(64):
            x = to_pictures(batch).to(vae.device)
            y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
            mse = ((y.add(1).mul(127.5).round() - x.add(1).mul(127.5)) / 255).square().mean((1, 2, 3))
            values.append(-10 * mse.clamp_min(1e-10).log10().cpu())
    return torch.cat(values).mean().item()


def main(work: Path, steps: int) -> None:
    dev = device()
    data = np.load(work / "data.npz")
    out = held_out(data["names"])
    pictures, test = torch.from_numpy(data["pictures"][~out]), torch.from_numpy(data["pictures"][out])
    print(f"{len(pictures)} pictures to train on, {len(test)} held out, on {dev}", flush=True)
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG).to(dev)

    def loss_at(step: int, g: torch.Generator) -> torch.Tensor:
        x = augment(to_pictures(pictures[torch.randint(len(pictures), (32,), generator=g)]), g).to(dev)
        with fast(dev):
            latent = vae.encode(x).latent_dist
            y = vae.decode(latent.sample()).sample
        y = y.float()
        edges = sum((a - b).abs().mean() for a, b in zip(gradient(y), gradient(x), strict=True))
        kl = latent.kl().float().mean() / latent.mean[0].numel()
        return (y - x).abs().mean() + edges + (y - x).square().mean() + 1e-3 * kl

    def check(step: int, ema: dict[str, torch.Tensor]) -> None:
        print(
            f"vae {step}: PSNR held out {psnr(vae, test):.2f} dB, trained {psnr(vae, pictures[:256]):.2f} dB",
            flush=True,
        )

    ema = train("vae", {"vae": vae}, loss_at, work, steps=steps, learning_rate=2e-3, at_checkpoint=check)
    vae.load_state_dict({k.removeprefix("vae/"): p for k, p in ema.items()})
    with torch.inference_mode():
        latents = torch.cat([vae.encode(to_pictures(b).to(dev)).latent_dist.mean.cpu() for b in pictures.split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4), shift_factor=None)
    vae.save_pretrained(work / "vae")
    figures = {"psnr_held_out_db": psnr(vae, test), "psnr_trained_db": psnr(vae, pictures), "steps": steps}
    figures |= {"pictures": len(pictures), "held_out": len(test)}
    (work / "vae.json").write_text(json.dumps(figures, indent=2))
    print(figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=2700)
    arguments = parser.parse_args()
    main(arguments.work, arguments.steps)
