"""Attention maps: where each token of a prompt acts, by the UNet's cross-attention averaged over a run.

For a place q of the picture and the keys k of all tokens, a head's attention is softmax(q·kᵀ/√d). The map is its mean
over heads, layers and evaluations, for the prompt's half of the batch, scaled up to the largest resolution: the
attention maps of DAAM (Tang et al. 2022, "What the DAAM", section 3.1), which sums instead.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Maps:
    """A context that records the attention of the UNet's evaluations. The pictures stay the same to the bit.

    guided  whether the network's batch is [negative prompts, prompts]; then its second half counts

    Memory is bounded: one map for each picture, resolution and token, whatever the number of steps, layers and heads,
    and one head's attention while it works.
    """

    def __init__(self, unet: Any, guided: bool) -> None:
        self.unet, self.guided = unet, guided
        self._sums: dict[tuple[int, int], Tensor] = {}  # [B, tokens, h, w] by (h, w)
        self._count = 0
        self._size = (0, 0)

    def __enter__(self) -> Maps:
        self._layers = [part for name, part in self.unet.named_modules() if name.endswith(".attn2")]
        self._processors = [layer.processor for layer in self._layers]
        for layer, processor in zip(self._layers, self._processors, strict=True):
            layer.set_processor(_Watched(processor, self))
        self._hook = self.unet.register_forward_pre_hook(self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()
        for layer, processor in zip(self._layers, self._processors, strict=True):
            layer.set_processor(processor)

    def clear(self) -> None:
        """Forget the maps: other pictures begin."""
        self._sums, self._count = {}, 0

    def tokens(self, row: int) -> Tensor:
        """The attention [tokens, h, w] of picture `row` of the batch; at each place it sums to 1 over the tokens."""
        size = max(self._sums)
        scaled = [functional.interpolate(maps[row : row + 1], size, mode="bilinear") for maps in self._sums.values()]
        return torch.cat(scaled).sum(0) / self._count

    def word(self, row: int, places: list[int]) -> Tensor:
        """The map [h, w] of a word at these places among the tokens: their sum."""
        return self.tokens(row)[places].sum(0)

    def _begin(self, unet: Any, inputs: tuple[Any, ...]) -> None:
        self._size = tuple(inputs[0].shape[-2:])

    def add(self, layer: Any, states: Tensor, context: Tensor) -> None:
        """Add the attention of one layer: states [B, h·w, C] attend to context [B, tokens, width]."""
        rows = len(states) // 2 if self.guided else len(states)
        query, key = layer.to_q(states[-rows:]), layer.to_k(context[-rows:])
        mean = torch.zeros(rows, query.shape[1], key.shape[1], device=query.device)
        for q, k in zip(query.chunk(layer.heads, -1), key.chunk(layer.heads, -1), strict=True):
            mean += (q.float() @ k.float().mT * layer.scale).softmax(-1)
        size = self._resolution(query.shape[1])
        maps = (mean / layer.heads).mT.unflatten(-1, size)
        self._sums[size] = self._sums[size] + maps if size in self._sums else maps
        self._count += 1

    def _resolution(self, places: int) -> tuple[int, int]:
        """(h, w) of a layer with that many places: the latents', halved repeatedly."""
        height, width = self._size
        while height * width > places:
            height, width = -(-height // 2), -(-width // 2)
        return height, width


class _Watched:
    """A layer's own processor; the maps get its input first."""

    def __init__(self, processor: Any, maps: Maps) -> None:
        self.processor, self.maps = processor, maps

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        if encoder_hidden_states is not None:
            self.maps.add(attn, hidden_states, encoder_hidden_states)
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **more)
