"""From checked files to a pipeline of diffusers: the families' pipelines, ControlNets, the safety checker.

Nothing named in a file is imported, nothing is unpickled, nothing is fetched.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffgen.errors import InputError
from diffgen.models import gate
from diffgen.models.gate import Checked, Component

from .layouts import constants, controlnet_layout, file_layout
from .network import load_network
from .tokenizers import load_t5_tokenizer, load_tokenizer

T5_LENGTH = 512

# For each family the pipeline that its parts are put into, and those of its arguments that are no parts.
_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
PIPELINES: dict[str, tuple[type, dict[str, Any]]] = {
    "sd1": (StableDiffusionPipeline, _NO_CHECKER),
    "sd2": (StableDiffusionPipeline, _NO_CHECKER),
    "sdxl": (StableDiffusionXLPipeline, {"add_watermarker": False}),
    "sdxl-refiner": (
        StableDiffusionXLImg2ImgPipeline,
        {
            "text_encoder": None,
            "tokenizer": None,
            "add_watermarker": False,
            "requires_aesthetics_score": True,
            "force_zeros_for_empty_prompt": False,
        },
    ),
    "sd3": (StableDiffusion3Pipeline, {"text_encoder_3": None, "tokenizer_3": None}),
    "flux": (FluxPipeline, {}),
    "unconditional": (DDPMPipeline, {}),
}
SETTINGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")  # of a folder's model_index.json


def load_pipeline(checked: Checked, device: torch.device, dtype: torch.dtype) -> Any:
    """The text-to-image pipeline of a model that has passed the gate, ready but for its scheduler, which is None.

    A refiner comes in its image-to-image pipeline, an unconditional model in DDPMPipeline. The VAE is in float32: it
    overflows in float16. Raises InputError where a configuration makes no network, names, shapes or values of the
    weights do not fit it, or the parts do not fit each other.
    """
    loaded: dict[str, Any] = {}
    for name, component in checked.components.items():
        if component.tensors is not None:
            loaded[name] = _load(checked, component, device, torch.float32 if name == "vae" else dtype)
    for name, component in checked.components.items():
        if name.startswith("tokenizer"):
            loaded[name] = _tokenizer(component, loaded[name.replace("tokenizer", "text_encoder")])
    _check_fit(checked, loaded)
    cls, others = PIPELINES[checked.family]
    pipeline = cls(**{**others, **loaded, "scheduler": None, **_settings(checked, cls)})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_refiner(checked: Checked, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of SDXL's refiner, which takes a picture or latents. Raises InputError for any other model."""
    if checked.family != "sdxl-refiner":
        raise InputError(f"{checked.folder}: no refiner of Stable Diffusion XL, but of the family {checked.family}")
    return load_pipeline(checked, device, dtype)


