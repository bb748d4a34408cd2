"""Prompt → embedding → latents from the picture's own generator → solver ⇄ guided denoiser → decode → picture."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

import diffgen
import schedulers
from diffgen.devices import choose_device, choose_dtype, out_of_memory
from diffgen.errors import InputError, InvalidOutput, UsageError
from diffgen.images.metadata import LEVELS, SCHEMA, info_of
from diffgen.images.pixels import pixels_sha256, to_pil
from diffgen.models import gate
from diffgen.models.find import Model
from diffgen.sampling import Picture
from schedulers.scheduler import Scheduler

from .load import load_pipeline
from .plan import Plan, make_plan, noise_and_prediction


class ImageGenerator:
    """A loaded model. `diffgen.load` makes one."""

    def __init__(self, model: Model, device: str = "auto", dtype: str = "auto") -> None:
        self.model = model
        self.checked = gate.check_folder(model.folder)
        self.noise, self.prediction = noise_and_prediction(self.checked)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        with ThreadPoolExecutor(1) as hashing, out_of_memory():
            hashes = hashing.submit(gate.file_hashes, self.checked)
            self.pipeline = load_pipeline(self.checked, self.device, self.dtype)
        self.hashes = hashes.result()
        self.model_hash = gate.model_hash(self.checked, self.hashes)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        count: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        grid: str | None = None,
        size: str | int | tuple[int, int] | None = None,
        negative: str = "",
        batch_size: int = 1,
        metadata: str = "full",
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures of a prompt (of several: in their order, then in that of the seeds), RGB, their metadata in `.info`.

        Picture i of a prompt has the seed `seed + i` and does not depend on the others; `seed` is random unless given.
        None stands for the model's own default. `on_step(done, total)` hears of each evaluation of the network.
        `metadata` is full, params (without our own record) or none.
        Raises UsageError (a number or name), OutOfMemory, InvalidOutput (not finite).
        """
        if metadata not in LEVELS:
            raise UsageError(f"metadata must be one of {', '.join(LEVELS)} (got {metadata!r})")
        plan = make_plan(
            self.model,
            prompt,
            count=count,
            seed=seed,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            grid=grid,
            size=size,
            negative=negative,
            batch_size=batch_size,
        )
        images = []
        for picture in self.pictures(plan, on_step):
            if picture.image is None:
                raise picture.error or InvalidOutput(f"no picture of {picture.prompt!r}")
            picture.image.info.update(info_of(picture.record, metadata))
            images.append(picture.image)
        return images

    def scheduler(self, plan: Plan) -> Scheduler:
        """The plan's scheduler for this model's noise and prediction. Raises InputError if they do not go together."""
        try:
            return schedulers.get(plan.label, noise=self.noise, prediction=self.prediction, grid=plan.grid)
        except ValueError as error:
            raise InputError(f"{self.model.name} does not go with {plan.scheduler} on {plan.grid}: {error}") from error

    @torch.inference_mode()
    def pictures(self, plan: Plan, on_step: Callable[[int, int], None] | None = None) -> Iterator[Picture]:
        """The pictures of a plan, as each is done. One that is not finite comes with its error; the others go on."""
        self.pipeline.scheduler = scheduler = self.scheduler(plan)
        try:
            nfe = scheduler.nfe(plan.steps)
        except ValueError as error:
            raise UsageError(f"--steps {plan.steps}: {error}") from error
        batches = list(plan.batches())
        done = 0

        def tick(*_: Any) -> dict[str, Any]:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, nfe * len(batches))
            return {}

        for prompt, numbers in batches:
            with out_of_memory():
                embedded = self._embed(prompt, plan.negative)
                latents = self._sample(embedded, [plan.seed + i for i in numbers], plan, tick)
            warnings = [*plan.warnings(prompt), *self._cut(prompt)]
            for i, latent in zip(numbers, latents, strict=True):
                yield self._finish(latent, self._record(plan, scheduler, prompt, i, nfe, warnings))

    def _embed(self, prompt: str, negative: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings of the prompt and of the negative prompt, each [1, tokens, width]."""
        return self.pipeline.encode_prompt(prompt, self.device, 1, True, negative_prompt=negative)

    def _cut(self, prompt: str) -> list[str]:
        """A warning that says what of a prompt is too long to be read."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(prompt).input_ids
        limit = tokenizer.model_max_length
        if len(ids) <= limit:
            return []
        lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
        return [f"the prompt has {len(ids)} tokens, this model reads {limit}; dropped: {lost!r}"]

    def _sample(
        self, embedded: tuple[torch.Tensor, torch.Tensor], seeds: list[int], plan: Plan, tick: Callable[..., Any]
    ) -> torch.Tensor:
        """Clean latents [B, channels, H/f, W/f], one for each seed, each from noise of its own."""
        positive, negative = embedded
        factor = self.pipeline.vae_scale_factor
        shape = (1, self.pipeline.unet.config.in_channels, plan.height // factor, plan.width // factor)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        return self.pipeline(
            prompt_embeds=positive.repeat(len(seeds), 1, 1),
            negative_prompt_embeds=negative.repeat(len(seeds), 1, 1),
            width=plan.width,
            height=plan.height,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            latents=noise.to(self.dtype),
            generator=generators,
            output_type="latent",
            callback_on_step_end=tick,
            return_dict=False,
        )[0]

    def _finish(self, latent: torch.Tensor, record: dict[str, Any]) -> Picture:
        """Decode one latent [channels, H/f, W/f] by itself, so that a picture does not depend on its batch."""
        vae = self.pipeline.vae
        try:
            if not latent.isfinite().all():
                raise InvalidOutput("the latents are not finite")
            with out_of_memory():
                decoded = vae.decode(latent[None].float() / vae.config.scaling_factor, return_dict=False)[0]
                image = to_pil(decoded.float().cpu().numpy())[0]
        except InvalidOutput:
            error = InvalidOutput(
                f"the picture of {record['prompt']!r} with seed {record['seed']} is not finite: nothing saved for it",
                "try --dtype float32, less --guidance or another --scheduler",
            )
            return Picture(record["prompt"], record["seed"], None, record, error)
        record["pixels_sha256"] = pixels_sha256(image)
        return Picture(record["prompt"], record["seed"], image, record)

    def _record(
        self, plan: Plan, scheduler: Scheduler, prompt: str, index: int, nfe: int, warnings: list[str]
    ) -> dict[str, Any]:
        """All that is needed to make the picture again, but for its pixels' hash."""
        return {
            "schema": SCHEMA,
            "prompt": prompt,
            "negative": plan.negative,
            "seed": plan.seed + index,
            "index": index,
            "steps": plan.steps,
            "nfe": nfe,
            "guidance": plan.guidance,
            "scheduler": scheduler.name,
            "scheduler_options": scheduler.options,
            "grid": scheduler.grid_name,
            "width": plan.width,
            "height": plan.height,
            "model": self.model.name,
            "model_hash": self.model_hash,
            "model_files": {
                n.replace("/", ":"): digest for n, digest in self.hashes.items() if n.endswith(".safetensors")
            },
            "family": self.model.family,
            "prediction": self.prediction,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": plan.batch_size,
            "rng": "CPU",
            "versions": {
                "diffgen": diffgen.__version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "diffusers": version("diffusers"),
                "transformers": version("transformers"),
            },
            "warnings": warnings,
        }
