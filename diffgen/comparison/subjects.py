"""The models that schedulers are compared on, behind one protocol: the exact mixture, a training run, a pipeline."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import schedulers
from diffgen.errors import UsageError
from diffgen.images.pixels import to_pil
from schedulers.draws import normal
from schedulers.exact import Mixture

if TYPE_CHECKING:
    from diffgen.pipelines.generate import ImageGenerator
    from diffgen.pipelines.sampling.latents import Codec
    from diffgen.training.generate import RunGenerator

Network = Callable[[Tensor, Tensor], Tensor]


class Subject(Protocol):
    """A model under comparison."""

    name: str
    family: str
    model_hash: str  # sha256: two subjects with one hash give the same answers
    noise: schedulers.NoiseSchedule
    prediction: str
    device: torch.device
    dtype: torch.dtype  # of the network
    takes_prompts: bool
    is_mixture: bool  # its exact solution is known, its network is cheap, and its pictures are plots of points
    options: dict[str, Any]  # further options of its schedulers
    module: torch.nn.Module | None  # the network itself, whose calls are counted
    remarks: Sequence[str]  # warnings about the prompts

    def start(self, seed: int) -> tuple[Tensor, torch.Generator]:
        """Standard normal noise [B, …] of that seed on the CPU, and the generator that drew it."""
        ...

    def network(self, prompts: Sequence[str], guidance: float) -> Network:
        """The model(x, t [B]) for `Scheduler.sample`, for a batch with these prompts; each prompt is encoded once."""
        ...

    def picture(self, x0: Tensor) -> Image.Image:
        """The picture of a result [B, …]."""
        ...

    def exact(self, noise: Tensor) -> Tensor | None:
        """The solution of the probability-flow ODE from this noise; None if it is not known."""
        ...


class Counter:
    """Count the evaluations of a network: NFE is counted, not computed.

    As a context manager it also counts the calls of the module for each example: a guided evaluation calls it twice,
    with the prompt and without.
    """

    def __init__(self, network: Network, module: torch.nn.Module | None) -> None:
        self.network, self.module, self.nfe, self._calls = network, module, 0, 0.0
        self._size = 1

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe, self._size = self.nfe + 1, len(x)
        return self.network(x, t)

    @property
    def network_calls(self) -> int:
        """Calls of the module for each example."""
        return self.nfe if self.module is None else round(self._calls)

    def __enter__(self) -> Counter:
        def count(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            first = next(value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor))
            self._calls += len(first) / self._size

        self._hook = None if self.module is None else self.module.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()


class MixtureSubject:
    """`mixture`: six Gaussians in the plane, Stable Diffusion's noise schedule, the exact E[ε|x] as network.

    One seed is a cloud of 256 starts, so that a single cell shows the distribution. The exact solution follows the
    probability-flow ODE (solved to about 1e-10) to the least noise of the schedule and takes the network's x0 there,
    since a model of this schedule knows nothing below.
    """

    STARTS, SIDE, REACH = 256, 192, 2.6  # points of a cloud; pixels of its picture; the picture shows [-2.6, 2.6]
    name, family, prediction = "mixture", "mixture", "epsilon"
    device, dtype = torch.device("cpu"), torch.float32
    takes_prompts, is_mixture = False, True
    module: torch.nn.Module | None = None
    remarks: Sequence[str] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)

    def __init__(self) -> None:
        self.noise = schedulers.NoiseSchedule.scaled_linear()
        angle = torch.arange(6, dtype=torch.float64) * math.tau / 6
        radius = torch.tensor([1.6, 0.7], dtype=torch.float64).repeat(3)
        self.mixture = Mixture(
            torch.stack([radius * angle.cos(), radius * angle.sin()], 1),
            torch.tensor([0.25, 0.15], dtype=torch.float64).repeat(3),
            [3.0, 1.0, 2.0, 2.0, 1.0, 3.0],
        )
        parts = (self.mixture.means, self.mixture.deviations, self.mixture.weights)
        self.model_hash = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    def start(self, seed: int) -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return normal((self.STARTS, 2), generator), generator

    def network(self, prompts: Sequence[str] = (), guidance: float = 1.0) -> Network:
        return self.mixture.denoiser(self.noise, self.prediction)

    def exact(self, noise: Tensor) -> Tensor:
        first, last = self.noise.noisiest, self.noise.at(t=self.noise.t_min)
        end = self.mixture.solve(noise.double() * first.norm, first, last)
        return self.mixture.denoise(end, last.alpha, last.sigma)[0].float()

    def draw(self, count: int, seed: int) -> Tensor:
        """Draw data [count, 2]."""
        return self.mixture.draw(count, torch.Generator().manual_seed(seed)).float()

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """The exact mean [2] and covariance [2, 2] of the data: E[μ] and E[s²]·1 + Cov[μ]."""
        w, means = self.mixture.weights[:, None], self.mixture.means
        mean = (w * means).sum(0)
        offset = means - mean
        return mean, (w * offset).T @ offset + torch.eye(2).double() * (w[:, 0] * self.mixture.deviations**2).sum()

    @cached_property
    def _density(self) -> np.ndarray:
        """The density of the data on the plane as a pale picture, floats [H, W, 3]."""
        axis = torch.linspace(-self.REACH, self.REACH, self.SIDE, dtype=torch.float64)
        place = torch.stack(torch.meshgrid(axis, -axis, indexing="xy"), -1).reshape(-1, 1, 2)
        s2 = self.mixture.deviations**2
        squares = (place - self.mixture.means).square().sum(-1)
        density = (self.mixture.weights / s2 * torch.exp(-squares / (2 * s2))).sum(1).reshape(self.SIDE, self.SIDE)
        shade = (density / density.max()).sqrt().numpy()[..., None]
        return (1 - shade) * np.array([250.0, 250, 252]) + shade * np.array([132.0, 176, 228])

    def picture(self, x0: Tensor) -> Image.Image:
        """The points over the density of the data."""
        rgb = self._density.copy()
        for x, y in x0.reshape(-1, 2).tolist():
            column, row = ((v / self.REACH + 1) / 2 * (self.SIDE - 1) for v in (x, -y))
            if 1 <= column < self.SIDE - 2 and 1 <= row < self.SIDE - 2:
                rgb[int(row) : int(row) + 2, int(column) : int(column) + 2] = (200, 60, 40)
        return Image.fromarray(rgb.round().astype(np.uint8))


class RunSubject:
    """A training run: the average of its weights, x0 clipped to the range of pixels, as in `generate`."""

    is_mixture = False

    def __init__(self, generator: RunGenerator) -> None:
        run = generator.run
        self.generator, self.data, self.name, self.family = generator, run.data, run.name, "run"
        self.model_hash, self.noise, self.prediction = generator.model_hash, generator.noise, generator.prediction
        self.device, self.dtype, self.options = generator.device, generator.dtype, {"clip_sample": True}
        self.takes_prompts = run.data["classes"] is not None
        self.module: torch.nn.Module | None = generator.network
        self.remarks: Sequence[str] = ()

    def start(self, seed: int) -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return normal((1, self.data["channels"], *self.data["size"]), generator), generator

    def network(self, prompts: Sequence[str], guidance: float) -> Network:
        classes = self.data["classes"]
        return self.generator.denoiser([classes.index(name) for name in prompts] if classes else None, guidance)

    def exact(self, noise: Tensor) -> None:
        return None

    def picture(self, x0: Tensor) -> Image.Image:
        return to_pil(x0[:1].clamp(-1, 1).cpu().numpy(), self.data["levels"])[0]


class PipelineSubject:
    """A pipeline of diffusers: results are latents, from which pictures are decoded.

    Flux's latents are packed, [1, h·w/4, 4C]. A flow whose shift depends on the resolution takes the model's own size.
    """

    is_mixture = False

    def __init__(self, generator: ImageGenerator) -> None:
        from diffgen.models.info import info
        from diffgen.pipelines.plan import make_plan
        from diffgen.pipelines.sizes import tokens

        self.generator, self.name, self.family = generator, generator.model.name, generator.checked.family
        self.model_hash, self.noise, self.prediction = generator.model_hash, generator.noise, generator.prediction
        self.device, self.dtype = generator.device, generator.dtype
        self.options: dict[str, Any] = {}
        self.takes_prompts = generator.checked.row.reads_prompts
        parts = generator.pipeline.components
        self.module: torch.nn.Module | None = parts.get("unet", parts.get("transformer"))
        self.remarks: Sequence[str] = ()
        self.pixels = "vae" not in parts
        self.card = info(generator.model)
        plan = make_plan(generator.model, "x" if self.takes_prompts else (), count=1, seed=0)
        self.guidance, self.size = plan.guidance, (plan.width, plan.height)
        if self.noise.dynamic is not None:
            self.noise = self.noise.at_resolution(tokens(generator.checked, self.size))

    @property
    def _shape(self) -> tuple[int, int, int]:
        """[C, h, w] of the latents, or of the pixels."""
        if self.pixels:
            return self.generator.pipeline.unet.config.in_channels, self.size[1], self.size[0]
        return self.generator.autoencoder().shape(self.size)

    @property
    def _codec(self) -> Codec:
        from diffgen.pipelines.sampling.latents import CODECS

        return CODECS[self.generator.checked.row.latents]

    def start(self, seed: int) -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return self._codec.pack(normal((1, *self._shape), generator)), generator

    def network(self, prompts: Sequence[str], guidance: float) -> Network:
        from diffgen.pipelines.sampling.denoiser import denoiser

        return denoiser(self.generator.pipeline, self.generator.checked, prompts, guidance, self.size)

    def check(self, prompts: Sequence[str]) -> None:
        """Check prompts as `generate` does, and keep its warnings. Raises UsageError."""
        from diffgen.pipelines.plan import make_plan

        plan = make_plan(self.generator.model, prompts, count=1, seed=0)
        for text in prompts:
            if plan.wildcards.choose(text, random.Random(0))[1]:
                raise UsageError(
                    f"{text!r} leaves a choice to the seed, but every cell must show the same",
                    "write the prompt out",
                )
        self.remarks = list(dict.fromkeys(note for text in prompts for note in plan.warnings(text)))

    def exact(self, noise: Tensor) -> None:
        return None

    @torch.no_grad()
    def picture(self, x0: Tensor) -> Image.Image:
        if self.pixels:
            return to_pil(x0[:1].float().cpu().numpy())[0]
        return self.generator.decode(self._codec.unpack(x0[:1].to(self.device), *self._shape[1:]))[0]


def subject_of(
    model: str | None,
    prompts: Sequence[str],
    guidance: Sequence[float],
    device: str,
    dtype: str,
    drawn: int | None = None,
) -> tuple[Subject, tuple[str, ...], tuple[float, ...]]:
    """(the subject, its prompts, its guidance scales), by default the model's own.

    With `drawn`, that many prompts are drawn from the concepts that the model lists, unless there are prompts.
    Raises UsageError for prompts or guidance that the model does not take, InputError for the model itself.
    """
    if model == "mixture":
        if prompts or guidance:
            raise UsageError("mixture takes neither prompts nor guidance")
        return MixtureSubject(), ("",), (1.0,)
    from diffgen.loading import load

    loaded = load(model, device, dtype)
    if loaded.model.is_run:
        return _of_run(cast("RunGenerator", loaded), tuple(prompts), tuple(guidance), drawn)
    subject = PipelineSubject(cast("ImageGenerator", loaded))
    if not subject.takes_prompts:
        if prompts or guidance:
            raise UsageError(f"{subject.name} takes neither prompts nor guidance")
        return subject, ("",), (1.0,)
    texts = tuple(dict.fromkeys(prompts))
    if texts:
        subject.check(texts)
    if not texts and drawn is not None:
        texts = _drawn_captions(subject.card, drawn)
    if not texts:
        raise UsageError(f"{subject.name} needs a prompt", 'say what to show: diffgen compare "a red apple" -o FOLDER')
    return subject, texts, tuple(guidance) or (subject.guidance,)


def _of_run(
    generator: RunGenerator, prompts: tuple[str, ...], guidance: tuple[float, ...], drawn: int | None
) -> tuple[Subject, tuple[str, ...], tuple[float, ...]]:
    from diffgen.training.plan import make_plan

    subject = RunSubject(generator)
    names = make_plan(generator.model, prompts, seed=0).prompts  # checked as in `generate`
    classes = subject.data["classes"]
    if classes and not prompts:
        names = tuple(classes) if drawn else (classes[0],)
    scales = guidance or (make_plan(generator.model, (), seed=0).guidance,)
    for scale in scales:
        make_plan(generator.model, (), seed=0, guidance=scale)  # raises if the run was trained without
    return subject, tuple(dict.fromkeys(names)), scales


def _drawn_captions(card: dict[str, Any], count: int) -> tuple[str, ...]:
    """Captions for a model whose card lists its concepts: a concept and a style each, the same ones every time."""
    if not card.get("concepts"):
        return ()
    draw = random.Random(0)
    styles = card.get("styles") or [None]
    pairs = [(draw.choice(card["concepts"]), draw.choice(styles)) for _ in range(count)]
    return tuple(f"{concept}, {style} style" if style else concept for concept, style in pairs)
