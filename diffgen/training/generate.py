"""Pictures from a run: noise from the picture's own generator → solver ⇄ network, guided by a class → picture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

import schedulers
from diffgen.devices import choose_device, choose_dtype, out_of_memory
from diffgen.diffusion import guided
from diffgen.errors import InputError, InvalidOutput, UsageError
from diffgen.generation.batching import Progress, in_batches
from diffgen.generation.grid_files import check_grid_model
from diffgen.generation.options import Options
from diffgen.generation.plan import Picture, finished
from diffgen.generation.record import record_of
from diffgen.images.pixels import pixels_sha256, to_pil
from diffgen.images.strip import Step
from diffgen.models import gate
from diffgen.models.find import Model
from schedulers.draws import normal
from schedulers.scheduler import NonFinite, Scheduler

from .plan import RunPlan, Shot, make_plan
from .run import diffusion_of, load_network, read_run

Watch = Callable[[list[Shot], int, Tensor], None]


class RunGenerator:
    """A loaded run: the average of its weights in its newest sound checkpoint. `diffgen.load` makes one.

    dtype  "auto" is float32; float16 and bfloat16 are what the network computes in, its weights stay float32
    checkpoint  another than the newest
    Raises InputError for a broken run, UsageError for a missing device, OutOfMemory.
    """

    fits: tuple[str, ...] = ()  # a run has no adapters
    sketched = "the pixels themselves"  # what `sketch` shows

    def __init__(self, model: Model, device: str = "auto", dtype: str = "auto", checkpoint: Path | None = None) -> None:
        self.model = model
        self.run = read_run(model.folder)
        self.device = choose_device(device)
        self.dtype = choose_dtype("float32" if dtype == "auto" else dtype, self.device, 0)
        damaged: list[str] = []  # newer checkpoints that were left out
        checkpoint = checkpoint or self.run.latest(damaged.append)
        with out_of_memory():
            self.network, self.step = load_network(self.run, device=self.device, checkpoint=checkpoint)
        assert checkpoint is not None
        self.notes = [f"newer checkpoints are damaged: that of step {self.step} was taken"] if damaged else []
        self.model_hash = gate.read_json(checkpoint / "state.json")["files"]["ema.safetensors"]["sha256"]
        process = diffusion_of(self.run)
        self.noise, self.prediction = process.noise, process.prediction

    def __repr__(self) -> str:
        (height, width), dtype = self.run.data["size"], str(self.dtype).removeprefix("torch.")
        return f"<{self.run.name}: a run at step {self.step}, {width}x{height}, {dtype} on {self.device}>"

    def generate(
        self,
        prompt: str | Sequence[str] = (),
        *,
        metadata: str = "full",
        on_step: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Pictures of classes by their names, or of nothing: of a class drawn from the seed, if there are any.

        They are L, RGB or RGBA as the data, with their metadata in `.info`. Picture i of a class has the seed
        `seed + i` and does not depend on the others; `seed` is random by default. `options` are those of
        `plan.make_plan`. `on_step(done, total)` is called after each evaluation of the network. `metadata` is full,
        params or none.
        Raises UsageError (a number or name), OutOfMemory, InvalidOutput (not finite).
        """
        return finished(self.pictures(make_plan(self.model, prompt, **options), on_step, fill=True), metadata)

    def scheduler(self, plan: RunPlan) -> Scheduler:
        """The plan's scheduler for this run's noise and prediction, x̂0 kept in the range of pixels.

        `ddpm` uses the variance that the run has learned, if it has. Raises InputError if they do not go together.
        """
        check_grid_model(plan.grid, self.model.name, self.model_hash)
        label = schedulers.parse(plan.label)
        learned = label.name == "ddpm" and "variance" not in label.options and self.run.variance == "learned_range"
        options: dict[str, Any] = {"variance": "learned"} if learned else {}
        try:
            return schedulers.get(
                plan.label, noise=self.noise, prediction=self.prediction, grid=plan.grid, clip_sample=True, **options
            )
        except ValueError as error:
            raise InputError(f"{self.model.name} does not go with {plan.scheduler} on {plan.grid}: {error}") from error

    def sketch(self, x: Tensor) -> Image.Image:
        """A preview of a picture [C, H, W]; values that are not finite become grey."""
        return to_pil(x.float().nan_to_num(0).cpu().numpy()[None], self.run.data["levels"])[0]

    @torch.inference_mode()
    def pictures(
        self,
        plans: RunPlan | Sequence[RunPlan],
        on_step: Callable[[int, int], None] | None = None,
        on_denoised: Watch | None = None,
        *,
        fill: bool = False,
    ) -> Iterator[Picture]:
        """The pictures of plans, as each is done. One that is not finite comes with its error; the others go on.

        All is as in `Generator.pictures`. `on_denoised(shots, i, x0)` gets the pictures [B, C, H, W] that evaluation i
        predicts for those made at once.
        """
        plans = [plans] if isinstance(plans, RunPlan) else plans
        progress = Progress(plans, self._nfe, on_step)
        yield from in_batches(plans, lambda plan: _Batches(self, plan, progress, on_denoised, fill), progress)

    def _nfe(self, plan: RunPlan) -> int:
        """The network's evaluations for one batch. Raises UsageError for an impossible number of steps."""
        scheduler = self.scheduler(plan)
        try:
            return 1 if scheduler.solver.native_only else scheduler.nfe(plan.steps)
        except ValueError as error:
            raise UsageError(f"--steps {plan.steps}: {error}") from error

    def denoiser(
        self, labels: Sequence[int] | None, guidance: float, pair: bool = False
    ) -> Callable[[Tensor, Tensor], Any]:
        """The network as a function of (x, t), for a batch of these classes, guided; `pair` as `guided` takes it."""
        classes, network = self.run.data["classes"], self.network
        if classes is None or labels is None:
            conditional: Callable[[Tensor, Tensor], Tensor] = network
        else:
            label = torch.tensor(labels, device=self.device)
            conditional = guided(network, label, torch.full_like(label, len(classes)), guidance, pair=pair)
        half = self.dtype is not torch.float32

        def denoiser(x: Tensor, t: Tensor) -> Any:
            with torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext():
                outputs = conditional(x, t)
                return tuple(output.float() for output in outputs) if pair else outputs.float()

        return denoiser


