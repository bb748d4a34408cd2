"""Build the networks of diffusers and transformers that the jobs train, and read their weights."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from diffgen.errors import InputError
from diffgen.models import gate
from diffgen.models.gate import Component
from diffgen.networks.blocks import attend
from diffgen.training.run import Run, is_run, read_run, weights_file

from ..weights.network import load_network, make_network
from ..weights.pieces import Layout, keep

LIBRARIES = {"AutoencoderKL": "diffusers", "UNet2DConditionModel": "diffusers", "CLIPTextModel": "transformers"}


def build(class_name: str, config: Mapping[str, Any], where: str) -> Any:
    """Build a network of that class with fresh weights. Raises InputError for an invalid configuration."""
    try:
        return make_network(class_name, dict(config))
    except Exception as error:  # whatever a constructor raises for invalid arguments
        raise InputError(f"{where}: [network] is invalid for {class_name}: {error}") from error


def arguments(cls: type, network: Mapping[str, Any], derived: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a network: those of the configuration, and those derived from the data. Raises InputError."""
    if clash := sorted(derived.keys() & network.keys()):
        raise InputError(f"{where}: network.{clash[0]} follows from the data: leave it out")
    names = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    if wrong := sorted(network.keys() - names.keys()):
        raise InputError(f"{where}: unknown key network.{wrong[0]}", f"{cls.__name__} has {', '.join(list(names)[1:])}")
    return {**network, **derived}


def of_run(run: Run, name: str, class_name: str, config: Mapping[str, Any], which: str, dtype: torch.dtype) -> Any:
    """Load the network `name` of a run's newest checkpoint, for inference; its tensors are named "name.…" there.

    `which` weights: "ema", "model", "ema-<length>". Raises InputError.
    """
    newest = run.latest()
    if newest is None:
        raise InputError(f"{run.folder} has no checkpoint to read", "train it first")
    path = weights_file(newest, which)
    tensors = {key: tensor for key, tensor in gate.read_header(path).items() if key.startswith(f"{name}.")}
    component = Component(name, LIBRARIES[class_name], class_name, run.folder, dict(config), (path,), tensors)
    return load_network(component, torch.device("cpu"), dtype, _without(f"{name}."))


class PlainAttention:
    """diffusers' attention with the operations of `networks.blocks.attend`, which train faster on a CPU.

    For the transformer blocks of UNet2DConditionModel: their attention has no mask, norm or residual of its own.
    """

    def __call__(
        self, layer: Attention, x: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
    ) -> Tensor:
        """x [B, N, width] attends to `encoder_hidden_states` [B, M, width'], without them to itself: [B, N, width]."""
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            tokens.unflatten(2, (layer.heads, -1)).transpose(1, 2)
            for tokens in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
        )
        out = attend(q, k, v)
        for part in layer.to_out:  # a projection and a dropout
            out = part(out)
        return out


def _without(prefix: str) -> Layout:
    return lambda name: [(name.removeprefix(prefix), keep)] if name.startswith(prefix) else []


def read_autoencoder(path: Path, which: str = "ema") -> tuple[Any, float | None]:
    """Load (AutoencoderKL in float32, the factor of its latents) from a run, its folder or that of a pipeline.

    A run of the job "autoencoder" has no factor: None. Raises InputError.
    """
    if is_run(path):
        run = read_run(path)
        if run.job != "autoencoder":
            raise InputError(f"{path} is a run of the job {run.job!r}, not of an autoencoder")
        return of_run(run, "vae", "AutoencoderKL", run.network, which, torch.float32), None
    folder = path / "vae" if (path / "model_index.json").is_file() else path
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", "name a run of the job autoencoder, or a diffusers folder")
    component = gate.check_component(folder, "vae", ("diffusers", "AutoencoderKL"), "network", [])
    if (kind := component.config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise InputError(f"{folder / 'config.json'}: of the class {gate.short(kind)}, not an AutoencoderKL")
    vae = load_network(component, torch.device("cpu"), torch.float32)
    if vae.config.shift_factor is not None:
        raise InputError(f"{folder / 'config.json'}: Stable Diffusion's pipelines have no shift_factor")
    return vae, float(vae.config.scaling_factor)


def digest(network: nn.Module) -> str:
    """SHA-256 in hex of the weights of a network, in the order of their names."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.contiguous().numpy().tobytes())
    return sha256.hexdigest()


def fitting(folder: Path, weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights. Raises InputError unless their names and shapes are those of `own`."""
    for name in sorted(weights.keys() ^ own.keys()):
        raise InputError(f"{folder}: {name!r} is in {'its' if name in weights else 'our'} network only")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise InputError(f"{folder}: {name} has the shape {list(weights[name].shape)}, not {list(tensor.shape)}")
    return weights
