"""What the adapters share: a frozen model with its training loss, and a training loop."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import diffgen
from diffgen.diffusion import GaussianDiffusion
from diffgen.errors import InputError, InvalidOutput
from diffgen.images.pixels import from_pil
from diffgen.pipelines.generate import ImageGenerator
from diffgen.pipelines.training.captions import read
from diffgen.training.batches import times
from diffgen.training.precision import fast_attention, fast_dtype

ENCODE_BATCH = 64
LOG_INTERVAL = 10.0  # seconds


class Frozen:
    """A Stable Diffusion 1 model with frozen weights: `unet`, `text_encoder`, `tokenizer`, and `side` in pixels."""

    def __init__(self, name: str) -> None:
        """Load a model. Raises InputError for a model of another family."""
        model = diffgen.load(name, dtype="float32")
        if not isinstance(model, ImageGenerator) or model.checked.family != "sd1":
            raise InputError(f"{name} is not a Stable Diffusion 1 model", "these adapters are for the model emoji")
        self.device, self.parts = model.device, model.pipeline.components
        self.unet: Any = self.parts["unet"]
        self.text_encoder: Any = self.parts["text_encoder"]
        self.tokenizer: Any = self.parts["tokenizer"]
        self.diffusion = GaussianDiffusion(model.noise, model.prediction)
        self.side = self.unet.config.sample_size * model.pipeline.vae_scale_factor  # of a picture, pixels
        self.dtype = fast_dtype("auto", self.device, self.side**2)

    @contextlib.contextmanager
    def fast(self) -> Iterator[None]:
        """Compute forward passes in bfloat16 if the device is fast at it."""
        if self.dtype == torch.float32:
            yield
        else:
            with torch.autocast(self.device.type, self.dtype), fast_attention(self.device):
                yield

    @torch.no_grad()
    def latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The scaled latents of pictures, the UNet's input: float32 [N, C, h, w]."""
        vae, batches = self.parts["vae"], []
        for first in range(0, len(pictures), ENCODE_BATCH):
            x = np.stack([from_pil(picture) for picture in pictures[first : first + ENCODE_BATCH]])
            with self.fast():
                batches.append(vae.encode(torch.from_numpy(x).to(self.device)).latent_dist.mean.float())
        return torch.cat(batches) * vae.config.scaling_factor

    def context(self, captions: Sequence[str]) -> Tensor:
        """The text embeddings of captions: [B, length, width]."""
        with self.fast():
            return self.text_encoder(read(self.tokenizer, captions).to(self.device)).last_hidden_state

    def loss(self, x0: Tensor, context: Tensor, **options: Any) -> Tensor:
        """DDPM algorithm 1, lines 3 to 5: the mean loss on x0 [B, C, h, w] at random times.

        `options` are arguments of `denoise`.
        """
        t = times(torch.rand(len(x0)), self.diffusion.T, stratified=True).to(self.device)
        noise = torch.randn(x0.shape).to(self.device)
        return self.diffusion.loss(lambda x, t: self.denoise(x, t, context, **options), x0, t, noise).mean()

    def denoise(self, x: Tensor, t: Tensor, context: Tensor, control: Callable[..., Any] | None = None) -> Tensor:
        """The UNet's output [B, C, h, w], with the residuals of `control(x, t, context)` added inside."""
        with self.fast():
            down, mid = (None, None) if control is None else control(x, t, context)
            output = self.unet(
                x,
                t,
                context,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
        return output.float()


def descend(
    name: str, weights: Iterable[nn.Parameter], loss: Callable[[int], Tensor], *, steps: int, batch: int, rate: float
) -> None:
    """Minimise loss(k), k = 0 … steps − 1, with Adam.

    The learning rate rises over the first twentieth of the steps and falls to 0 over the last third. Progress goes to
    stderr every few seconds. Raises InvalidOutput if the loss is not finite.
    """
    weights = [weight.requires_grad_() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=rate)
    start = last_log = time.monotonic()
    recent: list[float] = []
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, 20 * (k + 1) / steps, 3 * (steps - k) / steps)
        value = loss(k)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(value.item())
        if not np.isfinite(recent[-1]):
            raise InvalidOutput(f"{name}: the loss of step {k + 1} is {recent[-1]}", "lower the learning rate")
        now = time.monotonic()
        if now - last_log > LOG_INTERVAL or k + 1 == steps:
            speed = batch * (k + 1) / (now - start)
            print(
                f"{name}: step {k + 1} of {steps}, loss {np.mean(recent):.4f}, {speed:.0f} pictures/s",
                file=sys.stderr,
                flush=True,
            )
            last_log, recent = now, []
