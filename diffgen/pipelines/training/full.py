"""The job "full": all weights of the denoiser. The run is a model: `generate -m RUN`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from diffgen.errors import InputError
from diffgen.models.info import CARD
from diffgen.training.job import Autocast, Networks

from .finetune import Call, FineTune, Pick
from .finetune_config import FullConfig

FOLDER = "model"
KEPT = ("licence", "resolution", "styles", "words", "defaults")  # of a card: what tuning leaves true
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FullJob(FineTune):
    """A full fine-tuning."""

    config: FullConfig

    def base_dtype(self) -> str:
        return "float32"  # what the optimizer changes; the forward pass may be in bfloat16

    def build(self) -> dict[str, nn.Module]:
        if self.config.train.quantize != "none":
            raise InputError(f"{self.where}: train.quantize is for adapters: all weights are trained here")
        if self.checked.file is not None:
            hint = f"write it as a folder first: diffgen models export {self.config.model} FOLDER"
            raise InputError(f"{self.where}: {self.config.model} is a single file", hint)
        if self.config.prior.target == "model" and self.config.prior.captions:
            raise InputError(f'{self.where}: prior.target = "model" is for adapters', 'take target = "pictures"')
        self.frozen = {name: part for name, part in self.frozen.items() if part is not self.base}
        self.base.requires_grad_(True)
        return {self.row.denoiser: self.base}

    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        super().prepare(device, autocast)
        with torch.no_grad():
            _ = self._base_sheet  # now: soon the base is no more

    def denoiser(self, networks: Networks, picks: Sequence[Pick]) -> Call:
        return networks[self.row.denoiser]

    def files(self) -> dict[str, bytes | Path]:
        """The base's other files: links where the file system has them."""
        network = self.checked.network
        left = {*network.weights, *network.folder.glob("*.index.json")}
        files: dict[str, bytes | Path] = {
            f"{FOLDER}/{path.relative_to(self.checked.folder).as_posix()}": path
            for path in self.checked.files
            if path not in left and path not in self.checked.grids
        }
        card = self.checked.folder / "card.json"
        if card.is_file():
            table = json.loads(card.read_bytes())
            kept = {key: table[key] for key in KEPT if key in table and key in CARD}
            if isinstance(kept.get("defaults"), dict):
                kept["defaults"] = {key: value for key, value in kept["defaults"].items() if key != "grid"}
            files[f"{FOLDER}/card.json"] = json.dumps(kept, indent=1).encode()
        return files

    def products(self, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
        dtypes = {tensor.dtype for tensor in (self.checked.network.tensors or {}).values()}
        dtype = DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
        tensors = {name: tensor.to(dtype).cpu().contiguous() for name, tensor in weights.items()}
        name = f"{FOLDER}/{self.row.denoiser}/diffusion_pytorch_model.safetensors"
        return {name: save(tensors, {"format": "pt"})}
