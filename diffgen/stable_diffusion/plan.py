"""What will be made: every number, name and word checked, defaults filled in, before torch is imported."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.models.find import Model
from diffgen.models.gate import Checked, check_folder
from diffgen.models.info import info

from . import prompts as prompt_rules

MAX_SEED = 2**32 - 1
MAX_SIDE = 8192
MAX_PICTURES = 100_000

# Where neither the command nor the model's card says otherwise.
DEFAULTS = {"steps": 25, "guidance": 7.5, "scheduler": "dpmpp_2m", "grid": None}


@dataclass(frozen=True)
class Plan:
    """A checked order for pictures: picture i of each prompt has the seed `seed + i`."""

    model: Model
    checked: Checked
    prompts: tuple[str, ...]
    negative: str
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
    notes: tuple[str, ...]  # what concerns every picture
    unknown: dict[str, tuple[str, ...]]  # the words of each prompt that the model never saw

    def __len__(self) -> int:
        return len(self.prompts) * self.count

    def batches(self) -> Iterator[tuple[str, range]]:
        """(prompt, the numbers i of the pictures to make at once), prompts first, then seeds."""
        for prompt in self.prompts:
            for first in range(0, self.count, self.batch_size):
                yield prompt, range(first, min(first + self.batch_size, self.count))

    def warnings(self, prompt: str) -> list[str]:
        """What to know before looking at a picture of this prompt."""
        words = self.unknown.get(prompt)
        if not words:
            return list(self.notes)
        named = ", ".join(map(repr, words))
        return [*self.notes, f"{self.model.name} never saw {named}: a picture of {prompt!r} will not show it"]


def make_plan(
    model: Model,
    prompts: str | Sequence[str],
    *,
    negative: str = "",
    count: int = 1,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    grid: str | None = None,
    size: str | int | tuple[int, int] | None = None,
    batch_size: int = 1,
) -> Plan:
    """Check everything that can be checked without torch, the model's files included.

    `seed` is random unless given; `size` is (width, height), "WxH", or the side of a square. What is None comes from
    the model's card, else from DEFAULTS. Raises UsageError for a wrong number or name, InputError for a wrong model.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise UsageError("there is no prompt", 'say what to show: diffgen generate "a red apple"')
    for text in texts:
        prompt_rules.check(text)
    if negative and negative.strip():
        prompt_rules.check(negative)
    whole("--count", count, 1, MAX_PICTURES)
    whole("--batch-size", batch_size, 1, 4096)
    if seed is not None:
        whole("--seed", seed, 0, MAX_SEED)
        whole("the last seed, --seed plus --count less 1,", seed + count - 1, 0, MAX_SEED)

    # What was asked for is checked first, so that a wrong option is never blamed on the model.
    asked = {"steps": steps, "guidance": guidance, "scheduler": scheduler, "grid": grid}
    _sampling(DEFAULTS | {key: value for key, value in asked.items() if value is not None})
    given_size = parse_size(size) if size is not None else None
    checked = check_folder(model.folder)
    said = info(model)
    card = said["defaults"] if isinstance(said["defaults"], dict) else {}
    if scheduler is not None:
        card = {key: value for key, value in card.items() if key != "grid"}  # the card's grid is for its own scheduler
    values = DEFAULTS | {key: card.get(key, default) for key, default in DEFAULTS.items()}
    values |= {key: value for key, value in asked.items() if value is not None}
    try:
        sampling = _sampling(values)
        wanted = given_size or parse_size(_own_size(card, said, checked))
    except UsageError as error:
        raise InputError(f"{model.folder}: {error.message}, by the model's card or configuration") from error
    (width, height), notes = _round_size(wanted, checked)
    if sampling["guidance"] == 0:
        notes.append("guidance 0 leaves the prompt out (1 is guidance off)")

    unknown = {}
    if said["concepts"]:  # the card lists all that the model was trained on
        known = prompt_rules.caption_words(said["concepts"], said["styles"] or ())
        unknown = {text: tuple(prompt_rules.unknown_words(known, text)) for text in texts}
    return Plan(
        model=model,
        checked=checked,
        prompts=tuple(texts),
        negative=negative,
        seed=secrets.randbelow(MAX_SEED - count + 2) if seed is None else seed,
        count=count,
        width=width,
        height=height,
        batch_size=batch_size,
        notes=tuple(notes),
        unknown=unknown,
        **sampling,
    )


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


