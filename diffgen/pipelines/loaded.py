"""A loaded diffusion pipeline: its parts, hashes, device and dtype, and what each picture needs of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import schedulers
from diffgen.devices import choose_device, choose_dtype, out_of_memory
from diffgen.errors import InputError, UsageError
from diffgen.generation.grid_files import check_grid_model
from diffgen.images.pixels import to_pil
from diffgen.models import find, gate
from diffgen.models.by_hash import network_hash
from schedulers.scheduler import Scheduler

from .inputs import quantize_name
from .plan import Plan, noise_and_prediction
from .sampling import memory
from .sampling.autoencoder import Autoencoder, vae_dtype
from .sampling.sketch import Sketch
from .sizes import tokens
from .weights import quantize as quantization
from .weights.load import load_pipeline, load_refiner, load_safety_checker


class LoadedModel:
    """A model in memory: `pipeline` holds its parts, `checked` what its files say."""

    def __init__(
        self,
        model: find.Model,
        device: str = "auto",
        dtype: str = "auto",
        offload: str = "none",
        quantize: str = "none",
    ) -> None:
        self.model = model
        self.checked = find.check(model)
        self.noise, self.prediction = noise_and_prediction(self.checked)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device, self.checked.network.parameters)
        self.offload = memory.check_offload(offload, self.device)
        self.quantize = quantize_name(quantize)
        if quantize != "none":
            quantization.check(quantize)
            if offload != "none":
                raise UsageError(f"--quantize {quantize} and --offload {offload} exclude each other", "choose one")
        with ThreadPoolExecutor(1) as hashing:
            hashes = hashing.submit(gate.file_hashes, self.checked)
            self.pipeline = self._load()
        self.hashes = hashes.result()
        self.model_hash = gate.model_hash(self.checked, self.hashes)
        self.fits: list[str] = []  # how each LoRA and embedding of the last plan fits the model, in words
        self._adapted: tuple[Any, ...] = ()
        self._quantized = False
        self._safety: Any = None
        self._refiner: Any = None
        self._sketch: Sketch | None = None

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{self.model.name}: {self.checked.row.title}, {dtype} on {self.device}>"

    def scheduler(self, plan: Plan, size: tuple[int, int] | None = None) -> Scheduler:
        """The plan's scheduler for this model's noise and prediction. Raises InputError if they do not go together.

        `size` is that of the pictures in pixels, where their shift depends on it and no pipeline of diffusers sets it.
        """
        check_grid_model(plan.grid, self.model.name, self.model_hash)
        noise = self.noise
        if size is not None and noise.dynamic is not None:
            noise = noise.at_resolution(tokens(self.checked, size))
        try:
            return schedulers.get(plan.label, noise=noise, prediction=self.prediction, grid=plan.grid)
        except ValueError as error:
            raise InputError(f"{self.model.name} does not go with {plan.scheduler} on {plan.grid}: {error}") from error

    @property
    def sketched(self) -> str:
        """What `sketch` shows, in words."""
        return "the pixels themselves" if self._coarse is None else self._coarse.how

    def sketch(self, latent: Tensor) -> Image.Image:
        """A quick preview of clean latents [C, h, w]; values that are not finite become grey."""
        if self._coarse is None:
            return to_pil(latent.float().nan_to_num(0).cpu().numpy()[None])[0]
        return self._coarse(latent)

    @property
    def _coarse(self) -> Sketch | None:
        """None for a model of pixels."""
        vae = self.pipeline.components.get("vae")
        if vae is not None and (self._sketch is None or self._sketch.coder.vae is not vae):
            self._sketch = Sketch(Autoencoder(vae, vae.dtype, self.device, vae.use_tiling))
        return self._sketch

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """The pictures of clean latents [B, C, h, w], one at a time. Raises InvalidOutput, OutOfMemory."""
        coder = self.autoencoder()
        return [to_pil(coder.decode(latent[None]).cpu().numpy())[0] for latent in latents]

    def autoencoder(self, plan: Plan | None = None) -> Autoencoder:
        dtype = vae_dtype(self.pipeline.vae, self.checked.row, self.dtype, self.offload)
        tiling, may_tile = (plan.options["vae_tiling"], not plan.options["tile"]) if plan else (False, True)
        return Autoencoder(self.pipeline.vae, dtype, self.device, tiling, may_tile)

    def safety_checker(self) -> Any:
        """The model's (checker, image processor), or None if it has none."""
        if self._safety is None:
            self._safety = load_safety_checker(self.checked, self.device, self.dtype) or False
        return self._safety or None

    def refiner(self, model: find.Model) -> Any:
        """The pipeline of a refiner, loaded once."""
        if self._refiner is None or self._refiner[0] != model:
            with out_of_memory():
                pipeline = load_refiner(find.check(model), self.device, self.dtype)
            self._refiner = (model, pipeline, network_hash(model))
        return self._refiner[1]

    @property
    def refiner_hash(self) -> str:
        """`gate.model_hash` of the refiner that was used last."""
        return self._refiner[2]

    def _load(self) -> Any:
        with out_of_memory():
            device = self.device if self.offload == "none" else torch.device("cpu")
            # float16 may be too narrow for the autoencoder: `autoencoder` decides
            exact = self.dtype == torch.float16 or self.offload in ("sequential", "group")
            return load_pipeline(self.checked, device, self.dtype, torch.float32 if exact else self.dtype)
