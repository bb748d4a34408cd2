"""The families of models that are read: their parts, by our own table of classes, and how each is best sampled.

A name in a file is only ever compared with this table; nothing is imported by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Pair = tuple[str, str]  # (library, class), as model_index.json writes them


@dataclass(frozen=True)
class Part:
    """A component of a pipeline."""

    kind: str  # "network", "tokenizer" or "scheduler"
    classes: frozenset[Pair]  # those that it may be; empty for a scheduler, whose class is only a word
    optional: bool = False  # the pipeline works without it


class Defaults(NamedTuple):
    """How a model is sampled unless its card or the user says otherwise. Guidance is in our convention: 1 is off."""

    steps: int
    guidance: float
    scheduler: str
    grid: str | None = None  # None: the scheduler's own
    size: int | None = None  # side of a square in pixels; None: what the configuration means


@dataclass(frozen=True)
class Family:
    """What models of one kind have in common."""

    name: str
    title: str
    pipelines: tuple[str, ...]  # class names in model_index.json
    parts: Mapping[str, Part]
    defaults: Defaults
    variants: Mapping[str, Defaults] = field(default_factory=dict)
    patch: int = 1  # latents on a side that the network reads as one
    guidance_embedded: bool = False  # the network takes the guidance as an input, in one evaluation


def _network(library: str, *classes: str, optional: bool = False) -> Part:
    return Part("network", frozenset((library, name) for name in classes), optional)


def _tokenizer(*classes: str, optional: bool = False) -> Part:
    return Part("tokenizer", frozenset(("transformers", name) for name in classes), optional)


SCHEDULER = Part("scheduler", frozenset())
UNET = _network("diffusers", "UNet2DConditionModel")
VAE = _network("diffusers", "AutoencoderKL")
CLIP = _network("transformers", "CLIPTextModel")
CLIP_PROJECTED = _network("transformers", "CLIPTextModelWithProjection")
CLIP_TOKENIZER = _tokenizer("CLIPTokenizer", "CLIPTokenizerFast")
T5, T5_TOKENIZER = ("T5EncoderModel",), ("T5Tokenizer", "T5TokenizerFast")

_STABLE_DIFFUSION = {
    "unet": UNET,
    "vae": VAE,
    "text_encoder": CLIP,
    "tokenizer": CLIP_TOKENIZER,
    "scheduler": SCHEDULER,
}
_SD_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
)
# The distilled variants of Stable Diffusion: "turbo" knows no guidance; "lcm" takes it as an input of its UNet,
# "lcm-merged" (a UNet with an LCM LoRA in it) nearly none.
_FEW_STEPS = {
    "turbo": Defaults(4, 1.0, "euler", "trailing"),
    "lcm": Defaults(4, 8.0, "lcm"),
    "lcm-merged": Defaults(6, 1.0, "lcm"),
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd1",
            "Stable Diffusion 1",
            _SD_PIPELINES,
            _STABLE_DIFFUSION,
            Defaults(25, 7.5, "dpmpp_2m"),
            {**_FEW_STEPS, "inpaint": Defaults(25, 7.5, "dpmpp_2m")},
        ),
        Family(
            "sd2",
            "Stable Diffusion 2",
            _SD_PIPELINES,
            _STABLE_DIFFUSION,
            Defaults(25, 7.5, "dpmpp_2m"),
            {**_FEW_STEPS, "inpaint": Defaults(25, 7.5, "dpmpp_2m")},
        ),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
            {
                **_STABLE_DIFFUSION,
                "text_encoder_2": CLIP_PROJECTED,
                "tokenizer_2": CLIP_TOKENIZER,
            },
            Defaults(30, 5.0, "dpmpp_2m"),
            {
                **_FEW_STEPS,
                "turbo": Defaults(4, 1.0, "euler_ancestral", "trailing"),
                "inpaint": Defaults(30, 5.0, "dpmpp_2m"),
            },
        ),
        Family(
            "sdxl-refiner",
            "Stable Diffusion XL refiner",
            ("StableDiffusionXLImg2ImgPipeline",),
            {
                "unet": UNET,
                "vae": VAE,
                "text_encoder_2": CLIP_PROJECTED,
                "tokenizer_2": CLIP_TOKENIZER,
                "scheduler": SCHEDULER,
            },
            Defaults(30, 5.0, "dpmpp_2m"),
        ),
        Family(
            "sd3",
            "Stable Diffusion 3",
            ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
            {
                "transformer": _network("diffusers", "SD3Transformer2DModel"),
                "vae": VAE,
                "text_encoder": CLIP_PROJECTED,
                "tokenizer": CLIP_TOKENIZER,
                "text_encoder_2": CLIP_PROJECTED,
                "tokenizer_2": CLIP_TOKENIZER,
                "text_encoder_3": _network("transformers", *T5, optional=True),
                "tokenizer_3": _tokenizer(*T5_TOKENIZER, optional=True),
                "scheduler": SCHEDULER,
            },
            Defaults(28, 7.0, "euler", size=1024),
            {"3.5": Defaults(28, 4.5, "euler", size=1024), "turbo": Defaults(4, 1.0, "euler", size=1024)},
            patch=2,
        ),
        Family(
            "flux",
            "FLUX.1",
            ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
            {
                "transformer": _network("diffusers", "FluxTransformer2DModel"),
                "vae": VAE,
                "text_encoder": CLIP,
                "tokenizer": CLIP_TOKENIZER,
                "text_encoder_2": _network("transformers", *T5),
                "tokenizer_2": _tokenizer(*T5_TOKENIZER),
                "scheduler": SCHEDULER,
            },
            Defaults(28, 3.5, "euler", size=1024),
            {"schnell": Defaults(4, 1.0, "euler", size=1024)},
            patch=2,
            guidance_embedded=True,
        ),
        Family(
            "unconditional",
            "unconditional diffusion in pixels",
            ("DDPMPipeline", "DDIMPipeline"),
            {"unet": _network("diffusers", "UNet2DModel"), "scheduler": SCHEDULER},
            Defaults(50, 1.0, "dpmpp_2m"),
        ),
    )
}
PIPELINES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.pipelines))

# What a folder may name besides, and what text to image does not need. Checked only where it is asked for.
COMPANIONS = {
    "safety_checker": _network("stable_diffusion", "StableDiffusionSafetyChecker"),
    "feature_extractor": Part(
        "processor",
        frozenset(
            ("transformers", name)
            for name in ("CLIPImageProcessor", "CLIPImageProcessorPil", "CLIPFeatureExtractor", "SiglipImageProcessor")
        ),
    ),
    "image_encoder": _network("transformers", "CLIPVisionModelWithProjection", "SiglipVisionModel"),
}


def candidates(pipeline: str) -> list[Family]:
    """The families whose models a pipeline of that class name may be."""
    return [family for family in FAMILIES.values() if pipeline in family.pipelines]


def family_of(pipeline: str, parts: set[str], unet: Mapping[str, Any]) -> Family | None:
    """The family of a pipeline with those components, by its UNet's configuration where the class leaves it open.

    Stable Diffusion 2 reads texts of width 1024 (OpenCLIP's), 1 of width 768; a refiner has no first text encoder.
    """
    found = {family.name: family for family in candidates(pipeline)}
    if {"sd1", "sd2"} <= set(found):
        return found["sd2" if unet.get("cross_attention_dim") == 1024 else "sd1"]
    if {"sdxl", "sdxl-refiner"} <= set(found):
        return found["sdxl" if "text_encoder" in parts else "sdxl-refiner"]
    return next(iter(found.values()), None)


def variant_of(
    family: Family, name: str, pipeline: str, network: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> str | None:
    """Which of the family's variants a model is, by its configurations first, then by its name; None is the plain one.

    inpaint: 9 channels in. lcm: the UNet has a projection for the guidance (time_cond_proj_dim). lcm-merged: it has
    none, but LCM's pipeline or scheduler, or "lcm" in the name. turbo: an Euler scheduler with trailing times for
    epsilon, or "turbo" or "lightning" in the name. 3.5: normalised queries and keys. schnell: no guidance embedding.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    known = family.variants
    if "inpaint" in known and network.get("in_channels") == 9:
        return "inpaint"
    if "schnell" in known and network.get("guidance_embeds") is not True:
        return "schnell"
    if "lcm" in known:
        if network.get("time_cond_proj_dim") is not None:
            return "lcm"
        named = pipeline.startswith("LatentConsistency") or scheduler.get("_class_name") == "LCMScheduler"
        if named or "lcm" in words:
            return "lcm-merged"
    if "turbo" in known:
        fast = any(word.endswith(("turbo", "lightning")) for word in words)
        euler = scheduler.get("_class_name") in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        plain = scheduler.get("prediction_type", "epsilon") == "epsilon"
        if fast or (euler and plain and scheduler.get("timestep_spacing") == "trailing"):
            return "turbo"
    if "3.5" in known and network.get("qk_norm") is not None:
        return "3.5"
    return None


def guidance_is_input(family: str, network: Mapping[str, Any]) -> bool:
    """Whether the network itself reads the guidance scale, so that there is no second, unconditional evaluation.

    `network` is its configuration. Flux's networks read it or, in schnell, use none; a UNet reads it if it has a
    projection for it (time_cond_proj_dim), as LCM's has.
    """
    return FAMILIES[family].guidance_embedded or network.get("time_cond_proj_dim") is not None


def defaults_of(family: str, variant: str | None = None) -> Defaults:
    """How a model of that family and variant is sampled unless its card or the user says otherwise."""
    said = FAMILIES[family]
    return said.variants[variant] if variant is not None else said.defaults
