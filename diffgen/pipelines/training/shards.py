"""Keep the latents of windows in files, so that later trainings on the same pictures do not encode them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from diffgen.errors import InputError
from diffgen.images.publish import Exists, cannot_write, publish
from diffgen.training.checkpoint import read_weights


class Shards:
    """The latents of numbered windows, one file each: FOLDER/<hash of what they depend on>/<number>.safetensors."""

    def __init__(self, folder: Path, *depends: object) -> None:
        """`depends` is all that the latents depend on: the data, the autoencoder, the window, the precision."""
        self.folder = folder / hashlib.sha256(repr(depends).encode()).hexdigest()[:16]

    def __call__(self, number: int, shape: tuple[int, ...], encode: Callable[[], Tensor]) -> Tensor:
        """The latents of a window, float32 of that shape: from its file, or encoded and written to it.

        Raises InputError for a file with other contents, CannotWrite.
        """
        path = self.folder / f"{number}.safetensors"
        if path.is_file():
            latents = read_weights(path, {"latents": torch.empty(shape, device="meta")})["latents"]
            if latents.dtype != torch.float32 or not bool(latents.isfinite().all()):
                raise InputError(f"{path}: these latents are not finite numbers of float32", "delete the file")
            return latents
        latents = encode().float()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, save({"latents": latents.contiguous()}))
        except Exists:
            pass  # another process encoded the same window
        except OSError as error:
            raise cannot_write(path, error) from error
        return latents
