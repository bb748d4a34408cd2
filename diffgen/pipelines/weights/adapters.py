"""Add LoRAs, textual inversions and seamless tiling to a loaded model. Their files have passed the gate.

A LoRA is merged once, W + scale·(alpha/rank)·B·A, so that a picture takes no longer with it. Its tensors may have the
names of any layout in use:

    unet.X.lora_A.weight                        diffusers and PEFT (also transformer.X, text_encoder.X)
    unet.X.processor.to_q_lora.down.weight      older diffusers
    lora_unet_X.lora_down.weight                kohya: X with underscores, by diffusers' or the original names
    diffusion_model.X.lora_A.weight             the original names
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffgen.errors import InputError
from diffgen.models import gate
from diffgen.models.families import FAMILIES

from ..families import code_of
from ..inputs import Embedding, Lora
from . import deltas
from .layouts import file_layout
from .packed import PackedLinear
from .pieces import Take, keep

_END = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight|"
    r"(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(?P<kohya>down|up)\.weight|"
    r"\.(?P<other>alpha|dora_scale|lora_magnitude_vector|lokr_w[12](?:_[ab])?|hada_w[12]_[ab])(?:\.weight)?)"
)
LAYERS = (nn.Linear, nn.Conv2d, PackedLinear)  # that a LoRA may change
_ORIGINAL = ("lora_unet_", "lora_transformer_", "model.diffusion_model.", "diffusion_model.")
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_KOHYA_TEXT = {
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}


@dataclass(frozen=True)
class Matched:
    """How a LoRA fits a model."""

    matched: int  # tensors
    total: int
    rank: int  # the highest
    unmatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        rest = f"; without a place: {', '.join(self.unmatched[:3])}" if self.unmatched else ""
        return f"matched {self.matched} of {self.total} tensors, rank {self.rank}{rest}"


@dataclass
class _Low:
    """A low-rank matrix of a file: the names of its tensors."""

    parts: dict[str, str] = field(default_factory=dict)  # down, up, alpha, magnitude; lokr_…, hada_…

    @property
    def complete(self) -> bool:
        names = self.parts.keys()
        return {"down", "up"} <= names or not names.isdisjoint((*deltas.LOKR, *deltas.LOHA))


@torch.no_grad()
def merge_lora(pipeline: Any, family: str, lora: Lora) -> Matched:
    """Add a LoRA to the weights of the pipeline's networks; returns how much of it matched.

    Read are LoRA, LoKr, LoHa, and DoRA of each. Raises InputError if nothing fits, for a wrong shape, values that are
    not finite, and another kind (one with a core tensor, whole differences).
    """
    metadata, header = gate.read_safetensors(lora.path)
    lows, strange = _lows(header)
    if special := next((name for name in strange if re.search(r"hada_t|lokr_t|lora_mid|\.diff", name)), None):
        raise InputError(
            f"{lora.path}: the tensor {special!r} is of a kind of adapter that is not read",
            "read: LoRA, DoRA, LoKr, LoHa",
        )
    places = _Places(pipeline, family)
    alphas = _alphas(metadata)
    matched, rank, unmatched = 0, 0, list(strange)
    with safe_open(lora.path, framework="pt", device="cpu") as file:
        for module, low in lows.items():
            targets = places.of(module) if low.complete else []
            if not targets:
                unmatched += low.parts.values()
                continue
            tensors = {part: file.get_tensor(name).float() for part, name in low.parts.items()}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise InputError(f"{lora.path}: {module!r} has values that are not finite")
            magnitude = tensors.pop("magnitude", None)
            delta, own = _delta(lora, module, tensors, alphas, lora.scale if magnitude is None else 1.0)
            for layer, take in targets:
                if isinstance(layer, PackedLinear):
                    layer.unpack()  # few bits cannot hold the sum
                change = _shaped(lora, module, layer.weight, take(delta)).to(layer.weight.device)
                if magnitude is not None:
                    by_row = take(magnitude.reshape(-1, 1)) if magnitude.numel() == len(delta) else magnitude
                    change = deltas.decomposed(layer.weight.float(), change, by_row.to(change)) * lora.scale
                layer.weight.data = (layer.weight.float() + change).to(layer.weight.dtype)
            matched += len(low.parts)
            rank = max(rank, own)
    if not matched:
        raise InputError(
            f"{lora.path}: none of its {len(header)} tensors fits this model, the first is {next(iter(header))!r}",
            f"the model is of the family {family}: is the LoRA for another one?",
        )
    return Matched(matched, len(header), rank, tuple(unmatched))


def _lows(names: Mapping[str, Any]) -> tuple[dict[str, _Low], list[str]]:
    """({module: its tensors}, the names that belong to no low-rank matrix)."""
    lows: dict[str, _Low] = {}
    strange = []
    for name in names:
        if match := _END.fullmatch(name):
            kind = match["other"] or match["kohya"] or {"A": "down", "B": "up"}[match["peft"]]
            kind = "magnitude" if kind in ("dora_scale", "lora_magnitude_vector") else kind
            lows.setdefault(match["module"], _Low()).parts[kind] = name
        else:
            strange.append(name)
    return lows, strange


class _Places:
    """The places in a pipeline for a LoRA's modules, by all their spellings."""

    def __init__(self, pipeline: Any, family: str) -> None:
        self.family = family
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.denoiser = FAMILIES[family].denoiser
        self.words = code_of(family).words  # in kohya's names every dot is an underscore too
        self.network: Any = parts[self.denoiser]
        self.layers = {path: layer for path, layer in self.network.named_modules() if isinstance(layer, LAYERS)}
        self.by_spelling: dict[str, Any] = {}
        for name, part in parts.items():
            if name == self.denoiser or name.startswith("text_encoder"):
                for path, module in part.named_modules():
                    if isinstance(module, LAYERS):
                        for spelling in self._spellings(name, path):
                            self.by_spelling.setdefault(spelling, module)

    def of(self, module: str) -> list[tuple[Any, Take]]:
        """(layer, the part of the matrix that it takes) of each place; none if the model has no such module."""
        if module in self.by_spelling:
            return [(self.by_spelling[module], keep)]
        prefix = next((prefix for prefix in _ORIGINAL if module.startswith(prefix)), None)
        if prefix is None:
            return []
        name = module.removeprefix(prefix)
        if "." not in prefix:
            name = re.sub(self.words, lambda word: word[0].replace("_", "#"), name).replace("_", ".").replace("#", "_")
        pieces = file_layout(self.family, self.denoiser, self.network.config, ())(f"{name}.weight")
        places = [(target.removesuffix(".weight"), take) for target, take in pieces]
        if not all(path in self.layers for path, _ in places):
            return []
        return [(self.layers[path], take) for path, take in places]

    def _spellings(self, part: str, path: str) -> Iterator[str]:
        if part == self.denoiser:
            yield f"{part}.{path}"
            yield f"base_model.model.{path}"
            yield from (f"{prefix}{path.replace('.', '_')}" for prefix in ("lora_unet_", "lora_transformer_"))
            owner, _, last = path.removesuffix(".0").rpartition(".")
            yield f"{part}.{owner}.processor.{last}"
        else:
            bare = path.removeprefix("text_model.")
            for full in (bare, f"text_model.{bare}"):
                yield f"{part}.{full}"
                yield from (f"{prefix}{full.replace('.', '_')}" for prefix in _KOHYA_TEXT[part])
                owner, _, last = full.rpartition(".")
                if last in _OLD_TEXT:
                    yield f"{part}.{owner}.{_OLD_TEXT[last]}"


