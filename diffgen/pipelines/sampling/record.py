"""The record of a picture that a pipeline made. `generation/record.py` lists its keys."""

from __future__ import annotations

from typing import Any

import torch

from diffgen.generation.options import OPTIONS
from diffgen.generation.record import installed_version
from diffgen.generation.record import record_of as plan_record
from diffgen.images.metadata import base_name
from diffgen.models import gate
from diffgen.models.find import Model
from schedulers.scheduler import Scheduler

from ..loaded import LoadedModel
from ..plan import Shot


def record_of(loaded: LoadedModel, shot: Shot, scheduler: Scheduler, nfe: int, batch_size: int) -> dict[str, Any]:
    """The record of a picture, except the hash of its pixels and what was done to fit into memory."""
    files = {name.replace("/", ":"): digest for name, digest in loaded.hashes.items() if name.endswith(".safetensors")}
    width, height = shot.plan.final_size
    return plan_record(
        loaded,
        shot,
        scheduler,
        nfe,
        batch_size,
        negative=shot.negative,
        width=width,
        height=height,
        model_files=files,
        family=loaded.model.family,
        threads=torch.get_num_threads(),
        versions={name: installed_version(name) for name in ("diffusers", "transformers")},
        **_options(loaded, shot),
    )


def _options(loaded: LoadedModel, shot: Shot) -> dict[str, Any]:
    """The options that are not neutral, by the keys of their rows, and what else only some pictures have."""
    plan = shot.plan
    values: dict[str, Any] = {
        "grid_from": "model" if plan.own_grid else None,
        "template": shot.template if shot.template != shot.prompt else None,
        "negative_template": plan.negative if plan.negative != shot.negative else None,
        "styles": list(plan.styles),
    }
    for name, option in OPTIONS.items():
        if option.record:
            value = plan.options.get(name) if option.check else getattr(plan, option.record)
            values[option.record] = None if value == option.neutral else _as_json(value)
    if not plan.image:
        values["strength"] = None
    if plan.outpaint:
        values["mask"] = None  # it is what was added
    if plan.upscale:
        values["upscale"]["from"] = [plan.width, plan.height]
    if plan.refiner:
        values["refiner_hash"] = loaded.refiner_hash
    has_checker = "safety_checker" in loaded.checked.companions
    values["safety"] = ("on" if plan.options["safety"] else "off") if has_checker else None
    values["components"] = [
        {"part": name, "name": base_name(file.name), "sha256": loaded.hashes[gate.name_of(loaded.checked, file)]}
        for name, file in plan.model.components
    ]
    values["quantize"] = loaded.quantize if loaded.quantize != "none" else None
    return {key: value for key, value in values.items() if value is not None and value != []}


def _as_json(value: Any) -> Any:
    """A plan's value in JSON's types."""
    if isinstance(value, tuple):
        return [_as_json(one) for one in value]
    if isinstance(value, Model):
        return base_name(value.name)
    return value.record() if hasattr(value, "record") else value
