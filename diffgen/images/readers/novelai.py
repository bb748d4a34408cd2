"""NovelAI: PNG texts Software, Source, Description (the prompt) and Comment (JSON); in WebP all of them as one JSON."""

from __future__ import annotations

from ..read import Carried
from .picture_info import PictureInfo, name, number, parsed, seed, side, steps, text


def read(carried: Carried) -> PictureInfo | None:
    texts = carried.texts
    if "Comment" not in texts:
        inside = parsed(carried.comment) or {}
        texts = {key: value for key, value in inside.items() if isinstance(value, str)}
    record = parsed(texts.get("Comment"))
    if record is None or not (texts.get("Software") == "NovelAI" or "uc" in record):
        return None
    info = PictureInfo(
        "novelai",
        prompt=text(texts.get("Description") or record.get("prompt")),
        negative=text(record.get("uc")),
        seed=seed(record.get("seed")),
        steps=steps(record.get("steps")),
        guidance=number(record.get("scale")),
        width=side(record.get("width")),
        height=side(record.get("height")),
        model=name(texts.get("Source")),
        strength=number(record.get("strength")) if record.get("request_type") == "Img2ImgRequest" else None,
    )
    info.sampled(record.get("sampler"), record.get("noise_schedule"))
    if info.prompt and any(bracket in info.prompt for bracket in "{}[]"):
        info.notes.append("NovelAI's {} and [] weigh by 1.05; here write (words:1.05)")
    info.notes.append("NovelAI's models are not to be had")
    return info
