"""The table of generate's options: one row each.

The checks, the keys of prompt files, the record of a picture, `reproduce` and the command that `inspect` prints are
derived from it. To add an option: a row here, its flag in cli/generate.py, its use, its documentation. A plan holds
the checked value of an option with a `check` in `plan.options`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, cast, get_args, get_origin, get_type_hints

from PIL import Image

from diffgen.errors import UsageError, check_keywords
from diffgen.images.readers.picture_info import plain_number

from . import recorded
from .checks import check_backend, check_bool, check_interval, in_range, whole_number
from .recorded import Files, Fits, Record

Source = str | os.PathLike[str] | Image.Image

# Kinds of models: pipelines that read prompts, pipelines that make pictures from noise alone, runs of `diffgen train`.
ALL = frozenset({"prompts", "noise", "run"})
PROMPTS = frozenset({"prompts"})


@dataclass(frozen=True)
class Option:
    """What holds for one option; its type and its name are those of the key in `Options`."""

    neutral: Any = None  # the value that changes nothing, as None and empty values do
    models: frozenset[str] = ALL  # the kinds of models that take it
    per_line: bool = False  # a line of a prompt file may set it
    check: Callable[[str, Any], Any] | None = None  # (flag, value) → the value for `plan.options`; raises UsageError
    record: str | None = None  # its key in a picture's record, where it is not neutral
    fits: Fits | None = None  # is a value of that key possible? By default, what `check` accepts
    read: Callable[[Record, Files], Any] | None = None  # its value from a record; by default, the key's
    flag: str = ""  # of the command, where it is not the name
    served: bool = False  # clients of `diffgen serve` may set it; one that names files of the server may not
    guided: bool = False  # it acts on guidance: nothing without it, refused where the network reads the scale itself

    def possible(self, value: Any) -> bool:
        """Can a record have this value at the option's key?"""
        if self.fits is not None:
            return self.fits(value)
        try:
            self.check and self.check("", value)
        except UsageError:
            return False
        return True


