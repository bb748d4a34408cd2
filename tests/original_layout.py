"""Single-file checkpoints in the original layouts, written from diffusers' folders.

The conversion follows the layouts themselves (CompVis/stable-diffusion, OpenCLIP, sd3-ref, flux), block by block, and
is independent of diffgen's reader. test_load_single_file.py compares it with diffusers' own converters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


def write(folder: Path, file: Path, family: str, change: Callable[[Weights], Any] | None = None) -> Path:
    """A folder's networks as one file; `change` edits its tensors before they are written."""
    parts = [name for name in networks(folder) if name in LAYOUTS[family]]
    weights = single_file({name: (config(folder / name), tensors(folder / name)) for name in parts}, family)
    if change is not None:
        change(weights)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, file)
    return file


def networks(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors(folder: Path) -> Weights:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def single_file(parts: dict[str, tuple[dict[str, Any], Weights]], family: str) -> Weights:
    """The tensors of a file that holds those networks: {component: (configuration, tensors)}."""
    file: Weights = {}
    for part, (settings, weights) in parts.items():
        prefix, convert = LAYOUTS[family][part]
        file |= {prefix + name: tensor for name, tensor in convert(weights, settings).items()}
    if family in ("sd1", "sd2"):  # what the original training left in its files
        file["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        file["model_ema.decay"] = torch.tensor([0.9999])
        file["first_stage_model.loss.logvar"] = torch.zeros(1)
    if family == "sd1":
        file["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    return file


def unet(weights: Weights, settings: dict[str, Any]) -> Weights:
    level = settings["layers_per_block"] + 1
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    ends = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    attends = [kind.startswith("CrossAttn") for kind in settings.get("up_block_types", [])]
    places = ends | {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(len(settings["block_out_channels"])):
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{level * (i + 1)}.0.op"
        for j in range(level):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{level * i + j + 1}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{level * i + j + 1}.1"
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{level * i + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{level * i + j}.1"
        if i < len(attends):
            places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{level * (i + 1) - 1}.{1 + attends[i]}.conv"
    file = {}
    for name, tensor in weights.items():
        place = max((p for p in places if name.startswith(p + ".")), key=len)
        rest = name[len(place) + 1 :]
        if ".resnets." in place:
            stem, _, end = rest.rpartition(".")
            rest = f"{resnet[stem]}.{end}"
        file[f"{places[place]}.{rest}"] = tensor
    return file


def controlnet(weights: Weights, settings: dict[str, Any]) -> Weights:
    hints = 2 * len(settings["conditioning_embedding_out_channels"])
    hint = {"conv_in": 0, "conv_out": 2 * (hints - 1)} | {f"blocks.{i}": 2 * (i + 1) for i in range(hints - 2)}
    file, first_half = {}, {}
    for name, tensor in weights.items():
        stem, _, end = name.rpartition(".")
        if name.startswith("controlnet_down_blocks."):
            file[f"zero_convs.{stem.split('.')[1]}.0.{end}"] = tensor
        elif stem == "controlnet_mid_block":
            file[f"middle_block_out.0.{end}"] = tensor
        elif name.startswith("controlnet_cond_embedding."):
            file[f"input_hint_block.{hint[stem.split('.', 1)[1]]}.{end}"] = tensor
        else:
            first_half[name] = tensor
    return file | unet(first_half, settings)


def vae(weights: Weights, settings: dict[str, Any]) -> Weights:
    last = len(settings["block_out_channels"]) - 1
    file = {}
    for name, tensor in weights.items():
        name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{last - int(m[1])}", name)
        for new, old in (
            ("down_blocks", "down"), ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            (".resnets.", ".block."), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
            ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("mid_block.attentions.0", "mid.attn_1"),
        ):  # fmt: skip
            name = name.replace(new, old)
        if ".attn_1." in name:  # convolutions over one pixel
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
            for new, old in (
                ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
            ):  # fmt: skip
                name = name.replace(new, old)
        file[name] = tensor
    return file


def clip(weights: Weights, settings: dict[str, Any]) -> Weights:
    """transformers' names, with the model below `text_model`."""
    top = ("text_model.", "text_projection.")
    return {name if name.startswith(top) else f"text_model.{name}": tensor for name, tensor in weights.items()}


def clip_without_projection(weights: Weights, settings: dict[str, Any]) -> Weights:
    return {name: tensor for name, tensor in clip(weights, settings).items() if name != "text_projection.weight"}


def openclip(weights: Weights, settings: dict[str, Any]) -> Weights:
    file, parts = {}, {}
    for name, tensor in weights.items():
        name = name.removeprefix("text_model.")
        for new, old in (
            ("embeddings.token_embedding.weight", "token_embedding.weight"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("final_layer_norm", "ln_final"),
            ("encoder.layers", "transformer.resblocks"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        ):
            name = name.replace(new, old)
        if match := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            parts.setdefault(f"{match[1]}.attn.in_proj_{match[3]}", {})[match[2]] = tensor
        elif name == "text_projection.weight":
            file["text_projection"] = tensor.T
        else:
            file[name] = tensor
    file["logit_scale"] = torch.tensor(4.6)
    return file | {name: torch.cat([three[x] for x in "qkv"]) for name, three in parts.items()}


def openclip_whole(weights: Weights, settings: dict[str, Any]) -> Weights:
    """With the last layer and the projection, which Stable Diffusion 2 does not read."""
    file = openclip(weights, settings)
    last, width = settings["num_hidden_layers"], settings["hidden_size"]
    before = f"transformer.resblocks.{last - 1}."
    more = {name.replace(before, f"transformer.resblocks.{last}."): tensor for name, tensor in file.items()}
    return {**more, **file, "text_projection": torch.eye(width)}


def same(weights: Weights, settings: dict[str, Any]) -> Weights:
    return weights


def exchanged(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def joined(weights: Weights, names: list[str]) -> Tensor:
    return torch.cat([weights.pop(name) for name in names])


def sd3(weights: Weights, settings: dict[str, Any]) -> Weights:
    weights, file, last = dict(weights), {}, settings["num_layers"] - 1
    for i in range(last + 1):
        old, new = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        for end in ("weight", "bias"):
            three = [f"{new}.attn.to_{x}.{end}" for x in "qkv"]
            file[f"{old}.x_block.attn.qkv.{end}"] = joined(weights, three)
            three = [f"{new}.attn.add_{x}_proj.{end}" for x in "qkv"]
            file[f"{old}.context_block.attn.qkv.{end}"] = joined(weights, three)
            if f"{new}.attn2.to_q.{end}" in weights:
                three = [f"{new}.attn2.to_{x}.{end}" for x in "qkv"]
                file[f"{old}.x_block.attn2.qkv.{end}"] = joined(weights, three)
    for name, tensor in weights.items():
        for pattern, old in (
            (r"pos_embed\.pos_embed", "pos_embed"), (r"pos_embed\.proj", "x_embedder.proj"),
            (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
            (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
            (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
            (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
            (r"^proj_out", "final_layer.linear"), (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"transformer_blocks", "joint_blocks"),
            (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
            (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
            (r"\.attn\.norm_added_([qk])", r".context_block.attn.ln_\1"),
            (r"\.(attn2?)\.norm_([qk])", r".x_block.\1.ln_\2"),
            (r"\.attn\.to_add_out", ".context_block.attn.proj"),
            (r"\.(attn2?)\.to_out\.0", r".x_block.\1.proj"),
            (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
            (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
            (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"), (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
        ):  # fmt: skip
            name = re.sub(pattern, old, name)
        swap = name.startswith(("final_layer.adaLN", f"joint_blocks.{last}.context_block.adaLN"))
        file[name] = exchanged(tensor) if swap else tensor
    return file


def flux(weights: Weights, settings: dict[str, Any]) -> Weights:
    weights, file = dict(weights), {}
    for i in range(settings["num_layers"]):
        for end in ("weight", "bias"):
            three = [f"transformer_blocks.{i}.attn.to_{x}.{end}" for x in "qkv"]
            file[f"double_blocks.{i}.img_attn.qkv.{end}"] = joined(weights, three)
            three = [f"transformer_blocks.{i}.attn.add_{x}_proj.{end}" for x in "qkv"]
            file[f"double_blocks.{i}.txt_attn.qkv.{end}"] = joined(weights, three)
    for i in range(settings["num_single_layers"]):
        for end in ("weight", "bias"):
            block = f"single_transformer_blocks.{i}"
            four = [*(f"{block}.attn.to_{x}.{end}" for x in "qkv"), f"{block}.proj_mlp.{end}"]
            file[f"single_blocks.{i}.linear1.{end}"] = joined(weights, four)
    for name, tensor in weights.items():
        swap = name.startswith("norm_out.")
        for pattern, old in (
            (r"^x_embedder", "img_in"), (r"^context_embedder", "txt_in"),
            (r"time_text_embed\.timestep_embedder", "time_in"), (r"time_text_embed\.text_embedder", "vector_in"),
            (r"time_text_embed\.guidance_embedder", "guidance_in"),
            (r"_in\.linear_1", "_in.in_layer"), (r"_in\.linear_2", "_in.out_layer"),
            (r"^proj_out", "final_layer.linear"), (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
            (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
            (r"^transformer_blocks", "double_blocks"),
            (r"norm1\.linear", "img_mod.lin"), (r"norm1_context\.linear", "txt_mod.lin"),
            (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
            (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
            (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
            (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
            (r"attn\.to_out\.0", "img_attn.proj"), (r"attn\.to_add_out", "txt_attn.proj"),
            (r"ff\.net\.0\.proj", "img_mlp.0"), (r"ff\.net\.2", "img_mlp.2"),
            (r"ff_context\.net\.0\.proj", "txt_mlp.0"), (r"ff_context\.net\.2", "txt_mlp.2"),
        ):  # fmt: skip
            name = re.sub(pattern, old, name)
        file[name] = exchanged(tensor) if swap else tensor
    return file


def z_image(weights: Weights, settings: dict[str, Any]) -> Weights:
    weights, file = dict(weights), {}
    for block in [name.removesuffix(".attention.to_q.weight") for name in weights if name.endswith("to_q.weight")]:
        three = [f"{block}.attention.to_{x}.weight" for x in "qkv"]
        file[f"{block}.attention.qkv.weight"] = joined(weights, three)
    for name, tensor in weights.items():
        for pattern, old in (
            (r"^all_(x_embedder|final_layer)\.2-1\.", r"\1."), (r"attention\.to_out\.0\.", "attention.out."),
            (r"attention\.norm_(q|k)\.", r"attention.\1_norm."),
        ):  # fmt: skip
            name = re.sub(pattern, old, name)
        file[name] = tensor
    return file


def flux2(weights: Weights, settings: dict[str, Any]) -> Weights:
    weights, file = dict(weights), {}
    for i in range(settings["num_layers"]):
        block = f"transformer_blocks.{i}.attn"
        for old, names in (("img", [f"to_{x}" for x in "qkv"]), ("txt", [f"add_{x}_proj" for x in "qkv"])):
            three = [f"{block}.{name}.weight" for name in names]
            file[f"double_blocks.{i}.{old}_attn.qkv.weight"] = joined(weights, three)
    for name, tensor in weights.items():
        swap = name.startswith("norm_out.")
        for pattern, old in (
            (r"^x_embedder", "img_in"), (r"^context_embedder", "txt_in"),
            (r"time_guidance_embed\.timestep_embedder", "time_in"),
            (r"time_guidance_embed\.guidance_embedder", "guidance_in"),
            (r"_in\.linear_1", "_in.in_layer"), (r"_in\.linear_2", "_in.out_layer"),
            (r"modulation(_img|_txt)?\.linear", r"modulation\1.lin"),
            (r"^proj_out", "final_layer.linear"), (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
            (r"^transformer_blocks", "double_blocks"),
            (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
            (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
            (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
            (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
            (r"attn\.to_out\.0", "img_attn.proj"), (r"attn\.to_add_out", "txt_attn.proj"),
            (r"ff\.linear_in", "img_mlp.0"), (r"ff\.linear_out", "img_mlp.2"),
            (r"ff_context\.linear_in", "txt_mlp.0"), (r"ff_context\.linear_out", "txt_mlp.2"),
        ):  # fmt: skip
            name = re.sub(pattern, old, name)
        file[name] = exchanged(tensor) if swap else tensor
    return file


def chroma(weights: Weights, settings: dict[str, Any]) -> Weights:
    """FLUX.1's, and the network that makes the modulations."""
    own = {name: tensor for name, tensor in weights.items() if name.startswith("distilled_guidance_layer.")}
    file = flux({name: tensor for name, tensor in weights.items() if name not in own}, settings)
    for name, tensor in own.items():
        name = name.replace("linear_1", "in_layer").replace("linear_2", "out_layer")
        file[re.sub(r"(norms\.\d+)\.weight", r"\1.scale", name)] = tensor
    return file


def language(weights: Weights, settings: dict[str, Any]) -> Weights:
    return {f"model.{name}": tensor for name, tensor in weights.items()}


Convert = Callable[[Weights, dict[str, Any]], Weights]
_FIRST_STAGE = ("first_stage_model.", vae)
_UNET = ("model.diffusion_model.", unet)
LAYOUTS: dict[str, dict[str, tuple[str, Convert]]] = {
    "sd1": {"unet": _UNET, "vae": _FIRST_STAGE, "text_encoder": ("cond_stage_model.transformer.", clip)},
    "sd2": {"unet": _UNET, "vae": _FIRST_STAGE, "text_encoder": ("cond_stage_model.model.", openclip_whole)},
    "sdxl": {
        "unet": _UNET,
        "vae": _FIRST_STAGE,
        "text_encoder": ("conditioner.embedders.0.transformer.", clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", openclip),
    },
    "sdxl-refiner": {
        "unet": _UNET,
        "vae": _FIRST_STAGE,
        "text_encoder_2": ("conditioner.embedders.0.model.", openclip),
    },
    "sd3": {
        "transformer": ("model.diffusion_model.", sd3),
        "vae": _FIRST_STAGE,
        "text_encoder": ("text_encoders.clip_l.transformer.", clip_without_projection),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", clip),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", same),
    },
    "flux": {
        "transformer": ("model.diffusion_model.", flux),
        "vae": ("vae.", vae),
        "text_encoder": ("text_encoders.clip_l.transformer.", clip),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.", same),
    },
    "z-image": {
        "transformer": ("model.diffusion_model.", z_image),
        "vae": ("vae.", vae),
        "text_encoder": ("text_encoders.qwen3_4b.transformer.", language),
    },
    "chroma": {
        "transformer": ("", chroma),
        "vae": ("vae.", vae),
        "text_encoder": ("text_encoders.t5xxl.transformer.", same),
    },
    "flux2": {"transformer": ("", flux2)},
    "flux2-klein": {"transformer": ("", flux2)},
    "qwen-image": {"transformer": ("model.diffusion_model.", same)},
}
