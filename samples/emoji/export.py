"""Write the finished model: a diffusers Stable Diffusion folder in float16, with its card.

python samples/emoji/export.py work/ work/diffusion.safetensors work/emoji      # a checkpoint's average weights
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from architecture import PREDICTION, build_text_encoder, build_unet
from captions import every, names
from data import HELD_OUT, STYLES
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizer import LAST, WIDE, as_bytes, pieces
from transformers import CLIPTokenizer

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": PREDICTION,
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
TABLE = "token_embedding.weight"


def half(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """float16; `position_ids` and the like, which are no weights, are left out."""
    kept = {k: v.detach().cpu().half().contiguous() for k, v in tensors.items() if v.is_floating_point()}
    save_file(kept, path, metadata={"format": "pt"})


def settle(table: torch.Tensor, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """The token embeddings [tokens, width] for use: tokens that no caption contains were never trained, and become 0.

    But where a Chinese character was seen at the end of words only, or never there, both its tokens get that meaning.
    """
    words = sorted({word for caption in captions for word in pieces(caption)})
    seen = {i for ids in tokenizer(words).input_ids for i in ids}
    mask = torch.tensor([i not in seen for i in range(len(table))])
    table = table.detach().cpu().masked_fill(mask[:, None], 0)
    for character in {c for word in words for c in word if c >= WIDE}:
        pair = tokenizer.convert_tokens_to_ids([as_bytes(character), as_bytes(character) + LAST])
        for one, other in (pair, pair[::-1]):
            if one in seen and other not in seen:
                table[other] = table[one]
    return table


def export(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    weights: Mapping[str, torch.Tensor],
    work: Path,
    images: int,
) -> None:
    """Write the folder, replacing one that is there. `weights` has "unet/…" and "text_encoder/…"; the rest is told by
    the names and pictures in `work`; `images` is how many pictures the weights were trained on, repeats counted.
    """
    table = names(work)
    captions = every(table)
    new = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    unet, text = build_unet(), build_text_encoder(tokenizer)
    for module, name in ((vae, "vae"), (unet, "unet"), (text, "text_encoder")):
        (new / name).mkdir(parents=True)
        state = {k: weights.get(f"{name}/{k}", v) for k, v in module.state_dict().items()}
        if name == "text_encoder":
            state = {k: settle(v, tokenizer, captions) if k.endswith(TABLE) else v for k, v in state.items()}
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        half(new / name / file, state)
        module.config.save_pretrained(new / name) if name == "text_encoder" else module.save_config(new / name)
    vae_config = json.loads((new / "vae" / "config.json").read_text())
    vae_config.pop("_name_or_path", None)  # a path of the machine that trained it
    (new / "vae" / "config.json").write_text(json.dumps(vae_config, indent=2) + "\n")
    shutil.copytree(work / "tokenizer", new / "tokenizer")
    (new / "scheduler").mkdir()
    (new / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    (new / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    card = {
        "schema": "diffgen.card/1",
        "licence": "Apache-2.0 (weights); pictures: OFL-1.1 (Noto), MIT (Fluent); keywords: MIT (emojibase)",
        "resolution": 64,
        "styles": list(STYLES),
        "held_out": json.loads(HELD_OUT.read_text("utf-8")),
        "defaults": DEFAULTS,
        "trained_on_images": images,
        "concepts": sorted(table),
        "words": sorted({word for caption in captions for word in pieces(caption) if any(map(str.isalnum, word))}),
    }
    (new / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def main(work: Path, checkpoint: Path, folder: Path, which: str, images: int) -> None:
    with safe_open(checkpoint, "pt") as file:
        step = (file.metadata() or {}).get("step", "?")
    weights = {k.removeprefix(f"{which}/"): v for k, v in load_file(checkpoint).items() if k.startswith(f"{which}/")}
    if not weights:
        raise SystemExit(f"{checkpoint} has no tensors {which}/…")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    export(folder, AutoencoderKL.from_pretrained(work / "vae"), tokenizer, weights, work, images)
    print(f"{which} of step {step} -> {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", default="ema", help="the prefix of their names in the checkpoint")
    parser.add_argument("--images", type=int, default=0, help="for the card: pictures trained on, repeats counted")
    arguments = parser.parse_args()
    main(arguments.work, arguments.checkpoint, arguments.folder, arguments.weights, arguments.images)
