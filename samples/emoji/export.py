"""Write the finished model: a diffusers Stable Diffusion folder in float16, with its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from data import STYLES
from safetensors.torch import save_file

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DEFAULTS = {"steps": 25, "guidance": 2.0, "scheduler": "dpmpp_2m", "grid": "karras", "size": [64, 64]}


def half(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """float16; `position_ids` and the like, which are no weights, are left out."""
    kept = {k: v.detach().cpu().half().contiguous() for k, v in tensors.items() if v.is_floating_point()}
    save_file(kept, path, metadata={"format": "pt"})


def export(
    work: Path, vae, unet, text, tokenizer, ema, seen: set[int], prediction: str, concepts: list[str], images: int
) -> None:
    folder = work / "emoji.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    for module, name in ((vae, "vae"), (unet, "unet"), (text, "text_encoder")):
        (folder / name).mkdir(parents=True)
        weights = {k: ema.get(f"{name}/{k}", v) for k, v in module.state_dict().items()}
        if name == "text_encoder":  # tokens that no caption contains were never trained: say nothing
            table = next(k for k in weights if k.endswith("token_embedding.weight"))
            unseen = torch.tensor([i not in seen for i in range(len(weights[table]))])
            weights[table] = weights[table].cpu().masked_fill(unseen[:, None], 0)
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        half(folder / name / file, weights)
        module.config.save_pretrained(folder / name) if name == "text_encoder" else module.save_config(folder / name)
    vae_config = json.loads((folder / "vae" / "config.json").read_text())
    vae_config.pop("_name_or_path", None)  # a path of the machine that trained it
    (folder / "vae" / "config.json").write_text(json.dumps(vae_config, indent=2) + "\n")
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = SCHEDULER | {"prediction_type": prediction}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    card = {
        "schema": "diffgen.card/1",
        "licence": "Apache-2.0 (weights); pictures: OFL-1.1 (Noto), MIT (Fluent)",
        "resolution": 64,
        "styles": list(STYLES),
        "held_out": [],
        "defaults": DEFAULTS,
        "trained_on_images": images,
        "concepts": concepts,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    shutil.rmtree(work / "emoji", ignore_errors=True)
    folder.rename(work / "emoji")
