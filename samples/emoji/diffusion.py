"""Stage 2: the text encoder and the UNet, trained together on the latents of stage 1.

    python samples/emoji/diffusion.py work/      # work/data.npz, work/names.json, work/vae/ -> work/emoji/, in float16

The objective is the project's own: `diffgen.diffusion.GaussianDiffusion.loss`. What `held_out.json` lists is left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a second busy process would slow it down many times

import argparse
import json
from pathlib import Path
from random import Random

import numpy as np
import torch
from architecture import PREDICTION, build_text_encoder, build_unet
from captions import every, names, phrase
from data import trained
from diffusers import AutoencoderKL
from export import export
from loop import train
from tokenizer import build_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from vae import device, fast, to_pictures

from diffgen.diffusion import GaussianDiffusion
from schedulers import NoiseSchedule


def main(work: Path, steps: int, batch: int, learning_rate: float) -> None:
    dev = device()
    data, table = np.load(work / "data.npz"), names(work)
    keep = trained(data["names"], data["styles"])
    concepts, styles = data["names"][keep].tolist(), data["styles"][keep].tolist()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(dev).eval()
    pictures = torch.from_numpy(data["pictures"][keep])
    with torch.inference_mode():
        parts = [vae.encode(to_pictures(b).to(dev)).latent_dist.mean for b in pictures.split(64)]
    latents = torch.cat(parts).clone() * vae.config.scaling_factor
    tokenizer = build_tokenizer(every(table), work / "tokenizer")
    print(f"{len(concepts)} pictures of {len(table)} concepts, {len(tokenizer)} tokens, on {dev}", flush=True)

    torch.manual_seed(0)
    text = build_text_encoder(tokenizer).to(dev)
    unet = build_unet().to(dev)
    process = GaussianDiffusion(NoiseSchedule.scaled_linear(1000), prediction=PREDICTION)

    def loss_at(step: int, g: torch.Generator) -> torch.Tensor:
        i = torch.randint(len(concepts), (batch,), generator=g)
        x0 = latents[i.to(dev)]
        draw = Random(int(torch.randint(2**62, (), generator=g)))
        phrases = [phrase(concepts[k], table[concepts[k]], styles[k], draw) for k in i.tolist()]
        ids = tokenizer(
            phrases, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        t = torch.randint(process.T, (batch,), generator=g).to(dev)
        noise = torch.randn(x0.shape, generator=g).to(dev)
        with fast(dev):
            context = text(ids.to(dev)).last_hidden_state
        return process.loss(lambda x, t: network(x, t, context), x0, t, noise).mean()

    def network(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        # plain attention: on a CPU the flash kernel's backward pass takes 40 % of a step in bf16
        with fast(dev), sdpa_kernel(SDPBackend.MATH if dev.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION):
            return unet(x, t, context).sample.float()

    def save(step: int, ema: dict[str, torch.Tensor]) -> None:
        export(work / "emoji", vae, tokenizer, ema, work, step * batch)

    modules = {"unet": unet, "text_encoder": text}
    train("diffusion", modules, loss_at, work, steps=steps, learning_rate=learning_rate, at_checkpoint=save)
    (work / "diffusion.json").write_text(json.dumps({"steps": steps, "batch": batch, "images": steps * batch}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    main(arguments.work, arguments.steps, arguments.batch, arguments.learning_rate)
