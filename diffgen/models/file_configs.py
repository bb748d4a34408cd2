"""Configurations of networks in single files: what differs between a family's models, read from the tensors' shapes.

A function for each network. It changes the family's configurations of the denoiser and of the scheduler in place;
`shapes` are those of the denoiser's tensors, without the prefix that a whole checkpoint has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def unet(network: dict[str, Any], scheduler: dict[str, Any], shapes: Shapes) -> None:
    """Stable Diffusion 1, XL: the channels in (9 read a mask), and a projection for the guidance (LCM)."""
    first = shapes.get("input_blocks.0.0.weight")
    if first and len(first) == 4:
        network["in_channels"] = first[1]
    if guidance := shapes.get("time_embed.cond_proj.weight"):
        network["time_cond_proj_dim"] = guidance[-1]


def unet_2(network: dict[str, Any], scheduler: dict[str, Any], shapes: Shapes) -> None:
    """Stable Diffusion 2: the model that predicts v is the one for 768 pixels."""
    unet(network, scheduler, shapes)
    if scheduler.get("prediction_type") == "v_prediction":
        network["sample_size"] = 96


def sd3(network: dict[str, Any], scheduler: dict[str, Any], shapes: Shapes) -> None:
    """Stable Diffusion 3: depth, width, and what 3.5 added (a second attention, normalised queries and keys)."""
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"joint_blocks\.(\d{1,3})\.", name))}
    network["num_layers"] = len(blocks)
    dual = sorted({int(m[1]) for name in shapes if (m := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", name))})
    if dual:
        network["dual_attention_layers"] = dual
    if any(".attn.ln_q." in name for name in shapes):
        network["qk_norm"] = "rms_norm"
    if (embed := shapes.get("pos_embed")) and len(embed) == 3:
        network["pos_embed_max_size"] = math.isqrt(embed[1])
    if (first := shapes.get("x_embedder.proj.weight")) and len(first) == 4:
        network["num_attention_heads"] = first[0] // network["attention_head_dim"]
        network["caption_projection_dim"] = first[0]


def flux(network: dict[str, Any], scheduler: dict[str, Any], shapes: Shapes) -> None:
    """FLUX.1: depth; schnell takes no guidance, and its noise is the same at any size."""
    network["guidance_embeds"] = any(name.startswith("guidance_in.") for name in shapes)
    for key, stem in (("num_layers", "double_blocks."), ("num_single_layers", "single_blocks.")):
        network[key] = len({name.split(".")[1] for name in shapes if name.startswith(stem)})
    if not network["guidance_embeds"]:
        scheduler |= {"shift": 1.0, "use_dynamic_shifting": False}


def z_image(network: dict[str, Any], scheduler: dict[str, Any], shapes: Shapes) -> None:
    """Z-Image: depth."""
    for key, stem in (("n_layers", "layers."), ("n_refiner_layers", "noise_refiner.")):
        network[key] = len({name.split(".")[1] for name in shapes if name.startswith(stem)})


def flux2(network: dict[str, Any], scheduler: dict[str, Any], shapes: Shapes) -> None:
    """FLUX.2: depth, width, the width of its texts, and whether it takes the guidance."""
    network["guidance_embeds"] = any(name.startswith("guidance_in.") for name in shapes)
    for key, stem in (("num_layers", "double_blocks."), ("num_single_layers", "single_blocks.")):
        network[key] = len({name.split(".")[1] for name in shapes if name.startswith(stem)})
    if len(first := shapes.get("txt_in.weight", ())) == 2:
        network["num_attention_heads"] = first[0] // network["attention_head_dim"]
        network["joint_attention_dim"] = first[1]


def language(network: dict[str, Any], shapes: Shapes) -> None:
    """A language model's depth and widths, by the names of transformers or of llama.cpp."""
    text = network["text_config"] if isinstance(network.get("text_config"), dict) else network
    blocks = {m[1] for name in shapes if (m := re.search(r"(?:layers|blk)\.(\d{1,3})\.", name))}
    if not blocks:
        return
    text["num_hidden_layers"] = len(blocks)

    def rows(*ends: str) -> tuple[int, ...]:
        return next((shape for name, shape in shapes.items() if name.endswith(ends) and len(shape) == 2), (0, 0))

    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    for key, shape, unit in (
        ("vocab_size", rows("embed_tokens.weight", "token_embd.weight"), 1),
        ("intermediate_size", rows("mlp.gate_proj.weight", "ffn_gate.weight"), 1),
        ("num_attention_heads", rows("self_attn.q_proj.weight", "attn_q.weight"), head),
        ("num_key_value_heads", rows("self_attn.k_proj.weight", "attn_k.weight"), head),
    ):
        text[key] = shape[0] // unit or text[key]
    text["hidden_size"] = rows("embed_tokens.weight", "token_embd.weight")[1] or text["hidden_size"]


def qwen_image(network: dict[str, Any], scheduler: dict[str, Any], shapes: Shapes) -> None:
    """Qwen-Image: depth."""
    network["num_layers"] = len({name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")})


def chroma(network: dict[str, Any], scheduler: dict[str, Any], shapes: Shapes) -> None:
    """Chroma: depth, also of the layers that replace FLUX.1's modulations."""
    for key, stem in (
        ("num_layers", "double_blocks."),
        ("num_single_layers", "single_blocks."),
        ("approximator_layers", "distilled_guidance_layer.layers."),
    ):
        network[key] = len({name.removeprefix(stem).split(".")[0] for name in shapes if name.startswith(stem)})
