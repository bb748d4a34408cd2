"""From a checked folder to a pipeline: classes from our own table, weights assigned straight from safetensors.

Each network is built without memory first (device "meta"); names and shapes of its weights must fit it exactly before
a tensor is read. Nothing named in a file is imported, nothing is unpickled, nothing is fetched.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from diffgen.errors import InputError
from diffgen.models.gate import MAX_TOKENIZER_FILE, Checked, Component, read_json

from .prompts import read_vocabulary

# What is taken from a text encoder's configuration. Others of its keys choose code (attention kernels) or are not used.
TEXT_CONFIG = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}

# Bounds on configurations: without them a few bytes could ask for a network that takes days to build.
MAX_NUMBER = 10**6
MAX_LIST = 64


class Pipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline with guidance as it is defined, uncond + scale·(cond − uncond), below 1 too."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale != 1 and self.unet.config.time_cond_proj_dim is None


def load_pipeline(checked: Checked, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """The pipeline of a folder that has passed the gate, ready but for its scheduler; its VAE is in float32.

    Raises InputError where a configuration makes no network, or names, shapes or values of its weights do not fit.
    """
    parts = checked.components
    unet = _network(parts["unet"], functools.partial(_from_config, UNet2DConditionModel), device, dtype)
    vae = _network(parts["vae"], functools.partial(_from_config, AutoencoderKL), device, torch.float32)
    text_encoder = _network(parts["text_encoder"], _text_encoder, device, dtype)
    tokenizer = load_tokenizer(parts["tokenizer"].folder, text_encoder.config.max_position_embeddings)
    _check_fit(checked.folder, unet, vae, text_encoder, tokenizer)
    pipeline = Pipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """CLIP's tokenizer with the vocabulary of a folder; it cuts a text at `length` tokens. Raises InputError."""
    vocabulary, merges = read_vocabulary(folder)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    special |= _special_tokens(folder, (*special, "unk_token"))
    outside = [token for token in special.values() if token not in vocabulary]
    if outside:
        raise InputError(f"{folder}: the token {outside[0]!r} is not in the vocabulary")
    try:
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, **special)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise InputError(f"{folder}: makes no CLIP tokenizer: {error}") from error


