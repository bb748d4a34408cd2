"""Plan the pictures of a pipeline: check every number, name and input file, and fill in defaults, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Unpack

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.generation import grid_files, plan
from diffgen.generation.checks import (
    DEFAULTS,
    MAX_SIDE,
    check_batch_size,
    check_guidance,
    check_sampling,
    parse_size,
    which_seeds,
)
from diffgen.generation.options import Options, checked_values, flag_of, guided_flags, unsupported, with_our_names
from diffgen.models.families import FAMILIES, REFINERS, class_of
from diffgen.models.find import Model, check, find
from diffgen.models.gate import Checked
from diffgen.models.info import info
from diffgen.prompts import compositions
from diffgen.prompts import syntax as prompt_syntax
from diffgen.prompts import words as prompt_rules
from diffgen.prompts.styles import apply_styles
from diffgen.prompts.wildcards import Wildcards
from schedulers.explicit import is_grid_file

from . import inputs, sizes
from .inputs import Control, Embedding, Input, Inputs, Lora, Upscale, Variation


@dataclass(frozen=True, kw_only=True)
class Shot(plan.Shot):
    """One picture of a plan. The choices in its prompts are made."""

    plan: Plan = field(compare=False, repr=False)
    negative: str
    template: str  # the prompt with its choices


@dataclass(frozen=True, kw_only=True)
class Plan(plan.Plan):
    """A checked request for pictures of a diffusion pipeline. `prompts` may hold choices, which each seed makes."""

    OWN: ClassVar[frozenset[str]] = plan.Plan.OWN | {"checked", "negative", "own_grid", "vocabulary", "styles"}

    checked: Checked
    negative: str
    own_grid: bool = False  # the grid is the tuned one that the model selects automatically
    vocabulary: frozenset[str] | None = None  # the words that the model was trained on
    card: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # of the model, by `models.info`
    prompt_syntax: str = "a1111"
    styles: tuple[str, ...] = ()
    image: Input | None = None
    strength: float = 1.0
    mask: Input | None = None
    outpaint: tuple[int, int, int, int] | None = None
    references: tuple[Input, ...] = ()
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
        """The task of the pipeline: one of `families.TASKS`."""
        if self.mask is not None and self.checked.reads_mask:
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
        """What else a summary of the plan says."""
        details = [f"strength {self.strength:g}"] if self.image else []
        if self.model.prediction is not None:
            details.append(f"predicts {self.model.prediction}")
        if "safety_checker" in self.checked.companions:
            details.append(f"safety checker {'on' if self.options['safety'] else 'off'}")
        return details

    def shots(self) -> Iterator[Shot]:
        """Every picture: prompts first, then seeds."""
        for template in self.prompts:
            for index in range(self.count):
                seed = self.seed_of(index)
                prompt, negative = template, self.negative
                if self.prompt_syntax != "plain":
                    prompt, negative = self.wildcards.expand(template, seed, self.negative)
                yield Shot(plan=self, prompt=prompt, negative=negative, template=template, index=index, seed=seed)

    def unknown(self, prompt: str) -> tuple[str, ...]:
        """The words of a prompt, and of its choices, that the model was not trained on; none without a vocabulary."""
        if self.vocabulary is None:
            return ()
        if self.prompt_syntax != "plain":
            prompt = self.wildcards.possible(prompt)
        added = {word for embedding in self.embeddings for word in prompt_rules.words(embedding.word)}
        return tuple(prompt_rules.unknown_words(self.vocabulary | added, prompt, self.prompt_syntax))

    def warnings(self, prompt: str) -> list[str]:
        """What to know before looking at a picture of this prompt."""
        warnings = [*self.notes, *prompt_syntax.notes(prompt, self.prompt_syntax)]
        if words := self.unknown(prompt):
            named = ", ".join(map(repr, words))
            near = prompt_rules.nearest_words(self.vocabulary or (), words)
            known = f"; it knows {', '.join(map(repr, near))}" if near else ""
            warnings.append(f"{self.model.name} never saw {named}: a picture of {prompt!r} will not show it{known}")
            if not (self.card.get("compositions") or {}).get("things"):
                return warnings  # of a model that draws one thing, this says all
        text = prompt_syntax.plain_text(prompt, self.prompt_syntax)
        return [*warnings, *(f"{self.model.name}: {note}" for note in compositions.composition_notes(self.card, text))]


class ModelFacts:
    """What plans need to know of a model, read from its files once. A process that makes many plans keeps it."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @cached_property
    def checked(self) -> Checked:
        """The model's files, checked. Raises InputError."""
        return check(self.model)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The model's description. Raises InputError."""
        return info(self.model)

    @cached_property
    def vocabulary(self) -> frozenset[str] | None:
        """The words that the model was trained on."""
        return prompt_rules.known_words(self.about)

    @cached_property
    def noise(self) -> schedulers.NoiseSchedule:
        """The model's noise schedule. Raises InputError."""
        return noise_and_prediction(self.checked)[0]


