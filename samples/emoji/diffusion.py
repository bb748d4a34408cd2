"""Stage 2: the text encoder and the UNet, trained together on the latents of stage 1.

    python samples/emoji/diffusion.py work/      # work/data.npz, work/vae/ -> work/emoji/, the float16 folder

The objective is the project's own: `diffgen.diffusion.GaussianDiffusion.loss`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a second busy process would slow it down many times

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from data import STYLES, caption
from diffusers import AutoencoderKL, UNet2DConditionModel
from export import export
from loop import train
from tokenizer import build_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel
from vae import device, fast, to_pictures

from diffgen.diffusion import GaussianDiffusion
from schedulers import NoiseSchedule

WIDTH = 192  # of the text encoder
UNET = dict(
    sample_size=8,
    in_channels=16,
    out_channels=16,
    block_out_channels=(96, 192),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    cross_attention_dim=WIDTH,
    attention_head_dim=4,  # in this class: the number of heads
    norm_num_groups=16,
)
PREDICTION = "v_prediction"
# This first version learns short names of things. People, faces and signs come in many forms that look almost the same.
LEFT_OUT = re.compile(
    r"\b((wo)?m[ae]ns?|person|people|boy|girl|couple|family|kiss|face|hands?|finger|fist|hair|child|children|lip|feeding)\b"
    r"|\b(artist|cook|detective|farmer|firefighter|guard|judge|mechanic|officer|pilot|scientist|singer|student|teacher)$"
    r"|\b(technologist|worker|prince|princess|mrs|mx|skier|snowboarder|selfie)\b"
    r"|\b(aquarius|aries|cancer|capricorn|gemini|leo|libra|ophiuchus|pisces|sagittarius|scorpio|taurus|virgo)$"
    r"|\b(symbol|sign|mark|no|suit|prohibited|restroom|customs|claim|left|control|closet|warning|registered|copyright|om)\b"
    r"|\b(khanda|infinity|information|input|circled|minus|plus|multiply|divide|cross|bars|mode|wireless|loop|dash|badge)\b"
    r"|\b(exchange|cinema|trident|biohazard|radioactive|zzz|points|away|droplets|tabs|index|tray|file|folder|notepad)\b"
    r"|\b(ledger|chart|clipboard|identification|label|placard|incoming|oncoming|banknote|potable|restroom|emblem|exclamation)\b"
    r"|\b(button|clock|arrow|thirty|keycap|square|circle|level|skin|arrival|departure|pushpin|paperclips?|receiver)\b|oclock"
)


def chosen(names: np.ndarray, styles: np.ndarray) -> np.ndarray:
    """True for names of one or two words that are present in all styles and are not of people, clocks or signs."""
    everywhere = set.intersection(*(set(names[styles == style]) for style in STYLES))
    good = {n for n in everywhere if len(n.split()) <= 2 and not LEFT_OUT.search(n)}
    return np.array([n in good for n in names])


def phrase(name: str, style: str, g: torch.Generator) -> str:
    """The caption; sometimes without its style, or with an article before it; one in ten is dropped for guidance."""
    u = torch.rand((), generator=g).item()
    if u < 0.10:
        return ""
    article = "an" if name[0] in "aeiou" else "a"
    text = f"{article} {name}" if u < 0.30 else name
    return text if u < 0.20 or u > 0.90 else caption(text, style)


def main(work: Path, steps: int, batch: int, learning_rate: float) -> None:
    dev = device()
    data = np.load(work / "data.npz")
    keep = chosen(data["names"], data["styles"])
    names, styles = data["names"][keep].tolist(), data["styles"][keep].tolist()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(dev).eval()
    pictures = torch.from_numpy(data["pictures"][keep])
    with torch.inference_mode():
        parts = [vae.encode(to_pictures(b).to(dev)).latent_dist.mean for b in pictures.split(64)]
    latents = torch.cat(parts).clone() * vae.config.scaling_factor
    tokenizer = build_tokenizer(sorted(set(names)), work / "tokenizer")
    print(f"{len(names)} pictures of {len(set(names))} concepts, {len(tokenizer)} tokens, on {dev}", flush=True)

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(dev)
    unet = UNet2DConditionModel(**UNET).to(dev)
    process = GaussianDiffusion(NoiseSchedule.scaled_linear(1000), prediction=PREDICTION)

    def loss_at(step: int, g: torch.Generator) -> torch.Tensor:
        i = torch.randint(len(names), (batch,), generator=g)
        x0 = latents[i.to(dev)]
        phrases = [phrase(names[k], styles[k], g) for k in i.tolist()]
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
        seen = {i for n in set(names) for s in STYLES for i in tokenizer(caption(f"a an {n}", s)).input_ids}
        export(work, vae, unet, text, tokenizer, ema, seen, PREDICTION, sorted(set(names)), step * batch)

    modules = {"unet": unet, "text_encoder": text}
    train("diffusion", modules, loss_at, work, steps=steps, learning_rate=learning_rate, at_checkpoint=save)
    (work / "diffusion.json").write_text(json.dumps({"steps": steps, "batch": batch, "images": steps * batch}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    main(arguments.work, arguments.steps, arguments.batch, arguments.learning_rate)
