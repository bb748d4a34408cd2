"""Prompt → embedding → latents from the picture's own generator → solver ⇄ guided denoiser → decode → picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image

from diffgen.errors import UsageError
from diffgen.generation.batching import Progress, in_batches
from diffgen.generation.options import Options
from diffgen.generation.plan import Picture, finished

from .loaded import LoadedModel
from .plan import Plan, make_plan
from .sampling.accelerate import accelerate
from .sampling.batch import Batches, Watch, nfe_of
from .weights import adapters, export
from .weights import quantize as quantization


class ImageGenerator(LoadedModel):
    """A loaded model. `diffgen.load` makes one."""

    def generate(
        self,
        prompt: str | Sequence[str] = (),
        *,
        metadata: str = "full",
        on_step: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Pictures of a prompt (of several: in their order, then in that of the seeds), RGB, their metadata in `.info`.

        Picture i of a prompt has the seed `seed + i` and does not depend on the others; `seed` is random by default.
        `options` are those of `generation.options.Options`; the model has a default for each. `on_step(done, total)` is
        called after each evaluation of the network. `metadata` is full, params (without our own record) or none.
        Raises UsageError (a number, name or combination), InputError (a file), OutOfMemory, InvalidOutput (not finite).
        """
        return finished(self.pictures(make_plan(self.model, prompt, **options), on_step, fill=True), metadata)

    @torch.inference_mode()
    def pictures(
        self,
        plans: Plan | Sequence[Plan],
        on_step: Callable[[int, int], None] | None = None,
        on_denoised: Watch | None = None,
        *,
        fill: bool = False,
    ) -> Iterator[Picture]:
        """The pictures of plans, as each is done. One that is not finite comes with its error; the others go on.

        All is as in `Generator.pictures`. `on_denoised(shots, i, x0)` gets the clean latents [B, C, h, w] that
        evaluation i predicts for a batch of shots; `decode` makes pictures of them. An error in a callback ends the
        work; the generator stays usable. Out of memory, the batch becomes smaller, then the autoencoder works in tiles;
        then OutOfMemory is raised.
        """
        plans = [plans] if isinstance(plans, Plan) else plans
        progress = Progress(plans, lambda plan: nfe_of(self, plan), on_step)

        def maker_of(plan: Plan) -> Batches:
            self._adapt(plan)
            return Batches(self, plan, progress, on_denoised, fill)

        yield from in_batches(plans, maker_of, progress)

    def save(self, folder: str | Path) -> None:
        """Write the model, as the last pictures were made with it, as a new diffusers folder.

        LoRAs are merged into it. Raises CannotWrite, and UsageError for quantised weights.
        """
        if self._quantized:
            raise UsageError("quantised weights are not written", "load the model without quantize")
        export.save_pipeline(self.pipeline, self.checked, Path(folder))

    @torch.no_grad()
    def _adapt(self, plan: Plan) -> None:
        """Make the pipeline have exactly the plan's adapters: weights that were merged are read anew."""
        wanted = (*plan.loras, *plan.embeddings)
        if wanted != self._adapted:
            if self._adapted or self._quantized or self.offload != "none":
                self.pipeline, self._quantized = self._load(), False
            self._adapted, self.fits = ("unfinished",), []  # so it stays if it is interrupted
            for lora in plan.loras:
                self.fits.append(f"{lora.path.name}: {adapters.merge_lora(self.pipeline, self.checked.family, lora)}")
            for embedding in plan.embeddings:
                vectors = adapters.add_embedding(self.pipeline, embedding)
                self.fits.append(f"{embedding.path.name}: {embedding.word} is {vectors} vector{'s' * (vectors > 1)}")
            self._adapted = wanted
        if self.quantize != "none" and not self._quantized:
            left = quantization.quantize(self.pipeline, self.quantize)
            self._quantized = True
            self.fits.append(f"weights in {quantization.WAYS[self.quantize]}: {left:.0%} of their bytes are left")
        if plan.options["compile"] and self.offload not in ("none", "model"):
            raise UsageError(f"--compile and --offload {self.offload} exclude each other", "choose one")
        network = self.pipeline.components[self.checked.row.denoiser]
        accelerate(network, plan.options["attention_backend"], plan.options["compile"])
        adapters.seamless(self.pipeline, plan.options["tile"])