def load_safety_checker(checked: Checked, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """(checker, its image processor), as `run_safety_checker` of Stable Diffusion 1's pipelines needs them; None where
    the model has none. Raises InputError."""
    if not {"safety_checker", "feature_extractor"} <= set(checked.companions):
        return None
    component = gate.check_companion(checked, "safety_checker")
    processor = gate.check_companion(checked, "feature_extractor")
    return load_network(component, device, dtype), _processor(processor)


def load_controlnet(path: str | Path, unet: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The ControlNet in a diffusers folder, or in a file in diffusers' or the original layout, for a model's UNet.

    A file has no configuration: its is the UNet's, whose first half a ControlNet is. Raises InputError for what is no
    ControlNet and for one that is made for another family.
    """
    component = _controlnet_component(Path(path), unet)
    names = component.tensors or {}
    original = any(name.endswith("input_hint_block.0.weight") for name in names)
    layout = controlnet_layout(component.config, names) if original else None
    network = load_network(component, device, dtype, layout)
    for key in ("cross_attention_dim", "addition_embed_type"):
        ours, theirs = network.config[key], unet.config[key]
        if ours != theirs:
            raise InputError(
                f"{path}: a ControlNet for another family of models ({key} {ours}, this model's is {theirs})",
                "use one that was trained for this model's family",
            )
    return network


def _controlnet_component(path: Path, unet: Any) -> Component:
    """A ControlNet's files, checked."""
    if path.is_dir():
        config = gate.read_json(path / "config.json")
        if config.get("_class_name") != "ControlNetModel":
            kind = gate.short(config.get("_class_name"))
            raise InputError(f"{path / 'config.json'}: of the class {kind}, not a ControlNetModel")
        return gate.check_component(path, "controlnet", ("diffusers", "ControlNetModel"), "network", [])
    tensors = gate.read_header(path)
    config = {
        **unet.config,
        "in_channels": unet.config.out_channels,  # those of an inpainting UNet are more
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
        held = itertools.takewhile(tensors.__contains__, map(name, itertools.count()))
        if widths := [tensors[key].shape[0] for key in held]:
            return widths
    raise InputError(f"{path}: no ControlNet: it has no convolutions for a control picture")


def _load(checked: Checked, component: Component, device: torch.device, dtype: torch.dtype) -> Any:
    """A network of the folder, or of the single file in its original layout."""
    if checked.file is None or component.weights != (checked.file,):
        return load_network(component, device, dtype)
    family, name, config = checked.family, component.name, component.config
    layout = file_layout(family, name, config, component.tensors or {})
    return load_network(component, device, dtype, layout, constants(family, name))


def _tokenizer(component: Component, encoder: Any) -> Any:
    if component.class_name.startswith("T5"):
        return load_t5_tokenizer(component.folder, T5_LENGTH)
    return load_tokenizer(component.folder, encoder.config.max_position_embeddings, component.config)


def _processor(component: Component) -> CLIPImageProcessorPil:
    """CLIP's image processor: of its configuration the sizes and numbers."""
    known = {
        "size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb",
        "image_mean", "image_std", "rescale_factor", "resample",
    }  # fmt: skip
    try:
        return CLIPImageProcessorPil(**{key: value for key, value in component.config.items() if key in known})
    except (TypeError, ValueError) as error:
        path = component.folder / "preprocessor_config.json"
        raise InputError(f"{path}: makes no image processor: {error}") from error


def _settings(checked: Checked, cls: type) -> dict[str, bool]:
    """What a folder's model_index.json says besides of the parts."""
    if checked.file is not None and checked.folder == checked.file.parent:
        return {}  # a single file without a folder
    index = gate.read_json(checked.folder / "model_index.json")
    wanted = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {key: index[key] for key in SETTINGS if key in wanted and isinstance(index.get(key), bool)}


def _check_fit(checked: Checked, loaded: Mapping[str, Any]) -> None:
    """Do the parts fit together, as the family's pipeline needs them? Raises InputError."""
    where = checked.file or checked.folder
    for name, tokenizer in loaded.items():
        if name.startswith("tokenizer"):
            rows = loaded[name.replace("tokenizer", "text_encoder")].config.vocab_size
            if (vocabulary := max(tokenizer.get_vocab().values()) + 1) > rows:
                raise InputError(f"{where}: the {name} has {vocabulary} tokens, its text encoder {rows}")
    if "transformer" in loaded:
        _check_transformer(where, checked.family, loaded)
    elif "vae" in loaded:
        _check_unet(where, checked, loaded)
    else:
        unet = loaded["unet"].config
        if unet.in_channels != unet.out_channels or unet.class_embed_type or unet.num_class_embeds:
            raise InputError(f"{where}: the UNet is not one that makes a picture of noise and nothing else")


def _check_unet(where: Path, checked: Checked, loaded: Mapping[str, Any]) -> None:
    unet, latent = loaded["unet"].config, loaded["vae"].config.latent_channels
    more = latent + 1 if checked.variant == "inpaint" else 0  # the masked picture and the mask
    if unet.in_channels != latent + more or unet.out_channels != latent:
        raise InputError(
            f"{where}: the UNet has {unet.in_channels} channels in and {unet.out_channels} out, the VAE has {latent}"
        )
    encoders = [loaded[name].config for name in ("text_encoder", "text_encoder_2") if name in loaded]
    width = sum(encoder.hidden_size for encoder in encoders)
    asked = unet.cross_attention_dim
    if {width} != (set(asked) if isinstance(asked, list | tuple) else {asked}):
        raise InputError(f"{where}: the UNet reads texts of width {asked}, the encoder writes {width}")
    xl = "text_encoder_2" in loaded
    wanted = {
        "addition_embed_type": "text_time" if xl else None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
    }
    for key, value in wanted.items():
        if unet.get(key) != value:
            raise InputError(
                f"{where}: the UNet needs another input than {checked.family} gives ({key} = {unet[key]!r})"
            )
    if xl:
        numbers = 5 if checked.family == "sdxl-refiner" else 6  # of size, crop, and target size or aesthetic score
        given = encoders[-1].projection_dim + numbers * unet.addition_time_embed_dim
        if given != (asked := unet.projection_class_embeddings_input_dim):
            raise InputError(f"{where}: the UNet reads {asked} numbers about the text and the size, it gets {given}")


def _check_transformer(where: Path, family: str, loaded: Mapping[str, Any]) -> None:
    transformer, latent = loaded["transformer"].config, loaded["vae"].config.latent_channels
    if family == "flux" and sum(transformer.axes_dims_rope) != transformer.attention_head_dim:
        raise InputError(f"{where}: axes_dims_rope {transformer.axes_dims_rope} do not make up attention_head_dim")
    channels = latent * 4 if family == "flux" else latent  # patches of 2×2 latents
    if transformer.in_channels != channels or (transformer.out_channels or channels) != channels:
        raise InputError(
            f"{where}: the transformer has {transformer.in_channels} channels in, the VAE makes {channels}"
        )
    first, second = loaded["text_encoder"].config, loaded["text_encoder_2"].config
    t5 = second if family == "flux" else loaded["text_encoder_3"].config if "text_encoder_3" in loaded else None
    pooled = first.hidden_size if family == "flux" else first.projection_dim + second.projection_dim
    if transformer.pooled_projection_dim != pooled:
        asked = transformer.pooled_projection_dim
        raise InputError(f"{where}: the transformer reads a text summary of width {asked}, the encoders write {pooled}")
    width = t5.d_model if t5 is not None else transformer.joint_attention_dim
    narrow = family == "sd3" and first.hidden_size + second.hidden_size > transformer.joint_attention_dim
    if transformer.joint_attention_dim != width or narrow:
        asked = transformer.joint_attention_dim
        raise InputError(f"{where}: the transformer reads texts of width {asked}, the encoders write {width}")
