"""The noise schedule: how much noise there is at time t. α(t), σ(t) and back; x_t = α·x0 + σ·ε.

Times are floats. A table of T levels (DDPM, Stable Diffusion) is defined on t ∈ [0, T−1]. Between two integers ln(σ/α)
is linear in t; if the last level is pure noise (α = 0), α/σ is linear in the last interval instead.

Every function of t or λ takes a Python float or a tensor of any shape. It keeps a tensor's gradient and never reads the
tensor back from its device. Floats need no torch.
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
    """One noise level: the network receives the time `t`; the state there is alpha·x0 + sigma·ε."""

    t: Any
    alpha: Any
    sigma: Any

    @cached_property
    def lam(self) -> Any:
        """λ = ln(α/σ), half the log signal-to-noise ratio: −inf from pure noise, +inf for the clean picture."""
        if _is_zero(self.alpha) or _is_zero(self.sigma):
            return -math.inf if _is_zero(self.alpha) else math.inf
        return ops(self.alpha).log(self.alpha) - ops(self.sigma).log(self.sigma)

    @cached_property
    def rho(self) -> Any:
        """σ/α: the noise level of Karras et al. (in the frame x/α); inf from pure noise."""
        return math.inf if _is_zero(self.alpha) else self.sigma / self.alpha

    @property
    def norm(self) -> float:
        """√(α² + σ²): the standard deviation of the state, for data of unit variance."""
        return math.hypot(self.alpha, self.sigma)


def _dtype(x: Any) -> Any:
    """float64, or float32 on devices without it."""
    torch = sys.modules["torch"]
    return torch.float32 if x.device.type == "mps" else torch.float64


def _precise(t: Any) -> Any:
    """A tensor as float64; another number, such as NumPy's, as a float."""
    if isinstance(t, (int, float)):
        return t
    return t.to(_dtype(t)) if hasattr(t, "requires_grad") else float(t)


def _is_zero(x: Any) -> bool:
    """Whether a float is 0; False for a tensor, which must not be read: its own arithmetic gives inf."""
    return isinstance(x, (int, float)) and x == 0


CLEAN = Point(0.0, 1.0, 0.0)


