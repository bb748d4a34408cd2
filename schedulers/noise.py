"""How much noise is there at time t?  α(t), σ(t) and back; x_t = α·x0 + σ·ε.

Times are floats. A table of T levels (DDPM, Stable Diffusion) is read at t ∈ [0, T−1]; between two integers ln(σ/α) is
linear in t, and where the last level has no signal at all (α = 0), α/σ is linear in that last interval instead.

Every function here takes a Python float, or a tensor whose gradient it keeps; the float path needs no torch.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


def ops(x: Any) -> Any:
    """The module whose exp, log, sqrt, … fit x: torch for a tensor, math for a float."""
    return math if isinstance(x, (int, float)) else sys.modules["torch"]


@dataclass(frozen=True)
class Point:
    """One noise level: `t` is what the network is told; the state there is alpha·x0 + sigma·ε."""

    t: Any
    alpha: Any
    sigma: Any

    @cached_property
    def lam(self) -> Any:
        """λ = ln(α/σ), half the log signal-to-noise ratio: −inf from pure noise, +inf for the clean picture."""
        if self.alpha == 0 or self.sigma == 0:
            return -math.inf if self.alpha == 0 else math.inf
        return ops(self.alpha).log(self.alpha) - ops(self.sigma).log(self.sigma)

    @cached_property
    def rho(self) -> Any:
        """σ/α: the noise level of Karras et al. (in the frame x/α); inf from pure noise."""
        return math.inf if self.alpha == 0 else self.sigma / self.alpha


CLEAN = Point(0.0, 1.0, 0.0)


class NoiseSchedule:
    """α(t) and σ(t) of a diffusion process.

    Build one with a class method: `linear`, `scaled_linear`, `cosine`, `sigmoid` or `from_betas`/`from_alphas_cumprod`
    (variance preserving, α² + σ² = 1), `flow` (α = 1 − σ), `edm` (α = 1).

    Attributes: `name`; `T`, the number of training times; `t_max` and `t_min`, the times of the most and least noise.
    """

    def __init__(
        self,
        name: str,
        T: int,
        t_max: float,
        t_min: float,
        *,
        point: Callable[[Any], tuple[Any, Any]],
        time: Callable[[float], float],
        alphas_cumprod: Sequence[float] = (),
        shift: float = 1.0,
    ) -> None:
        self.name, self.T, self.t_max, self.t_min, self.shift = name, T, t_max, t_min, shift
        self.alphas_cumprod = tuple(alphas_cumprod)  # ᾱ_t of a table, float64; empty where there is none
        self._point, self._time = point, time

    def __repr__(self) -> str:
        return f"NoiseSchedule.{self.name}(T={self.T})"

    def alpha(self, t: Any) -> Any:
        """The factor of the signal at time t (a float, or a tensor of any shape)."""
        return self._point(t)[0]

    def sigma(self, t: Any) -> Any:
        """The standard deviation of the noise at time t (a float, or a tensor of any shape)."""
        return self._point(t)[1]

    def at(self, *, t: Any = None, lam: Any = None) -> Point:
        """The point at time t, or at λ = ln(α/σ)."""
        if t is None:
            t = self._time(lam)
        return Point(t, *self._point(t))

    @cached_property
    def noisiest(self) -> Point:
        return self.at(t=self.t_max)

    @cached_property
    def betas(self) -> tuple[float, ...]:
        """β_t = 1 − ᾱ_t/ᾱ_{t−1} of the table (DDPM eq. 4), float64."""
        before = (1.0, *self.alphas_cumprod[:-1])
        return tuple(1 - a / b for a, b in zip(self.alphas_cumprod, before, strict=True))

    # Tables: variance preserving

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Iterable[Any], name: str = "from_alphas_cumprod") -> NoiseSchedule:
        """From ᾱ_t = α_t², t = 0 … T−1: strictly decreasing, inside (0, 1); only the last may be 0."""
        a = [float(x) for x in alphas_cumprod]
        if len(a) < 1 or not all(p > q for p, q in zip([1.0, *a], [*a, -1e-300], strict=True)):
            raise ValueError(f"alphas_cumprod must fall strictly inside (0, 1) (the last may be 0); got {_brief(a)}")
        table = _Table(a)
        return cls(name, len(a), len(a) - 1.0, 0.0, point=table.point, time=table.time, alphas_cumprod=a)

    @classmethod
    def from_betas(cls, betas: Iterable[Any], name: str = "from_betas") -> NoiseSchedule:
        """From β_t, the variance that step t adds (DDPM eq. 2): ᾱ_t = Π (1 − β_s), in float64."""
        b = [float(x) for x in betas]
        wrong = [(i, x) for i, x in enumerate(b) if not 0 < x <= 1 or (x == 1 and i < len(b) - 1)]
        if wrong or not b:
            raise ValueError(f"betas must lie in (0, 1) (the last may be 1); at (index, value): {wrong[:3]}")
        product, a = 1.0, []
        for x in b:
            product *= 1 - x
            a.append(product)
        return cls.from_alphas_cumprod(a, name)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
        """β linear in t. DDPM section 4 has 1e-4 … 0.02 at T = 1000; other T scale both by 1000/T, as there."""
        start, end = _ends(T, beta_start, beta_end, 1e-4, 0.02)
        return cls.from_betas(_linspace(start, end, T), "linear")

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
        """√β linear in t: Stable Diffusion (latent diffusion's "linear"), 0.00085 … 0.012 at T = 1000."""
        start, end = _ends(T, beta_start, beta_end, 0.00085, 0.012)
        return cls.from_betas([x * x for x in _linspace(math.sqrt(start), math.sqrt(end), T)], "scaled_linear")

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """ᾱ(u) = cos²((u + s)/(1 + s)·π/2), β capped (Improved DDPM eq. 17)."""

        def bar(u: float) -> float:
            return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

        return cls.from_betas([min(1 - bar((i + 1) / T) / bar(i / T), max_beta) for i in range(T)], "cosine")

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
        """β a logistic curve over [−6, 6] between its two ends (GeoDiff), 1e-4 … 0.02 at T = 1000."""
        start, end = _ends(T, beta_start, beta_end, 1e-4, 0.02)
        return cls.from_betas([start + (end - start) / (1 + math.exp(-x)) for x in _linspace(-6, 6, T)], "sigmoid")

    # Continuous schedules

    @classmethod
    def flow(cls, shift: float = 1.0, T: int = 1000) -> NoiseSchedule:
        """Rectified flow: x = (1 − σ)·x0 + σ·ε, the network is told t = T·σ (SD3, Flux).

        `shift` does not change the path; grids that are uniform in u ask at σ = shift·u/(1 + (shift − 1)·u).
        """
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")

        def point(t: Any) -> tuple[Any, Any]:
            return 1 - t / T, t / T

        def time(lam: float) -> float:
            return T / (1 + ops(lam).exp(lam))

        return cls("flow", T, float(T), shift / (T + shift - 1) * T, point=point, time=time, shift=shift)

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 80.0, T: int = 1000) -> NoiseSchedule:
        """Variance exploding, α = 1; the network is told c_noise = ln(σ)/4 (EDM table 1)."""
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"edm needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")

        def point(t: Any) -> tuple[Any, Any]:
            return t * 0 + 1.0, ops(t).exp(4 * t)

        def time(lam: float) -> float:
            return -lam / 4

        return cls("edm", T, math.log(sigma_max) / 4, math.log(sigma_min) / 4, point=point, time=time)

    # Names

    NAMES = ("linear", "scaled_linear", "cosine", "sigmoid", "flow", "edm")

    @classmethod
    def named(cls, name: str) -> NoiseSchedule:
        if name not in cls.NAMES:
            raise ValueError(f"unknown noise schedule {name!r}; there are {', '.join(cls.NAMES)}")
        return getattr(cls, name)()


