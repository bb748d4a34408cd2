"""Write a training run as a diffusers folder."""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.images.publish import publish
from diffgen.models import gate
from diffgen.training.job import JOBS
from diffgen.training.precision import DTYPES
from diffgen.training.run import Run, diffusion_of, load_network, product_of, weights_file

from ..weights.export import as_unet2d, new_folder, pair, save_part, write_json
from ..weights.lora_files import LAYOUTS, write_lora
from ..weights.tokenizers import load_tokenizer
from .finetune_config import check_base
from .parts import of_run, read_autoencoder


def save_run(run: Run, folder: Path, which: str = "ema", **options: Any) -> None:
    """Write a run as a diffusers folder or a file that does not exist yet, as its job's row in `JOBS` says.

    `which` weights: "ema", "model", "ema-<length>". `options` are those of the row's function: layout, dtype.
    Raises InputError for a run that is not exported, UsageError for an option that it has not, and CannotWrite.
    """
    kind = JOBS.get(run.job)
    if kind is None or not kind.export:
        raise InputError(f"{run.folder}: runs of the job {run.job} cannot be saved as a diffusers folder")
    function = kind.load("export")
    accepted = inspect.signature(function).parameters if kind.command == "finetune" else {}
    if wrong := sorted(options.keys() - accepted.keys()):
        raise UsageError(f"--{wrong[0]} {options[wrong[0]]} is not for runs of the job {run.job}", "leave it out")
    function(run, folder, which=which, **options)


def save_lora_run(run: Run, file: Path, which: str = "ema", layout: str = "diffusers", dtype: str = "float32") -> None:
    """Write a run of the job "lora" as a file in one of `lora_files.LAYOUTS`. Raises InputError, UsageError."""
    if layout not in LAYOUTS:
        raise UsageError(f"--layout must be one of {', '.join(LAYOUTS)} (got {layout!r})")
    newest = run.latest()
    if newest is None:
        raise InputError(f"{run.folder} has no checkpoint to read", "train it first")
    about = gate.read_json(run.folder / "run.json")
    checked = None if layout == "diffusers" else check_base(run.config["model"])[1]
    publish(file, write_lora(about, load_file(weights_file(newest, which)), layout, DTYPES[dtype], checked))


def copy_product(run: Run, place: Path, which: str = "ema") -> None:
    """Copy what a run made for other commands: a file or a folder. Raises InputError, UsageError, CannotWrite."""
    if which != "ema":
        raise UsageError(f"--weights {which} is not for runs of the job {run.job}", "leave it out")
    product = product_of(run.folder, run.job)
    if product.is_file():
        publish(place, product.read_bytes())
    else:
        with new_folder(place) as new:
            shutil.copytree(product, new, dirs_exist_ok=True)


def save_pixel_run(run: Run, folder: Path, which: str = "ema") -> None:
    """Write a run of the job "pixels" as a diffusers folder that does not exist yet: UNet2DModel, DDPMScheduler.

    Raises InputError, with the reason, for a run that diffusers' classes cannot express, and CannotWrite.
    """
    network, _ = load_network(run, which)
    process = diffusion_of(run)
    unet = as_unet2d(network, run.data["size"], f"{run.folder}")
    if run.prediction == "flow_prediction" or run.variance == "learned_range":
        raise InputError(f"{run.folder}: diffusers' DDPMPipeline has no {run.prediction} with {run.variance}")
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": process.noise.T,
        "trained_betas": list(process.noise.betas),
        "prediction_type": run.prediction,
        "variance_type": run.variance,
        "clip_sample": True,
    }
    with new_folder(folder) as new:
        unet.save_pretrained(new / "unet")
        write_json(new / "scheduler" / "scheduler_config.json", scheduler)
        pairs = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        write_json(new / "model_index.json", {"_class_name": "DDPMPipeline", **pairs})


def save_latent_run(
    run: Run,
    folder: Path,
    card: Mapping[str, Any] | None = None,
    *,
    which: str = "ema",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a run of the job "latents" as a Stable Diffusion folder that does not exist yet, with its newest weights.

    `card` becomes card.json; `models.info` lists its keys. Raises InputError and CannotWrite.
    """
    if run.job != "latents":
        raise InputError(f"{run.folder}: a run of the job {run.job}, not of latents")
    with _sound(run):
        scheduler = _scheduler(run)
        parts = {
            "unet": of_run(run, "unet", "UNet2DConditionModel", run.network["unet"], which, dtype),
            "text_encoder": of_run(run, "text_encoder", "CLIPTextModel", run.network["text_encoder"], which, dtype),
        }
        length = parts["text_encoder"].config.max_position_embeddings
    parts["vae"] = read_autoencoder(run.folder / "vae")[0].to(dtype)
    parts["tokenizer"] = load_tokenizer(run.folder / "tokenizer", length)
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", scheduler["_class_name"]]}
    index |= {name: pair(parts.get(name)) for name in (*parts, "safety_checker", "feature_extractor", "image_encoder")}
    with new_folder(folder) as new:
        for name, part in parts.items():
            save_part(part, new / name)
        write_json(new / "scheduler" / "scheduler_config.json", scheduler)
        write_json(new / "model_index.json", {**index, "requires_safety_checker": False})
        if card is not None:
            text = json.dumps(card, indent=1, ensure_ascii=False)
            (new / "card.json").write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _sound(run: Run) -> Iterator[None]:
    """Raise InputError if run.json lacks a key."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{run.folder / 'run.json'}: not a run on latents ({error})") from error


def _scheduler(run: Run) -> dict[str, Any]:
    """The scheduler_config.json of a run on latents. Raises KeyError and ValueError."""
    name, T, zero = (run.noise[key] for key in ("name", "T", "zero_terminal_snr"))
    noise = schedulers.NoiseSchedule.named(name, T=T)
    table: dict[str, Any] = {"trained_betas": list(noise.betas)}
    if name in ("linear", "scaled_linear"):
        ends = {"beta_start": noise.recipe["beta_start"], "beta_end": noise.recipe["beta_end"]}
        table = {**ends, "beta_schedule": name}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": T,
        **table,
        "rescale_betas_zero_snr": bool(zero),
        "prediction_type": run.prediction,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }
