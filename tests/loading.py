"""Loading a model with diffgen and with diffusers, and a picture and the weights of what was loaded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import schedulers
from diffgen.models import gate, single_file
from diffgen.pipelines.weights.load import load_pipeline

CPU, F32 = torch.device("cpu"), torch.float32


def load(folder: Path, dtype: torch.dtype = F32) -> Any:
    return load_pipeline(gate.check_folder(folder), CPU, dtype)


def load_single_file(file: Path, base: Path, dtype: torch.dtype = F32) -> Any:
    return load_pipeline(single_file.check_file(file, base), CPU, dtype)


def theirs(folder: Path) -> Any:
    import diffusers

    without = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3-without-t5" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **without)
    pipe.set_progress_bar_config(disable=True)
    for network in networks(pipe).values():
        network.requires_grad_(False)  # torch multiplies in another order where a gradient may be needed
    return pipe


def networks(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def picture(pipe: Any, folder: Path, guidance: float = 3.0) -> np.ndarray:
    """A picture of two steps, with our scheduler for the noise and prediction of the folder's."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    noise, prediction = schedulers.from_diffusers_config(config)
    pipe.scheduler = schedulers.get("euler", noise=noise, prediction=prediction)
    settings: dict[str, Any] = {
        "num_inference_steps": 2, "generator": torch.Generator().manual_seed(5), "output_type": "np",
    }  # fmt: skip
    kind = type(pipe).__name__
    ramp = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    if kind != "DDPMPipeline":
        settings |= {"prompt": "a red apple", "guidance_scale": guidance}
    if "negative_prompt" in inspect.signature(pipe.__call__).parameters and kind != "FluxPipeline":
        settings["negative_prompt"] = "blue"
    if kind == "StableDiffusionXLImg2ImgPipeline":
        settings |= {"image": ramp, "strength": 1.0}
    elif kind != "DDPMPipeline":
        settings |= {"width": 32, "height": 32}
    if kind == "FluxFillPipeline":
        settings |= {"image": ramp, "mask_image": ramp[:, :1].round()}
    if kind == "FluxControlPipeline":
        settings["control_image"] = ramp
    if kind == "FluxKontextPipeline":
        settings["max_area"] = 32**2
    return pipe(**settings).images[0]


def weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, network in networks(pipe).items()
        for name, tensor in network.state_dict().items()
    }
