"""Sizes of pictures in pixels: the default of a model, and those that it can make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffgen.errors import InputError, UsageError
from diffgen.generation.checks import parse_size
from diffgen.models.families import FAMILIES
from diffgen.models.find import Model
from diffgen.models.gate import Checked

FAR = 5.0  # times the pixels
LEVELS = ("block_out_channels", "dim_mult", "encoder_block_out_channels")  # an entry for each level, in some class


def levels(checked: Checked) -> tuple[int, ...]:
    """The widths of the levels of what makes pixels of numbers: the VAE, or the network of a model of pixels."""
    component = checked.components.get("vae", checked.network)
    levels = next((component.config[key] for key in LEVELS if key in component.config), None)
    if not isinstance(levels, list) or not 0 < len(levels) < 10:
        raise InputError(f"{component.folder / 'config.json'}: block_out_channels is {levels!r}")
    return tuple(levels)


def multiple(checked: Checked) -> int:
    """What a side in pixels must be a multiple of: 2 for each level but the last, times the network's patches."""
    return 2 ** (len(levels(checked)) - 1) * FAMILIES[checked.family].patch


def tokens(checked: Checked, size: tuple[int, int]) -> int:
    """How many tokens a picture of (width, height) pixels is for the network."""
    factor = multiple(checked)
    return (size[0] // factor) * (size[1] // factor)


def own_size(model: Model, about: Mapping[str, Any], checked: Checked) -> tuple[int, int]:
    """The default size: of the model's card, its configuration or its family."""
    card = about["defaults"] if isinstance(about["defaults"], dict) else {}
    size = card.get("size") or about["resolution"] or checked.defaults.size
    if size is None:
        sample = checked.network.config.get("sample_size")
        scale = 2 ** (len(levels(checked)) - 1) if "vae" in checked.components else 1
        size = [side * scale for side in reversed(sample)] if isinstance(sample, list) else sample
    try:
        return parse_size(size)
    except UsageError as error:
        raise InputError(f"{model.folder}: {error.message}, by the model's card or configuration") from error


def round_size(wanted: tuple[int, int], checked: Checked) -> tuple[tuple[int, int], list[str]]:
    """(size, notes): each side rounded to the nearest multiple of the model's factor, but never to nothing."""
    factor = multiple(checked)
    width, height = (max(factor, (side + factor // 2) // factor * factor) for side in wanted)
    if (width, height) == wanted:
        return wanted, []
    return (width, height), [
        f"size {wanted[0]}x{wanted[1]} rounded to {width}x{height}: this model makes multiples of {factor}"
    ]


def size_notes(size: tuple[int, int], model: Model, about: Mapping[str, Any], checked: Checked) -> list[str]:
    """A note for a picture with many more or many fewer pixels than those that the model was trained on.

    The network's time grows with the pixels where it convolves, with their square where it attends.
    """
    try:
        own, name = own_size(model, about, checked), model.name
    except InputError:  # nothing says what it was made for
        return []
    ratio = size[0] * size[1] / (own[0] * own[1])
    if 1 / FAR <= ratio <= FAR:
        return []
    here, there = ("x".join(map(str, sides)) for sides in (size, own))
    if ratio < 1:
        return [f"{here} is far from {there}, for which {name} was made: the picture may not show what it should"]
    return [
        f"{here} has {ratio:.3g} times the pixels of {there}, for which {name} was made: a step takes about "
        f"{ratio:.3g} to {ratio**2:.3g} times as long and as much memory, and things may appear twice"
    ]
