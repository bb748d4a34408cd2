"""A picture's metadata: the AUTOMATIC1111 text, our own record as JSON, and the mark "made by a model".

`generation/record.py` says what the record holds. No path goes in, only base names. Keys that are missing are left
out of the texts.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import schedulers
from schedulers.registry import A1111_GRIDS, LABELS

SCHEMA = "diffgen.image/1"
LEVELS = ("full", "params", "none")
FAST_LEVEL = 1  # of zlib: a fifth of the time of the usual level 6, for a file larger by a fifth
MAX_CHUNK = 64 * 2**10  # bytes of one text chunk

# The grids that AUTOMATIC1111 has too, by its labels ("Schedule type"); others keep our name.
SCHEDULE_TYPES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "linspace": "Uniform",
    "simple": "Simple",
    "trailing": "Simple",  # both take every (T/n)-th entry of the noise table, counted from its end
    "sgm_uniform": "SGM Uniform",
    "leading": "DDIM",
    **{grid: label for label, grid in A1111_GRIDS.items()},
}

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="r"?>'
)


def parameters_text(record: Mapping[str, Any]) -> str:
    """The record in AUTOMATIC1111's grammar: prompt, `Negative prompt: …`, and a last line of `Key: value, …`.

    A value with a comma, colon, quote or line break in it is a JSON string; numbers are short (7, not 7.0).
    """
    versions = record.get("versions") or {}
    upscale = record.get("upscale") or {}
    width, height = upscale.get("from") or (record.get("width"), record.get("height"))
    values = {
        "Steps": record.get("steps"),
        "Sampler": _sampler(record.get("scheduler"), record.get("scheduler_options") or {}),
        "Schedule type": _schedule_type(record.get("grid")),
        "CFG scale": record.get("guidance"),
        "Seed": record.get("seed"),
        "Size": f"{width}x{height}" if width and height else None,
        "Model hash": (record.get("model_hash") or "")[:10] or None,
        "Model": base_name(record["model"]) if record.get("model") else None,
        **_extras(record),
        "RNG": record.get("rng"),
        "Version": f"diffgen {versions['diffgen']}" if versions.get("diffgen") else None,
    }
    adapters = "".join(f" <lora:{_stem(one['name'])}:{_value(one['scale'])}>" for one in record.get("loras") or ())
    lines = [(printable(record.get("prompt") or "") + adapters).strip()]
    if negative := printable(record.get("negative") or "").strip():
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{key}: {_value(value)}" for key, value in values.items() if value is not None))
    return "\n".join(lines).strip()


def _extras(record: Mapping[str, Any]) -> dict[str, Any]:
    """What AUTOMATIC1111 and its extensions write about more than a prompt: adapters, second pass, controls."""
    upscale, variation = record.get("upscale") or {}, record.get("variation") or {}
    loras, words = record.get("loras") or (), record.get("embeddings") or ()
    return {
        "Denoising strength": upscale.get("strength", record.get("strength")),
        "Clip skip": record.get("clip_skip"),
        "Variation seed": variation.get("seed"),
        "Variation seed strength": variation.get("strength"),
        "Tiling": record.get("tile"),
        "Hires upscale": upscale.get("factor"),
        "Hires upscaler": {"latent": "Latent", "lanczos": "Lanczos"}.get(upscale.get("mode", "")),
        "Lora hashes": ", ".join(f"{_stem(one['name'])}: {one['sha256'][:12]}" for one in loras) or None,
        "TI hashes": ", ".join(f"{one['word']}: {one['sha256'][:12]}" for one in words) or None,
        **{
            f"ControlNet {i}": f"Module: {one['kind'] if one['drawn'] else 'none'}, "
            f"Model: {_stem(one['model'])}, Weight: {_value(one['scale'])}"
            for i, one in enumerate(record.get("controls") or ())
        },
        "Refiner": record.get("refiner"),
    }


def info_of(record: Mapping[str, Any], level: str = "full") -> dict[str, str]:
    """The texts that a picture carries, by keyword: `full` all three, `params` all but our own, `none` nothing."""
    if level not in LEVELS:
        raise ValueError(f"unknown metadata level {level!r}: there are {', '.join(LEVELS)}")
    if level == "none":
        return {}
    info = {"parameters": _fitted(parameters_text, record), "XML:com.adobe.xmp": XMP}
    if level == "full":
        info["diffgen"] = _fitted(_json, record)
    return info


def encode_png(image: Image.Image, record: Mapping[str, Any], level: str = "full") -> bytes:
    """The picture as a PNG file with the texts of `info_of`.

    A picture from an accelerator is compressed at FAST_LEVEL: zlib's usual level takes as long as a third of sampling.
    """
    chunks = PngInfo()
    for keyword, text in info_of(record, level).items():
        if keyword.startswith("XML:"):
            chunks.add_itxt(keyword, text)
        else:
            chunks.add_text(keyword, text)  # Latin-1 if it can be, else UTF-8
    file = io.BytesIO()
    fast = {} if record.get("device") in (None, "cpu") else {"compress_level": FAST_LEVEL}
    image.save(file, "PNG", pnginfo=chunks, **fast)
    return file.getvalue()


def _stem(name: str) -> str:
    return base_name(name).rpartition(".")[0] or base_name(name)


def base_name(path: str) -> str:
    """The last part of a path of any system; folders of this machine are not published."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def label_of(name: str, options: Mapping[str, Any]) -> str:
    """The label of a scheduler with these options; its name if they have none."""
    try:
        usual = schedulers.info(name).options
    except ValueError:
        return name
    values = usual | {key: value for key, value in options.items() if key in usual}
    labels = (label for label, (of, _, stands) in LABELS.items() if of == name and usual | stands == values)
    return name if values == usual else next(labels, name)


def _sampler(scheduler: str | None, options: Mapping[str, Any]) -> str | None:
    if scheduler is None:
        return None
    if (label := label_of(scheduler, options)) != scheduler:
        return label
    try:
        return schedulers.info(scheduler).a1111 or scheduler
    except ValueError:  # of another package, not installed here
        return base_name(scheduler)


def _schedule_type(grid: str | None) -> str | None:
    return SCHEDULE_TYPES.get(grid, base_name(grid)) if grid else None


def _value(value: Any) -> str:
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value
    text = printable(str(value))
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def printable(text: str) -> str:
    """Without control characters (line breaks become \\n, tabs stay) and halves of surrogate pairs."""
    text = re.sub(r"\r\n?", "\n", text)
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def _json(record: Mapping[str, Any]) -> str:
    """One line of ASCII: other characters and control characters are escaped, so that the prompt comes back exactly."""
    record = {"schema": SCHEMA, **record}
    for key in ("model", "scheduler", "grid"):
        if isinstance(record.get(key), str):
            record[key] = base_name(record[key])
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return json.dumps(json.loads(text.encode("utf-8", "replace")))  # half a surrogate pair becomes a question mark


def _fitted(render: Callable[[Mapping[str, Any]], str], record: Mapping[str, Any]) -> str:
    """`render(record)` in at most MAX_CHUNK bytes.

    Where it is longer, the longest value is halved, or left out if it is no text, again and again; the record then
    lists under `cut` what is not complete.
    """
    while len((text := render(record)).encode()) > MAX_CHUNK:
        longest = max((key for key in record if key != "cut"), key=lambda key: len(json.dumps(record[key])))
        value = record[longest]
        shorter = value[: len(value) // 2] if isinstance(value, str) else None
        record = {**record, longest: shorter, "cut": sorted({*record.get("cut", ()), longest})}
    return text
