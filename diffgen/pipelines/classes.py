"""Which class of diffusers makes pictures in which way, for each family: the one table. Imports no torch."""

from __future__ import annotations

from diffgen.errors import UsageError

# A way that is not here, the family lacks. "mask" is for networks that read the mask as an input (9 channels); with
# every other network inpainting is image to image that keeps to the picture outside the mask.
CLASSES: dict[str, dict[str, str]] = {
    "sd1": {
        "text": "StableDiffusionPipeline",
        "image": "StableDiffusionImg2ImgPipeline",
        "mask": "StableDiffusionInpaintPipeline",
        "control": "StableDiffusionControlNetPipeline",
        "control+image": "StableDiffusionControlNetImg2ImgPipeline",
    },
    "sdxl": {
        "text": "StableDiffusionXLPipeline",
        "image": "StableDiffusionXLImg2ImgPipeline",
        "mask": "StableDiffusionXLInpaintPipeline",
        "control": "StableDiffusionXLControlNetPipeline",
        "control+image": "StableDiffusionXLControlNetImg2ImgPipeline",
    },
    "sdxl-refiner": {"image": "StableDiffusionXLImg2ImgPipeline"},
    "sd3": {"text": "StableDiffusion3Pipeline", "image": "StableDiffusion3Img2ImgPipeline"},
    "flux": {"text": "FluxPipeline", "image": "FluxImg2ImgPipeline"},
}
CLASSES["sd2"] = CLASSES["sd1"]

NAMES = {
    "text": "text to image",
    "image": "image to image",
    "mask": "inpainting with a network that reads the mask",
    "control": "ControlNet",
    "control+image": "ControlNet on a picture",
}


def class_of(family: str, way: str) -> str:
    """The name of diffusers' class for a way of a family. Raises UsageError if the family has none."""
    name = CLASSES.get(family, {}).get(way)
    if name is None:
        has = ", ".join(NAMES[known] for known in CLASSES.get(family, {})) or "pictures from nothing but noise"
        raise UsageError(f"{NAMES[way]} is not there for models of the family {family}", f"it has {has}")
    return name
