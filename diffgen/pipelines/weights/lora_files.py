"""Write LoRAs in the layouts that other programs read. The scale alpha/rank is folded in, so that all apply the same.

    diffusers   unet.X.lora_A.weight                 diffusers with PEFT, ComfyUI
    kohya       lora_unet_X.lora_down.weight, alpha  AUTOMATIC1111, ComfyUI, diffusers
    original    diffusion_model.Y.lora_A.weight      ComfyUI; Y is the original name of X

Where the original network has one matrix for several of diffusers' (queries, keys, values), their LoRAs become one of
the sum of their ranks: [A1; A2; A3], and B1, B2, B3 on the diagonal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from diffgen.errors import UsageError
from diffgen.models.gate import Checked
from diffgen.version import __version__

from ..families import code_of
from .deltas import low_rank
from .pieces import exchanged, keep

LAYOUTS = ("diffusers", "kohya", "original")
ENDS = {  # of our names of an adapter's tensors
    "kohya": {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale"},
    "diffusers": {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "flux": "flux-1-dev",
}
SCALED = ("B", "w2_a")  # the tensor of each kind that begins at zero; the scale goes there
Adapter = dict[str, Tensor]  # A, B; magnitude; w1, w2_a, w2_b


def write_lora(
    about: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    layout: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    checked: Checked | None = None,
) -> bytes:
    """A safetensors file of a run's adapter. `about` is the content of run.json, `weights` those of its network.

    The original names need the base's files, `checked`. Raises UsageError for a layout that cannot hold the adapter.
    """
    network, base = about["network"], about["base"]
    part, scale = network["part"], network["alpha"] / network["rank"]
    adapters: dict[str, Adapter] = {}
    for name, tensor in weights.items():
        place, _, key = name.removeprefix("layers.").rpartition(".")
        own = (tensor * scale if key in SCALED else tensor).to(dtype).cpu()
        adapters.setdefault(place.replace("/", "."), {})[key] = own
    prefix = f"{part}."
    if layout == "original" or (layout == "kohya" and part == "transformer"):
        assert checked is not None
        adapters, prefix = original(adapters, checked), "diffusion_model."
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        stem = f"lora_unet_{path.replace('.', '_')}" if layout == "kohya" else f"{prefix}{path}"
        tensors |= _named(stem, adapter, layout)
    metadata = {
        "format": "pt",
        "modelspec.architecture": ARCHITECTURES.get(base["family"], base["family"]) + "/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": about["prediction"],
        "modelspec.sai_model_spec": "1.0.1",
        "software": f"diffgen {__version__}",
        "ss_network_alpha": str(network["rank"]),
        "ss_network_dim": str(network["rank"]),
        "ss_network_module": "lycoris.kohya" if network["kind"] == "lokr" else "networks.lora",
        "ss_new_sd_model_hash": base["sha256"],
        "ss_sd_model_name": base["name"],
    }
    if network["trigger"]:
        metadata["modelspec.trigger_phrase"] = network["trigger"]
    return _with_sorted_header(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def _named(stem: str, adapter: Adapter, layout: str) -> dict[str, Tensor]:
    """The tensors of one layer's adapter under the names of a layout."""
    ends, named = ENDS["kohya" if layout == "kohya" else "diffusers"], {}
    if "w1" in adapter:
        a, b = adapter["w2_a"], adapter["w2_b"]
        convolution = {"lokr_w2": low_rank(a, b)}  # the whole factor, which all read alike
        own = {"lokr_w1": adapter["w1"]} | (convolution if b.ndim == 4 else {"lokr_w2_a": a, "lokr_w2_b": b})
        return {f"{stem}.{name}": value for name, value in own.items()} | {f"{stem}.alpha": torch.tensor(float(len(b)))}
    is_convolution = adapter["A"].ndim == 4
    for key, tensor in adapter.items():
        if key == "B" and is_convolution:
            tensor = tensor[:, :, None, None]
        if key == "magnitude":
            tensor = tensor.reshape((-1, 1) if layout == "kohya" else (1, -1, 1, 1) if is_convolution else (-1,))
        named[f"{stem}.{ends[key]}"] = tensor
    return named | ({f"{stem}.alpha": torch.tensor(float(len(adapter["A"])))} if layout == "kohya" else {})


def original(adapters: Mapping[str, Adapter], checked: Checked) -> dict[str, Adapter]:
    """The adapters by the original names of their layers. Raises UsageError where that is not possible."""
    code, config = code_of(checked.family), checked.network.config
    left, renamed = set(adapters), {}
    for name in code.originals(config, adapters):
        pieces = code.layout(f"{name}.weight", config) or []
        targets = [(target.removesuffix(".weight"), take) for target, take in pieces]
        if not any(target in left for target, _ in targets):
            continue
        left -= {target for target, _ in targets}
        if len(targets) > 1:
            renamed[name] = _joined(name, {target: adapters.get(target) for target, _ in targets}, checked)
            continue
        ((target, take),) = targets
        adapter = dict(adapters[target])
        if take is exchanged and "w1" not in adapter:
            adapter |= {key: exchanged(adapter[key]) for key in ("B", "magnitude") if key in adapter}
        elif take is not keep:
            raise UsageError(f"the layer {target} has no place in the original layout", "take the layout diffusers")
        renamed[name] = adapter
    if left:
        raise UsageError(f"the layer {min(left)} has no name in the original layout", "take the layout diffusers")
    return renamed


def _joined(name: str, parts: Mapping[str, Adapter | None], checked: Checked) -> Adapter:
    """The LoRAs of layers that are the rows of one matrix, in their order; None: a layer without one."""
    known = [part for part in parts.values() if part is not None]
    if any(set(part) != {"A", "B"} for part in known):
        raise UsageError(f"{name} is one matrix in the original layout: only a LoRA fits", "take the layout diffusers")
    shapes = {key: tensor.shape for key, tensor in (checked.network.tensors or {}).items()}
    total, column, ups = sum(len(part["A"]) for part in known), 0, []
    for target, part in parts.items():
        up = torch.zeros(shapes[f"{target}.weight"][0] if part is None else len(part["B"]), total)
        if part is not None:
            up[:, column : column + len(part["A"])] = part["B"]
            column += len(part["A"])
        ups.append(up)
    down = torch.cat([part["A"] for part in known])
    return {"A": down, "B": torch.cat(ups).to(down.dtype)}


def _with_sorted_header(data: bytes) -> bytes:
    """The same file with its metadata in the order of their names: safetensors writes them in a random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]
