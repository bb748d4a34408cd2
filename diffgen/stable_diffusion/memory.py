"""What is done to fit into memory and into the range of half precision, and a list of what was done.

The autoencoder is where both end first: it works on all the pixels, and its activations outgrow float16. So one
picture at a time goes through it; where memory ends, in tiles; where numbers end, once more in float32.
"""

from __future__ import annotations

import gc
import importlib.util
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from diffgen.devices import out_of_memory
from diffgen.errors import InputError, OutOfMemory, UsageError

HINT = "try a smaller --size; on a GPU also --dtype float16, --offload model, --offload sequential"


def check_offload(name: str, device: torch.device) -> str:
    """The name, if it can be done: on a GPU, by the package accelerate. Raises UsageError, InputError."""
    if name != "none":
        if device.type == "cpu":
            raise UsageError(f"--offload {name} spares a GPU's memory, and the device is the CPU", "leave it out")
        if importlib.util.find_spec("accelerate") is None:
            raise InputError(f"--offload {name} needs the package accelerate", "pip install 'diffgen[offload]'")
    return name


def offload(pipeline: Any, kind: str, device: torch.device) -> None:
    """Keep the pipeline's parts in main memory and on the device only while they compute.

    `model` moves whole networks, `sequential` layer by layer.
    """
    if kind == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif kind == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)


def vae_dtype(vae: Any, family: str, dtype: torch.dtype, offload: str) -> torch.dtype:
    """What the autoencoder computes in: as the model, but for XL's, of which it is known that float16 is too narrow."""
    narrow = dtype == torch.float16 and family.startswith("sdxl") and vae.config.force_upcast
    return torch.float32 if narrow or offload == "sequential" else dtype


def release() -> None:
    """Give back what is no longer used, so that a smaller attempt finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_flagged(safety: tuple[Any, Any], image: Image.Image, device: torch.device, dtype: torch.dtype) -> bool:
    """What the model's safety checker says of a picture; `safety` is (checker, its image processor)."""
    checker, processor = safety
    seen = processor(images=[image], return_tensors="pt").pixel_values.to(device=device, dtype=dtype)
    _, flags = checker(images=np.asarray(image)[None] / 255, clip_input=seen)
    return bool(flags[0])


class Autoencoder:
    """A pipeline's autoencoder, one picture at a time.

    `tiling` is whether it works in tiles; `float32` whether it had to be computed so where the model is in half
    precision. Both stay once they were needed. With `may_tile` off, tiles are never taken (their seams would show).
    """

    def __init__(
        self, vae: Any, dtype: torch.dtype, device: torch.device, tiling: bool = False, may_tile: bool = True
    ) -> None:
        self.vae, self.device, self.may_tile = vae, device, may_tile
        self.tiling = self.float32 = False
        config = vae.config
        channels = (1, -1, 1, 1)
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        self._mean = None if mean is None else torch.tensor(mean).reshape(channels)
        self._deviation = None if deviation is None else torch.tensor(deviation).reshape(channels)
        self._shift = config.get("shift_factor") or 0.0
        if self.vae.dtype != dtype:
            self.vae.to(dtype)
        if tiling:
            self._tile()
        else:
            self.vae.disable_tiling()

    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Latents [1, C, h, w] of one picture [1, 3, H, W] in [-1, 1], drawn from what the encoder thinks possible."""
        spread = self._run(lambda x: self.vae.encode(x).latent_dist.parameters, pixels)
        latents = DiagonalGaussianDistribution(spread.float()).sample(generator)
        if self._mean is not None and self._deviation is not None:
            latents = (latents - self._mean.to(latents)) / self._deviation.to(latents)
        return (latents - self._shift) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """The picture [1, 3, H, W], float32, of clean latents [1, C, h, w]; it may hold nan."""
        x = latents.float() / self.vae.config.scaling_factor
        if self._mean is not None and self._deviation is not None:
            x = x * self._deviation.to(x) + self._mean.to(x)
        return self._run(lambda z: self.vae.decode(z, return_dict=False)[0], x + self._shift).float()

    def _run(self, function: Any, x: Tensor) -> Tensor:
        """function(x) in the autoencoder's dtype; where memory ends again in tiles, where numbers end in float32."""
        result = self._try(function, x)
        if not result.isfinite().all() and self.vae.dtype != torch.float32 and x.isfinite().all():
            self.vae.to(torch.float32)
            self.float32 = True
            result = self._try(function, x)
        return result

    def _try(self, function: Any, x: Tensor) -> Tensor:
        try:
            with out_of_memory():
                return function(x.to(device=self.device, dtype=self.vae.dtype))
        except OutOfMemory as error:
            if self.tiling or not self.may_tile:
                raise OutOfMemory(error.message, HINT) from error
        release()
        self._tile()
        with out_of_memory():
            return function(x.to(device=self.device, dtype=self.vae.dtype))

    def _tile(self) -> None:
        self.tiling = True
        self.vae.enable_tiling()