def make_plan(model: Model | ModelFacts, prompts: str | Sequence[str], **keywords: Unpack[Options]) -> Plan:
    """Check everything that can be checked without torch, the model's and the inputs' files included.

    Missing values come from the model's card, else from its family's defaults.
    Raises UsageError for a wrong number, name or combination, InputError for a wrong model or input.
    """
    facts = model if isinstance(model, ModelFacts) else ModelFacts(model)
    model = facts.model
    options = with_our_names(keywords)
    checked_options = CheckedOptions(options)
    # Before the model, so that a wrong option is never blamed on it.
    check_sampling(DEFAULTS | checked_options.sampling)
    size = parse_size(options["size"]) if options.get("size") is not None else None
    checked = facts.checked
    if not checked.row.reads_prompts:
        if name := unsupported(options, "noise"):
            why = f"{model.name} makes pictures from nothing but noise"
            raise UsageError(f"{flag_of(name)} is not supported: {why}", "leave it out")
    elif options.get("controls"):
        class_of(checked.family, "control")  # before its ControlNet is looked for
    texts, negative = checked_options.texts(prompts, checked.row.reads_prompts)
    about = facts.about
    begun = any(options.get(name) is not None for name in ("image", "upscale"))
    begun = begun or any(options.get(name) for name in ("controls", "references"))
    plain = not begun and checked_options.values["refiner"] is None
    chosen = _sampling(facts, checked_options.sampling, plain)
    rest = {"steps": chosen["steps"], "guidance": chosen["guidance"], "scheduler": chosen["label"]}
    own_grid = Path(chosen["grid"]) in checked.grids
    own_grid = own_grid and _sampling(facts, rest, plain)["grid"] == chosen["grid"]
    pictures = Inputs(options, model.folder, checked.network.folder if checked.row.reads == "control" else None)
    size, notes = sizes.round_size(size or pictures.size or sizes.own_size(model, about, checked), checked)
    fitted = pictures.fitted(size, notes, sizes.multiple(checked))
    embedded = checked.guidance_is_input
    if chosen["guidance"] == 0 and not embedded:
        notes.append("guidance 0 leaves the prompt out (1 is guidance off)")
    why_not = "takes it as an input" if embedded else "" if checked.row.reads_prompts else "reads no prompts"
    notes += [*grid_files.grid_notes(chosen), *check_guidance(chosen, why_not)]
    if negative.strip() and (embedded or chosen["guidance"] == 1):
        notes.append("the negative prompt is not read: guidance is off, or an input of this model")
    if chosen["guidance"] == 1 and not embedded:
        notes += [
            f"guidance is off: {flag} changes nothing" for flag in guided_flags(checked_options.values["options"])
        ]
    plan = Plan(
        model=model,
        checked=checked,
        prompts=texts,
        negative=negative,
        width=size[0],
        height=size[1],
        notes=tuple(notes),
        vocabulary=facts.vocabulary,
        card=about,
        own_grid=own_grid,
        **chosen,
        **checked_options.values,
        **fitted,
    )
    _check_together(plan)
    return replace(plan, notes=(*plan.notes, *sizes.size_notes(plan.final_size, model, about, checked)))


