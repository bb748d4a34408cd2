"""What will be made: every number, name, word and input file checked, defaults filled in, before torch is imported."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.generation import grid_files, plan
from diffgen.generation.checks import (
    DEFAULTS,
    MAX_SIDE,
    check_int,
    check_sampling,
    parse_interval,
    parse_size,
    which_seeds,
)
from diffgen.generation.options import Options, checked_values, flag_of, unsupported, with_our_names
from diffgen.models.families import REFINERS, class_of
from diffgen.models.find import Model, check, find
from diffgen.models.gate import Checked
from diffgen.models.info import info
from diffgen.prompts import syntax as prompt_syntax
from diffgen.prompts import words as prompt_rules
from diffgen.prompts.styles import apply_styles
from diffgen.prompts.wildcards import Wildcards
from schedulers.explicit import is_grid_file

from . import inputs, sizes
from .inputs import Control, Embedding, Input, Inputs, Lora, Upscale, Variation


@dataclass(frozen=True, kw_only=True)
class Shot(plan.Shot):
    """One picture of a plan, its prompts with their choices made."""

    negative: str
    template: str  # the prompt before


@dataclass(frozen=True, kw_only=True)
class Plan(plan.Plan):
    """A checked order for pictures of a diffusion pipeline. `prompts` may hold choices, which each seed makes."""

    checked: Checked
    negative: str
    own_grid: bool = False  # one of the model's files, which it takes by itself for the rest of what is asked
    known: frozenset[str] | None = None  # the words that the model was trained on
    prompt_syntax: str = "a1111"
    styles: tuple[str, ...] = ()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    image: Input | None = None
    strength: float = 1.0
    mask: Input | None = None
    outpaint: tuple[int, int, int, int] | None = None
    controls: tuple[Control, ...] = ()
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    upscale: Upscale | None = None
    variation: Variation | None = None
    refiner: Model | None = None
    attention: tuple[str, ...] = ()
    wildcards: Wildcards = field(default_factory=lambda: Wildcards([]), compare=False, repr=False)

    @property
    def task(self) -> str:
        """How the pictures are made: one of `families.TASKS`."""
        if self.mask is not None and self.checked.variant == "inpaint":
            return "mask"
        return ("control+" if self.controls else "") * (self.image is not None) + (
            "image" if self.image is not None else "control" if self.controls else "text"
        )

    @property
    def final_size(self) -> tuple[int, int]:
        """(width, height) of the pictures, after the second pass if there is one."""
        if self.upscale is None:
            return self.width, self.height
        factor = sizes.multiple(self.checked)
        width, height = (
            max(1, round(side * self.upscale.factor / factor)) * factor for side in (self.width, self.height)
        )
        return width, height

    @property
    def details(self) -> list[str]:
        """What else to say of the plan in a line."""
        found = [f"strength {self.strength:g}"] if self.image else []
        if self.model.prediction is not None:
            found.append(f"predicts {self.model.prediction}")
        if "safety_checker" in self.checked.companions:
            found.append(f"safety checker {'on' if self.options['safety'] else 'off'}")
        return found

    def shots(self) -> Iterator[Shot]:
        """Every picture: prompts first, then seeds."""
        for template in self.prompts:
            for index in range(self.count):
                seed = self.seed_of(index)
                prompt, negative = template, self.negative
                if self.prompt_syntax != "plain":
                    prompt, negative = self.wildcards.expand(template, seed, self.negative)
                yield Shot(prompt=prompt, negative=negative, template=template, index=index, seed=seed)

    def groups(self, size: int | None = None) -> Iterator[list[Shot]]:
        """The pictures to make at once: neighbours of the same prompts, at most `size` (the plan's batch size)."""
        for _, same in itertools.groupby(self.shots(), lambda shot: (shot.template, shot.prompt, shot.negative)):
            shots = list(same)
            step = size or self.batch_size
            yield from (shots[i : i + step] for i in range(0, len(shots), step))

    def unknown(self, prompt: str) -> tuple[str, ...]:
        """The words of a prompt, and of its choices, that the model never saw, as far as that is known."""
        if self.known is None:
            return ()
        if self.prompt_syntax != "plain":
            prompt = self.wildcards.possible(prompt)
        added = {word for embedding in self.embeddings for word in prompt_rules.words(embedding.word)}
        return tuple(prompt_rules.unknown_words(self.known | added, prompt, self.prompt_syntax))

    def warnings(self, prompt: str) -> list[str]:
        """What to know before looking at a picture of this prompt."""
        found = [*self.notes, *prompt_syntax.notes(prompt, self.prompt_syntax)]
        if words := self.unknown(prompt):
            named = ", ".join(map(repr, words))
            found.append(f"{self.model.name} never saw {named}: a picture of {prompt!r} will not show it")
        return found


def make_plan(model: Model, prompts: str | Sequence[str], **keywords: Unpack[Options]) -> Plan:
    """Check everything that can be checked without torch, the model's and the inputs' files included.

    What is not said comes from the model's card, else from its family's defaults.
    Raises UsageError for a wrong number, name or combination, InputError for a wrong model or input.
    """
    options = with_our_names(keywords)
    said = CheckedOptions(options)
    # What was asked for is checked first, so that a wrong option is never blamed on the model.
    check_sampling(DEFAULTS | said.sampling)
    size = parse_size(options["size"]) if options.get("size") is not None else None
    checked = check(model)
    if not checked.row.reads_prompts:
        if name := unsupported(options, "noise"):
            why = f"{model.name} makes pictures from nothing but noise"
            raise UsageError(f"{flag_of(name)} is not supported: {why}", "leave it out")
    elif options.get("controls"):
        class_of(checked.family, "control")  # before a ControlNet is asked for
    texts, negative = said.texts(prompts, checked.row.reads_prompts)
    about = info(model)
    begun = options.get("image") is not None or options.get("upscale") is not None or bool(options.get("controls"))
    plain = not begun and said.values["refiner"] is None
    chosen = _sampling(model, checked, about, said.sampling, plain)
    rest = {"steps": chosen["steps"], "guidance": chosen["guidance"], "scheduler": chosen["label"]}
    own_grid = Path(chosen["grid"]) in checked.grids
    own_grid = own_grid and _sampling(model, checked, about, rest, plain)["grid"] == chosen["grid"]
    given = Inputs(options, model.folder)
    size, notes = sizes.round_size(size or given.size or sizes.own_size(model, about, checked), checked)
    pictures = given.fitted(size, notes)
    embedded = checked.guidance_is_input
    if chosen["guidance"] == 0 and not embedded:
        notes.append("guidance 0 leaves the prompt out (1 is guidance off)")
    notes += grid_files.grid_notes(chosen)
    if negative.strip() and (embedded or chosen["guidance"] == 1):
        notes.append("the negative prompt is not read: guidance is off, or an input of this model")
    if (
        chosen["guidance"] == 1
        and not embedded
        and (options.get("guidance_rescale") or options.get("guidance_interval"))
    ):
        notes.append("guidance is off: its rescale and its interval change nothing")
    known = prompt_rules.known_words(about)
    plan = Plan(
        model=model,
        checked=checked,
        prompts=texts,
        negative=negative,
        width=size[0],
        height=size[1],
        notes=tuple(notes),
        known=known,
        own_grid=own_grid,
        **chosen,
        **said.values,
        **pictures,
    )
    _check_together(plan)
    return plan


def _check_together(plan: Plan) -> None:
    """Does all that was asked for go together, and with this model? Raises UsageError."""
    family, mask = plan.checked.family, plan.mask is not None
    if max(plan.final_size) > MAX_SIDE:
        size = "x".join(map(str, plan.final_size))
        raise UsageError(
            f"the pictures would have {size} pixels, at most {MAX_SIDE} a side", "ask for less with --size"
        )
    transformer = "transformer" in plan.checked.components
    if not plan.checked.row.reads_prompts:
        return
    class_of(family, plan.task)
    embedded, tile = plan.checked.guidance_is_input, plan.options["tile"]
    rescale, interval = plan.options["guidance_rescale"], plan.guidance_interval != (0, 1)
    for is_wrong, reason in (
        (plan.checked.variant == "inpaint" and not mask, "this is an inpainting model: it needs --image and --mask"),
        (plan.task == "mask" and plan.controls, "an inpainting model takes no --control"),
        (plan.upscale and mask, "--upscale and a mask exclude each other: upscale the picture in a second run"),
        (tile and transformer, f"--tile is not supported for {family}: its network has no convolutions"),
        (tile and plan.options["vae_tiling"], "--tile and --vae-tiling exclude each other: seams would show"),
        (plan.embeddings and transformer, f"--embedding is not supported for {family}"),
        (embedded and rescale, "--guidance-rescale is not for a network that takes the guidance as an input"),
        (embedded and interval, "--guidance-interval is not for a network that takes the guidance as an input"),
        (plan.refiner and plan.checked.row.refiner is None, f"--refiner is for Stable Diffusion XL, not for {family}"),
        (plan.attention and transformer, f"--attention is not supported for {family}: it has no cross-attention"),
        (plan.refiner and (plan.task != "text" or plan.upscale), "--refiner is for text to image alone"),
    ):
        if is_wrong:
            raise UsageError(reason)
    if plan.upscale:
        class_of(family, "control+image" if plan.controls else "image")
    _check_attention(plan)


def _check_attention(plan: Plan) -> None:
    """Is each word whose attention is asked for in a prompt? Raises UsageError."""
    if not plan.attention:
        return
    texts = dict.fromkeys(prompt_syntax.plain_text(shot.prompt, plan.prompt_syntax) for shot in plan.shots())
    held = [prompt_rules.words(text) for text in texts]
    for asked in plan.attention:
        if not (words := prompt_rules.words(asked)):
            raise UsageError(f"--attention {asked!r} is no word")
        n = len(words)
        if not any(words == row[i : i + n] for row in held for i in range(len(row) - n + 1)):
            listed = ", ".join(dict.fromkeys(word for row in held for word in row))
            raise UsageError(f"--attention {asked!r} is not in the prompt", f"its words are: {listed[:300]}")


class CheckedOptions:
    """The options about prompts, seeds and sampling, checked. Raises UsageError."""

    def __init__(self, options: Options) -> None:
        self.options = options
        keys = ("steps", "guidance", "scheduler", "grid")
        self.sampling: dict[str, Any] = {key: options[key] for key in keys if options.get(key) is not None}  # type: ignore[literal-required]
        self.prompt_syntax = prompt_syntax.check_syntax(options.get("prompt_syntax", "a1111"))
        style = options.get("style")
        self.styles = (style,) if isinstance(style, str) else tuple(style or ())
        folders = options.get("wildcards")
        self.wildcards = Wildcards(None if folders is None else list(folders))
        window = options.get("guidance_interval")
        self.values: dict[str, Any] = {
            "given": frozenset(key for key, value in options.items() if value is not None),
            **which_seeds(options.get("count", 1), options.get("seed"), options.get("seeds")),
            "options": checked_values(options),
            "batch_size": check_int("--batch-size", options.get("batch_size", 1), 1, 4096),
            "prompt_syntax": self.prompt_syntax,
            "styles": self.styles,
            "wildcards": self.wildcards,
            "guidance_interval": (0.0, 1.0) if window is None else parse_interval(window),
            "upscale": inputs.check_upscale(
                options.get("upscale"), options.get("upscale_mode"), options.get("upscale_strength")
            ),
            "variation": inputs.check_variation(options.get("variation_seed"), options.get("variation_strength")),
            "refiner": _refiner(options.get("refiner")),
            "keep_steps": options.get("keep_steps", False),
            "attention": _words(options.get("attention")),
        }

    def texts(self, prompts: str | Sequence[str], reads_prompts: bool) -> tuple[tuple[str, ...], str]:
        """The prompts and the negative prompt, in their styles, all that any seed could choose checked."""
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        negative = self.options.get("negative", "")
        if not reads_prompts:
            if given or negative.strip():
                raise UsageError("this model reads no prompts", "leave the prompt out")
            return ("",), ""
        if not given:
            raise UsageError("there is no prompt", 'say what to show: diffgen generate "a red apple"')
        for text in (*given, *([negative] if negative.strip() else [])):
            prompt_rules.check(text)
        if self.styles:
            styled = [apply_styles(self.styles, text, negative) for text in given]
            given, negative = [text for text, _ in styled], styled[0][1]
        for text in (*given, negative):
            check_text(text, self.prompt_syntax, self.wildcards)
        return tuple(given), negative


def check_text(text: str, syntax: str, wildcards: Wildcards) -> None:
    """Check a prompt's grammar and all its choices. Raises UsageError, InputError."""
    if syntax != "plain":
        wildcards.check(text)
        prompt_syntax.parse(text, syntax)


def noise_and_prediction(checked: Checked) -> tuple[schedulers.NoiseSchedule, str]:
    """The noise schedule and the prediction that a model's scheduler_config.json says it was trained with."""
    component = checked.components["scheduler"]
    try:
        return schedulers.from_diffusers_config(component.config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{component.folder / 'scheduler_config.json'}: {error}") from error


def _sampling(
    model: Model, checked: Checked, about: Mapping[str, Any], asked: Mapping[str, Any], plain: bool
) -> dict[str, Any]:
    """steps, guidance, scheduler and grid: as asked, else by the model's card, else by its family.

    A picture that this model alone makes from nothing but noise (`plain`) is made on one of its own tuned grids where
    nobody asks for a grid and there is one for just its scheduler, number of steps and guidance. The card may name one:
    it then says the number of steps too, unless what is asked, or the user's list says, does not go with it.
    """
    card = about["defaults"] if isinstance(about["defaults"], dict) else {}
    own = {key: card.get(key, getattr(checked.defaults, key)) for key in DEFAULTS}
    named = next((path for path in checked.grids if own["grid"] == f"grids/{path.name}"), None)
    users = "grid" in asked or ("grid" in model.defaults and named is None)
    if named is None and "grid" not in model.defaults and is_grid_file(str(own["grid"])):
        raise InputError(f"{model.folder / 'card.json'}: there is no grid {own['grid']!r} in the model's folder")
    if "scheduler" in asked or named is not None:
        own["grid"] = None  # the model's grid is for its own scheduler
    try:
        if plain and not users:
            said = grid_files.tuned_defaults({"grid": str(named)}) if named else {}
            said = {k: v for k, v in said.items() if k not in model.defaults and (k != "guidance" or k not in card)}
            grids = [*([named] if named else []), *checked.grids]
            for values in (own | said, own):
                chosen = check_sampling(values | dict(asked))
                if (grid := grid_files.shipped_grid(grids, chosen)) is not None:
                    return chosen | {"grid": grid}
        return check_sampling(own | grid_files.tuned_defaults(asked) | dict(asked))
    except UsageError as error:
        raise InputError(f"{model.folder}: {error.message}, by the model's card or configuration") from error


def _words(asked: str | Sequence[str] | None) -> tuple[str, ...]:
    """The words that were asked for, each once."""
    return tuple(dict.fromkeys([asked] if isinstance(asked, str) else asked or ()))


def _refiner(name: str | None) -> Model | None:
    if name is None:
        return None
    model = find(name)
    if model.family not in REFINERS:
        raise InputError(f"--refiner {name}: not a refiner of Stable Diffusion XL, but of the family {model.family}")
    return model
