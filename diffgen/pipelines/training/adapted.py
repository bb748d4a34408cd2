"""A frozen network with a trained adapter: the adapter's weights are all that it owns.

The network stays outside the module tree, so it is in no checkpoint, average or moment. Hooks on its layers add what
the adapter says. They stay on through the backward pass, which may compute a part of the forward pass again; `off`
gives the base model alone.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..weights import deltas
from ..weights.packed import PackedLinear

LAYERS = {  # the names of the layers that get an adapter
    "attention": r"\b(attn\d?|attention)\.(?!norm)",
    "attention+mlp": r"\b(attn\d?|attention|ff(_context)?|feed_forward|img_mlp|txt_mlp|mlp|proj_mlp)\b|"
    r"single_transformer_blocks\.\d+\.proj_out$",
    "all": "",
}


class LowRank(nn.Module):
    """ΔW = scale·B·A of one layer: Hu et al. 2021, arXiv 2106.09685, eq. 3. B begins at zero."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        """`weight` is the layer's, [out, in] or [out, in, kh, kw]; a rank that it cannot have becomes its largest."""
        super().__init__()
        rows = math.prod(weight.shape[1:])
        rank, self.scale = min(rank, len(weight), rows), scale
        self.A = nn.Parameter(torch.empty(rank, *weight.shape[1:], dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(len(weight), rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output with ΔW·x added."""
        low = apply(layer, x, self.A)
        if isinstance(layer, nn.Conv2d):
            return output + functional.conv2d(low, self.B[:, :, None, None]) * self.scale
        return output + functional.linear(low, self.B) * self.scale


class Whole(nn.Module):
    """An adapter that computes all of ΔW; a subclass says how from its own weights and the layer's."""

    def delta(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        return output + apply(layer, x, self.delta(weight_of(layer)))


class Decomposed(Whole):
    """DoRA: magnitude and direction of each row of W are trained apart. ΔW begins at zero, exactly."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        low = LowRank(weight, rank, scale)
        self.A, self.B, self.scale = low.A, low.B, scale
        dims = list(range(1, weight.ndim))
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(weight.detach().float(), dim=dims))

    def delta(self, weight: Tensor) -> Tensor:
        low = deltas.low_rank(self.B, self.A) * self.scale
        return deltas.decomposed(weight.float(), low, self.magnitude)


class Kronecker(Whole):
    """LoKr: ΔW = scale·W1 ⊗ (A·B), which begins at zero. W1 is nearly square, W2 = A·B has the rank."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = (_factor(side) for side in weight.shape[:2])
        b, d = len(weight) // rows, (weight.shape[1] // columns, *weight.shape[2:])
        rank, self.scale = min(rank, b, math.prod(d)), scale
        self.w1 = nn.Parameter(torch.empty(rows, columns, dtype=torch.float32))
        self.w2_a = nn.Parameter(torch.zeros(b, rank, dtype=torch.float32))
        self.w2_b = nn.Parameter(torch.empty(rank, *d, dtype=torch.float32))
        for factor in (self.w1, self.w2_b):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def delta(self, weight: Tensor) -> Tensor:
        return deltas.kronecker(self.w1, deltas.low_rank(self.w2_a, self.w2_b)) * self.scale


def _factor(side: int) -> int:
    """The largest divisor of a side that is at most its square root."""
    return next(n for n in range(math.isqrt(side), 0, -1) if side % n == 0)


KINDS = {"lora": LowRank, "dora": Decomposed, "lokr": Kronecker}


def apply(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight, without its bias."""
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return functional.linear(x, weight)


def weight_of(layer: Any) -> Tensor:
    """The matrix of a layer, also where it is packed into fewer bits."""
    weight: Tensor = layer.matrix() if isinstance(layer, PackedLinear) else layer.weight
    return weight


Kind = Callable[[Tensor], nn.Module]  # the adapter of a layer with this weight


class Adapted(nn.Module):
    """A frozen network with an adapter at some of its layers; called as the network is."""

    def __init__(self, base: nn.Module, layers: str, kind: Kind) -> None:
        """`layers` is one of LAYERS. Raises ValueError if the network has no such layer."""
        super().__init__()
        self._base = [base]  # in a list: not a part of this module
        self._on = True
        self.layers = nn.ModuleDict()
        for name, layer in base.named_modules():
            kinds = (nn.Linear, PackedLinear, nn.Conv2d) if layers == "all" else (nn.Linear, PackedLinear)
            grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
            if isinstance(layer, kinds) and not grouped and re.search(LAYERS[layers], name):
                adapter = kind(weight_of(layer))
                self.layers[name.replace(".", "/")] = adapter
                layer.register_forward_hook(self._hook(adapter))
        if not self.layers:
            raise ValueError(f"the network has no layers of the kind {layers!r}")

    def _hook(self, adapter: nn.Module) -> Callable[..., Any]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return adapter(layer, inputs[0], output) if self._on else output

        return hook

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._base[0](*args, **kwargs)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the network is the base alone. Not for a forward pass that gets a backward pass."""
        self._on = False
        try:
            yield
        finally:
            self._on = True


class Substitute:
    """An object with some attributes replaced, and what a call of it does."""

    def __init__(self, original: Any, call: Callable[..., Any] | None = None, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._original, self._call = original, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._call or self._original)(*args, **kwargs)
