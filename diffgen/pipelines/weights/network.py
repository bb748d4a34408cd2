"""Load a network: build it without memory, compare it with the files' headers, fill it tensor by tensor.

A network that computes tables for itself (rotary frequencies, positions) is built with those tables, its parameters
alone without memory; no table is left empty.

The class comes from our own table. Names and shapes of the weights must fit it exactly before any is read, and every
value must be finite.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import Ministral3Model
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from diffgen.errors import InputError
from diffgen.models.families import FAMILIES
from diffgen.models.gate import Component, Tensor

from .packed import Packed, pack
from .pieces import Layout, Take, keep
from .stored import stored

# The keys that are read from a configuration of transformers. Others choose code (attention kernels) or do nothing.
CLIP_TEXT = {
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
CLIP_VISION = {
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps",
}  # fmt: skip
T5 = {
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
    "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj", "pad_token_id", "eos_token_id",
}  # fmt: skip
# Of the language models. Their base for rotary frequencies stands at the top level or in a table: see _language.
LANGUAGE = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "pad_token_id",
    "bos_token_id", "eos_token_id",
}  # fmt: skip

# How Ministral stretches its rotary frequencies.
YARN = {
    "factor", "original_max_position_embeddings", "max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "llama_4_scaling_beta",
}  # fmt: skip

# Bounds on configurations: without them a few bytes could describe a network that takes days to build.
MAX_NUMBER = 10**6
MAX_BASE = 10**12  # rope_theta: a number that is only computed with
MAX_LIST = 64


def _clip_text(cls: type, config: dict[str, Any]) -> nn.Module:
    return cls(CLIPTextConfig(**_only(CLIP_TEXT, config), attn_implementation="sdpa"))


def _t5(cls: type, config: dict[str, Any]) -> nn.Module:
    return cls(T5Config(**_only(T5, config), attn_implementation="sdpa"))


def _language(cls: type, config_class: type, config: dict[str, Any]) -> nn.Module:
    """A language model without its last layer, with plain rotary positions; in a larger one, `text_config` is its."""
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    table = config.get("rope_parameters") or config.get("rope_scaling")
    table = table if isinstance(table, dict) else {}
    theta = config.get("rope_theta") or table.get("rope_theta") or 10_000
    rope = {"rope_type": "default", "rope_theta": float(theta), **_only({"mrope_section"}, table)}
    if config_class is Ministral3Config:
        kind = table.get("rope_type") or table.get("type")
        rope |= {"rope_type": "yarn" if kind == "yarn" else "default", **_only(YARN, table)}
    more = {"sliding_window": None} if config_class in (MistralConfig, Ministral3Config) else {}
    return cls(config_class(**_only(LANGUAGE, config), rope_parameters=rope, attn_implementation="sdpa", **more))


def _safety_checker(cls: type, config: dict[str, Any]) -> nn.Module:
    vision = config.get("vision_config")
    vision = _only(CLIP_VISION, vision) if isinstance(vision, dict) else {}
    width = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    return cls(CLIPConfig(vision_config=vision, **width))


def _only(keys: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in keys}


# Of a network's class: that of its ControlNets, and what both configurations have in common.
_WIDTHS = ("num_attention_heads", "attention_head_dim", "pooled_projection_dim")
CONTROLNETS = {
    "UNet2DConditionModel": ("ControlNetModel", ("cross_attention_dim", "addition_embed_type")),
    "SD3Transformer2DModel": ("SD3ControlNetModel", _WIDTHS),
    "FluxTransformer2DModel": ("FluxControlNetModel", _WIDTHS),
}
# The classes of diffusers in the families' rows; and those of other libraries, each with its own keys.
_DIFFUSERS = {name for name, _ in CONTROLNETS.values()} | {
    name
    for row in FAMILIES.values()
    for part in row.parts.values()
    for library, name in part.classes
    if part.kind == "network" and library == "diffusers"
}
_TRANSFORMERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "CLIPTextModel": functools.partial(_clip_text, CLIPTextModel),
    "CLIPTextModelWithProjection": functools.partial(_clip_text, CLIPTextModelWithProjection),
    "T5EncoderModel": functools.partial(_t5, T5EncoderModel),
    "Qwen3Model": functools.partial(_language, Qwen3Model, Qwen3Config),
    "MistralModel": functools.partial(_language, MistralModel, MistralConfig),
    "Ministral3Model": functools.partial(_language, Ministral3Model, Ministral3Config),
    "Qwen3VLTextModel": functools.partial(_language, Qwen3VLTextModel, Qwen3VLTextConfig),
    "Qwen2_5_VLTextModel": functools.partial(_language, Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig),
    "StableDiffusionSafetyChecker": functools.partial(_safety_checker, StableDiffusionSafetyChecker),
}


def make_network(class_name: str, config: dict[str, Any]) -> nn.Module:
    """Make a network of a class in our tables, with fresh weights. Raises whatever its constructor raises."""
    if class_name in _TRANSFORMERS:
        return _TRANSFORMERS[class_name](config)
    if class_name not in _DIFFUSERS:
        raise ValueError(f"there is no class {class_name!r} in the table of families")
    cls = getattr(diffusers, class_name)
    return cls(**_only(inspect.signature(cls.__init__).parameters, config))


@dataclass(frozen=True)
class Source:
    """Where a tensor of a network comes from: a tensor of the files, and the part of it."""

    name: str
    take: Take


def load_network(
    component: Component,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout | None = None,
    constants: Mapping[str, Take] | None = None,
) -> Any:
    """Load the network of a component that has passed the gate, for inference. Matrices of few bits stay as they are.

    `layout` translates the names of an original layout (None: diffusers' and transformers' own), `constants` makes
    tensors that no file of that layout holds. Tensors too narrow in float16 (T5's output projections) stay in
    float32. Raises InputError where the configuration makes no network, or names, shapes or values of the
    weights do not fit it.
    """
    _check_bounds(component)
    try:
        with torch.device("meta"):
            network: Any = make_network(component.class_name, component.config)
        if list(_empty_tables(network)):
            with _parameters_without_memory():
                network = make_network(component.class_name, component.config)
    except Exception as error:  # whatever a constructor raises for arguments that do not fit together
        raise InputError(f"{component.folder / 'config.json'}: makes no {component.class_name}: {error}") from error
    expected, aliases = _tensors_of(network)
    constant = {name: take for name, take in (constants or {}).items() if name in expected}
    sources = _match(component, {name: expected[name] for name in expected if name not in constant}, aliases, layout)
    exact = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    dtypes = {name: torch.float32 if exact & set(name.split(".")) else dtype for name in expected}
    linear = {f"{path}.weight" for path, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    tensors, packed = _read(component, sources, dtypes, device, linear - {*aliases, *aliases.values()})
    for name, take in constant.items():
        tensors[name] = take(torch.empty(expected[name], device="meta")).to(device, dtypes[name])
    pack(network, {name: (matrix, dtypes[name]) for name, matrix in packed.items()})
    tensors |= {f"{name.removesuffix('weight')}packed": matrix.data for name, matrix in packed.items()}
    network.load_state_dict({**tensors, **{a: tensors[name] for a, name in aliases.items()}}, strict=True, assign=True)
    if aliases:
        network.tie_weights()
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    if empty := next(_empty_tables(network), None):
        raise InputError(f"{component.folder / 'config.json'}: this {component.class_name} lacks the table {empty}")
    return network.eval().requires_grad_(False)


def _tensors_of(network: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """({name: shape} of each tensor once, {a further name of it: the first})."""
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        original = first.setdefault(id(tensor), name)
        if original == name:
            shapes[name] = tuple(tensor.shape)
        else:
            aliases[name] = original
    return shapes, aliases


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Inside, parameters of new modules take no memory and are not initialised; every other tensor is real."""

    def without(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = nn.modules.module.register_module_parameter_registration_hook(without)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _empty_tables(network: nn.Module) -> Iterator[str]:
    """The names of tensors without memory that no file fills: unsaved buffers and plain attributes of modules."""
    for path, module in network.named_modules():
        tables = {name: x for name, x in vars(module).items() if isinstance(x, torch.Tensor | list | tuple | dict)}
        buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in {**tables, **buffers}.items():
            values = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(x, torch.Tensor) and x.is_meta for x in values):
                yield f"{path}.{name}"


def _check_bounds(component: Component) -> None:
    """Raise InputError for excessive numbers and lists, and for more layers than there are tensors."""
    where = component.folder / "config.json"
    layers, blocks = 1, 0
    for key, value in _entries(component.config):
        items = _flat(value)
        numbers = [n for n in items if isinstance(n, int | float)]
        limit = MAX_BASE if key == "rope_theta" else MAX_NUMBER
        if len(items) > MAX_LIST or any(not abs(n) <= limit for n in numbers):
            raise InputError(f"{where}: {key!r} is out of bounds")
        if key in ("layers_per_block", "transformer_layers_per_block"):
            layers *= max([1, *map(math.ceil, numbers)])
        if key in (
            "num_hidden_layers",
            "num_layers",
            "num_single_layers",
            "n_layers",
            "n_refiner_layers",
            "approximator_layers",
            "num_layerwise_text_blocks",
            "num_refiner_text_blocks",
        ):
            blocks += max([0, *map(math.ceil, numbers)])
        if key == "down_block_types":
            layers *= max(1, len(items))
    if max(layers, blocks) > len(component.tensors or {}):
        raise InputError(f"{where}: describes more layers ({max(layers, blocks)}) than there are weights")


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each (key, value) of a configuration and of the tables in it, to any depth."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield key, value


def _flat(value: Any) -> list[Any]:
    return [item for part in value for item in _flat(part)] if isinstance(value, list) else [value]


def _match(
    component: Component, expected: dict[str, tuple[int, ...]], aliases: dict[str, str], layout: Layout | None
) -> dict[str, Source]:
    """{name in the network: its source}. Raises InputError unless both have the same tensors and shapes."""
    where = component.folder if layout is None else component.weights[0]
    sources: dict[str, Source] = {}
    spellings: dict[str, str] = {}  # the name that matched each: an alias or its own
    for name, tensor in (component.tensors or {}).items():
        if name.endswith("embeddings.position_ids"):
            continue  # 0, 1, 2, …: older files hold it
        for target, take in [(name, keep)] if layout is None else layout(name):
            spelled = next((s for s in _spellings(target) if s in expected or s in aliases), None)
            if spelled is None:
                raise InputError(f"{where}: the tensor {name!r} does not belong to its {component.class_name}")
            ours = aliases.get(spelled, spelled)
            _check_shape(f"{where}: the tensor {name!r}", tensor, take, expected[ours])
            if ours in sources:
                if spelled in aliases or spellings[ours] in aliases:
                    continue  # one tensor under both of its names
                raise InputError(f"{where}: the tensor {name!r} is there under two names")
            sources[ours], spellings[ours] = Source(name, take), spelled
    missing = sorted(set(expected) - set(sources))
    if missing:
        raise InputError(f"{where}: the tensor {missing[0]!r} is missing ({len(missing)} in all)")
    return sources


def _check_shape(what: str, tensor: Tensor, take: Take, expected: tuple[int, ...]) -> None:
    try:
        shape = tuple(take(torch.empty(tensor.shape, device="meta")).shape)
    except (RuntimeError, IndexError, ValueError):  # too few dimensions or parts
        shape = ()
    if shape != expected:
        part = "" if take is keep else f", a part of it {list(shape)}" if shape else ""
        raise InputError(f"{what} has the shape {list(tensor.shape)}{part}, config.json makes it {list(expected)}")


def _spellings(name: str) -> Iterator[str]:
    """A tensor's name, and its names in other versions of diffusers and transformers."""
    yield name
    yield name.removeprefix("text_model.")
    yield f"text_model.{name}"
    yield name.replace("vision_model.vision_model.", "vision_model.")
    old = re.sub(r"\.(query|key|value)\.", lambda m: f".to_{m[1][0]}.", name)
    yield old.replace(".proj_attn.", ".to_out.0.")


def _read(
    component: Component,
    sources: dict[str, Source],
    dtypes: dict[str, torch.dtype],
    device: torch.device,
    linear: Container[str],
) -> tuple[dict[str, torch.Tensor], dict[str, Packed]]:
    """Read the tensors, under their names in the network; matrices of few bits of the layers `linear` stay packed.

    Raises InputError for a value that is not finite.
    """
    targets: dict[str, list[str]] = {}
    for target, source in sources.items():
        targets.setdefault(source.name, []).append(target)
    tensors, packed = {}, {}
    for path, name, value in stored(component, targets):
        for target in targets[name]:
            dtype, take = dtypes[target], sources[target].take
            part = value.taken(take) if isinstance(value, Packed) else take(value)
            whole = part.decoded() if isinstance(part, Packed) else part
            tensor = _laid_out(whole.to(dtype if whole.is_floating_point() else whole.dtype))
            if not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
                raise InputError(f"{path}: the tensor {name!r} has values that are not finite in {str(dtype)[6:]}")
            if isinstance(part, Packed) and target in linear:
                packed[target] = replace(part, data=part.data.to(device))
            else:
                tensors[target] = tensor.to(device)
    return tensors, packed


def _laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the memory format that is fast: in half precision, convolutions have their channels last."""
    if tensor.ndim == 4 and tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()
