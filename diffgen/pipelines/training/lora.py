"""The job "lora": a low-rank update of the denoiser's layers, for `generate --lora RUN`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffgen.errors import InputError
from diffgen.training.job import Networks

from ..weights.lora_files import write_lora
from .adapted import KINDS, Adapted
from .finetune import Call, FineTune, Pick
from .finetune_config import LoraConfig

FILE = "adapter.safetensors"


class LoraJob(FineTune):
    """A LoRA: the trained network owns A and B alone."""

    config: LoraConfig

    def build(self) -> dict[str, nn.Module]:
        c = self.config.adapter
        alpha = c.rank if c.alpha is None else c.alpha
        try:
            self.adapted = Adapted(self.base, c.layers, lambda weight: KINDS[c.kind](weight, c.rank, alpha / c.rank))
        except ValueError as error:
            raise InputError(f"{self.where}: {error}", 'adapter.layers = "all" takes every layer') from error
        return {"adapter": self.adapted}

    def denoiser(self, networks: Networks, picks: Sequence[Pick]) -> Call:
        return networks["adapter"]

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        with self.adapted.off():
            yield

    def about(self) -> dict[str, Any]:
        c = self.config.adapter
        network = {"kind": c.kind, "part": self.row.denoiser, "rank": c.rank, "alpha": c.alpha or float(c.rank)}
        return super().about() | {"network": network | {"trigger": self.config.data.trigger}}

    def products(self, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
        return {FILE: write_lora(self.about(), weights)}