def _check_together(plan: Plan) -> None:
    """Raise UsageError for options that exclude each other or do not fit the model."""
    family, mask = plan.checked.family, plan.mask is not None
    if max(plan.final_size) > MAX_SIDE:
        size = "x".join(map(str, plan.final_size))
        raise UsageError(
            f"the pictures would have {size} pixels, at most {MAX_SIDE} a side", "ask for less with --size"
        )
    transformer = "transformer" in plan.checked.components
    if not plan.checked.row.reads_prompts:
        return
    if not plan.checked.reads_mask or mask:  # else it is refused below
        class_of(family, plan.task)
    embedded, tile = plan.checked.guidance_is_input, plan.options["tile"]
    guided = " and ".join(guided_flags(plan.options)) if embedded else ""
    for is_wrong, reason in (
        (plan.checked.reads_mask and not mask, "this is an inpainting model: it needs --image and --mask"),
        (plan.task == "mask" and plan.controls, "an inpainting model takes no --control"),
        (plan.upscale and mask, "--upscale and a mask exclude each other: upscale the picture in a second run"),
        (tile and transformer, f"--tile is not supported for {family}: its network has no convolutions"),
        (tile and plan.options["vae_tiling"], "--tile and --vae-tiling exclude each other: seams would show"),
        (len(plan.references) > plan.checked.row.references, _references(plan.checked.row.references, family)),
        (plan.embeddings and transformer, f"--embedding is not supported for {family}"),
        (guided, f"{guided} is not for a network that takes the guidance as an input"),
        (plan.refiner and plan.checked.row.refiner is None, f"--refiner is for Stable Diffusion XL, not for {family}"),
        (plan.attention and transformer, f"--attention is not supported for {family}: it has no cross-attention"),
        (plan.refiner and (plan.task != "text" or plan.upscale), "--refiner is for text to image alone"),
    ):
        if is_wrong:
            raise UsageError(reason)
    if plan.upscale:
        class_of(family, "control+image" if plan.controls else "image")
    _check_attention(plan)


def _references(most: int, family: str) -> str:
    editors = ", ".join(row.name for row in FAMILIES.values() if row.references)
    return (
        f"--reference at most {most} times for {family}" if most else f"--reference is for {editors}, not for {family}"
    )


