"""Write LoRAs in the layouts that other programs read. The scale alpha/rank is folded into B, so all apply the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from diffgen.errors import InputError, UsageError
from diffgen.version import __version__

LAYOUTS = ("diffusers", "kohya", "original")


def write_lora(
    about: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    layout: str = "diffusers",
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """A safetensors file of a run's LoRA. `about` is its run.json, `weights` those of its network.

    Layouts: diffusers (unet.X.lora_A.weight), kohya (lora_unet_X.lora_down.weight with alpha = rank).
    """
    network, base = about["network"], about["base"]
    part, rank = network["part"], network["rank"]
    scale = network["alpha"] / rank
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        place, _, letter = name.removeprefix("layers.").rpartition(".")
        if letter not in ("A", "B"):
            raise InputError(f"the LoRA has an unknown tensor {name!r}")
        path = place.replace("/", ".")
        if letter == "B":
            tensor = tensor * scale
            if len(weights[f"layers.{place}.A"].shape) == 4:
                tensor = tensor[:, :, None, None]
        tensors |= _named(layout, part, path, letter, tensor.to(dtype).cpu().contiguous())
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_sd_model_name": base["name"],
        "ss_new_sd_model_hash": base["sha256"],
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES.get(base["family"], base["family"]) + "/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": about["prediction"],
        "software": f"diffgen {__version__}",
    }
    if network["trigger"]:
        metadata["modelspec.trigger_phrase"] = network["trigger"]
    return _with_sorted_header(save(tensors, metadata))


def _with_sorted_header(data: bytes) -> bytes:
    """The same file with its metadata in the order of their names: safetensors writes them in a random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "flux": "flux-1-dev",
}


def _named(layout: str, part: str, path: str, letter: str, tensor: Tensor) -> dict[str, Tensor]:
    if layout == "diffusers":
        return {f"{part}.{path}.lora_{letter}.weight": tensor}
    if layout == "kohya":
        stem = f"lora_unet_{path.replace('.', '_')}"
        named = {f"{stem}.lora_{'down' if letter == 'A' else 'up'}.weight": tensor}
        return named | ({f"{stem}.alpha": torch.tensor(float(len(tensor)))} if letter == "A" else {})
    raise UsageError(f"the layout must be one of {', '.join(LAYOUTS)} (got {layout!r})")
