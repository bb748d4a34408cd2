"""stable-diffusion.cpp: AUTOMATIC1111's text, the schedule joined to the sampler's name; newer ones add JSON to it.

The JSON follows `, SDCPP: ` at the end of the text, has the schema sdcpp.image.params/v1, and is what is read if there
is one. In WebP the text lies in XMP.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any

from ..read import Carried
from . import a1111
from .picture_info import PictureInfo, as_int, entries, name, number, seed, side, steps, table, text

MARK = "Version: stable-diffusion.cpp"
TAIL = ", SDCPP: "


def read(carried: Carried) -> PictureInfo | None:
    inside = re.search(r"<sdcpp:parameters[^>]{0,200}>([^<]*)</sdcpp:parameters>", carried.xmp)
    value = carried.texts.get("parameters") or carried.comment or (html.unescape(inside[1]) if inside else "")
    plain, record = _tail(value)
    if record is not None:
        return _of_record(record)
    if MARK not in plain.rsplit("\n", 1)[-1]:
        return None
    prompt, negative, values = a1111.split(plain)
    # An older one's sampler is followed by ", Version"; a list of sigmas may stand between.
    info = a1111.of_settings("sdcpp", prompt, negative, values)
    info.cpu_noise = values.get("RNG") == "cpu"
    return info


def _tail(value: str) -> tuple[str, dict[str, Any] | None]:
    """(text, record): the JSON repeats the prompt, so text that looks like its beginning may be part of a prompt."""
    for match in list(re.finditer(re.escape(TAIL) + r"(?=\{)", value))[:20]:
        try:
            record, end = json.JSONDecoder().raw_decode(value, match.end())
        except (ValueError, RecursionError):
            continue
        if not value[end:].strip() and str(table(record).get("schema")).startswith("sdcpp.image.params/"):
            return value[: match.start()], record
    return value, None


def _of_record(record: dict[str, Any]) -> PictureInfo:
    sampling, prompt, models = (table(record.get(key)) for key in ("sampling", "prompt", "models"))
    scale = table(sampling.get("guidance"))
    info = PictureInfo(
        "sdcpp",
        prompt=text(prompt.get("positive")),
        negative=text(prompt.get("negative")),
        seed=seed(record.get("seed")),
        steps=steps(sampling.get("steps")),
        guidance=number(scale.get("txt_cfg")),
        width=side(record.get("width")),
        height=side(record.get("height")),
        model=name(models.get("model") or models.get("diffusion_model")),
        clip_skip=as_int(record.get("clip_skip"), 1, 100),
        cpu_noise=record.get("rng") == "cpu",
    )
    info.sampled(sampling.get("method") or sampling.get("sample_method"), sampling.get("scheduler"))
    a1111.tags(info)
    for lora in map(table, entries(record.get("loras"))):
        if named := name(lora.get("name") or lora.get("path")):
            info.loras.append((named, number(lora.get("multiplier")) or 1.0))
    if entries(sampling.get("custom_sigmas")):
        info.notes.append("it was made at noise levels of its own, which are not carried over")
    hires = table(record.get("hires"))
    if hires.get("enabled") is True and (factor := number(hires.get("scale"))):
        mode = "latent" if str(hires.get("upscaler")).startswith("Latent") else "lanczos"
        info.upscale = factor, mode, number(hires.get("denoising_strength"))
    return info