def device_name(name: str) -> str:
    """The name of a device, if it can be one. Whether it is there, torch knows. Raises UsageError."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", name):
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N, mps or xpu (got {name!r})")
    return name


def dtype_name(name: str) -> str:
    """The full name of a dtype. Raises UsageError."""
    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    if name not in ("auto", "float32", "float16", "bfloat16"):
        raise UsageError(f"--dtype must be auto, float32, float16 or bfloat16 (got {name!r})")
    return name


def noise_and_prediction(checked: Checked) -> tuple[schedulers.NoiseSchedule, str]:
    """The noise schedule and the prediction that a folder's scheduler_config.json says the model was trained with."""
    component = checked.components["scheduler"]
    try:
        return schedulers.from_diffusers_config(component.config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{component.folder / 'scheduler_config.json'}: {error}") from error


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    """steps, guidance, scheduler and grid, checked, names in their canonical form. Raises UsageError, InputError."""
    whole("--steps", values["steps"], 1, 1000)
    guidance = values["guidance"]
    if type(guidance) not in (int, float) or not math.isfinite(guidance) or not 0 <= guidance <= 100:
        raise UsageError(f"--guidance must be a number from 0 to 100 (got {guidance!r})", "1 is off; 3 to 9 are usual")
    try:
        name, named_grid = schedulers.resolve(str(values["scheduler"]))
        solver = schedulers.info(name)
        grid = schedulers.check_grid(str(values["grid"] or named_grid or solver.grid))
    except schedulers.UnknownName as error:
        raise UsageError(str(error), "list: diffgen schedulers list") from error
    except (ValueError, OSError) as error:  # a grid of its own, from a file
        raise InputError(f"--grid {values['grid']}: {error}") from error
    if solver.native_only:
        raise UsageError(f"--scheduler {name} does not run inside a pipeline", "list: diffgen schedulers list")
    label = str(values["scheduler"])
    return {"steps": values["steps"], "guidance": float(guidance), "scheduler": name, "label": label, "grid": grid}


def _factor(checked: Checked) -> int:
    """How many pixels a latent has on a side: 2 for each level of the VAE but the last."""
    levels = checked.components["vae"].config.get("block_out_channels")
    if not isinstance(levels, list) or not 0 < len(levels) < 10:
        raise InputError(f"{checked.components['vae'].folder / 'config.json'}: block_out_channels is {levels!r}")
    return 2 ** (len(levels) - 1)


def _own_size(card: dict[str, Any], said: dict[str, Any], checked: Checked) -> Any:
    """The size that the model makes unless asked: its card's, else the one its configuration means."""
    if size := card.get("size") or said["resolution"]:
        return size
    sample = checked.components["unet"].config.get("sample_size")
    return [side * _factor(checked) for side in reversed(sample)] if isinstance(sample, list) else sample


def _round_size(wanted: tuple[int, int], checked: Checked) -> tuple[tuple[int, int], list[str]]:
    """(size, notes): each side rounded to the nearest multiple of the VAE's factor, but never to nothing."""
    factor = _factor(checked)
    width, height = (max(factor, (side + factor // 2) // factor * factor) for side in wanted)
    if (width, height) == wanted:
        return wanted, []
    return (width, height), [
        f"size {wanted[0]}x{wanted[1]} rounded to {width}x{height}: this model makes multiples of {factor}"
    ]
