"""What can be asked of any model: prompts, seeds, steps, guidance, a scheduler, a size; checked without torch."""

from __future__ import annotations

import platform
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffgen
import schedulers
from diffgen.errors import DiffgenError, InputError, InvalidOutput, UsageError
from diffgen.models.gate import sha256_of

if TYPE_CHECKING:
    from PIL import Image

    from diffgen.images.strip import Step
    from diffgen.models.find import Model
    from schedulers.scheduler import Scheduler

MAX_SEED = 2**32 - 1
MAX_SIDE = 8192
MAX_PICTURES = 100_000

# Where neither the command nor the model says otherwise.
DEFAULTS = {"steps": 25, "guidance": 7.5, "scheduler": "dpmpp_2m", "grid": None}


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
    import torch

    from diffgen.images.metadata import SCHEMA

    versions = {"diffgen": diffgen.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
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
        "threads": torch.get_num_threads(),
        "batch_size": plan.batch_size,
        "rng": "CPU",
        "warnings": plan.warnings(shot.prompt),
    }
    return record | more | {"versions": versions | more.get("versions", {})}


def parse_size(size: Any) -> tuple[int, int]:
    """(width, height) from that pair, "WxH", "N" or N. Raises UsageError."""
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", size.strip())
        size = (int(match[1]), int(match[2] or match[1])) if match else size
    if isinstance(size, int):
        size = (size, size)
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int for n in size)):
        raise UsageError(f"--size must be WIDTHxHEIGHT in pixels (got {size!r})", "for example --size 512x512")
    return whole("--size: the width", size[0], 1, MAX_SIDE), whole("--size: the height", size[1], 1, MAX_SIDE)


def whole(what: str, value: Any, low: int, high: int) -> int:
    """The value, a whole number in [low, high]. Raises UsageError."""
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{what} must be a whole number from {low} to {high} (got {value!r})")
    return value


def parse_numbers(
    option: str, text: str | Sequence[int], low: int, high: int, most: int = MAX_PICTURES
) -> tuple[int, ...]:
    """The numbers in "0-7", "1,5,9", "0-3,100", or the numbers, each once, at most `most`. Raises UsageError."""
    found: list[int] = []
    for part in text.split(",") if isinstance(text, str) else text:
        first, dash, last = (piece.strip() for piece in str(part).partition("-"))
        ends = [int(end) if end.isascii() and end.isdigit() and len(end) < 11 else -1 for end in (first, last or first)]
        if not max(low, 0) <= ends[0] <= ends[1] <= high or ends[1] - ends[0] >= most or (dash and not last):
            raise UsageError(
                f"{option} must be numbers and ranges from {low} to {high} (got {text!r})",
                f"for example {low}-{low + 7},42",
            )
        found += range(ends[0], ends[1] + 1)
    whole(f"{option}: how many", len(found), 1, most)
    return tuple(dict.fromkeys(found))


def parse_seeds(text: str | Sequence[int]) -> tuple[int, ...]:
    """The seeds in "0-7", "1,5,9", "0-3,100", or the numbers. Raises UsageError."""
    return parse_numbers("--seeds", text, 0, MAX_SEED)


def which_seeds(count: int, seed: int | None, seeds: str | Sequence[int] | None) -> dict[str, Any]:
    """count, seed (random unless given) and seeds (empty unless given) of a plan, checked. Raises UsageError."""
    whole("--count", count, 1, MAX_PICTURES)
    listed = () if seeds is None else parse_seeds(seeds)
    if listed and (seed is not None or count != 1):
        raise UsageError("--seeds says how many pictures and which seeds: leave --seed and --count out")
    if seed is not None:
        whole("--seed", seed, 0, MAX_SEED)
        whole("the last seed, --seed plus --count less 1,", seed + count - 1, 0, MAX_SEED)
    count = len(listed) or count
    if seed is None:
        seed = listed[0] if listed else secrets.randbelow(MAX_SEED - count + 2)
    return {"count": count, "seed": seed, "seeds": listed}