def _check_attention(plan: Plan) -> None:
    """Raise UsageError for a word of --attention that is in no prompt."""
    if not plan.attention:
        return
    texts = dict.fromkeys(prompt_syntax.plain_text(shot.prompt, plan.prompt_syntax) for shot in plan.shots())
    prompts = [prompt_rules.words(text) for text in texts]
    for wanted in plan.attention:
        if not (words := prompt_rules.words(wanted)):
            raise UsageError(f"--attention {wanted!r} is no word")
        n = len(words)
        if not any(words == row[i : i + n] for row in prompts for i in range(len(row) - n + 1)):
            listed = ", ".join(dict.fromkeys(word for row in prompts for word in row))
            raise UsageError(f"--attention {wanted!r} is not in the prompt", f"its words are: {listed[:300]}")


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
        self.values: dict[str, Any] = {
            "given": frozenset(key for key, value in options.items() if value is not None),
            **which_seeds(options.get("count", 1), options.get("seed"), options.get("seeds")),
            "options": checked_values(options),
            "batch_size": check_batch_size(options.get("batch_size", 1)),
            "prompt_syntax": self.prompt_syntax,
            "styles": self.styles,
            "wildcards": self.wildcards,
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
        positive = [prompts] if isinstance(prompts, str) else list(prompts)
        negative = self.options.get("negative", "")
        if not reads_prompts:
            if positive or negative.strip():
                raise UsageError("this model reads no prompts", "leave the prompt out")
            return ("",), ""
        if not positive:
            raise UsageError("there is no prompt", 'say what to show: diffgen generate "a red apple"')
        for text in (*positive, *([negative] if negative.strip() else [])):
            prompt_rules.check_prompt(text)
        if self.styles:
            styled = [apply_styles(self.styles, text, negative) for text in positive]
            positive, negative = [text for text, _ in styled], styled[0][1]
        for text in (*positive, negative):
            check_text(text, self.prompt_syntax, self.wildcards)
        return tuple(positive), negative


def check_text(text: str, syntax: str, wildcards: Wildcards) -> None:
    """Check a prompt's grammar and all its choices. Raises UsageError, InputError."""
    if syntax != "plain":
        wildcards.check(text)
        prompt_syntax.parse(text, syntax)


def noise_and_prediction(checked: Checked) -> tuple[schedulers.NoiseSchedule, str]:
    """The noise schedule and the prediction that a model's scheduler_config.json states."""
    component, row = checked.components["scheduler"], checked.row
    config = component.config | ({"mu": row.shift} if row.shift else {})
    if (mu := row.shifts.get(checked.variant or "")) is not None:
        config |= {"base_shift": mu, "max_shift": mu}
    try:
        return schedulers.from_diffusers_config(config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{component.folder / 'scheduler_config.json'}: {error}") from error


def _sampling(facts: ModelFacts, chosen: Mapping[str, Any], plain: bool) -> dict[str, Any]:
    """steps, guidance, scheduler and grid: as `chosen`, else of the model's card, else of its family.

    Text to image by this model alone (`plain`) uses one of its own tuned grids if the user chose no grid and there is
    one for exactly the scheduler, number of steps and guidance. The card may name one: it then sets the number of steps
    too, unless that contradicts `chosen` or the user's list of models.
    """
    model, checked, about, noise = facts.model, facts.checked, facts.about, facts.noise
    card = about["defaults"] if isinstance(about["defaults"], dict) else {}
    own = {key: card.get(key, getattr(checked.defaults, key)) for key in DEFAULTS}
    named = next((path for path in checked.grids if own["grid"] == f"grids/{path.name}"), None)
    users = "grid" in chosen or ("grid" in model.defaults and named is None)
    if named is None and "grid" not in model.defaults and is_grid_file(str(own["grid"])):
        raise InputError(f"{model.folder / 'card.json'}: there is no grid {own['grid']!r} in the model's folder")
    if "scheduler" in chosen or named is not None:
        own["grid"] = None  # the model's grid is for its own scheduler
    try:
        if plain and not users:
            tuned = grid_files.tuned_defaults({"grid": str(named)}) if named else {}
            tuned = {k: v for k, v in tuned.items() if k not in model.defaults and (k != "guidance" or k not in card)}
            grids = [*([named] if named else []), *checked.grids]
            for values in (own | tuned, own):
                sampling = check_sampling(values | dict(chosen), noise=noise)
                if (grid := grid_files.shipped_grid(grids, sampling)) is not None:
                    return sampling | {"grid": grid}
        return check_sampling(own | grid_files.tuned_defaults(chosen) | dict(chosen), noise=noise)
    except UsageError as error:
        raise InputError(f"{model.folder}: {error.message}, by the model's card or configuration") from error


def _words(words: str | Sequence[str] | None) -> tuple[str, ...]:
    """The words of --attention, each once."""
    return tuple(dict.fromkeys([words] if isinstance(words, str) else words or ()))


def _refiner(name: str | None) -> Model | None:
    if name is None:
        return None
    model = find(name)
    if model.family not in REFINERS:
        raise InputError(f"--refiner {name}: not a refiner of Stable Diffusion XL, but of the family {model.family}")
    return model
