"""Fooocus: JSON as `parameters` (its own scheme), or AUTOMATIC1111's text with `fooocus_scheme` beside it; or EXIF."""

from __future__ import annotations

import re

from ..read import MAKER_NOTE, SOFTWARE, Carried
from . import a1111
from .picture_info import PictureInfo, entries, name, number, parsed, seed, side, steps, text


def read(carried: Carried) -> PictureInfo | None:
    parameters = carried.texts.get("parameters") or carried.comment
    record = parsed(parameters)
    if record is not None and "base_model" in record and "sampler" in record:
        match = re.fullmatch(r"\(\s*(\d{1,5}),\s*(\d{1,5})\s*\)", str(record.get("resolution")))
        width, height = (match[1], match[2]) if match else (None, None)
        info = PictureInfo(
            "fooocus",
            prompt=text(record.get("prompt")),
            negative=text(record.get("negative_prompt")),
            seed=seed(record.get("seed")),
            steps=steps(record.get("steps")),
            guidance=number(record.get("guidance_scale")),
            width=side(width),
            height=side(height),
            model=name(record.get("base_model")),
            cpu_noise=True,
        )
        info.sampled(record.get("sampler"), record.get("scheduler"))
        for lora in entries(record.get("loras")):
            if isinstance(lora, list) and len(lora) >= 2 and (named := name(lora[0])):
                info.loras.append((named, number(lora[1]) or 1.0))
        styles = text(record.get("styles")) or ""
    else:
        scheme = carried.texts.get("fooocus_scheme") or carried.tags.get(MAKER_NOTE)
        prompt, negative, values = a1111.split(parameters)
        version = values.get("Version", "") + carried.tags.get(SOFTWARE, "")
        if not values or (scheme != "a1111" and "Fooocus" not in version):
            return None
        info = a1111.of_settings(
            "fooocus", values.get("Raw prompt", prompt), values.get("Raw negative prompt", negative), values
        )
        info.cpu_noise = True
        if info.grid is None:
            info.sampled(values.get("Sampler"), values.get("Scheduler"))
        for pair in values.get("Lora weights", "").split(", ")[:100]:
            named, _, scale = pair.rpartition(": ")
            if named and (value := number(scale)) is not None:
                info.loras.append((name(named) or named, value))
        styles = values.get("Styles", "")
    info.notes.append("Fooocus adds sharpening and guidance of its own, which are not carried over")
    if styles and styles != "[]":
        info.notes.append(f"the words of its styles are not in the prompt: {styles[:200]}")
    return info
