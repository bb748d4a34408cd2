"""Our own record, which says all of it."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ..metadata import label_of
from .made import Made


def of_record(record: Mapping[str, Any]) -> Made:
    """What a checked record (`metadata.read_record`) says, with every option of the command that it stands for."""
    upscale, variation = record.get("upscale") or {}, record.get("variation") or {}
    run = record.get("family") == "run"
    made = Made(
        "diffgen",
        prompt=record.get("prompt"),
        negative=record.get("negative"),
        seed=record.get("seed"),
        steps=record.get("steps"),
        guidance=record.get("guidance"),
        scheduler=record.get("scheduler"),
        grid=record.get("grid"),
        width=record.get("width"),
        height=record.get("height"),
        first_size=tuple(upscale["from"]) if upscale else None,
        model=record.get("model"),
        label=label_of(record.get("scheduler") or "", record.get("scheduler_options") or {}) or None,
        given_grid=None if record.get("grid_from") == "model" else record.get("grid"),
        syntax="ours",
        clip_skip=record.get("clip_skip"),
        loras=[(one["name"], one["scale"]) for one in record.get("loras") or () if one["name"]],
        cpu_noise=True,
    )
    if upscale:
        made.upscale = upscale["factor"], upscale["mode"], upscale["strength"]
    if variation:
        made.variation = variation["seed"], variation["strength"]
    made.more = [] if run else _more(record)
    if record.get("cut"):
        made.notes.append("what is said was too long for the file, and is not complete")
    return made


def _more(record: Mapping[str, Any]) -> list[str]:
    """The options that only our own record knows of."""
    words: list[str] = []

    def add(option: str, value: Any) -> None:
        if value is not None:
            words.extend([option, value if isinstance(value, str) else plain(value)])

    add("--prompt-syntax", record.get("prompt_syntax"))
    add("--guidance-rescale", record.get("guidance_rescale"))
    if window := record.get("guidance_interval"):
        add("--guidance-interval", ",".join(map(plain, window)))
    for key in ("image", "mask"):
        if key in record:
            add(f"--{key}", record[key]["name"] or f"{key.upper()}.png")
    if "image" in record:
        add("--strength", record.get("strength"))
    if margins := record.get("outpaint"):
        add("--outpaint", ",".join(map(plain, margins)))
    for one in record.get("controls") or ():
        add("--control", f"{one['kind']}={one['name']}:{plain(one['scale'])}")
        add("--control-model", f"{one['kind']}={one['model']}")
    for one in record.get("embeddings") or ():
        add("--embedding", f"{one['word']}={one['name']}")
    of_file = any(":" not in name for name in record.get("model_files") or ())  # folders' are part:name
    if of_file and (record.get("family") == "sd2" or record.get("prediction") == "v_prediction"):
        add("--prediction", record.get("prediction"))
    add("--refiner", record.get("refiner"))
    add("--quantize", record.get("quantize"))
    if record.get("tile"):
        words.append("--tile")
    if record.get("safety") == "off":
        add("--safety", "off")
    return words


def plain(value: float) -> str:
    """A number in full, without an exponent, as the command's options read it."""
    found = format(Decimal(repr(value)), "f")
    return found.rstrip("0").rstrip(".") if "." in found else found
