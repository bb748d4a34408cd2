"""The record that a picture carries: all that is needed to make it again. Its keys are listed in images/metadata.py."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from diffgen.generation.record import record_of as plan_record
from diffgen.images.metadata import base_name
from schedulers.scheduler import Scheduler

from ..loaded import LoadedModel
from ..plan import Plan, Shot


def record_of(generator: LoadedModel, plan: Plan, scheduler: Scheduler, shot: Shot, nfe: int) -> dict[str, Any]:
    """The record of a picture, but for its pixels' hash and what was done about memory."""
    files = {
        name.replace("/", ":"): digest for name, digest in generator.hashes.items() if name.endswith(".safetensors")
    }
    width, height = plan.final_size
    return plan_record(
        generator,
        plan,
        scheduler,
        shot,
        nfe,
        negative=shot.negative,
        width=width,
        height=height,
        model_files=files,
        family=generator.model.family,
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("diffusers", "transformers")},
        **_asked(generator, plan, shot),
    )


def _asked(generator: LoadedModel, plan: Plan, shot: Shot) -> dict[str, Any]:
    """The options that not every picture has; those that were not asked for are left out."""
    found: dict[str, Any] = {
        "grid_from": "model" if plan.own_grid else None,
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
        "refiner_hash": generator.refiner_hash if plan.refiner else None,
        "tile": plan.tile or None,
        "quantize": generator.quantize if generator.quantize != "none" else None,
        "safety": ("on" if plan.safety else "off") if "safety_checker" in generator.checked.companions else None,
    }
    return {key: value for key, value in found.items() if value is not None and value != []}
