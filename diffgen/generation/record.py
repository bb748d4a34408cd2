"""The record that every picture carries."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diffgen.images.metadata import SCHEMA
from diffgen.version import __version__

from .grid_files import grid_file
from .model import Loaded
from .plan import Plan, Shot

if TYPE_CHECKING:
    from schedulers.scheduler import Scheduler


def record_of(loaded: Loaded, plan: Plan, scheduler: Scheduler, shot: Shot, nfe: int, **more: Any) -> dict[str, Any]:
    """What the record of any picture says, but for its pixels' hash; `more` is what this kind of model adds.

    All that is needed to make the picture again: its keys are listed in images/metadata.py.
    """
    versions = {"diffgen": __version__, "python": platform.python_version(), "torch": version("torch")}
    record = {
        "schema": SCHEMA,
        "prompt": shot.prompt,
        "negative": "",
        "seed": shot.seed,
        "index": shot.index,
        "steps": plan.steps,
        "nfe": nfe,
        "guidance": plan.guidance,
        "scheduler": scheduler.name,
        "scheduler_options": scheduler.options,
        "grid": scheduler.grid_name,
        **grid_file(plan.grid),
        "width": plan.width,
        "height": plan.height,
        "model": loaded.model.name,
        "model_hash": loaded.model_hash,
        "prediction": loaded.prediction,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "batch_size": plan.batch_size,
        "rng": "CPU",
        "warnings": plan.warnings(shot.prompt),
    }
    return record | more | {"versions": versions | more.get("versions", {})}
