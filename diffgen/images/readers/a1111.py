"""AUTOMATIC1111's web UI and Forge: one text, `parameters` in PNG, EXIF's UserComment elsewhere.

    prompt, any number of lines
    Negative prompt: any number of lines, or none
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, …

A value with a comma, colon, quote or line break in it is a JSON string. The last line is one of settings if at least
three of them stand in it. Extensions may add lines of their own after it.
"""

from __future__ import annotations

import json
import re

from ..read import Carried
from .made import Made, as_int, name, number, seed, side, size, steps, text

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


def read(carried: Carried) -> Made | None:
    found = carried.texts.get("parameters") or carried.comment
    prompt, negative, values = split(found)
    if not values and "parameters" not in carried.texts:
        return None  # a camera's comment
    if not values.get("Version", "").startswith("diffgen "):
        return made("a1111", prompt, negative, values)
    ours = made("diffgen", prompt, negative, values)
    ours.prompt, ours.syntax = without_tags(ours.prompt or ""), "ours"
    return ours


def split(found: str) -> tuple[str, str | None, dict[str, str]]:
    """(prompt, negative prompt or None, settings) of a text; no settings where no line has at least three."""
    lines = found.strip().split("\n")
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
    found: dict[str, str] = {}
    for key, value in _PAIR.findall(line):
        found.setdefault(key, unquoted(value.strip()))
    return found if len(found) >= LEAST else {}


def unquoted(value: str) -> str:
    """The text of a JSON string; any other value as it is."""
    if value[:1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value


def made(tool: str, prompt: str, negative: str | None, values: dict[str, str]) -> Made:
    """What the parts of such a text say."""
    width, height = size(values.get("Size"))
    found = Made(
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
    found.sampled(values.get("Sampler"), values.get("Schedule type"))
    _automatic(found, values)
    tags(found)
    share, other = number(values.get("Variation seed strength")), seed(values.get("Variation seed"))
    if share and other is not None:
        found.variation = other, share
    factor, strength = number(values.get("Hires upscale")), number(values.get("Denoising strength"))
    if factor:
        upscaler = values.get("Hires upscaler", "")
        found.upscale = factor, "latent" if upscaler.startswith("Latent") else "lanczos", strength
        if upscaler and not upscaler.startswith(("Latent", "Lanczos")):
            found.notes.append(f"the second pass scaled up with {upscaler[:60]!r}, here with Lanczos")
        if (own := steps(values.get("Hires steps"))) and own != found.steps:
            found.notes.append(f"the second pass had {own} steps of its own")
    else:
        found.strength = strength
    if values.get("Tiling", "").lower() == "true":
        found.more.append("--tile")
    if values.get("RNG"):
        found.cpu_noise = values["RNG"].upper() == "CPU"
    elif tool == "a1111":
        found.cpu_noise = False
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
            found.notes.append(f"it was made with {what}: {key}: {values[key][:80]}")
    found.notes += [f"it was made with a ControlNet: {values[key][:120]}" for key in values if key[:10] == "ControlNet"]
    return found


def tags(found: Made) -> None:
    """Note the LoRAs that stand in the prompt."""
    for kind, named, numbers in _TAG.findall(found.prompt or ""):
        if kind == "hypernet":
            found.notes.append(f"it was made with a hypernetwork: {named}")
            continue
        scales = [number(part) for part in numbers.split(":")[1:]]
        found.loras.append((name(named) or named, next((scale for scale in scales if scale is not None), 1.0)))


def without_tags(prompt: str) -> str:
    return _TAG.sub("", prompt).strip()


def _automatic(found: Made, values: dict[str, str]) -> None:
    """The grid where the text leaves it to the sampler."""
    sampler = values.get("Sampler", "").lower().replace(" ", "")
    if found.label is None or found.grid is not None:
        return
    if sampler in OWN_TIMES:
        found.given_grid = "leading"
    elif values.get("Schedule type", "").lower() == "automatic":
        found.grid = found.given_grid = AUTOMATIC.get(found.scheduler or "", "linspace")
    elif found.tool == "a1111" and "Schedule type" not in values:
        found.given_grid = "linspace"  # before 1.9 a schedule stood in the sampler's name
