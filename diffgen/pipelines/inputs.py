"""Read and check what a picture is made from besides its prompt: pictures, masks, adapters. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffgen.errors import InputError, UsageError
from diffgen.generation.checks import MAX_SEED, check_int, check_number, check_share
from diffgen.generation.options import Source
from diffgen.images import fit
from diffgen.images.metadata import base_name
from diffgen.images.pixels import pixels_sha256
from diffgen.images.read import read_image
from diffgen.models import gate, single_file
from diffgen.training.run import product_of

DRAWN = ("canny", "scribble")  # the maps that diffgen draws; all others are pictures of the user's
EXAMPLE = 'for example --embedding "<cat>=cat.safetensors"'
MODES = ("lanczos", "latent")
OFFLOADS = ("none", "model", "group", "sequential")
QUANTIZATIONS = ("none", "int8", "fp8", "nf4", "fp8-storage")
REFERENCE_AREA = 1024**2  # pixels: larger references are scaled down to it, as diffusers' pipelines do
STRENGTH = 0.75  # of image to image, by default
UPSCALE_STRENGTH = 0.5  # of the second pass


@dataclass(frozen=True)
class Input:
    """A picture of the user's: its base name (None for one that is no file) and SHA-256, of the file if it is one."""

    name: str | None
    sha256: str
    image: Image.Image = field(compare=False, repr=False)

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256}


@dataclass(frozen=True)
class Control:
    """A map for a ControlNet: edges, depth, … `drawn` says that the map was drawn from the picture."""

    kind: str
    picture: Input
    scale: float
    model: Path
    map: Image.Image = field(compare=False, repr=False)
    drawn: bool
    sha256: str  # of the ControlNet's weights

    def record(self) -> dict[str, Any]:
        record = {"kind": self.kind, "scale": self.scale, "drawn": self.drawn, **self.picture.record()}
        return record | {"model": base_name(str(self.model)), "model_sha256": self.sha256}


@dataclass(frozen=True)
class Lora:
    path: Path
    scale: float
    sha256: str

    @property
    def name(self) -> str:
        return self.path.stem

    def record(self) -> dict[str, Any]:
        return {"name": self.path.name, "sha256": self.sha256, "scale": self.scale}


@dataclass(frozen=True)
class Embedding:
    """A textual inversion: a word that is replaced by the vectors in a file."""

    word: str
    path: Path
    sha256: str

    def record(self) -> dict[str, Any]:
        return {"word": self.word, "name": self.path.name, "sha256": self.sha256}


@dataclass(frozen=True)
class Upscale:
    """A second pass at another size, from the first one's latents or its pixels, scaled up."""

    factor: float
    mode: str
    strength: float

    def record(self) -> dict[str, Any]:
        return {"factor": self.factor, "mode": self.mode, "strength": self.strength}


@dataclass(frozen=True)
class Variation:
    """A share of another seed's noise in every picture's own."""

    seed: int
    strength: float

    def record(self) -> dict[str, Any]:
        return {"seed": self.seed, "strength": self.strength}


def read_input(source: Source | Input, mode: str = "RGB") -> Input:
    """A picture from a file, from Pillow, or already read. Raises InputError, UsageError for an empty name."""
    if isinstance(source, Input):
        return replace(source, image=source.image.convert(mode))
    if isinstance(source, Image.Image):
        image = source.convert(mode)
        return Input(None, pixels_sha256(image), image)
    path = Path(source)
    if not os.fspath(source):
        raise UsageError("the name of a picture is empty")
    if re.match(r"\w+://", str(source)):
        raise InputError(f"{source} is a URL: pictures are read from files only", "download it first")
    image = read_image(path, mode)
    return Input(path.name, gate.sha256_of(path), image)


def read_control(text: str, models: Sequence[str], folder: Path, own: Path | None = None) -> Control:
    """A control from TYPE=IMAGE[:SCALE]; its ControlNet from `models`, or from the model's own folder.

    `models` are [TYPE=]PATH, PATH a diffusers folder or a .safetensors file; one without a type serves every control.
    Else `folder`/controlnet/TYPE is looked for. `own` is a model's network that reads the map itself. Canny and
    scribble maps are drawn from the picture unless it is a map already; for every other type the picture is taken as
    the map. Raises UsageError, InputError.
    """
    kind, _, rest = text.partition("=")
    kind = kind.strip().lower()
    if not rest or not re.fullmatch(r"[a-z][a-z0-9_-]{0,40}", kind):
        raise UsageError(
            f"--control must be TYPE=IMAGE[:SCALE] (got {text!r})", "for example --control canny=photo.png:0.8"
        )
    name, scale = _scaled(rest, "--control")
    picture = read_input(name)
    from diffgen.images import edges  # imports numpy

    drawn = kind in DRAWN and not edges.is_map(picture.image)
    image = getattr(edges, kind)(picture.image) if drawn else picture.image
    model = own or _control_model(kind, models, folder)
    return Control(kind, picture, scale, model, image, drawn, weights_sha256(model))