class _Batches:
    """Makes the pictures of a run's plans that share a batch key."""

    def __init__(
        self, generator: RunGenerator, plan: RunPlan, progress: Progress, on_denoised: Watch | None, fill: bool
    ) -> None:
        self.generator, self.plan, self.progress, self.on_denoised = generator, plan, progress, on_denoised
        self.scheduler = generator.scheduler(plan)
        self.size = plan.batch_size or plan.fitting
        self.fill = fill and plan.batch_size is not None

    def kind(self, shot: Shot) -> None:
        """Classes of any kind fit into one batch."""

    def make(self, shots: list[Shot]) -> Iterator[Picture]:
        """The pictures of a batch; where one is not finite, made again one by one, so that the others come out."""
        generator, plan, progress = self.generator, self.plan, self.progress
        padded = shots + [shots[-1]] * (self.size - len(shots)) * self.fill
        trail: list[tuple[float, list[Image.Image]]] = []  # (t, predicted pictures) of each evaluation
        before = progress.done

        def watch(i: int, point: Any, denoised: Any) -> None:
            progress.tick()
            if plan.keep_steps:
                t = float(torch.as_tensor(point.t, dtype=torch.float32).mean())
                trail.append((t, [generator.sketch(x) for x in denoised.x0]))
            if self.on_denoised is not None:
                self.on_denoised(shots, i, denoised.x0[: len(shots)])

        try:
            pixels = self._sample(padded, watch)[: len(shots)]
        except NonFinite:
            if len(shots) > 1:
                progress.total += progress.nfe[plan.batch_key] * len(shots)
                for shot in shots:
                    yield from self.make([shot])
                return
            pixels = torch.full((1, 1, 1, 1), torch.nan)
        for row, (shot, x) in enumerate(zip(shots, pixels, strict=True)):
            steps = tuple(Step(images[row], i, t) for i, (t, images) in enumerate(trail, 1))
            record = record_of(
                generator,
                shot,
                self.scheduler,
                progress.done - before,
                len(padded),
                model_files={"ema.safetensors": generator.model_hash},
                family="run",
                threads=torch.get_num_threads(),
                training_step=generator.step,
                training_data=generator.run.data["name"],
                warnings=[*shot.plan.warnings(shot.prompt), *generator.notes],
            )
            yield self._finish(x, shot, record, steps)

    def _sample(self, shots: list[Shot], watch: Callable[[int, Any, Any], None]) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1], each from noise of its own."""
        generator, plan, scheduler = self.generator, self.plan, self.scheduler
        shape = (len(shots), generator.run.data["channels"], plan.height, plan.width)
        labels = [shot.label for shot in shots if shot.label is not None] or None
        generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots]
        with out_of_memory():
            x = scheduler.start(normal(shape, generators, generator.device), plan.steps)
            denoiser = generator.denoiser(labels, plan.guidance, scheduler.solver.cfg_pp)
            return scheduler.sample(denoiser, x, plan.steps, generators, callback=watch)

    def _finish(self, x: Tensor, shot: Shot, record: dict[str, Any], steps: tuple[Step, ...]) -> Picture:
        if not bool(x.isfinite().all()):
            of = f"of {shot.prompt!r} " if shot.prompt else ""
            error = InvalidOutput(
                f"the picture {of}with seed {shot.seed} is not finite: nothing saved for it",
                "try --dtype float32, less --guidance or another --scheduler",
            )
            return Picture(shot, None, record, error)
        image = to_pil(x[None].cpu().numpy(), self.generator.run.data["levels"])[0]
        record["pixels_sha256"] = pixels_sha256(image)
        return Picture(shot, image, record, steps=steps)
