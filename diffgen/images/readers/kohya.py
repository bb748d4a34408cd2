"""kohya's sd-scripts (gen_img): PNG texts prompt, negative-prompt, seed, sampler, steps and scale."""

from __future__ import annotations

from ..read import Carried
from .picture_info import PictureInfo, number, seed, steps, text


def read(carried: Carried) -> PictureInfo | None:
    texts = carried.texts
    if not {"prompt", "seed", "sampler", "steps", "scale"} <= set(texts):
        return None
    info = PictureInfo(
        "kohya",
        prompt=text(texts["prompt"]),
        negative=text(texts.get("negative-prompt")),
        seed=seed(texts["seed"]),
        steps=steps(texts["steps"]),
        guidance=number(texts["scale"]),
        width=carried.width,
        height=carried.height,
    )
    info.sampled(texts["sampler"])
    if "negative-scale" in texts:
        info.notes.append(f"the negative prompt had a scale of its own: {texts['negative-scale'][:20]}")
    return info
