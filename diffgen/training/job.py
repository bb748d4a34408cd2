"""What a training job is, and the table of all jobs: a new one is its own file and a row here. No torch at import.

A job owns the data, the networks and the loss; the trainer and the loop own everything else. A row names its classes
as text, since jobs on diffusers' networks are in `diffgen.pipelines`, which is built on this package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from diffgen.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

Networks: TypeAlias = "Mapping[str, nn.Module]"  # ready to be called: with torchrun they are wrapped
Autocast = Callable[[], AbstractContextManager[Any]]  # the context of the networks' forward passes


@dataclass(frozen=True)
class JobKind:
    """A row of `JOBS`. Classes and functions are named "module:name"."""

    title: str  # what the job trains
    config: str  # the dataclass of its configuration, in a module that imports no torch
    job: str  # its class: called with (config, data, where, device=, progress=), as `training.pixels.PixelJob`
    captions: bool = False  # whether it reads captions
    export: str = ""  # writes a run for other programs: called with (run, path, which=, …); empty: not supported
    hint: str = ""  # what to do instead of `generate -m RUN`, {run} being its folder; empty: the run makes pictures
    command: str = "train"  # which command starts it
    defaults: str = ""  # fills in the values of its configuration that depend on a model: called with (tables, where)
    data: str = ""  # opens its data: called with (folder, config, where, progress); empty: `data.open_training_data`
    measure: str = ""  # measures a run: called with (folder, data, samples=, seed=, device=, progress=)
    product: str = ""  # the file or folder of a run that other commands read, rewritten with each checkpoint

    def load(self, field: str) -> Any:
        """Import the class or function that a field names."""
        module, _, name = getattr(self, field).partition(":")
        return getattr(import_module(module), name)


_FINETUNE: dict[str, Any] = {
    "captions": True,
    "command": "finetune",
    "defaults": "diffgen.pipelines.training.finetune_config:open_base",
    "data": "diffgen.pipelines.training.pictures:open_pictures",
    "measure": "diffgen.pipelines.training.measures:measure",
}
JOBS = {
    "pixels": JobKind(
        title="a diffusion model of pixels, unconditional or by class",
        config="diffgen.training.config:Config",
        job="diffgen.training.pixels:PixelJob",
        export="diffgen.pipelines.training.export:save_pixel_run",
    ),
    "autoencoder": JobKind(
        title="an autoencoder, the first stage of latent diffusion",
        config="diffgen.pipelines.training.config:AutoencoderConfig",
        job="diffgen.pipelines.training.autoencoder:AutoencoderJob",
        hint='it is the first stage: train the job "latents" on it',
    ),
    "latents": JobKind(
        title="a diffusion model of latents with captions",
        config="diffgen.pipelines.training.config:LatentConfig",
        job="diffgen.pipelines.training.latents:LatentJob",
        captions=True,
        export="diffgen.pipelines.training.export:save_latent_run",
        hint="write it as a pipeline first: diffgen models export {run} FOLDER",
    ),
    "lora": JobKind(
        title="a low-rank update of a model",
        config="diffgen.pipelines.training.finetune_config:LoraConfig",
        job="diffgen.pipelines.training.lora:LoraJob",
        hint="it changes a model: diffgen generate PROMPT -m {base} --lora {run}",
        export="diffgen.pipelines.training.export:save_lora_run",
        product="adapter.safetensors",
        **_FINETUNE,
    ),
    "embedding": JobKind(
        title="a new word for a model",
        config="diffgen.pipelines.training.finetune_config:EmbeddingConfig",
        job="diffgen.pipelines.training.embedding:EmbeddingJob",
        hint='it is a word of a model: diffgen generate PROMPT -m {base} --embedding "WORD={run}"',
        export="diffgen.pipelines.training.export:copy_product",
        product="embedding.safetensors",
        **_FINETUNE,
    ),
    "full": JobKind(
        title="all weights of a model's denoiser",
        config="diffgen.pipelines.training.finetune_config:FullConfig",
        job="diffgen.pipelines.training.full:FullJob",
        product="model",
        **_FINETUNE,
    ),
    "control": JobKind(
        title="a ControlNet of a model",
        config="diffgen.pipelines.training.finetune_config:ControlConfig",
        job="diffgen.pipelines.training.control:ControlJob",
        hint="it steers a model: diffgen generate PROMPT -m {base} --control canny=FILE --control-model {run}",
        export="diffgen.pipelines.training.export:copy_product",
        product="controlnet",
        **_FINETUNE,
    ),
}


class Job(ABC):
    """Something to train, with defaults for what most jobs do not have.

    `diffusion_job.DiffusionJob` is the base of those that train a diffusion model.
    """

    networks: dict[str, nn.Module]  # every parameter that requires a gradient is trained
    area: int  # pixels of an example, or elements of one channel of its latents
    notes: tuple[str, ...] = ()  # what the user should know before the training
    frozen: Mapping[str, nn.Module] = {}  # networks that are called and not trained

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """The part of run.json beside configuration and versions: job, data, network, …; JSON values."""

    def files(self) -> Mapping[str, bytes | Path]:
        """Further files of the run, by relative name with /: what its model needs and training does not change (a
        tokenizer, the autoencoder of latents). A path is a file to link or copy."""
        return {}

    def products(self, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Files of the run that other commands read, of the averaged weights; rewritten with each checkpoint."""
        return {}

    def first_weights(self, folder: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The initial weights, from a folder that is no run; `own` are the networks' present weights, by name.

        Raises InputError for a folder that does not fit this job.
        """
        raise InputError(f"{folder} is not a run", "start from a run of this job, or from a .safetensors file")

    @abstractmethod
    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        """Move the job's own tensors (data, frozen networks) to the device. Called once, before the first loss."""

    @abstractmethod
    def loss(self, networks: Networks, k: int, positions: slice) -> Tensor:
        """The loss of each example [b] at these positions of the global batch of step k, float32, on the device.

        A pure function of (seed, k, position) and the weights, except for layers that draw from torch's global
        generators: the trainer seeds them. It must not read a value back from the device.
        """

    @abstractmethod
    def held_out(self, networks: Networks) -> list[float]:
        """Losses on held-out data, always at the same examples, times and noise: one for each quartile of the times,
        small times first; a single one for a job without times. Empty without held-out data."""

    @abstractmethod
    def samples(self, networks: Networks) -> list[Image.Image]:
        """Pictures, always from the same noise."""

    def sample_names(self) -> Sequence[str]:
        """What each of the samples shows, such as its class; empty if there is nothing to say."""
        return ()

    def state_dict(self) -> dict[str, Tensor]:
        """What the job has learned beside the networks, for a checkpoint; may be empty."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Take over what `state_dict` returned."""