class NoiseSchedule:
    """α(t) and σ(t) of a diffusion process.

    Build one with a class method: `linear`, `scaled_linear`, `cosine`, `sigmoid`, `laplace` or `from_betas`,
    `from_alphas_cumprod` (variance preserving, α² + σ² = 1), `flow` (α = 1 − σ), `edm` (variance exploding, α = 1).

    Attributes: `name`; `T`, the number of training times; `t_max` and `t_min`, the times of the most and least noise;
    `recipe`, the JSON from which `from_recipe` rebuilds it; `alphas_cumprod`, ᾱ_t of a table in float64, else empty;
    `shift`, `dynamic`, `terminal` and `tokens` of a flow; `sigma_data` of EDM. `NAMES` are the named schedules,
    `TABLES` those with a table.
    """

    recipe: dict[str, Any]
    shift = 1.0
    dynamic: Mapping[str, Any] | None = None
    terminal: float | None = None
    tokens: int | None = None
    sigma_data = 1.0

    def __init__(
        self,
        name: str,
        T: int,
        t_max: float,
        t_min: float,
        *,
        point: Callable[[Any], tuple[Any, Any]],
        time: Callable[[Any], Any],
        alphas_cumprod: Sequence[float] = (),
    ) -> None:
        self.name, self.T, self.t_max, self.t_min = name, T, t_max, t_min
        self.alphas_cumprod = tuple(alphas_cumprod)
        self._point, self._time = point, time

    def _with_recipe(self, **arguments: Any) -> NoiseSchedule:
        self.recipe = {"name": self.name, **arguments}
        return self

    def __repr__(self) -> str:
        arguments = {k: v for k, v in self.recipe.items() if k not in ("name", "alphas_cumprod")} or {"T": self.T}
        return f"NoiseSchedule.{self.name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and self.recipe == other.recipe

    def __reduce__(self) -> Any:
        return NoiseSchedule.from_recipe, (self.recipe,)

    def __hash__(self) -> int:
        return hash((self.name, self.T, self.t_max, self.t_min))

    @property
    def is_flow(self) -> bool:
        """Whether x0 and ε are mixed linearly: α = 1 − σ (rectified flow)."""
        return self.name == "flow"

    def alpha(self, t: Any) -> Any:
        """The factor of the signal at time t (a float, or a tensor of any shape)."""
        return self.at(t=t).alpha

    def sigma(self, t: Any) -> Any:
        """The standard deviation of the noise at time t (a float, or a tensor of any shape)."""
        return self.at(t=t).sigma

    def at(self, *, t: Any = None, lam: Any = None, level: Any = None) -> Point:
        """The point at time t, at λ = ln(α/σ), or at a noise level; beyond an end of a table, that end."""
        if level is not None and self.is_flow:
            t = self.T * level
        elif level is not None:
            lam = -ops(level).log(level)
        if t is None:
            t = self._time(lam)
        return Point(t, *self._point(_precise(t)))

    def level(self, p: Point) -> Any:
        """The noise level by which points are placed, listed and drawn: σ on a flow, σ/α on every other schedule."""
        return p.sigma if self.is_flow else p.rho

    @cached_property
    def noisiest(self) -> Point:
        """The point of the most noise."""
        return self.at(t=self.t_max)

    @cached_property
    def betas(self) -> tuple[float, ...]:
        """β_t = 1 − ᾱ_t/ᾱ_{t−1} of the table (DDPM eq. 4), float64."""
        before = (1.0, *self.alphas_cumprod[:-1])
        return tuple(1 - a / b for a, b in zip(self.alphas_cumprod, before, strict=True))

    # Tables: variance preserving

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Iterable[Any], name: str = "from_alphas_cumprod") -> NoiseSchedule:
        """Build from ᾱ_t = α_t², t = 0 … T−1: strictly decreasing, inside (0, 1); only the last may be 0."""
        a = [float(x) for x in alphas_cumprod]
        if not a or a[0] == 0 or not all(p > q for p, q in zip([1.0, *a], [*a, -1e-300], strict=True)):
            raise ValueError(f"alphas_cumprod must fall strictly inside (0, 1) (the last may be 0); got {_brief(a)}")
        table = _Table(a)
        schedule = cls(name, len(a), len(a) - 1.0, 0.0, point=table.point, time=table.time, alphas_cumprod=a)
        schedule.recipe = {"name": "from_alphas_cumprod", "alphas_cumprod": a}
        return schedule

    @classmethod
    def from_betas(cls, betas: Iterable[Any], name: str = "from_alphas_cumprod") -> NoiseSchedule:
        """Build from β_t, the variance that step t adds (DDPM eq. 2): ᾱ_t = Π (1 − β_s), in float64."""
        b = [float(x) for x in betas]
        wrong = [(i, x) for i, x in enumerate(b) if not 0 < x <= 1 or (x == 1 and i < len(b) - 1)]
        if wrong or not b:
            raise ValueError(f"betas must lie in (0, 1) (the last may be 1); wrong (index, value): {wrong[:3]}")
        product, a = 1.0, []
        for x in b:
            product *= 1 - x
            a.append(product)
        return cls.from_alphas_cumprod(a, name)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
        """β linear in t: DDPM section 4, 1e-4 … 0.02 at T = 1000; for another T both scale by 1000/T."""
        start, end = _ends(T, beta_start, beta_end, 1e-4, 0.02)
        schedule = cls.from_betas(_linspace(start, end, T), "linear")
        return schedule._with_recipe(T=T, beta_start=start, beta_end=end)

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, beta_start: float | None = None, beta_end: float | None = None
    ) -> NoiseSchedule:
        """√β linear in t: Stable Diffusion, 0.00085 … 0.012 at T = 1000. Latent diffusion calls it "linear"."""
        start, end = _ends(T, beta_start, beta_end, 0.00085, 0.012)
        schedule = cls.from_betas([x * x for x in _linspace(math.sqrt(start), math.sqrt(end), T)], "scaled_linear")
        return schedule._with_recipe(T=T, beta_start=start, beta_end=end)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """ᾱ(u) = cos²((u + s)/(1 + s)·π/2), β capped (Improved DDPM eq. 17)."""
        schedule = cls._from_curve(lambda u: math.cos((u + s) / (1 + s) * math.pi / 2) ** 2, T, max_beta, "cosine")
        return schedule._with_recipe(T=T, s=s, max_beta=max_beta)

    @classmethod
    def laplace(cls, T: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """ᾱ(u) = √(snr/(1 + snr)), ln snr = ∓½·ln(1 − 2|½ − u|): Laplace quantiles (Hang et al. 2024)."""

        def bar(u: float) -> float:
            snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
            return math.sqrt(snr / (1 + snr))

        return cls._from_curve(bar, T, max_beta, "laplace")._with_recipe(T=T, max_beta=max_beta)

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
        """β a logistic curve over [−6, 6] (GeoDiff), 1e-4 … 0.02 at T = 1000."""
        start, end = _ends(T, beta_start, beta_end, 1e-4, 0.02)
        schedule = cls.from_betas([start + (end - start) / (1 + math.exp(-x)) for x in _linspace(-6, 6, T)], "sigmoid")
        return schedule._with_recipe(T=T, beta_start=start, beta_end=end)

    @classmethod
    def _from_curve(cls, bar: Callable[[float], float], T: int, max_beta: float, name: str) -> NoiseSchedule:
        """β_t = 1 − ᾱ((t + 1)/T)/ᾱ(t/T), capped."""
        return cls.from_betas([min(1 - bar((i + 1) / T) / bar(i / T), max_beta) for i in range(T)], name)

    def zero_terminal_snr(self) -> NoiseSchedule:
        """This table with √ᾱ shifted and scaled so that the last level is pure noise (Lin et al. 2023, algorithm 1)."""
        if not self.alphas_cumprod:
            raise ValueError(f"only a table can be rescaled to zero terminal SNR; this is {self!r}")
        first, last = math.sqrt(self.alphas_cumprod[0]), math.sqrt(self.alphas_cumprod[-1])
        if first == last:
            raise ValueError("a table of one level cannot end in pure noise")
        bars = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in self.alphas_cumprod]
        schedule = self.from_alphas_cumprod(bars, self.name)
        schedule.recipe = {**self.recipe, "zero_terminal_snr": True}
        return schedule

    def with_snr_divided(self, by: float) -> NoiseSchedule:
        """This table with every signal-to-noise ratio divided by a number: diffusers' snr_shift_scale (CogVideoX)."""
        if not self.alphas_cumprod or not by > 0:
            raise ValueError(f"only the ratios of a table are divided, by a number above 0; got {by} for {self!r}")
        schedule = self.from_alphas_cumprod((a / (by + (1 - by) * a) for a in self.alphas_cumprod), self.name)
        schedule.recipe = {**self.recipe, "snr_divided": by}
        return schedule

    # Continuous schedules

    @classmethod
    def flow(
        cls,
        shift: float = 1.0,
        T: int = 1000,
        dynamic: Mapping[str, Any] | None = None,
        terminal: float | None = None,
        tokens: int | None = None,
    ) -> NoiseSchedule:
        """Rectified flow: x = (1 − σ)·x0 + σ·ε, the network receives t = T·σ (SD3, Flux).

        `shift` changes the grids, not the path: a grid that is uniform in u has σ = shift·u/(1 + (shift − 1)·u).
        `dynamic` makes the shift depend on the resolution, see `at_resolution`; its keys are diffusers' base_shift,
        max_shift, base_image_seq_len, max_image_seq_len and time_shift_type, each with its default, and `mu`, "linear"
        or "flux2". `terminal` is the σ of the last evaluation of every grid (diffusers' shift_terminal). With `tokens`
        the shift depends on the number of steps, see `for_steps`.
        """
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be positive, got {shift}")
        if terminal is not None and not 0 < terminal < 1:
            raise ValueError(f"terminal must lie between 0 and 1, got {terminal}")
        if dynamic is not None and dynamic.get("mu", "linear") not in ("linear", "flux2"):
            raise ValueError(f"the mu of a dynamic shift is 'linear' or 'flux2', got {dynamic['mu']!r}")

        def point(t: Any) -> tuple[Any, Any]:
            return 1 - t / T, t / T

        def time(lam: Any) -> Any:
            return T / (1 + ops(lam).exp(lam))

        schedule = cls("flow", T, float(T), 0.0, point=point, time=time)
        schedule.shift, schedule.dynamic = shift, None if dynamic is None else {**RESOLUTION_SHIFT, **dynamic}
        schedule.terminal, schedule.tokens = terminal, tokens
        schedule.t_min = T * (terminal or schedule.shifted(1 / T))
        more = {"dynamic": schedule.dynamic, "terminal": terminal, "tokens": tokens}
        return schedule._with_recipe(shift=shift, T=T, **{key: v for key, v in more.items() if v is not None})

    def shifted(self, u: float) -> float:
        """σ of a flow at the fraction u of its time: shift·u/(1 + (shift − 1)·u), exactly 1 at u = 1."""
        return u / (u + (1 - u) / self.shift)

    def ended(self, sigmas: Sequence[float]) -> list[float]:
        """These levels of a flow with 1 − σ scaled so that the last σ is `terminal`; unchanged without one."""
        if self.terminal is None or sigmas[-1] >= 1:
            return [*sigmas]
        scale = (1 - self.terminal) / (1 - sigmas[-1])
        return [1 - (1 - sigma) * scale for sigma in sigmas]

    def with_mu(self, mu: float) -> NoiseSchedule:
        """This flow with the shift e^μ (μ itself where the time_shift_type of `dynamic` is "linear")."""
        if not self.is_flow:
            raise ValueError(f"mu shifts a flow schedule; this is {self!r}")
        linear = (self.dynamic or RESOLUTION_SHIFT)["time_shift_type"] == "linear"
        return NoiseSchedule.flow(mu if linear else math.exp(mu), self.T, terminal=self.terminal)

    def at_resolution(self, tokens: int) -> NoiseSchedule:
        """This flow for pictures of `tokens` tokens.

        μ is linear in their number (SD3 section 5.3.2, Flux), or depends on the number of steps too (Flux 2).
        """
        d = self.dynamic or RESOLUTION_SHIFT
        if d.get("mu") == "flux2":
            return NoiseSchedule.flow(T=self.T, terminal=self.terminal, tokens=tokens)
        slope = (d["max_shift"] - d["base_shift"]) / (d["max_image_seq_len"] - d["base_image_seq_len"])
        return self.with_mu(d["base_shift"] + slope * (tokens - d["base_image_seq_len"]))

    def for_steps(self, n: int) -> NoiseSchedule:
        """This schedule for n steps: with the shift of Flux 2 for `tokens`, else unchanged.

        μ is linear in the tokens at 10 and at 200 steps, and linear in the steps between (Flux 2's reference code).
        """
        if self.tokens is None:
            return self
        many = 0.45666666 + 0.00016927 * self.tokens
        few = many if self.tokens > 4300 else 1.89833333 + 8.73809524e-05 * self.tokens
        return self.with_mu(many + (few - many) * (200 - n) / 190)

    @classmethod
    def edm(
        cls, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5, T: int = 1000
    ) -> NoiseSchedule:
        """Variance exploding, α = 1; the network receives c_noise = ln(σ)/4 (EDM table 1)."""
        if not (0 < sigma_min < sigma_max < math.inf and 0 < sigma_data < math.inf):
            values = f"{sigma_min}, {sigma_max}, {sigma_data}"
            raise ValueError(f"edm needs 0 < sigma_min < sigma_max and sigma_data > 0, got {values}")

        def point(t: Any) -> tuple[Any, Any]:
            return t * 0 + 1.0, ops(t).exp(4 * t)

        def time(lam: Any) -> Any:
            return -lam / 4

        schedule = cls("edm", T, math.log(sigma_max) / 4, math.log(sigma_min) / 4, point=point, time=time)
        schedule.sigma_data = sigma_data
        return schedule._with_recipe(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, T=T)

    # Names

    TABLES = ("linear", "scaled_linear", "cosine", "sigmoid", "laplace")
    NAMES = (*TABLES, "flow", "edm")

    @classmethod
    def named(cls, name: str, **arguments: Any) -> NoiseSchedule:
        """The schedule of that name, one of `NAMES`. Raises ValueError."""
        if name not in cls.NAMES:
            raise ValueError(f"unknown noise schedule {name!r}; there are {', '.join(cls.NAMES)}")
        return getattr(cls, name)(**arguments)

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> NoiseSchedule:
        """Rebuild the schedule with this `recipe`."""
        arguments = dict(recipe)
        name, zero = arguments.pop("name"), arguments.pop("zero_terminal_snr", False)
        by = arguments.pop("snr_divided", 1)
        noise = cls.from_alphas_cumprod(**arguments) if name == "from_alphas_cumprod" else cls.named(name, **arguments)
        noise = noise if by == 1 else noise.with_snr_divided(by)
        return noise.zero_terminal_snr() if zero else noise


