"""A plan, and its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffgen.errors import DiffgenError, InvalidOutput, UsageError

from .options import Options

if TYPE_CHECKING:
    from PIL import Image

    from diffgen.images.strip import Step
    from diffgen.models.find import Model


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of a plan."""

    prompt: str  # as the network reads it
    index: int  # among the pictures of its prompt
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked request for pictures: picture i of each prompt has the seed `seed + i`, or the i-th of `seeds`."""

    model: Model
    prompts: tuple[str, ...]
    given: frozenset[str]  # the options that the user set; the others are the model's defaults
    seed: int
    seeds: tuple[int, ...] = ()
    count: int  # pictures for each prompt
    steps: int
    guidance: float
    scheduler: str  # canonical
    label: str  # the scheduler as the user named it: other tools' names can stand for options too
    grid: str
    width: int
    height: int
    batch_size: int
    notes: tuple[str, ...] = ()  # what concerns every picture
    keep_steps: bool = False  # pictures come with what each evaluation predicted
    options: Options = field(default_factory=Options)  # the value of each option that has a check in its row

    def __len__(self) -> int:
        return len(self.prompts) * self.count

    @property
    def final_size(self) -> tuple[int, int]:
        """(width, height) of the pictures."""
        return self.width, self.height

    @property
    def details(self) -> list[str]:
        """What else a summary of the plan says."""
        return []

    def seed_of(self, index: int) -> int:
        """The seed of the index-th picture of each prompt."""
        return self.seeds[index] if self.seeds else self.seed + index

    def shots(self) -> Iterator[Shot]:
        """Every picture: prompts first, then seeds."""
        for prompt in self.prompts:
            for index in range(self.count):
                yield Shot(prompt=prompt, index=index, seed=self.seed_of(index))

    def warnings(self, prompt: str) -> list[str]:
        """What to know before looking at a picture of this prompt."""
        return list(self.notes)


@dataclass(frozen=True)
class Picture:
    """One picture of a plan and its record, or the error if it is invalid.

    If the plan keeps them, `steps` are the predictions of each evaluation of the network, and `attention` maps words of
    the prompt to arrays [h, w] in [0, 1]: the share of each place's attention.
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

    Raises UsageError for another level before a picture is made, and the error of an invalid picture.
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