class _Table:
    """L[t] = ln(σ/α) at integer t, linear in between; α = 0 at the end is kept apart as `ends_in_noise`."""

    def __init__(self, alphas_cumprod: Sequence[float]) -> None:
        self.ends_in_noise = alphas_cumprod[-1] == 0
        finite = alphas_cumprod[:-1] if self.ends_in_noise else alphas_cumprod
        self.L = [0.5 * (math.log1p(-a) - math.log(a)) for a in finite]
        self.last = len(alphas_cumprod) - 1

    def point(self, t: Any) -> tuple[Any, Any]:
        return self._point_of_float(t) if isinstance(t, (int, float)) else self._point_of_tensor(t)

    def _point_of_float(self, t: float) -> tuple[float, float]:
        if not 0 <= t <= self.last:
            raise ValueError(f"t must lie in [0, {self.last}], got {t}")
        i = min(int(t), len(self.L) - 1)
        if t == i:
            snr = math.exp(-self.L[i])  # α/σ
        elif i + 1 < len(self.L):
            snr = math.exp(-(self.L[i] + (t - i) * (self.L[i + 1] - self.L[i])))
        else:
            snr = math.exp(-self.L[i]) * (i + 1 - t)  # into pure noise: α/σ is linear and ends at 0
        norm = math.hypot(1.0, snr)
        return snr / norm, 1 / norm

    def _point_of_tensor(self, t: Any) -> tuple[Any, Any]:
        torch = sys.modules["torch"]
        t = t.double() if not t.is_floating_point() else t.to(torch.promote_types(t.dtype, torch.float64))
        L = torch.tensor(self.L, dtype=torch.float64, device=t.device)
        i = t.detach().floor().clamp(0, len(self.L) - 1).long()
        j = (i + 1).clamp(max=len(self.L) - 1)
        snr = torch.exp(-(L[i] + (t - i) * (L[j] - L[i])))
        if self.ends_in_noise:
            snr = torch.where(i == len(self.L) - 1, torch.exp(-L[i]) * (i + 1 - t), snr)
        norm = torch.sqrt(1 + snr * snr)
        return snr / norm, 1 / norm

    def time(self, lam: Any) -> Any:
        """The t in [0, last] at which ln(α/σ) is λ; beyond the table's ends, the end."""
        level, value = -lam, -float(lam)
        i = bisect_right(self.L, value) - 1
        if i < 0:
            return 0.0
        if i + 1 < len(self.L):
            return i + (level - self.L[i]) / (self.L[i + 1] - self.L[i])
        if self.ends_in_noise:
            return i + 1 - ops(lam).exp(self.L[i] - level)
        return float(i)


