"""A plan, and its pictures."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from diffgen.errors import DiffgenError, InvalidOutput, UsageError

from .options import Options

if TYPE_CHECKING:
    from PIL import Image

    from diffgen.images.strip import Step
    from diffgen.models.find import Model


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of a plan."""

    plan: Plan = field(compare=False, repr=False)
    prompt: str  # as the network reads it
    index: int  # among the pictures of its prompt
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked request for pictures: picture i of each prompt has the seed `seed + i`, or the i-th of `seeds`."""

    OWN: ClassVar[frozenset[str]] = frozenset({"model", "prompts", "given", "seed", "seeds", "count", "notes"})

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
    batch_size: int | None  # pictures at once, of this and other plans; None: as many as fit
    notes: tuple[str, ...] = ()  # what concerns every picture
    keep_steps: bool = False  # pictures come with what each evaluation predicted
    options: Options = field(default_factory=Options)  # the value of each option that has a check in its row

    def __len__(self) -> int:
        return len(self.prompts) * self.count

    @property
    def batch_key(self) -> Hashable:
        """Plans of one model with equal keys can share a batch: they differ only in the fields of `OWN`."""
        shared = (field.name for field in fields(self) if field.compare and field.name not in self.OWN)
        values = (getattr(self, name) for name in shared)
        return tuple(tuple(sorted(value.items())) if isinstance(value, dict) else value for value in values)

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
                yield Shot(plan=self, prompt=prompt, index=index, seed=self.seed_of(index))

    def warnings(self, prompt: str) -> list[str]:
        """What to know before looking at a picture of this prompt."""
        return list(self.notes)


@dataclass(frozen=True)
class Picture:
    """One picture of a plan and its record, or the error if it is invalid.

    If the plan keeps them, `steps` are the predictions of each evaluation of the network, and `attention` maps words of
    the prompt to arrays [h, w] in [0, 1]: the share of each place's attention.
    """

    shot: Shot
    image: Image.Image | None
    record: dict[str, Any]
    error: DiffgenError | None = None
    steps: tuple[Step, ...] = ()
    attention: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The prompt as the network read it."""
        return self.shot.prompt

    @property
    def seed(self) -> int:
        return self.shot.seed


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
