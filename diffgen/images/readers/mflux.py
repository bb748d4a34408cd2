"""mflux: JSON in EXIF's UserComment, in PNG too."""

from __future__ import annotations

import re

from ..read import Carried
from .picture_info import PictureInfo, entries, name, number, parsed, seed, side, steps, text


def read(carried: Carried) -> PictureInfo | None:
    record = parsed(carried.comment)
    if record is None or "mflux_version" not in record:
        return None
    model = text(record.get("model")) or ""
    info = PictureInfo(
        "mflux",
        prompt=text(record.get("prompt")),
        negative=text(record.get("negative_prompt")),
        seed=seed(record.get("seed")),
        steps=steps(record.get("steps")),
        guidance=number(record.get("guidance")),
        width=side(record.get("width")),
        height=side(record.get("height")),
        model=model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else name(model),  # a hub's id, or a path
        syntax="plain",
        cpu_noise=False,
    )
    info.sampled(record.get("scheduler"))
    scales = entries(record.get("lora_scales"))
    for i, path in enumerate(entries(record.get("lora_paths"))):
        if named := name(path):
            info.loras.append((named, (number(scales[i]) if i < len(scales) else None) or 1.0))
    if record.get("image_path") or record.get("image_paths"):
        # There a strength of 0.3 keeps the first 30% of the steps as they are in the picture.
        kept = number(record.get("image_strength"))
        info.strength = None if kept is None else round(1 - kept, 4)
    if record.get("controlnet_image_path"):
        info.notes.append("it was made with a ControlNet")
    if record.get("quantize"):
        info.notes.append(f"its weights had {str(record['quantize'])[:10]} bits")
    return info