def level_symbol(name: str) -> str:
    """The symbol of the noise level (`NoiseSchedule.level`) on the schedule of that name."""
    return "σ" if name == "flow" else "σ/α"


RESOLUTION_SHIFT: dict[str, Any] = {  # diffusers' names and defaults
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}


class _Table:
    """L[t] = ln(σ/α) at integer t, linear in between; `ends_in_noise` if the last level, left out of L, has α = 0."""

    def __init__(self, alphas_cumprod: Sequence[float]) -> None:
        self.ends_in_noise = alphas_cumprod[-1] == 0
        finite = alphas_cumprod[:-1] if self.ends_in_noise else alphas_cumprod
        self.L = [0.5 * (math.log1p(-a) - math.log(a)) for a in finite]
        self.last = len(alphas_cumprod) - 1
        self._tensors: dict[Any, Any] = {}  # L by device

    def point(self, t: Any) -> tuple[Any, Any]:
        if not isinstance(t, (int, float)):
            return self._point_of_tensor(t)
        if not 0 <= t <= self.last:
            raise ValueError(f"t must lie in [0, {self.last}], got {t}")
        i = min(int(t), len(self.L) - 1)
        if t == i:
            snr = math.exp(-self.L[i])  # α/σ
        elif i + 1 < len(self.L):
            snr = math.exp(-(self.L[i] + (t - i) * (self.L[i + 1] - self.L[i])))
        else:
            snr = math.exp(-self.L[i]) * (i + 1 - t)  # to pure noise: α/σ is linear and ends at 0
        norm = math.hypot(1.0, snr)
        return snr / norm, 1 / norm

    def _point_of_tensor(self, t: Any) -> tuple[Any, Any]:
        torch, L = sys.modules["torch"], self._tensor(t)
        t = t.clamp(0, self.last)
        i = t.detach().floor().clamp(max=len(self.L) - 1).long()
        j = (i + 1).clamp(max=len(self.L) - 1)
        snr = torch.exp(-(L[i] + (t - i) * (L[j] - L[i])))
        if self.ends_in_noise:
            snr = torch.where(i == j, torch.exp(-L[i]) * (i + 1 - t), snr)
        norm = torch.sqrt(1 + snr * snr)
        return snr / norm, 1 / norm

    def time(self, lam: Any) -> Any:
        """The t in [0, last] at which ln(α/σ) is λ; beyond an end of the table, that end."""
        if not isinstance(lam, (int, float)):
            return self._time_of_tensor(lam)
        level, n = -lam, len(self.L)
        i = bisect_right(self.L, level) - 1
        if i < 0:
            return 0.0
        if i + 1 < n:
            return i + (level - self.L[i]) / (self.L[i + 1] - self.L[i])
        return n - math.exp(self.L[-1] - level) if self.ends_in_noise else n - 1.0

    def _time_of_tensor(self, lam: Any) -> Any:
        torch, L, n = sys.modules["torch"], self._tensor(lam), len(self.L)
        level = -lam.to(L.dtype)
        i = (torch.searchsorted(L, level.detach(), right=True) - 1).clamp(0, max(n - 2, 0))
        gap = L[(i + 1).clamp(max=n - 1)] - L[i]
        t = (i + (level - L[i]) / torch.where(gap > 0, gap, 1)).clamp(0, n - 1)
        if self.ends_in_noise:
            t = torch.where(level > self.L[-1], n - torch.exp(self.L[-1] - level), t)
        return t

    def _tensor(self, like: Any) -> Any:
        """L on the device of `like`."""
        if like.device not in self._tensors:
            L = sys.modules["torch"].tensor(self.L, dtype=_dtype(like), device=like.device)
            self._tensors[like.device] = L
        return self._tensors[like.device]


def _ends(T: int, start: float | None, end: float | None, start_1000: float, end_1000: float) -> tuple[float, float]:
    """β at both ends; the defaults are those of T = 1000, scaled to T."""
    scale = 1000 / T if T >= 1 else math.nan
    start = start_1000 * scale if start is None else start
    end = end_1000 * scale if end is None else end
    if not 0 < start <= end < 1:
        raise ValueError(f"β must stay inside (0, 1); T = {T} gives {start:.4g} … {end:.4g}: choose T or beta_end")
    return start, end


def _linspace(a: float, b: float, n: int) -> list[float]:
    return [a + (b - a) * i / (n - 1) if n > 1 else a for i in range(n)]


def _brief(values: Sequence[float]) -> str:
    return f"{len(values)} values, {[round(v, 6) for v in values[:2]]} … {[round(v, 6) for v in values[-2:]]}"
