"""Qwen-Image: a transformer that reads the hidden states of Qwen2.5-VL; guided outputs keep the prompt's norms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffgen.diffusion.guidance import guide
from diffgen.errors import InputError
from diffgen.models.families import Family

from ..sampling.latents import CODECS
from ..weights.pieces import Pieces, keep
from . import Code, Inputs, check_widths

_TOKENS = CODECS["packed"]


def check_vae(where: Path, vae: Any) -> None:
    """Raise InputError unless a VAE's configuration has the mean and the deviation of each channel."""
    if not len(vae.latents_mean) == len(vae.latents_std) == vae.z_dim or min(vae.latents_std) <= 0:
        raise InputError(
            f"{where}: the VAE's latents_mean and latents_std need {vae.z_dim} numbers, the latter above 0"
        )


def _check(where: Path, family: Family, variant: str | None, parts: Mapping[str, Any]) -> None:
    transformer = parts["transformer"].config
    if transformer.use_additional_t_cond or transformer.use_layer3d_rope or transformer.guidance_embeds:
        raise InputError(f"{where}: the transformer is that of another model (layers of pictures), which is not read")
    check_vae(where, parts["vae"].config)
    channels, width = parts["vae"].config.z_dim * family.patch**2, parts["text_encoder"].config.hidden_size
    check_widths(where, transformer, channels=channels, width=width)


def _inputs(
    pipeline: Any, embeddings: Mapping[str, Any], size: tuple[int, int], guidance: float | None
) -> dict[str, Inputs]:
    texts, masks = embeddings["prompt_embeds"], embeddings["prompt_embeds_mask"].bool()
    side = pipeline.vae_scale_factor * 2
    shapes = [(1, size[1] // side, size[0] // side)]
    inputs: dict[str, Any] = {"text": [text[mask] for text, mask in zip(texts, masks, strict=True)]}
    if references := embeddings.get("references"):
        inputs["references"] = torch.cat([_TOKENS.pack(x.expand(len(texts), -1, -1, -1)) for x in references], 1)
        shapes += [(1, x.shape[-2] // 2, x.shape[-1] // 2) for x in references]
    inputs["shapes"] = [shapes] * len(texts)
    return inputs


def _predict(pipeline: Any, x: Tensor, t: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    texts = inputs["text"]
    lengths = [len(text) for text in texts]
    longest = max(lengths)
    mask = None
    if min(lengths) < longest:
        mask = torch.arange(longest, device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
    tokens = _TOKENS.pack(x)
    count = tokens.shape[1]
    if "references" in inputs:
        tokens = torch.cat([tokens, inputs["references"].to(tokens)], 1)
    output: Tensor = pipeline.transformer(
        hidden_states=tokens,
        timestep=t / 1000,
        encoder_hidden_states=torch.stack([functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts]),
        encoder_hidden_states_mask=mask,
        img_shapes=inputs["shapes"],
        return_dict=False,
    )[0]
    return _TOKENS.unpack(output[:, :count], *x.shape[-2:])


def _guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guidance whose tokens have the norms of the conditional output's (Qwen-Image's pipeline)."""
    size = cond.shape[-2:]
    tokens, guided = _TOKENS.pack(cond), _TOKENS.pack(guide(cond, uncond, scale))
    return _TOKENS.unpack(guided * (tokens.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), *size)


def _layout(name: str, config: Mapping[str, Any]) -> Pieces | None:
    """Its files have diffusers' own names."""
    return [(name, keep)]


CODE = Code(
    layout=_layout,
    check=_check,
    inputs=_inputs,
    predict=_predict,
    guide=_guide,
    words=(
        "transformer_blocks|img_mlp|txt_mlp|img_mod|txt_mod|img_in|txt_in|txt_norm|time_text_embed|norm_out|proj_out|"
        "to_q|to_k|to_v|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out|timestep_embedder|linear_1|linear_2"
    ),
)