class Options(TypedDict, total=False):
    """The options of generate besides the prompt, by the names of the command's. None means: not set."""

    # The prompt
    negative: Annotated[str, Option("", PROMPTS, per_line=True, served=True)]
    style: Annotated[str | Sequence[str] | None, Option(None, PROMPTS, per_line=True, served=True)]
    wildcards: Annotated[Sequence[str] | None, Option()]  # folders
    clip_skip: Annotated[int, Option(1, PROMPTS, True, whole_number(1, 12), "clip_skip", served=True)]
    # Which pictures: picture i of each prompt has the seed `seed + i`
    count: Annotated[int, Option(1, per_line=True, served=True)]
    seed: Annotated[int | None, Option(per_line=True, served=True)]  # random by default
    seeds: Annotated[str | Sequence[int] | None, Option()]  # instead of seed and count: "0-7", "1,5,9"
    size: Annotated[
        str | int | tuple[int, int] | None, Option(per_line=True, served=True)
    ]  # (width, height), "WxH" or a side
    # How they are sampled
    steps: Annotated[int | None, Option(per_line=True, served=True)]
    guidance: Annotated[float | None, Option(1, ALL - {"noise"}, per_line=True, served=True)]
    scheduler: Annotated[str | None, Option(per_line=True, served=True)]
    grid: Annotated[str | None, Option(per_line=True, served=True)]
    # What else the model reads
    loras: Annotated[
        Sequence[str],  # PATH[:SCALE]
        Option(
            models=PROMPTS,
            record="loras",
            fits=recorded.files({"scale": recorded.number(-10, 10)}),
            read=recorded.loras,
            flag="--lora",
            served=True,
        ),
    ]
    variation_seed: Annotated[
        int | None,
        Option(
            models=PROMPTS,
            per_line=True,
            record="variation",
            fits=recorded.table({"seed": recorded.whole(0, 2**32 - 1), "strength": recorded.number(0, 1)}),
            read=recorded.entry("variation", "seed"),
            served=True,
        ),
    ]
    variation_strength: Annotated[
        float | None, Option(models=PROMPTS, per_line=True, read=recorded.entry("variation", "strength"), served=True)
    ]
    upscale: Annotated[
        float | None,
        Option(
            models=PROMPTS,
            record="upscale",
            fits=recorded.table(
                {
                    "factor": recorded.number(1, 8),
                    "mode": recorded.name,
                    "strength": recorded.number(0, 1),
                    "from": recorded.numbers(2, 1, 8192),  # the size of the first pass
                }
            ),
            read=recorded.entry("upscale", "factor"),
            served=True,
        ),
    ]
    upscale_mode: Annotated[str | None, Option(models=PROMPTS, read=recorded.entry("upscale", "mode"), served=True)]
    upscale_strength: Annotated[
        float | None, Option(models=PROMPTS, read=recorded.entry("upscale", "strength"), served=True)
    ]
    prompt_syntax: Annotated[
        str, Option("a1111", per_line=True, record="prompt_syntax", fits=recorded.name, served=True)
    ]
    guidance_rescale: Annotated[
        float, Option(0.0, PROMPTS, False, in_range(0, 1), "guidance_rescale", guided=True, served=True)
    ]
    guidance_interval: Annotated[  # (from, to), shares of the steps
        str | Sequence[float] | None,
        Option(
            (0.0, 1.0),
            PROMPTS,
            False,
            check_interval,
            "guidance_interval",
            recorded.numbers(2, 0, 1),
            guided=True,
            served=True,
        ),
    ]
    image: Annotated[
        Source | None,
        Option(models=PROMPTS, per_line=True, record="image", fits=recorded.file, read=recorded.image),
    ]
    mask: Annotated[  # white is repainted
        Source | None, Option(models=PROMPTS, per_line=True, record="mask", fits=recorded.file, read=recorded.mask)
    ]
    strength: Annotated[
        float | None, Option(models=PROMPTS, per_line=True, record="strength", fits=recorded.number(0, 1), served=True)
    ]
    references: Annotated[  # pictures that the prompt speaks about, for models that edit
        Sequence[Source],
        Option(
            models=PROMPTS,
            record="references",
            fits=recorded.files({}),
            read=recorded.references,
            flag="--reference",
        ),
    ]
    outpaint: Annotated[  # left, top, right, bottom, in pixels
        str | Sequence[int] | None,
        Option(models=PROMPTS, record="outpaint", fits=recorded.numbers(4, 0, 8192), served=True),
    ]
    controls: Annotated[
        Sequence[str],  # TYPE=IMAGE[:SCALE]
        Option(
            models=PROMPTS,
            record="controls",
            fits=recorded.files({"kind": recorded.name, "scale": recorded.number(-10, 10), "model": recorded.name}),
            read=recorded.controls,
            flag="--control",
        ),
    ]
    control_models: Annotated[  # [TYPE=]PATH
        Sequence[str], Option(models=PROMPTS, read=recorded.control_models, flag="--control-model")
    ]
    embeddings: Annotated[
        Sequence[str],  # WORD=FILE
        Option(
            models=PROMPTS,
            record="embeddings",
            fits=recorded.files({"word": recorded.text}),
            read=recorded.embeddings,
            flag="--embedding",
            served=True,
        ),
    ]
    refiner: Annotated[  # a model of the family sdxl-refiner
        str | None, Option(models=PROMPTS, record="refiner", fits=recorded.text, read=recorded.refiner)
    ]
    tile: Annotated[bool, Option(False, PROMPTS, False, check_bool, "tile", served=True)]
    safety: Annotated[
        bool,
        Option(
            True, check=check_bool, record="safety", fits=lambda value: value in ("on", "off"), read=recorded.safety
        ),
    ]
    compile: Annotated[bool, Option(False, PROMPTS, check=check_bool, record="compile")]  # the network's blocks
    attention_backend: Annotated[str, Option("native", PROMPTS, check=check_backend, record="attention_backend")]
    # What does not change a picture
    batch_size: Annotated[int | str | None, Option(1)]  # "auto": as many as fit
    vae_tiling: Annotated[bool, Option(False, ALL - {"noise"}, check=check_bool, served=True)]
    keep_steps: Annotated[bool, Option(False)]  # pictures come with what each evaluation predicted
    attention: Annotated[str | Sequence[str] | None, Option(models=PROMPTS)]  # words whose cross-attention is kept


