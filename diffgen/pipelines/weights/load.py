"""Load checked files into pipelines of diffusers, ControlNets and the safety checker.

Nothing named in a file is imported, nothing is unpickled, nothing is fetched.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffgen.errors import InputError
from diffgen.models import gate
from diffgen.models.families import Family
from diffgen.models.gate import Checked, Component

from ..families import code_of
from ..families.unet import controlnet_layout
from .layouts import alone_layout, constants, file_layout, first_prefix, folder_layout, pieces_of
from .network import CONTROLNETS, load_network
from .tokenizers import tokenizer_of


def load_pipeline(
    checked: Checked, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype = torch.float32
) -> Any:
    """Load the text-to-image pipeline of a model that has passed the gate; its scheduler is None.

    A refiner has an image-to-image pipeline, an unconditional model DDPMPipeline. Raises InputError where a
    configuration makes no network, names, shapes or values of the weights do not fit it, or the parts do not fit each
    other.
    """
    loaded: dict[str, Any] = {}
    for name, component in checked.components.items():
        if component.tensors is not None:
            loaded[name] = _load(checked, component, device, vae_dtype if name == "vae" else dtype)
    for name, component in checked.components.items():
        if name.startswith("tokenizer"):
            encoder = loaded[name.replace("tokenizer", "text_encoder")]
            loaded[name] = tokenizer_of(component, encoder.config, checked.row.parts[name].template)
    _check_vocabularies(checked, loaded)
    settings = _settings(checked)
    where = checked.file or checked.folder
    code_of(checked.family).check(where, checked.row, checked.variant, {**loaded, **settings})
    cls = getattr(diffusers, checked.row.pipelines[0])
    return assemble(cls, checked.row, {**loaded, "scheduler": None}, settings)


def assemble(cls: type, family: Family, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Make a pipeline of a class of diffusers from the parts and settings that it takes; others are left out."""
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    optional = {name: None for name, part in family.parts.items() if part.optional}
    arguments = {**optional, **family.fixed, **parts, **settings}
    pipeline = cls(**{key: value for key, value in arguments.items() if key in parameters})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_refiner(checked: Checked, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a refiner, whose pipeline takes a picture or latents. Raises InputError for any other model."""
    if not checked.row.is_refiner:
        raise InputError(f"{checked.folder}: not a refiner of Stable Diffusion XL, but of the family {checked.family}")
    return load_pipeline(checked, device, dtype)


def load_safety_checker(checked: Checked, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """Load (checker, its image processor), as `memory.is_flagged` needs them; None if the model has none.

    Raises InputError.
    """
    if not {"safety_checker", "feature_extractor"} <= set(checked.companions):
        return None
    component = gate.check_companion(checked, "safety_checker")
    processor = gate.check_companion(checked, "feature_extractor")
    return load_network(component, device, dtype), _processor(processor)


def load_controlnet(path: str | Path, denoiser: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a ControlNet for a network, from a diffusers folder; for a UNet also from a file in either layout.

    A file has no configuration; the UNet's applies, since a ControlNet is a copy of its first half. Raises InputError
    for other kinds of files and for a ControlNet of another family.
    """
    component = _controlnet_component(Path(path), denoiser)
    names = component.tensors or {}
    original = any(name.endswith("input_hint_block.0.weight") for name in names)
    prefix = first_prefix(("control_model.",), names)
    layout = functools.partial(pieces_of, controlnet_layout, component.config, prefix) if original else None
    network = load_network(component, device, dtype, layout)
    for key in CONTROLNETS[type(denoiser).__name__][1]:
        ours, theirs = network.config[key], denoiser.config[key]
        if ours != theirs:
            raise InputError(
                f"{path}: a ControlNet for another family of models ({key} {ours}, this model's is {theirs})",
                "use one that was trained for this model's family",
            )
    return network


def _controlnet_component(path: Path, denoiser: Any) -> Component:
    """Check a ControlNet's files. Raises InputError."""
    expected, _ = CONTROLNETS[type(denoiser).__name__]
    if path.is_dir():
        config = gate.read_json(path / "config.json")
        if config.get("_class_name") != expected:
            kind = gate.short(config.get("_class_name"))
            raise InputError(f"{path / 'config.json'}: of the class {kind}, not a {expected}")
        return gate.check_component(path, "controlnet", ("diffusers", expected), "network", [])
    if expected != "ControlNetModel":
        raise InputError(f"{path}: a {expected} is read from a diffusers folder, not from a file")
    tensors = gate.read_header(path)
    config = {
        **denoiser.config,
        "in_channels": denoiser.config.out_channels,  # an inpainting UNet has more
        "conditioning_embedding_out_channels": _hint_widths(path, tensors),
    }
    return Component("controlnet", "diffusers", "ControlNetModel", path, config, (path,), tensors)


def _hint_widths(path: Path, tensors: Mapping[str, gate.Tensor]) -> list[int]:
    """The widths of the convolutions that read the control picture: the first, and each second one's output."""
    for name in (
        lambda i: f"control_model.input_hint_block.{4 * i}.weight",
        lambda i: f"input_hint_block.{4 * i}.weight",
        lambda i: f"controlnet_cond_embedding.{f'blocks.{2 * i - 1}' if i else 'conv_in'}.weight",
    ):
        names = itertools.takewhile(tensors.__contains__, map(name, itertools.count()))
        if widths := [tensors[key].shape[0] for key in names]:
            return widths
    raise InputError(f"{path}: not a ControlNet: it has no convolutions for a control picture")


def _load(checked: Checked, component: Component, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a network of the folder, or of the single file in its original layout."""
    part = checked.row.parts[component.name]
    component = replace(component, class_name=part.loads or component.class_name)
    if component.alone:
        names = component.tensors or {}
        layout = alone_layout(checked.family, component.name, component.config, names)
        fixed = constants(checked.family, component.name) if part.file else {}
        absent = {name: take for name, take in fixed.items() if not any(other.endswith(name) for other in names)}
        return load_network(component, device, dtype, layout, absent)
    if checked.file is None or component.weights != (checked.file,):
        return load_network(component, device, dtype, folder_layout(part.layout, component.config))
    family, name, config = checked.family, component.name, component.config
    layout = file_layout(family, name, config, component.tensors or {})
    return load_network(component, device, dtype, layout, constants(family, name))


def _processor(component: Component) -> CLIPImageProcessorPil:
    """CLIP's image processor, with the sizes and numbers of its configuration."""
    keys = {
        "size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb",
        "image_mean", "image_std", "rescale_factor", "resample",
    }  # fmt: skip
    try:
        return CLIPImageProcessorPil(**{key: value for key, value in component.config.items() if key in keys})
    except (TypeError, ValueError) as error:
        path = component.folder / "preprocessor_config.json"
        raise InputError(f"{path}: makes no image processor: {error}") from error


def _settings(checked: Checked) -> dict[str, Any]:
    """The family's settings in a folder's model_index.json: switches, numbers below 1000, and lists of those."""
    if checked.file is not None and checked.folder == checked.file.parent:
        return {}  # a single file without a folder
    index = gate.read_json(checked.folder / "model_index.json")
    settings = {key: index[key] for key in checked.row.settings if index.get(key) is not None}
    for key, value in settings.items():
        values = value if isinstance(value, list) and len(value) < 100 else [value]
        if not all(type(one) in (bool, int) and 0 <= one < 1000 for one in values):
            raise InputError(f"{checked.folder / 'model_index.json'}: {key} is {gate.short(value)}")
    return settings


def _check_vocabularies(checked: Checked, loaded: Mapping[str, Any]) -> None:
    """Raise InputError unless each text encoder has a row for every token of its tokenizer."""
    for name, tokenizer in loaded.items():
        if name.startswith("tokenizer"):
            rows = loaded[name.replace("tokenizer", "text_encoder")].config.vocab_size
            if (vocabulary := max(tokenizer.get_vocab().values()) + 1) > rows:
                where = checked.file or checked.folder
                raise InputError(f"{where}: the {name} has {vocabulary} tokens, its text encoder {rows}")