def _alphas(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """alpha(module, rank) where the file has no tensor for it: PEFT's value in the header, or the rank."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = config if isinstance(config, dict) else {}
    except (ValueError, RecursionError):
        config = {}

    def alpha(module: str, rank: int) -> float:
        part, _, path = module.partition(".")
        pattern = config.get(f"{part}.alpha_pattern")
        value = pattern.get(path) if isinstance(pattern, dict) else None
        value = config.get(f"{part}.lora_alpha", rank) if value is None else value
        value = value * math.sqrt(rank) if config.get(f"{part}.use_rslora") is True else value
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else float(rank)

    return alpha


def _delta(
    lora: Lora, module: str, tensors: dict[str, Tensor], alphas: Callable[[str, int], float], scale: float
) -> tuple[Tensor, int]:
    """(scale·(alpha/rank)·ΔW in float32, [out, in] or [out, in, kh, kw], the rank); the kinds are in `deltas`."""
    if "down" in tensors:
        down, up = tensors["down"], tensors["up"]
        rank = len(down)
        fits = down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[1] == rank and up[0, 0].numel() == 1
        if not fits:
            raise InputError(f"{lora.path}: {module!r} is not a product of {list(up.shape)} and {list(down.shape)}")
        alpha = float(tensors["alpha"]) if "alpha" in tensors else alphas(module, rank)
        return deltas.low_rank(up, down) * (scale * alpha / rank), rank
    try:
        delta, own = deltas.loha(tensors) if "hada_w1_a" in tensors else deltas.lokr(tensors)
    except (KeyError, RuntimeError) as error:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise InputError(f"{lora.path}: {module!r} is no product of {shapes}") from error
    alpha = float(tensors["alpha"]) / own if own and "alpha" in tensors else 1.0
    return delta * (scale * alpha), own or 1


def _shaped(lora: Lora, module: str, weight: nn.Parameter, delta: Tensor) -> Tensor:
    """The difference in the shape of the weight. Raises InputError."""
    if delta.numel() == weight.numel() and len(delta) == len(weight):  # a 1×1 convolution is a matrix too
        delta = delta.reshape(weight.shape)
    if delta.shape != weight.shape:
        raise InputError(
            f"{lora.path}: {module!r} has the shape {list(delta.shape)}, the model {list(weight.shape)} there",
            "the LoRA is for another family of models",
        )
    return delta


def add_embedding(pipeline: Any, embedding: Embedding) -> int:
    """Add a word to the pipeline's tokenizers and text encoders; returns its number of vectors.

    A file holds one tensor [n, width], or one for each of two encoders (clip_l, clip_g), as the width shows.
    Raises InputError if nothing fits, the word is taken, or values are not finite.
    """
    parts = pipeline.components
    encoders = {
        parts[name].config.hidden_size: (parts[name.replace("text_encoder", "tokenizer")], parts[name])
        for name in ("text_encoder", "text_encoder_2")
        if parts.get(name) is not None and hasattr(parts[name].config, "hidden_size")
    }
    vectors = 0
    with safe_open(embedding.path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    for name, tensor in tensors.items():
        rows = tensor[None] if tensor.ndim == 1 else tensor
        if rows.ndim != 2 or rows.shape[1] not in encoders or not 0 < len(rows) <= 75:
            raise InputError(
                f"{embedding.path}: {name!r} has the shape {list(tensor.shape)}; this model's encoders read vectors of "
                f"{' and '.join(map(str, encoders))}",
                "the embedding is for another family of models",
            )
        if not rows.isfinite().all():
            raise InputError(f"{embedding.path}: {name!r} has values that are not finite")
        tokenizer, encoder = encoders[rows.shape[1]]
        try:
            pipeline.load_textual_inversion(
                {name: rows}, token=embedding.word, tokenizer=tokenizer, text_encoder=encoder
            )
        except ValueError as error:  # the word is taken
            reason = str(error).split(". ")[0]
            raise InputError(f"--embedding {embedding.word}: {reason}", "give it another name") from error
        vectors = max(vectors, len(rows))
    return vectors


def seamless(pipeline: Any, on: bool) -> None:
    """Make pictures that repeat without seams: convolutions wrap around the edges. Off: they pad with zeros."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            seamless_network(part, on)


def seamless_network(network: nn.Module, on: bool) -> None:
    """Let a network's convolutions pad with the opposite side, or with zeros again."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular" if on else "zeros"
