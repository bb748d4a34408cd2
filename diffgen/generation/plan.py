"""A plan, its pictures, and the record that every picture carries."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diffgen.errors import DiffgenError, InvalidOutput, UsageError
from diffgen.version import __version__

if TYPE_CHECKING:
    from PIL import Image

    from diffgen.images.strip import Step
    from diffgen.models.find import Model
    from schedulers.scheduler import Scheduler
from .grid_files import grid_file


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked order for pictures: picture i of each prompt has the seed `seed + i`."""

    model: Model
    prompts: tuple[str, ...]
    seed: int
    count: int  # pictures for each prompt
    steps: int
    guidance: float
    scheduler: str  # canonical
    label: str  # what it was asked for as: other tools' names can stand for options too
    grid: str
    width: int
    height: int
    batch_size: int
    notes: tuple[str, ...] = ()  # what concerns every picture
    keep_steps: bool = False  # pictures come with what each evaluation predicted

    def __len__(self) -> int:
        return len(self.prompts) * self.count

    def batches(self) -> Iterator[tuple[str, range]]:
        """(prompt, the numbers i of the pictures to make at once), prompts first, then seeds."""
        for prompt in self.prompts:
            for first in range(0, self.count, self.batch_size):
                yield prompt, range(first, min(first + self.batch_size, self.count))

    def warnings(self, prompt: str) -> list[str]:
        """What to know before looking at a picture of this prompt."""
        return list(self.notes)


@dataclass(frozen=True)
class Picture:
    """One picture of a plan with the record of how it was made; or, where it came out wrong, the error.

    `steps` are what each evaluation of the network predicted, and `attention` the map [h, w] of each word that was
    asked for and is in the prompt (an array: a place's part of its attention, 0 to 1), where the plan asks for them.
    """

    prompt: str
    seed: int
    image: Image.Image | None
    record: dict[str, Any]
    error: DiffgenError | None = None
    steps: tuple[Step, ...] = ()
    attention: Mapping[str, Any] = field(default_factory=dict)


def finished(pictures: Iterable[Picture], metadata: str) -> list[Image.Image]:
    """The images of a plan's pictures, their metadata in `.info`: full, params (without our own record) or none.

    Raises UsageError for another level before a picture is made, and the error of one that came out wrong.
    """
    from diffgen.images.metadata import LEVELS, info_of

    if metadata not in LEVELS:
        raise UsageError(f"metadata must be one of {', '.join(LEVELS)} (got {metadata!r})")
    images = []
    for picture in pictures:
        if picture.image is None:
            raise picture.error or InvalidOutput(f"no picture of {picture.prompt!r}")
        picture.image.info.update(info_of(picture.record, metadata))
        images.append(picture.image)
    return images


def record_of(generator: Any, plan: Plan, scheduler: Scheduler, shot: Any, nfe: int, **more: Any) -> dict[str, Any]:
    """What the record of any picture says, but for its pixels' hash; `more` is what this kind of model adds.

    All that is needed to make the picture again: its keys are listed in images/metadata.py.
    """
    from diffgen.images.metadata import SCHEMA

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
        "model": generator.model.name,
        "model_hash": generator.model_hash,
        "prediction": generator.prediction,
        "device": generator.device.type,
        "dtype": str(generator.dtype).removeprefix("torch."),
        "batch_size": plan.batch_size,
        "rng": "CPU",
        "warnings": plan.warnings(shot.prompt),
    }
    return record | more | {"versions": versions | more.get("versions", {})}