def sampling(values: dict[str, Any], native: bool = False) -> dict[str, Any]:
    """steps, guidance, scheduler and grid, checked, names in their canonical form. Raises UsageError, InputError.

    `native`: for a model that is asked without a pipeline, which takes any solver.
    """
    whole("--steps", values["steps"], 1, 1000)
    guidance = values["guidance"]
    if type(guidance) not in (int, float) or not 0 <= guidance <= 100:
        raise UsageError(f"--guidance must be a number from 0 to 100 (got {guidance!r})", "1 is off; 3 to 9 are usual")
    try:
        name, named_grid = schedulers.resolve(str(values["scheduler"]))
    except schedulers.UnknownName as error:
        raise UsageError(str(error), "list: diffgen schedulers list") from error
    solver = schedulers.info(name)
    grid = check_grid(str(values["grid"] or named_grid or solver.grid))
    if solver.upwards:
        raise UsageError(f"--scheduler {name} goes from pictures to noise", "list: diffgen schedulers list")
    if solver.native_only and not native:
        raise UsageError(f"--scheduler {name} does not run inside a pipeline", "list: diffgen schedulers list")
    label = str(values["scheduler"])
    return {"steps": values["steps"], "guidance": float(guidance), "scheduler": name, "label": label, "grid": grid}


def check_grid(name: str) -> str:
    """The canonical name of a grid, or the path of a grid file, which is read. Raises UsageError, InputError."""
    try:
        return schedulers.check_grid(name)
    except schedulers.UnknownName as error:
        raise UsageError(str(error), "list: diffgen schedulers list") from error
    except (ValueError, OSError) as error:
        raise _unread(name, error) from error


def of_grid(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a grid file that is asked for was tuned for: scheduler, steps and guidance, the defaults beside it."""
    tuned = _tuned(asked.get("grid"))
    if tuned is None or not tuned.is_tuned:
        return {}
    found = {"scheduler": tuned.solver, "steps": tuned.steps, "guidance": tuned.guidance}
    return {key: value for key, value in found.items() if value is not None}


def shipped_grid(paths: Iterable[Path], chosen: Mapping[str, Any]) -> str | None:
    """The first of a model's tuned grids that is for exactly this solver and number of steps, and for this guidance,
    or for any.

    `chosen` is what `sampling` returned. Raises InputError.
    """
    label = schedulers.parse(chosen["label"])
    if label.grid or label.options:
        return None
    for path in map(str, paths):
        tuned = _tuned(path)
        fits = (tuned.solver, tuned.steps) == (chosen["scheduler"], chosen["steps"])
        if fits and tuned.guidance in (None, chosen["guidance"]):
            return path
    return None


def grid_notes(chosen: Mapping[str, Any]) -> list[str]:
    """What to know where a tuned grid is used for something else than it was tuned for."""
    tuned = _tuned(chosen["grid"])
    if tuned is None:
        return []
    notes = []
    if tuned.steps != chosen["steps"]:
        notes.append(
            f"the grid {tuned.name} was tuned for {tuned.steps} steps; it is interpolated to {chosen['steps']}"
        )
    if tuned.guidance is not None and tuned.guidance != chosen["guidance"]:
        notes.append(f"the grid {tuned.name} was tuned at guidance {tuned.guidance:g}, not {chosen['guidance']:g}")
    return notes


def check_grid_model(grid: str, model: str, model_hash: str) -> None:
    """Raises InputError for a grid file that was tuned for another model."""
    tuned = _tuned(grid)
    if tuned is not None and tuned.model_hash not in (None, model_hash):
        raise InputError(
            f"--grid {tuned.name} was tuned for another model than {model}",
            "choose another with --grid, or tune one: diffgen tune -m MODEL --scheduler NAME --nfe N -o GRID.json",
        )


def grid_file(grid: str) -> dict[str, str]:
    """What the record of a picture says of a grid that is a file, besides its name."""
    return {"grid_sha256": sha256_of(Path(grid))} if grid.lower().endswith(".json") else {}


def _tuned(grid: Any) -> Any:
    """The content of a grid file; None for a grid that is known by a name. Raises InputError."""
    if not isinstance(grid, str) or not grid.lower().endswith(".json"):
        return None
    try:
        return schedulers.tuned(grid)
    except (ValueError, OSError) as error:
        raise _unread(grid, error) from error


def _unread(grid: str, error: ValueError | OSError) -> InputError:
    """What to say of a grid that cannot be read."""
    if isinstance(error, OSError):
        hint = "diffgen tune writes such files; grids with a name: diffgen schedulers list"
        return InputError(f"cannot read the grid {grid}: {error.strerror}", hint)
    return InputError(f"cannot read the grid {error}")  # which names the file
