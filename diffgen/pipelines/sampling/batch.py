"""Make the pictures of plans batch by batch, from the noise or the picture that each task starts with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffgen.devices import out_of_memory
from diffgen.errors import InvalidOutput, OutOfMemory, UsageError
from diffgen.generation.batching import AHEAD, Progress
from diffgen.generation.plan import Picture
from diffgen.images import fit
from diffgen.images.pixels import from_pil, pixels_sha256, to_pil
from diffgen.images.strip import Step
from diffgen.models.families import FAMILIES
from schedulers.draws import normal

from ..families import Control
from ..loaded import LoadedModel
from ..plan import Plan, Shot
from ..weights import adapters
from ..weights.load import load_controlnet
from . import memory, native
from .attention import Maps
from .embed import Embedded, embed, places, stacked
from .latents import Start, latent_mask, slerp
from .pipeline import Settings, call, pipeline_for, watched
from .record import record_of

REFINED = 0.8  # the share of the noise's way after which a refiner takes over: its makers' value

Watch = Callable[[list[Shot], int, Tensor], None]


def nfe_of(loaded: LoadedModel, plan: Plan) -> int:
    """The network's evaluations for one batch of a plan. Raises UsageError for an impossible number of steps."""
    try:
        return loaded.scheduler(plan).nfe(plan.steps)
    except ValueError as error:
        raise UsageError(f"--steps {plan.steps}: {error}") from error