def _ends(T: int, start: float | None, end: float | None, start_at_1000: float, end_at_1000: float) -> tuple[float, float]:
    scale = 1000 / T if T >= 1 else math.nan
    start = start_at_1000 * scale if start is None else start
    end = end_at_1000 * scale if end is None else end
    if not 0 < start <= end < 1:
        raise ValueError(f"β must stay inside (0, 1); T = {T} gives {start:.4g} … {end:.4g}: choose T or beta_end")
    return start, end


def _linspace(a: float, b: float, n: int) -> list[float]:
    return [a + (b - a) * i / (n - 1) if n > 1 else a for i in range(n)]


def _brief(values: Sequence[float]) -> str:
    return f"{len(values)} values, {[round(v, 6) for v in values[:2]]} … {[round(v, 6) for v in values[-2:]]}"


def from_diffusers_config(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """(noise schedule, prediction) that a diffusers `scheduler_config.json` describes.

    Only those two are read; the flags of the solver that the file was written for are not ours (set_alpha_to_one of one
    class ruins another). Raises ValueError for a noise schedule or a prediction that is not known.
    """
    prediction = config.get("prediction_type", "epsilon")
    if "FlowMatch" in str(config.get("_class_name", "")):
        return NoiseSchedule.flow(shift=float(config.get("shift", 1.0))), "flow_prediction"
    T = int(config.get("num_train_timesteps", 1000))
    trained = config.get("trained_betas")
    kind = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if trained is not None:
        noise = NoiseSchedule.from_betas(trained, "trained_betas")
    elif kind == "linear":
        noise = NoiseSchedule.linear(T, start, end)
    elif kind == "scaled_linear":
        noise = NoiseSchedule.scaled_linear(T, start, end)
    elif kind == "squaredcos_cap_v2":
        noise = NoiseSchedule.cosine(T)
    elif kind == "sigmoid":
        noise = NoiseSchedule.sigmoid(T, start, end)
    else:
        raise ValueError(f"beta_schedule {kind!r} is not known here")
    return noise, str(prediction)
