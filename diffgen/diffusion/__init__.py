"""The DDPM paper in code.

    from diffgen.diffusion import GaussianDiffusion
    d = GaussianDiffusion(schedulers.NoiseSchedule.linear(1000), prediction="epsilon")
    loss = d.loss(model, x0, t, noise).mean()
    pictures = d.sample(model, (16, 3, 32, 32), generator, clip=(-1, 1))
    bits = d.bits_per_dim(model, x0)

forward.py has q, reverse.py p_θ, flow.py rectified flows, loss.py the objectives, likelihood.py bits per dimension,
guidance.py classifier-free guidance; process.py puts them together. names.py needs no torch. A docstring that states a
formula begins with the name of its equation.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .flow import RectifiedFlow
    from .guidance import guided
    from .loss import ImportanceSampler, offset_noise
    from .process import GaussianDiffusion

__all__ = ["GaussianDiffusion", "ImportanceSampler", "RectifiedFlow", "guided", "offset_noise"]

_MODULES = {
    "GaussianDiffusion": "process",
    "ImportanceSampler": "loss",
    "RectifiedFlow": "flow",
    "guided": "guidance",
    "offset_noise": "loss",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch at its first use."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
