"""Write models as diffusers folders, and our UNet as diffusers' own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors import SafetensorError
from torch import Tensor, nn

from diffgen import networks
from diffgen.errors import InputError
from diffgen.images.lock import locked
from diffgen.images.publish import LOCK, Exists, cannot_write, check_writable, sweep, sync_folder, temporary_in
from diffgen.models.gate import Checked

from .packed import unpack


def save_pipeline(pipeline: Any, checked: Checked, folder: Path) -> None:
    """Write a loaded model, with the LoRAs that were merged into it, as a diffusers folder that does not exist yet.

    Its scheduler is the one that the model came with. A safety checker is left out. Raises CannotWrite.
    """
    scheduler = checked.components["scheduler"]
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__}
    for name, part in pipeline.components.items():
        index[name] = pair(part)
    index["scheduler"] = ["diffusers", scheduler.class_name]
    settings = {key: value for key, value in pipeline.config.items() if isinstance(value, bool)}
    with new_folder(folder) as new:
        for name, part in pipeline.components.items():
            if part is not None and name != "scheduler":
                if isinstance(part, nn.Module):
                    unpack(part)
                save_part(part, new / name)
        write_json(
            new / "scheduler" / "scheduler_config.json", {"_class_name": scheduler.class_name, **scheduler.config}
        )
        write_json(new / "model_index.json", {**index, **settings})


def save_part(part: Any, folder: Path) -> None:
    """Write one part of a pipeline. A text encoder's configuration names float32, whatever its weights are stored in.

    Without a dtype from the caller, diffusers loads networks in float32, but transformers loads a text encoder in the
    dtype that its configuration names: the parts of a pipeline would not fit together.
    """
    with _contiguous(part):
        part.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if "dtype" in config:
        write_json(path, {**config, "dtype": "float32"})


@contextlib.contextmanager
def _contiguous(part: Any) -> Iterator[None]:
    """Inside, a network's weights are laid out as files hold them."""
    weights = list(part.parameters()) if isinstance(part, nn.Module) else []
    last = [weight for weight in weights if not weight.is_contiguous()]
    for weight in last:
        weight.data = weight.data.contiguous()
    try:
        yield
    finally:
        for weight in last:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def as_unet2d(network: nn.Module, size: list[int], name: str) -> UNet2DModel:
    """Convert one of our networks to diffusers' network that computes the same, with its weights.

    Only a UNet without classes and text has one, and only if all its normalisations have as many groups (a width of
    128, 256, … gives each 32) and its attention heads fill the channels. Raises InputError with the reason, which
    calls the model `name`.
    """
    if not isinstance(network, networks.UNet):
        raise InputError(f"{name}: diffusers has no network like its {type(network).__name__}")
    config = network.config
    groups = sorted({part.num_groups for part in network.modules() if isinstance(part, nn.GroupNorm)})
    widths = [config["width"] * multiplier for multiplier in config["multipliers"]]
    attends = [width for width, here in zip(widths, config["attention"], strict=True) if here] + widths[-1:]
    for wrong, why in (
        (config["classes"] is not None, "it has classes, which DDPMPipeline cannot ask for"),
        (config["text_width"] is not None, "it reads texts in a way that diffusers' UNets do not"),
        (len(groups) > 1, f"its normalisations have {groups} groups, diffusers has one number for all"),
        (any(width % config["head_width"] for width in attends), "its attention is narrower than its channels"),
        (any(side % 2 ** (len(widths) - 1) for side in size), f"its size {size} cannot be halved often enough"),
    ):
        if wrong:
            raise InputError(f"{name}: diffusers has no equivalent of this network: {why}")
    here = [("Attn" if attention else "", width) for attention, width in zip(config["attention"], widths, strict=True)]
    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=tuple(size),
            in_channels=config["channels"],
            out_channels=config["out_channels"],
            down_block_types=tuple(f"{attention}DownBlock2D" for attention, _ in here),
            up_block_types=tuple(f"{attention}UpBlock2D" for attention, _ in reversed(here)),
            block_out_channels=tuple(widths),
            layers_per_block=config["blocks"],
            time_embedding_dim=4 * config["width"],
            attention_head_dim=config["head_width"],
            norm_num_groups=groups[0],
            attn_norm_num_groups=groups[0],
            resnet_time_scale_shift="scale_shift",
        )
    weights = {key: value for key, value in network.state_dict().items() if not key.startswith("condition.augment.")}
    unet.load_state_dict(_renamed(weights, config), strict=True, assign=True)
    return unet.eval()


_ENDS = {
    "condition.into": "time_embedding.linear_1",
    "condition.out": "time_embedding.linear_2",
    "first": "conv_in",
    "norm": "conv_norm_out",
    "last": "conv_out",
}
_BLOCK = {
    "residual.norm1": "norm1",
    "residual.conv1": "conv1",
    "residual.modulation": "time_emb_proj",
    "residual.norm2": "norm2",
    "residual.conv2": "conv2",
    "residual.shortcut": "conv_shortcut",
    "attention.norm": "group_norm",
    "attention.out": "to_out.0",
}


def _renamed(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our UNet's weights under diffusers' names; its three attention matrices are one of ours."""
    blocks = config["blocks"]
    places = {"middle.0": ("mid_block", 0), "middle.1": ("mid_block", 1)}
    for level in range(len(config["multipliers"])):
        first = level * (blocks + 1)  # a level is one Shrink (not the first) and its blocks
        places |= {f"down.{first + j}": (f"down_blocks.{level}", j) for j in range(blocks)}
        places[f"down.{first - 1}"] = (f"down_blocks.{level - 1}.downsamplers.0", 0)
        first = level * (blocks + 2)  # on the way up its blocks, one more, and one Grow (not the last)
        places |= {f"up.{first + j}": (f"up_blocks.{level}", j) for j in range(blocks + 1)}
        places[f"up.{first + blocks + 1}"] = (f"up_blocks.{level}.upsamplers.0", 0)
    renamed = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"((?:down|up|middle)\.\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            stem, _, end = name.rpartition(".")
            renamed[f"{_ENDS[stem]}.{end}"] = tensor
            continue
        (block, j), inner, end = places[match[1]], match[2], match[3]
        if inner == "conv":
            renamed[f"{block}.conv.{end}"] = tensor
        elif inner == "attention.qkv":
            for x, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{block}.attentions.{j}.to_{x}.{end}"] = part.clone()
        else:
            kind = "resnets" if inner.startswith("residual") else "attentions"
            renamed[f"{block}.{kind}.{j}.{_BLOCK[inner]}.{end}"] = tensor
    return renamed


def pair(part: Any) -> list[str | None]:
    """(library, class) of a part, as model_index.json writes it."""
    return [None, None] if part is None else [type(part).__module__.split(".")[0], type(part).__name__]


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is in it. Raises CannotWrite."""
    if os.path.lexists(folder):
        raise Exists(folder)
    check_writable(folder)
    sweep(folder.parent)
    temporary = temporary_in(folder.parent)
    try:
        with locked(temporary, "writing"):
            yield temporary
            mode = next(file for file in temporary.iterdir() if file.suffix == ".json").stat().st_mode & 0o777
            for file in temporary.rglob("*.safetensors"):
                file.chmod(mode)  # which safetensors makes 0600
            (temporary / LOCK).unlink()
            os.rename(temporary, folder)
    except SafetensorError as error:  # it carries the system's refusal as text alone
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise cannot_write(folder, OSError(int(code[1]), os.strerror(int(code[1])))) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
