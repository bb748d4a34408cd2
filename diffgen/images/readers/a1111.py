"""AUTOMATIC1111's web UI and Forge: one text, `parameters` in PNG, EXIF's UserComment elsewhere.

    prompt, any number of lines
    Negative prompt: any number of lines, or none
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, …

A value with a comma, colon, quote or line break in it is a JSON string. The last line is one of settings if it has at
least three of them. Extensions may add lines of their own after it.
"""

from __future__ import annotations

import json
import re

from ..read import Carried
from .picture_info import PictureInfo, as_int, name, number, seed, side, size, steps, text

MAX_LINE = 64 * 1024  # characters of the line of settings
LEAST = 3  # settings

_PAIR = re.compile(r'\s*([A-Za-z][\w \-/.()]{0,63}?):\s*("(?:\\.|[^"\\])*"(?=\s*(?:,|$))|\[[^\]]*\]|[^,]*)(?:,|$)')
_TAG = re.compile(r"<(lora|lyco|hypernet):([^:<>]{1,200})((?::[^:<>]{0,50})*)>")

# What "Automatic" means for a sampler (modules/sd_samplers_kdiffusion.py, 1.9 and later); linspace for the others.
AUTOMATIC = {
    "dpmpp_2m": "karras",
    "dpmpp_sde": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_2s_ancestral": "karras",
    "dpmpp_3m_sde": "exponential",
    "dpm2": "karras",
    "dpm2_ancestral": "karras",
    "restart": "karras",
}
OWN_TIMES = ("ddim", "plms", "unipc")  # samplers with times of their own, every (T/n)-th


def read(carried: Carried) -> PictureInfo | None:
    parameters = carried.texts.get("parameters") or carried.comment
    prompt, negative, values = split(parameters)
    if not values and "parameters" not in carried.texts:
        return None  # a camera's comment
    if not values.get("Version", "").startswith("diffgen "):
        return of_settings("a1111", prompt, negative, values)
    ours = of_settings("diffgen", prompt, negative, values)
    ours.prompt, ours.syntax = without_tags(ours.prompt or ""), "ours"
    return ours


def split(parameters: str) -> tuple[str, str | None, dict[str, str]]:
    """(prompt, negative prompt or None, settings) of a text; no settings where no line has at least three."""
    lines = parameters.strip().split("\n")
    values = settings(lines[-1])
    if values:
        lines.pop()
    else:
        starts = [i for i, line in enumerate(lines) if line.startswith("Steps: ") and settings(line)]
        if starts:
            values, lines = settings(lines[starts[-1]]), lines[: starts[-1]]
    begins = [i for i, line in enumerate(lines) if line.strip().startswith("Negative prompt:")]
    cut = begins[0] if begins else len(lines)
    negative = [line.strip() for line in lines[cut:]]
    if negative:
        negative[0] = negative[0].removeprefix("Negative prompt:").strip()
    return "\n".join(line.strip() for line in lines[:cut]), "\n".join(negative) if negative else None, values


def settings(line: str) -> dict[str, str]:
    """{key: value} of a line of settings; empty if there are fewer than three."""
    if len(line) > MAX_LINE:
        return {}
    values: dict[str, str] = {}
    for key, value in _PAIR.findall(line):
        values.setdefault(key, unquoted(value.strip()))
    return values if len(values) >= LEAST else {}


def unquoted(value: str) -> str:
    """The text of a JSON string; any other value as it is."""
    if value[:1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value


def of_settings(tool: str, prompt: str, negative: str | None, values: dict[str, str]) -> PictureInfo:
    """The picture information in the parts of such a text."""
    width, height = size(values.get("Size"))
    info = PictureInfo(
        tool,
        prompt=text(prompt),
        negative=text(negative),
        seed=seed(values.get("Seed")),
        steps=steps(values.get("Steps")),
        guidance=number(values.get("CFG scale")),
        width=side(width),
        height=side(height),
        model=name(values.get("Model")),
        clip_skip=as_int(values.get("Clip skip"), 1, 100),
    )
    info.sampled(values.get("Sampler"), values.get("Schedule type"))
    _automatic(info, values)
    tags(info)
    share, other = number(values.get("Variation seed strength")), seed(values.get("Variation seed"))
    if share and other is not None:
        info.variation = other, share
    factor, strength = number(values.get("Hires upscale")), number(values.get("Denoising strength"))
    if factor:
        upscaler = values.get("Hires upscaler", "")
        info.upscale = factor, "latent" if upscaler.startswith("Latent") else "lanczos", strength
        if upscaler and not upscaler.startswith(("Latent", "Lanczos")):
            info.notes.append(f"the second pass scaled up with {upscaler[:60]!r}, here with Lanczos")
        if (own := steps(values.get("Hires steps"))) and own != info.steps:
            info.notes.append(f"the second pass had {own} steps of its own")
    else:
        info.strength = strength
    if values.get("Tiling", "").lower() == "true":
        info.more.append("--tile")
    if values.get("RNG"):
        info.cpu_noise = values["RNG"].upper() == "CPU"
    elif tool == "a1111":
        info.cpu_noise = False
    for key, what in (
        ("Refiner", "a refiner"),
        ("VAE", "an autoencoder of its own"),
        ("ENSD", "an offset of the noise's seed"),
        ("Mask blur", "a mask"),
        ("ADetailer model", "ADetailer"),
        ("TI hashes", "textual inversions"),
        ("Hypernet", "a hypernetwork"),
    ):
        if values.get(key):
            info.notes.append(f"it was made with {what}: {key}: {values[key][:80]}")
    info.notes += [f"it was made with a ControlNet: {values[key][:120]}" for key in values if key[:10] == "ControlNet"]
    return info


def tags(info: PictureInfo) -> None:
    """Note the LoRAs in the prompt."""
    for kind, named, numbers in _TAG.findall(info.prompt or ""):
        if kind == "hypernet":
            info.notes.append(f"it was made with a hypernetwork: {named}")
            continue
        scales = [number(part) for part in numbers.split(":")[1:]]
        info.loras.append((name(named) or named, next((scale for scale in scales if scale is not None), 1.0)))


def without_tags(prompt: str) -> str:
    return _TAG.sub("", prompt).strip()


def _automatic(info: PictureInfo, values: dict[str, str]) -> None:
    """The grid where the text leaves it to the sampler."""
    sampler = values.get("Sampler", "").lower().replace(" ", "")
    if info.label is None or info.grid is not None:
        return
    if sampler in OWN_TIMES:
        info.given_grid = "leading"
    elif values.get("Schedule type", "").lower() == "automatic":
        info.grid = info.given_grid = AUTOMATIC.get(info.scheduler or "", "linspace")
    elif info.tool == "a1111" and "Schedule type" not in values:
        info.given_grid = "linspace"  # before 1.9 a schedule stood in the sampler's name
