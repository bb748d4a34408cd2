"""What the adapters have in common: a frozen model that says how wrong it is, and a loop that makes it less so."""

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

ENCODED_AT_ONCE = 64
SAID_EVERY = 10.0  # seconds


class Frozen:
    """A model of Stable Diffusion 1 whose weights stay as they are. `unet`, `text_encoder`, `tokenizer`, `side`."""

    def __init__(self, name: str) -> None:
        """Raises InputError for a model of another family."""
        model = diffgen.load(name, dtype="float32")
        if not isinstance(model, ImageGenerator) or model.checked.family != "sd1":
            raise InputError(f"{name} is no model of Stable Diffusion 1", "these adapters are made for the model emoji")
        self.device, self.parts = model.device, model.pipeline.components
        self.unet: Any = self.parts["unet"]
        self.text_encoder: Any = self.parts["text_encoder"]
        self.tokenizer: Any = self.parts["tokenizer"]
        self.diffusion = GaussianDiffusion(model.noise, model.prediction)
        self.side = self.unet.config.sample_size * model.pipeline.vae_scale_factor  # of a picture, in pixels
        self.dtype = fast_dtype("auto", self.device, self.side**2)

    @contextlib.contextmanager
    def fast(self) -> Iterator[None]:
        """Forward passes are computed in bfloat16 in here, where the machine is quick at that."""
        if self.dtype == torch.float32:
            yield
        else:
            with torch.autocast(self.device.type, self.dtype), fast_attention(self.device):
                yield

    @torch.no_grad()
    def latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """What the autoencoder makes of pictures, as the UNet reads it: float32 [N, C, h, w]."""
        vae, parts = self.parts["vae"], []
        for first in range(0, len(pictures), ENCODED_AT_ONCE):
            x = np.stack([from_pil(picture) for picture in pictures[first : first + ENCODED_AT_ONCE]])
            with self.fast():
                parts.append(vae.encode(torch.from_numpy(x).to(self.device)).latent_dist.mean.float())
        return torch.cat(parts) * vae.config.scaling_factor

    def context(self, captions: Sequence[str]) -> Tensor:
        """What the text encoder says of captions: [B, length, width]."""
        with self.fast():
            return self.text_encoder(read(self.tokenizer, captions).to(self.device)).last_hidden_state

    def loss(self, x0: Tensor, context: Tensor, **more: Any) -> Tensor:
        """DDPM algorithm 1, lines 3 to 5: noise at a random time on x0 [B, C, h, w]; how far off the prediction is.

        `more` goes to `denoise`.
        """
        t = times(torch.rand(len(x0)), self.diffusion.T, stratified=True).to(self.device)
        noise = torch.randn(x0.shape).to(self.device)
        return self.diffusion.loss(lambda x, t: self.denoise(x, t, context, **more), x0, t, noise).mean()

    def denoise(self, x: Tensor, t: Tensor, context: Tensor, control: Callable[..., Any] | None = None) -> Tensor:
        """The UNet's output [B, C, h, w]; with what `control` of the same arguments says added inside."""
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
    """Adam on loss(k), k = 0 … steps − 1: the rate rises over the first twentieth and falls to 0 over the last third.

    Says every few seconds how it goes. Raises InvalidOutput where the loss is not finite.
    """
    weights = [weight.requires_grad_() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=rate)
    begin = said = time.monotonic()
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
        if now - said > SAID_EVERY or k + 1 == steps:
            rate_of = batch * (k + 1) / (now - begin)
            print(
                f"{name}: step {k + 1} of {steps}, loss {np.mean(recent):.4f}, {rate_of:.0f} pictures/s",
                file=sys.stderr,
                flush=True,
            )
            said, recent = now, []