_HINTS = get_type_hints(Options, include_extras=True)
OPTIONS: dict[str, Option] = {name: hint.__metadata__[0] for name, hint in _HINTS.items()}

# The names that diffusers' pipelines use.
ALIASES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
    "num_images_per_prompt": "count",
}


def with_our_names(keywords: Mapping[str, Any]) -> Options:
    """The options with diffusers' names replaced by ours; `width` and `height` become `size`.

    Raises UsageError for an unknown name, with the nearest one, and for an option that is set twice.
    """
    check_keywords(keywords, "generate", [*OPTIONS, *ALIASES, "width", "height"])
    options = {name: value for name, value in keywords.items() if name in OPTIONS}
    others = {ALIASES[alias]: (alias, value) for alias, value in keywords.items() if alias in ALIASES}
    if "width" in keywords or "height" in keywords:
        if not {"width", "height"} <= set(keywords):
            raise UsageError("width and height go together", "or set size")
        others["size"] = ("width and height", (keywords["width"], keywords["height"]))
    for name, (alias, value) in others.items():
        if name in options:
            raise UsageError(f"{alias} and {name} set the same option", "set one of them")
        options[name] = value
    return cast(Options, options)


def flag_of(name: str) -> str:
    """The command's flag of an option."""
    return OPTIONS[name].flag or f"--{name.replace('_', '-')}"


def unsupported(options: Options, kind: str) -> str | None:
    """The first option that is set and that models of this kind do not take; None if there is none."""
    for name, value in options.items():
        option = OPTIONS[name]
        if kind not in option.models and value and value != option.neutral:
            return name
    return None


def checked_values(options: Options) -> Options:
    """The checked value, or the neutral one, of every option whose row has a check. Raises UsageError."""
    values = {}
    for name, option in OPTIONS.items():
        if option.check is not None:
            value = options.get(name)
            values[name] = option.neutral if value is None else option.check(flag_of(name), value)
    return cast(Options, values)


def plain_type(name: str) -> type | None:
    """int, float, str or bool for an option that takes such a value, or none, and nothing else; None for others."""
    (hint, *_) = get_args(_HINTS[name])  # of Annotated
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, str, bool) else None


def guided_flags(values: Options) -> list[str]:
    """The flags of the checked options that act on guidance and are not neutral."""
    rows = ((name, option) for name, option in OPTIONS.items() if option.guided)
    return [flag_of(name) for name, option in rows if values.get(name) != option.neutral]


def json_types() -> dict[str, tuple[type, ...]]:
    """The options that a line of a prompt file may set, with the types of their JSON values."""
    return {name: _json_types(_HINTS[name]) for name, option in OPTIONS.items() if option.per_line}


def _json_types(hint: Any) -> tuple[type, ...]:
    types = {str: (str,), int: (int,), float: (int, float), Sequence: (list,), tuple: (list,)}
    (hint, *_) = get_args(hint)  # of Annotated
    json: list[type] = []
    for part in get_args(hint) or (hint,):
        json += types.get(get_origin(part) or part, ())
    return tuple(json)


def read_options(record: Record, kind: str, files: Files) -> Options:
    """The options of this kind of model that a picture's record holds, besides those that every record has."""
    options = {}
    for name, option in OPTIONS.items():
        if kind in option.models and (option.record or option.read):
            value = option.read(record, files) if option.read else record.get(option.record or "")
            if value is not None and value != []:
                options[name] = value
    return cast(Options, options)


def words_of(options: Options) -> list[str]:
    """The options as words of the command."""
    words = []
    for name, value in options.items():
        flag, neutral = flag_of(name), OPTIONS[name].neutral
        if value is None or value == neutral:
            continue
        if isinstance(value, bool):
            words += [flag] if value else [flag, "off"]
        elif isinstance(value, list) and isinstance(value[0], str):
            words += [word for one in value for word in (flag, one)]
        elif isinstance(value, list):
            words += [flag, ",".join(map(plain_number, value))]
        else:
            words += [flag, value if isinstance(value, str) else plain_number(cast(float, value))]
    return words