def _control_model(kind: str, models: Sequence[str], folder: Path) -> Path:
    named: dict[str, str] = {}
    for text in models:
        match = re.fullmatch(r"([a-z][a-z0-9_-]{0,40})=(.+)", text)
        named |= {match[1]: match[2]} if match else {"": text}
    path = Path(named.get(kind) or named.get("") or folder / "controlnet" / kind)
    if not os.path.lexists(path):
        hint = f"say which: --control-model {kind}=FOLDER, a diffusers folder or a .safetensors file"
        raise InputError(f"there is no ControlNet for {kind}: {path} does not exist", hint)
    return product_of(path, "control")


def weights_sha256(path: Path) -> str:
    """SHA-256 of a ControlNet's weights file, checked. Raises InputError."""
    if path.is_dir():
        stem = "diffusion_pytorch_model"
        files = [path / name for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors") if (path / name).exists()]
        if not files:
            raise InputError(f"{path}: no {stem}.safetensors", gate.CONVERT)
        path = files[0]
    gate.read_header(path)
    return gate.sha256_of(path)


def read_lora(text: str) -> Lora:
    """A LoRA from PATH[:SCALE], PATH being a file or a run of `diffgen finetune`.

    Raises UsageError, InputError (no safetensors, something else than a LoRA, a run of another job).
    """
    name, scale = _scaled(text, "--lora")
    path = product_of(name, "lora")
    content = single_file.recognise(path)
    if content.kind not in ("lora", "other"):
        raise InputError(f"{name}: no LoRA, but {content.what}")
    return Lora(path, scale, gate.sha256_of(path))


def read_embedding(text: str) -> Embedding:
    """A textual inversion from WORD=FILE or WORD=RUN. Raises UsageError, InputError."""
    word, _, name = text.partition("=")
    if not name:
        raise UsageError(f"--embedding must be WORD=FILE (got {text!r})", EXAMPLE)
    check_word(word)
    path = product_of(name, "embedding")
    gate.read_header(path)
    return Embedding(word, path, gate.sha256_of(path))


def check_word(word: str) -> None:
    """Check a word that is to stand for vectors. Raises UsageError."""
    if not re.fullmatch(r"[^\s,:(){}\[\]|\\]{1,60}", word):
        raise UsageError(f"a new word has no spaces and none of , : | ( ) [ ] {{ }} (got {word!r})", EXAMPLE)


def check_upscale(factor: float | None, mode: str | None, strength: float | None) -> Upscale | None:
    """The second pass, its numbers checked; None without a factor. Raises UsageError."""
    if factor is None:
        for what, value in (("--upscale-mode", mode), ("--upscale-strength", strength)):
            if value is not None:
                raise UsageError(f"{what} is for the second pass that --upscale makes", "add --upscale 2")
        return None
    mode = MODES[0] if mode is None else mode
    strength = UPSCALE_STRENGTH if strength is None else strength
    if mode not in MODES:
        raise UsageError(f"--upscale-mode must be {' or '.join(MODES)} (got {mode!r})")
    check_number("--upscale", factor, 1, 8)
    return Upscale(float(factor), mode, check_share("--upscale-strength", strength))


def check_variation(seed: int | None, strength: float | None) -> Variation | None:
    """A variation, its numbers checked: one without the other is a mistake. Raises UsageError."""
    if seed is None and strength is None:
        return None
    if seed is None or strength is None:
        raise UsageError("--variation-seed and --variation-strength go together")
    check_int("--variation-seed", seed, 0, MAX_SEED)
    check_number("--variation-strength", strength, 0, 1)
    return Variation(seed, float(strength))


def offload_name(name: str) -> str:
    """The name of a way to spare a GPU's memory. Raises UsageError."""
    if name not in OFFLOADS:
        raise UsageError(f"--offload must be one of {', '.join(OFFLOADS)} (got {name!r})")
    return name


def quantize_name(name: str) -> str:
    """The name of a way to make weights smaller. Raises UsageError."""
    if name not in QUANTIZATIONS:
        raise UsageError(f"--quantize must be one of {', '.join(QUANTIZATIONS)} (got {name!r})")
    return name


def check_switch(what: str, value: str) -> bool:
    """on or off. Raises UsageError."""
    if value not in ("on", "off"):
        raise UsageError(f"{what} must be on or off (got {value!r})")
    return value == "on"


def _scaled(text: str, option: str) -> tuple[str, float]:
    """(path, scale) from PATH[:SCALE]; a colon that no number follows belongs to the path."""
    path, colon, scale = text.rpartition(":")
    if not text or text == f":{scale}":
        raise UsageError(f"{option} names no file (got {text!r})")
    if not colon or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", scale) or os.path.lexists(text):
        return text, 1.0
    return path, check_number(f"{option}: the scale", float(scale), -10, 10)


class Inputs:
    """The pictures and adapters among a plan's options, read and checked. Raises UsageError, InputError."""

    def __init__(self, options: Mapping[str, Any], folder: Path, own: Path | None = None) -> None:
        """`folder` is the model's. `own` is its network's, where that reads the map of a control itself."""
        image, mask, margins = options.get("image"), options.get("mask"), options.get("outpaint")
        strength = options.get("strength")
        for what, value in (("--strength", strength), ("--mask", mask), ("--outpaint", margins)):
            if value is not None and image is None:
                raise UsageError(f"{what} needs a picture to begin with", "give one with --image FILE")
        if mask is not None and margins is not None:
            raise UsageError("--mask and --outpaint exclude each other: what --outpaint adds is its mask")
        self.image = None if image is None else read_input(image)
        self.mask = None if mask is None else read_input(mask, "L")
        self.margins = None if margins is None else fit.parse_margins(margins)
        if self.image and self.mask and self.mask.image.size != self.image.image.size:
            sizes = " and ".join("x".join(map(str, picture.image.size)) for picture in (self.image, self.mask))
            raise InputError(f"--image and --mask have different sizes, {sizes}", "make the mask from the picture")
        if self.mask and not self.mask.image.getextrema()[1]:
            raise InputError("the mask is all black: nothing would be repainted", "white is repainted")
        if strength is None:
            strength = 1.0 if self.image is None or self.mask or self.margins else STRENGTH
        self.strength = check_share("--strength", strength)
        self.references = [read_input(source) for source in options.get("references") or ()]
        models = options.get("control_models", ())
        self.controls = [read_control(text, models, folder, own) for text in options.get("controls", ())]
        if models and not self.controls:
            raise UsageError("--control-model needs a --control TYPE=IMAGE")
        self.loras = tuple(read_lora(text) for text in options.get("loras", ()))
        self.embeddings = tuple(read_embedding(text) for text in options.get("embeddings", ()))

    @property
    def size(self) -> tuple[int, int] | None:
        """The size that the first picture means, with what is added to it."""
        first = self.image.image if self.image else self.controls[0].map if self.controls else None
        if first is None:
            return reference_size(self.references[0].image.size) if self.references else None
        left, top, right, bottom = self.margins or (0, 0, 0, 0)
        return first.width + left + right, first.height + top + bottom

    def fitted(self, size: tuple[int, int], notes: list[str], multiple: int = 1) -> dict[str, Any]:
        """The fields of a plan, all pictures scaled to the size; what --outpaint adds fills the rest of it.

        References keep their own sizes, cut to multiples of `multiple`.
        """
        if self.margins and self.image:
            left, top, *_ = self.margins
            width, height = size[0] - self.image.image.width - left, size[1] - self.image.image.height - top
            if min(width, height) < 0:
                raise UsageError("--size is too small for the picture and what --outpaint adds", "leave --size out")
            grown, mask = fit.grow(self.image.image, (left, top, width, height))
            self.image = Input(self.image.name, self.image.sha256, grown)
            self.mask = Input(None, "", mask)
            self.margins = (left, top, width, height)
        for picture in (self.image, *(control.picture for control in self.controls)):
            if picture and picture.image.size != size:
                original = "x".join(map(str, picture.image.size))
                notes.append(
                    f"{picture.name or 'the picture'} ({original}) is scaled and cropped to {size[0]}x{size[1]}"
                )
        return {
            "image": self.image and _covering(self.image, size),
            "mask": self.mask and _covering(self.mask, size),
            "outpaint": self.margins,
            "strength": self.strength,
            "references": tuple(
                _covering(picture, reference_size(picture.image.size, multiple)) for picture in self.references
            ),
            "controls": tuple(_control(control, size) for control in self.controls),
            "loras": self.loras,
            "embeddings": self.embeddings,
        }


def reference_size(size: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
    """(width, height) of a reference: of at most REFERENCE_AREA pixels, each a multiple of `multiple`."""
    scale = min(1.0, (REFERENCE_AREA / (size[0] * size[1])) ** 0.5)
    width, height = (max(multiple, int(side * scale) // multiple * multiple) for side in size)
    return width, height


def _covering(picture: Input, size: tuple[int, int]) -> Input:
    return Input(picture.name, picture.sha256, fit.cover(picture.image, size))


def _control(control: Control, size: tuple[int, int]) -> Control:
    return replace(control, map=fit.cover(control.map, size))
