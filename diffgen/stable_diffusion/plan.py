"""What will be made: every number, name and word checked, defaults filled in, before torch is imported."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import schedulers
from diffgen import sampling
from diffgen.errors import InputError, UsageError
from diffgen.models.find import Model
from diffgen.models.gate import Checked, check_folder
from diffgen.models.info import info
from diffgen.sampling import DEFAULTS, MAX_PICTURES, MAX_SEED, parse_size, whole

from . import prompts as prompt_rules


@dataclass(frozen=True, kw_only=True)
class Plan(sampling.Plan):
    """A checked order for pictures of a Stable Diffusion."""

    checked: Checked
    negative: str
    unknown: dict[str, tuple[str, ...]]  # the words of each prompt that the model never saw

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
    sampling.sampling(DEFAULTS | {key: value for key, value in asked.items() if value is not None})
    given_size = parse_size(size) if size is not None else None
    checked = check_folder(model.folder)
    said = info(model)
    card = said["defaults"] if isinstance(said["defaults"], dict) else {}
    if scheduler is not None:
        card = {key: value for key, value in card.items() if key != "grid"}  # the card's grid is for its own scheduler
    values = DEFAULTS | {key: card.get(key, default) for key, default in DEFAULTS.items()}
    values |= {key: value for key, value in asked.items() if value is not None}
    try:
        chosen = sampling.sampling(values)
        wanted = given_size or parse_size(_own_size(card, said, checked))
    except UsageError as error:
        raise InputError(f"{model.folder}: {error.message}, by the model's card or configuration") from error
    (width, height), notes = _round_size(wanted, checked)
    if chosen["guidance"] == 0:
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
        **chosen,
    )


def noise_and_prediction(checked: Checked) -> tuple[schedulers.NoiseSchedule, str]:
    """The noise schedule and the prediction that a folder's scheduler_config.json says the model was trained with."""
    component = checked.components["scheduler"]
    try:
        return schedulers.from_diffusers_config(component.config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{component.folder / 'scheduler_config.json'}: {error}") from error


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