def _special_tokens(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The special tokens, as far as the folder's configuration names them: a text, or an object with `content`."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).exists():
            for name, value in read_json(folder / file, MAX_TOKENIZER_FILE).items():
                token = value.get("content") if isinstance(value, dict) else value
                if name in names and isinstance(token, str):
                    found[name] = token
    return found


def _text_encoder(config: dict[str, Any]) -> CLIPTextModel:
    known = {key: value for key, value in config.items() if key in TEXT_CONFIG}
    return CLIPTextModel(CLIPTextConfig(**known, attn_implementation="sdpa"))


def _network(
    component: Component, make: Callable[[dict[str, Any]], nn.Module], device: torch.device, dtype: torch.dtype
) -> Any:
    """A component's network with its weights."""
    _check_bounds(component)
    try:
        with torch.device("meta"):
            network = make(component.config)
    except Exception as error:  # whatever a constructor raises for arguments that do not go together
        raise InputError(f"{component.folder / 'config.json'}: makes no {component.class_name}: {error}") from error
    names = _match(component, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    network.load_state_dict(_read(component, names, device, dtype), strict=True, assign=True)
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:  # the one buffer that files do not hold: CLIP's position_ids, 0, 1, 2, …
            owner, _, key = name.rpartition(".")
            ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            network.get_submodule(owner).register_buffer(key, ids, persistent=False)
    return network.eval().requires_grad_(False)


def _from_config(cls: type, config: dict[str, Any]) -> nn.Module:
    """A diffusers network from those keys of its configuration that are arguments of its class."""
    known = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return cls(**{key: value for key, value in config.items() if key in known})


def _check_bounds(component: Component) -> None:
    """Refuse numbers and lists without measure, and more layers than there are tensors."""
    where = component.folder / "config.json"
    layers = 1
    for key, value in component.config.items():
        items = _flat(value)
        numbers = [n for n in items if isinstance(n, int | float)]
        if len(items) > MAX_LIST or any(not abs(n) <= MAX_NUMBER for n in numbers):
            raise InputError(f"{where}: {key!r} is out of all bounds")
        if key in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers"):
            layers *= max([1, *map(math.ceil, numbers)])
        if key == "down_block_types":
            layers *= max(1, len(items))
    if layers > len(component.tensors or {}):
        raise InputError(f"{where}: asks for more layers ({layers}) than there are weights")


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [item for part in value for item in _flat(part)] if isinstance(value, list) else [value]


def _match(component: Component, expected: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """{name in the files: name in the network}. Raises InputError unless both have the same tensors and shapes."""
    names: dict[str, str] = {}
    for name, tensor in (component.tensors or {}).items():
        if name.endswith("embeddings.position_ids"):
            continue  # 0, 1, 2, …: older files hold it
        ours = next((candidate for candidate in _spellings(name) if candidate in expected), None)
        if ours is None:
            raise InputError(f"{component.folder}: the tensor {name!r} does not belong to its {component.class_name}")
        if tensor.shape != expected[ours]:
            seen, asked = (list(shape) for shape in (tensor.shape, expected[ours]))
            raise InputError(
                f"{component.folder}: the tensor {name!r} has the shape {seen}, config.json makes it {asked}"
            )
        if ours in names.values():
            raise InputError(f"{component.folder}: the tensor {name!r} is there under two names")
        names[name] = ours
    missing = sorted(set(expected) - set(names.values()))
    if missing:
        raise InputError(f"{component.folder}: the tensor {missing[0]!r} is missing ({len(missing)} in all)")
    return names


def _spellings(name: str) -> Iterator[str]:
    """A tensor's name, and what other versions of diffusers and transformers call the same."""
    yield name
    yield name.removeprefix("text_model.")
    yield f"text_model.{name}"
    old = re.sub(r"\.(query|key|value)\.", lambda m: f".to_{m[1][0]}.", name)
    yield old.replace(".proj_attn.", ".to_out.0.")


def _read(
    component: Component, names: dict[str, str], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors, under their names in the network. Raises InputError for a value that is not finite."""
    tensors = {}
    for path in component.weights:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                if name not in names:
                    continue
                tensor = file.get_tensor(name).to(dtype)
                if not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
                    raise InputError(f"{path}: the tensor {name!r} has values that are not finite in {str(dtype)[6:]}")
                tensors[names[name]] = tensor.to(device)
    return tensors


def _check_fit(folder: Path, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Do the parts fit together, as text-to-image needs them? Raises InputError."""
    u, latent = unet.config, vae.config.latent_channels
    widths = set(u.cross_attention_dim) if isinstance(u.cross_attention_dim, list | tuple) else {u.cross_attention_dim}
    vocabulary, rows = max(tokenizer.get_vocab().values()) + 1, text_encoder.config.vocab_size
    if u.in_channels != latent or u.out_channels != latent:
        raise InputError(
            f"{folder}: the UNet has {u.in_channels} channels in and {u.out_channels} out, the VAE has {latent}",
            "9 channels in mark an inpainting model, which this version does not run" if u.in_channels == 9 else "",
        )
    if widths != {text_encoder.config.hidden_size}:
        raise InputError(
            f"{folder}: the UNet reads texts of width {widths}, the encoder writes {text_encoder.config.hidden_size}"
        )
    if vocabulary > rows:
        raise InputError(f"{folder}: the tokenizer has {vocabulary} tokens, the text encoder {rows}")
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if u.get(key) is not None:
            raise InputError(f"{folder}: the UNet needs an input that is no text ({key} = {u[key]!r})")
