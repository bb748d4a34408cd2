"""The record that a picture carries: all that is needed to make it again. Its keys are listed in images/metadata.py."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

import diffgen
from diffgen.images.metadata import SCHEMA, base_name
from diffgen.sampling import grid_file
from schedulers.scheduler import Scheduler

from .plan import Plan, Shot

if TYPE_CHECKING:
    from .generate import ImageGenerator


def record_of(generator: ImageGenerator, plan: Plan, scheduler: Scheduler, shot: Shot, nfe: int) -> dict[str, Any]:
    """The record of a picture, but for its pixels' hash and what was done about memory."""
    return {
        "schema": SCHEMA,
        "prompt": shot.prompt,
        "negative": shot.negative,
        "seed": shot.seed,
        "index": shot.index,
        "steps": plan.steps,
        "nfe": nfe,
        "guidance": plan.guidance,
        "scheduler": scheduler.name,
        "scheduler_options": scheduler.options,
        "grid": scheduler.grid_name,
        **grid_file(plan.grid),
        "width": plan.final_size[0],
        "height": plan.final_size[1],
        **_asked(generator, plan, shot),
        "model": generator.model.name,
        "model_hash": generator.model_hash,
        "model_files": {
            name.replace("/", ":"): digest for name, digest in generator.hashes.items() if name.endswith(".safetensors")
        },
        "family": generator.model.family,
        "prediction": generator.prediction,
        "device": generator.device.type,
        "dtype": str(generator.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": plan.batch_size,
        "rng": "CPU",
        "versions": {
            "diffgen": diffgen.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "diffusers": version("diffusers"),
            "transformers": version("transformers"),
        },
        "warnings": plan.warnings(shot.prompt),
    }


def _asked(generator: ImageGenerator, plan: Plan, shot: Shot) -> dict[str, Any]:
    """The options that not every picture has; those that were not asked for are left out."""
    found: dict[str, Any] = {
        "template": shot.template if shot.template != shot.prompt else None,
        "negative_template": plan.negative if plan.negative != shot.negative else None,
        "styles": list(plan.styles),
        "prompt_syntax": plan.syntax if plan.syntax != "a1111" else None,
        "clip_skip": plan.clip_skip if plan.clip_skip != 1 else None,
        "guidance_rescale": plan.rescale or None,
        "guidance_interval": list(plan.interval) if plan.interval != (0, 1) else None,
        "image": plan.image and plan.image.record(),
        "strength": plan.strength if plan.image else None,
        "mask": plan.mask.record() if plan.mask and not plan.outpaint else None,
        "outpaint": list(plan.outpaint) if plan.outpaint else None,
        "controls": [control.record() for control in plan.controls],
        "loras": [lora.record() for lora in plan.loras],
        "embeddings": [embedding.record() for embedding in plan.embeddings],
        "upscale": plan.upscale.record() | {"from": [plan.width, plan.height]} if plan.upscale else None,
        "variation": plan.variation and plan.variation.record(),
        "refiner": base_name(plan.refiner.name) if plan.refiner else None,
        "tile": plan.tile or None,
        "quantize": generator.quantize if generator.quantize != "none" else None,
        "safety": ("on" if plan.safety else "off") if "safety_checker" in generator.checked.companions else None,
    }
    return {key: value for key, value in found.items() if value is not None and value != []}
