"""InvokeAI in three generations: invokeai_metadata (3.0 on) and sd-metadata (2.x), both JSON; Dream, a command line."""

from __future__ import annotations

import re
from typing import Any

from ..read import Carried
from .picture_info import PictureInfo, as_int, entries, name, number, parsed, seed, side, steps, table, text

DREAM = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler", "f": "strength"}


def read(carried: Carried) -> PictureInfo | None:
    texts = carried.texts
    if (record := parsed(texts.get("invokeai_metadata"))) is not None:
        return _of_metadata(record)
    if (record := parsed(texts.get("sd-metadata"))) is not None:
        image = table(record.get("image"))
        return _older(image, _prompt(image.get("prompt")), record.get("model_weights") or record.get("model"))
    match = re.match(r'"(.*)"((?:\s|$)[^"]*)$', texts.get("Dream", "")[:64_000], re.DOTALL)
    if match is None:
        return None
    values = {DREAM[key]: value for key, value in re.findall(r"(?<!\S)-([A-Za-z])\s*(\S*)", match[2]) if key in DREAM}
    return _older(values, match[1], None)


def _of_metadata(record: dict[str, Any]) -> PictureInfo:
    model = table(record.get("model"))
    skipped = as_int(record.get("clip_skip"), 0, 100)
    info = PictureInfo(
        "invokeai",
        prompt=text(record.get("positive_prompt")),
        negative=text(record.get("negative_prompt")),
        seed=seed(record.get("seed")),
        steps=steps(record.get("steps")),
        guidance=number(record.get("cfg_scale")),
        width=side(record.get("width")),
        height=side(record.get("height")),
        model=name(model.get("name") or model.get("model_name")),
        clip_skip=None if not skipped else skipped + 1,  # there: layers left out
        strength=number(record.get("strength")),
        cpu_noise=record.get("rand_device") == "cpu",
        syntax="plain",
    )
    info.sampled(record.get("scheduler"))
    for lora in map(table, entries(record.get("loras"))):
        which = table(lora.get("model") or lora.get("lora"))
        if named := name(which.get("name") or which.get("model_name")):
            info.loras.append((named, number(lora.get("weight")) or 1.0))
    if rescale := number(record.get("cfg_rescale_multiplier")):
        info.more += ["--guidance-rescale", f"{rescale:g}"]
    for key, what in (("controlnets", "ControlNets"), ("ipAdapters", "IP adapters"), ("refiner_model", "a refiner")):
        if record.get(key):
            info.notes.append(f"it was made with {what}")
    _weights(info)
    return info


def _older(values: dict[str, Any], prompt: str, model: Any) -> PictureInfo:
    """Prompts from before version 3: the text in square brackets is the negative prompt."""
    negative = ", ".join(part.strip() for part in re.findall(r"\[([^\[\]]*)\]", prompt))
    info = PictureInfo(
        "invokeai",
        prompt=text(re.sub(r"\s*\[[^\[\]]*\]", "", prompt).strip()),
        negative=text(negative),
        seed=seed(values.get("seed")),
        steps=steps(values.get("steps")),
        guidance=number(values.get("cfg_scale")),
        width=side(values.get("width")),
        height=side(values.get("height")),
        model=name(model),
        strength=number(values.get("strength")),
        syntax="plain",
    )
    info.sampled(values.get("sampler"))
    _weights(info)
    return info


def _prompt(value: Any) -> str:
    """A text, or weighted texts."""
    if isinstance(value, str):
        return value
    return ", ".join(str(table(part).get("prompt", "")) for part in entries(value))


def _weights(info: PictureInfo) -> None:
    if re.search(r"[\w)][+-]+(?=[\s,)]|$)|\)\.(and|blend|swap)\(", info.prompt or ""):
        info.notes.append("InvokeAI's weights (words++) are read as plain text here; write (words:1.2)")