class Batches:
    """Makes the pictures of the plans that share the batch key of `plan`.

    `size` pictures at once, fewer where memory runs out. With `fill`, copies of the last picture fill a batch of fewer,
    if the plan names its size.
    """

    def __init__(
        self, loaded: LoadedModel, plan: Plan, progress: Progress, on_denoised: Watch | None, fill: bool = False
    ) -> None:
        self.loaded, self.plan, self.progress, self.on_denoised = loaded, plan, progress, on_denoised
        self.device, self.dtype, self.fill = loaded.device, loaded.dtype, fill and plan.batch_size is not None
        self.scheduler = loaded.scheduler(plan)
        self.count = 0  # evaluations for the current batch
        self.short_of_memory = False
        self.guided = plan.guidance != 1 and not loaded.checked.guidance_is_input
        self.pixels = "vae" not in loaded.pipeline.components
        self.trail: list[tuple[float, Any]] = []  # (t, predicted latents or pictures [B]) of each evaluation
        self.maps: Maps | None = None
        self.size = plan.batch_size or memory.fitting(loaded.pipeline, plan, self.device, self.dtype, self.guided)
        self._embedded = functools.lru_cache(maxsize=2 * AHEAD * self.size)(self._embed)
        if plan.attention:
            self.maps = Maps(loaded.pipeline.unet, self.guided)
        self.safety = loaded.safety_checker() if plan.options["safety"] and not self.pixels else None
        if self.pixels:
            return
        self.coder = loaded.autoencoder(plan)
        self.native = loaded.checked.row.samples_natively(plan.task)
        # Of the latents between two steps: our own loop keeps them in float32.
        self.state_dtype = torch.float32 if self.native else self.dtype
        row = loaded.checked.row
        denoiser = loaded.pipeline.components[row.denoiser]
        self.controlnets = [
            load_controlnet(control.model, denoiser, self.device, self.dtype)
            for control in plan.controls
            if row.reads != "control"
        ]
        for network in self.controlnets:
            adapters.seamless_network(network, plan.options["tile"])
        self.parts: dict[str, Any] = {}
        if self.controlnets:
            self.parts["controlnet"] = self.controlnets[0] if len(self.controlnets) == 1 else self.controlnets
        self.references = [self._reference(picture.image) for picture in plan.references]
        self.pipeline = self._pipeline(plan.task)
        memory.offload(self.pipeline, loaded.offload, self.device)
        self.second = self._pipeline("control+image" if plan.controls else "image") if plan.upscale else None

    def _pipeline(self, task: str) -> Any:
        return pipeline_for(self.loaded.pipeline, self.loaded.checked.family, task, **self.parts)

    def kind(self, shot: Shot) -> Hashable:
        """The shapes of the embeddings of the shot's prompts: those of a batch are stacked."""
        if self.pixels:
            return None
        return tuple((name, x.shape) for name, x in self._embedded(shot.prompt, shot.negative).tensors.items())

    def make(self, shots: list[Shot]) -> Iterator[Picture]:
        """Make the pictures of some shots of one kind at once, or of fewer at once if memory runs out."""
        if len(shots) > self.size:
            for first in range(0, len(shots), self.size):
                yield from self.make(shots[first : first + self.size])
            return
        padded = shots + [shots[-1]] * (self.size - len(shots)) * self.fill
        done, latents = self.progress.done, None
        try:
            self.count = 0
            with self.maps or contextlib.nullcontext():
                latents = self._sample(padded)
        except OutOfMemory as error:
            if len(padded) == 1:
                raise OutOfMemory(f"{error.message}, with one picture at a time", memory.HINT) from error
        if latents is None:  # not inside `except`: the error refers to every tensor of the attempt
            memory.release()
            self.size, self.short_of_memory = (len(padded) + 1) // 2, True
            self.progress.done = done
            self.progress.begin(self.plan.batch_key, self.size)
            yield from self.make(shots)
            return
        for row, shot in enumerate(shots):
            yield self._finish(latents[row], shot, row, len(padded))

    def _embed(self, prompt: str, negative: str) -> Embedded:
        plan = self.plan
        with out_of_memory():
            return embed(
                self.pipeline,
                plan.checked.row,
                prompt,
                negative,
                syntax=plan.prompt_syntax,
                clip_skip=plan.options["clip_skip"],
                guided=self.guided,
                tokens=plan.checked.tokens,
            )

    def _sample(self, shots: list[Shot]) -> Tensor:
        """Clean latents [B, C, h, w] of the shots, each from its own noise."""
        plan = self.plan
        self.trail = []
        if self.maps is not None:
            self.maps.clear()
        generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots]
        with out_of_memory():
            if self.pixels:
                return self._sample_pixels(shots, generators)
            embeddings: dict[str, Any] = stacked([self._embedded(shot.prompt, shot.negative) for shot in shots])
            if plan.references:
                embeddings["references"] = self.references
            size = (plan.width, plan.height)
            if plan.controls and self.native:
                embeddings["controls"] = self._controls(size, generators)
            start = self._start(size, generators)
            ends = {"denoising_end": REFINED} if plan.refiner else {}
            latents = self._call(self.pipeline, embeddings, shots, generators, start, plan.strength, **ends)
            if plan.refiner:
                latents = self._refined(latents, shots, generators)
            if plan.upscale:
                latents = self._upscaled(latents, embeddings, shots, generators)
        return latents

    def _start(self, size: tuple[int, int], generators: list[torch.Generator]) -> Start:
        """Where sampling starts. Numbers are drawn in the order in which diffusers' pipelines draw them."""
        plan = self.plan
        reads_mask = plan.task == "mask"  # the network itself does
        pure = plan.mask is not None and plan.strength == 1
        clean = None
        if plan.image and not (reads_mask and pure and not self.native):
            clean = self._encoded([plan.image.image] * len(generators), generators)
        noise = self._noise(size, generators)
        if plan.image is None:
            return Start(noise)
        if clean is None:
            clean = torch.zeros_like(noise)
        if plan.mask is None:
            return Start(noise, clean)
        pixels = torch.from_numpy(from_pil(plan.mask.image.convert("RGB")))[None, :1].add(1).div(2)
        mask = latent_mask(pixels, *noise.shape[-2:]).to(noise)
        if not reads_mask:
            return Start(noise, clean, mask, pure)
        hidden = torch.from_numpy(from_pil(plan.image.image))[None] * (pixels < 0.5)
        latents = torch.cat([self.coder.encode(hidden, generator) for generator in generators])
        return Start(noise, clean, mask, pure, (latents.to(noise), pixels))

    def _noise(self, size: tuple[int, int], generators: list[torch.Generator]) -> Tensor:
        """Standard normal latents, each from its generator, mixed with those of the variation's seed."""
        shape = (len(generators), *self.coder.shape(size))
        noise = normal(shape, generators)
        if variation := self.plan.variation:
            other = normal((1, *shape[1:]), torch.Generator("cpu").manual_seed(variation.seed))
            noise = torch.cat([slerp(own, other, variation.strength) for own in noise.split(1)])
        return noise.to(device=self.device, dtype=self.state_dtype)

    def _encoded(self, pictures: list[Image.Image], generators: list[torch.Generator]) -> Tensor:
        """Clean latents of pictures, each sampled with its generator."""
        latents = [
            self.coder.encode(torch.from_numpy(from_pil(picture))[None], generator)
            for picture, generator in zip(pictures, generators, strict=True)
        ]
        return torch.cat(latents).to(device=self.device, dtype=self.state_dtype)

    def _reference(self, picture: Image.Image) -> Tensor:
        """Clean latents [1, C, h, w] of a picture that the network reads: the mean of the encoder's posterior."""
        return self.coder.encode(torch.from_numpy(from_pil(picture))[None], None).to(self.device, self.dtype)

    def _controls(self, size: tuple[int, int], generators: list[torch.Generator]) -> list[Control]:
        """What our loop needs of each control at a size: its network, and its map as that network reads it."""
        controls = []
        for i, control in enumerate(self.plan.controls):
            network = self.controlnets[i] if self.controlnets else None
            picture = fit.cover(control.map, size)
            if getattr(network, "input_hint_block", None) is None:
                condition = self._encoded([picture] * len(generators), generators)
            else:
                pixels = torch.from_numpy(from_pil(picture))[None].expand(len(generators), -1, -1, -1)
                condition = pixels.to(self.device, self.dtype)
            controls.append(Control(network, control.kind, condition, control.scale))
        return controls

    def _call(
        self,
        pipeline: Any,
        embeddings: Mapping[str, Any],
        shots: list[Shot],
        generators: list[torch.Generator],
        start: Start,
        strength: float,
        **more: Any,
    ) -> Tensor:
        plan, (height, width) = self.plan, start.noise.shape[-2:]
        by_us, watch = self.native and pipeline.family == self.loaded.checked.row, None
        if plan.keep_steps or self.on_denoised is not None:

            def watch(i: int, t: float, x0: Tensor) -> None:
                self._observe(shots, i, t, pipeline.codec.unpack(x0, height, width))

        size = (width * self.coder.factor, height * self.coder.factor)
        pipeline.scheduler = watched(self.loaded.scheduler(plan, size if by_us else None), watch)
        pipeline.scheduler.generators = generators  # SD3's pipelines hand none on
        settings = Settings(
            size=size,
            steps=plan.steps,
            guidance=plan.guidance,
            options=plan.options,
            controls=[fit.cover(control.map, size) for control in plan.controls],
            scales=[control.scale for control in plan.controls],
        )
        sample = native.sample if by_us else call
        return sample(
            pipeline,
            embeddings,
            start,
            settings,
            strength=strength,
            generators=generators,
            on_evaluation=self._tick,
            **more,
        )

    def _refined(self, latents: Tensor, shots: list[Shot], generators: list[torch.Generator]) -> Tensor:
        """The last steps by the refiner, which continues where the model stopped."""
        plan, family = self.plan, self.loaded.checked.row.refiner
        assert plan.refiner is not None
        assert family is not None
        pipeline = pipeline_for(self.loaded.refiner(plan.refiner), family, "image")
        syntax, guided = plan.prompt_syntax, plan.guidance != 1
        distinct = {
            texts: embed(pipeline, FAMILIES[family], *texts, syntax=syntax, guided=guided)
            for texts in dict.fromkeys((shot.prompt, shot.negative) for shot in shots)
        }
        start = Start(torch.zeros_like(latents), latents)
        embeddings = stacked([distinct[shot.prompt, shot.negative] for shot in shots])
        return self._call(pipeline, embeddings, shots, generators, start, 1.0, denoising_start=REFINED)

    def _upscaled(
        self,
        latents: Tensor,
        embeddings: Mapping[str, Any],
        shots: list[Shot],
        generators: list[torch.Generator],
    ) -> Tensor:
        """The second pass: image to image from the first one's latents or pixels, scaled up."""
        upscale, size = self.plan.upscale, self.plan.final_size
        assert upscale is not None
        if "controls" in embeddings:
            embeddings = {**embeddings, "controls": self._controls(size, generators)}
        if upscale.mode == "lanczos":
            pictures = [to_pil(self.coder.decode(latent[None]).cpu().numpy())[0] for latent in latents]
            clean = self._encoded([picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures], generators)
            noise = self._noise(size, generators)
        else:
            noise = self._noise(size, generators)
            scaled = torch.nn.functional.interpolate(latents.float(), noise.shape[-2:], mode="bilinear")
            clean = scaled.to(latents.dtype)
        return self._call(self.second, embeddings, shots, generators, Start(noise, clean), upscale.strength)

    def _sample_pixels(self, shots: list[Shot], generators: list[torch.Generator]) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] of a model without prompts and latents, by the native loop."""
        unet = self.loaded.pipeline.unet
        scheduler = self.scheduler
        shape = (len(generators), unet.config.in_channels, self.plan.height, self.plan.width)
        x = scheduler.start(normal(shape, generators), self.plan.steps).to(device=self.device, dtype=self.dtype)

        def watch(i: int, point: Any, denoised: Any) -> None:
            self._tick()
            self._observe(shots, i, float(torch.as_tensor(point.t, dtype=torch.float32).mean()), denoised.x0)

        return scheduler.sample(lambda x, t: unet(x, t, return_dict=False)[0], x, self.plan.steps, generators, watch)

    def _observe(self, shots: list[Shot], i: int, t: float, x0: Tensor) -> None:
        """Keep and report the clean latents or pixels x0 [B, C, h, w] that evaluation i predicted at time t."""
        if self.plan.keep_steps:
            kept = [self.loaded.sketch(x) for x in x0] if self.pixels else x0.float().cpu().clone()
            self.trail.append((t, kept))
        if self.on_denoised is not None:
            self.on_denoised(shots, i, x0)

    def _tick(self) -> None:
        self.count += 1
        self.progress.tick()

    def _finish(self, latent: Tensor, shot: Shot, row: int, together: int) -> Picture:
        """The picture of one latent [C, h, w], decoded alone, so that it does not depend on its batch."""
        record = record_of(self.loaded, shot, self.scheduler, self.count, together)
        if not self.pixels:
            record["warnings"] += self._embedded(shot.prompt, shot.negative).warnings
        try:
            with out_of_memory():
                image = self._decoded(latent)
                steps = self._steps(row)
        except InvalidOutput as error:
            seed = f"the picture of {shot.prompt!r} with seed {shot.seed}"
            named = InvalidOutput(f"{seed} {error.message}: nothing saved for it", error.hint)
            return Picture(shot, None, record, named)
        record["memory"] = self._memory(together)
        record["pixels_sha256"] = pixels_sha256(image)
        return Picture(shot, image, record, steps=steps, attention=self._attention(shot, row))

    def _steps(self, row: int) -> tuple[Step, ...]:
        """Each evaluation's prediction of a picture of the batch."""
        steps = []
        for evaluation, (t, predicted) in enumerate(self.trail, 1):
            if self.pixels:
                image = predicted[row]
            else:
                pixels = self.coder.decode(predicted[row : row + 1]).nan_to_num(0)
                image = self._composed(to_pil(pixels.cpu().numpy())[0])
            steps.append(Step(image, evaluation, t))
        return tuple(steps)

    def _attention(self, shot: Shot, row: int) -> dict[str, Any]:
        """The map of each word of the plan that is in this picture's prompt."""
        maps = {}
        if self.maps is not None:
            for word in self.plan.attention:
                if where := places(self.pipeline, shot.prompt, word, self.plan.prompt_syntax):
                    maps[word] = self.maps.word(row, where).cpu().numpy()
        return maps

    def _composed(self, image: Image.Image) -> Image.Image:
        """The picture with the input picture outside the mask, if there is one."""
        if self.plan.mask is not None and self.plan.image is not None:
            return fit.compose(image, self.plan.image.image, self.plan.mask.image)
        return image

    def _decoded(self, latent: Tensor) -> Image.Image:
        """Decode the picture. Raises InvalidOutput: not finite, or flagged by the model's safety checker."""
        hint = "try --dtype float32, less --guidance or another --scheduler"
        if not latent.isfinite().all():
            raise InvalidOutput("is not finite", hint)
        pixels = latent[None] if self.pixels else self.coder.decode(latent[None])
        if not pixels.isfinite().all():
            raise InvalidOutput("is not finite", hint)
        image = to_pil(pixels.float().cpu().numpy())[0]
        if self.safety is not None and memory.is_flagged(self.safety, image, self.device, self.dtype):
            raise InvalidOutput("was flagged by the model's safety checker", "another --seed, or --safety off")
        return self._composed(image)

    def _memory(self, together: int) -> dict[str, Any]:
        """What was changed to fit into memory and half precision, for the record."""
        changes: dict[str, Any] = {}
        if self.short_of_memory:
            changes["batch_size"] = together
        if not self.pixels and self.coder.tiling:
            changes["vae_tiling"] = True
        if not self.pixels and self.coder.float32:
            changes["vae_dtype"] = "float32"
        if self.loaded.offload != "none":
            changes["offload"] = self.loaded.offload
        return changes
