"""The configurations of the fine-tuning jobs. No torch at import.

    job = "lora"
    model = "emoji"

    [data]
    trigger = "<rex>"

    [adapter]
    rank = 16

    [train]
    steps = 500

Missing keys have the defaults below; those of a model (learning rate, caption dropout) are filled in by `defaults`.
`samples/adapters/` has a commented file for each job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffgen.diffusion.names import WEIGHTS
from diffgen.errors import InputError
from diffgen.models import find
from diffgen.models.gate import Checked
from diffgen.training.config import Train, setting, with_values

# The learning rates with AdamW: of large networks, and of those below SMALL parameters.
SMALL = 50_000_000
RATES = {"lora": (1e-4, 2e-3), "embedding": (5e-3, 2e-2), "full": (1e-5, 2e-4), "control": (1e-5, 1e-3)}
WEIGHT_TYPES = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class FineData:
    """Which pictures, at which sizes, with which captions."""

    size: int | None = setting(None, 8, 4096)  # side of the square that pictures have as many pixels as; default: own
    step: int | None = setting(None, 1, 512)  # sides are multiples; default: 64, of models below 256 pixels the least
    aspect: float = setting(2.0, 1, 8)  # the longest side by the shortest, at most
    flip: bool = False  # mirror half of the pictures
    crops: int = setting(1, 1, 64)  # places where a picture is cropped; 1: the middle
    held_out: float = setting(0.1, 0, 0.9)  # the fraction that is not trained on
    trigger: str = ""  # a word put in front of captions that lack it
    caption: str | None = None  # of pictures without one
    shuffle: str = ""  # what separates tags, which are shuffled at each step; empty: no shuffling
    keep: int = setting(1, 0, 100)  # tags in front that stay
    unmasked: float = setting(0.1, 0, 1)  # the weight of what a mask leaves out
    cache: bool = True  # keep latents and embeddings of texts in the user's cache folder


@dataclass(frozen=True)
class FineDiffusion:
    """The objective. Noise schedule and prediction are the model's own."""

    weight: str | None = setting(None, of=tuple(WEIGHTS))  # of tables, not of flows
    times: str = setting("auto", of=("auto", "uniform", "logit_normal"))  # auto: logit_normal for flows
    shift: float | None = setting(None, 0.01, 100)  # of a flow's times; default: the model's own
    offset_noise: float = setting(0.0, 0, 1)
    caption_dropout: float = setting(0.1, 0, 1)  # how often a caption is dropped; 0 where the model needs no guidance
    guidance: float = setting(1.0, 0, 100)  # of networks that take it as an input


@dataclass(frozen=True)
class FineTrain(Train):
    """The table [train], with defaults for few pictures."""

    steps: int = setting(500, 1, 10**9)
    batch_size: int = setting(4, 1, 10**6)
    learning_rate: float = setting(1e-4, 0, 10)
    warmup: int = setting(20, 0, 10**9)
    schedule: str = setting("cosine", of=("constant", "cosine", "linear"))
    recompute: bool = False  # gradient checkpointing: activations are computed twice and not kept
    quantize: str = setting("none", of=("none", "int8", "fp8", "nf4"))  # the frozen model; not for the job full
    log_every: int = setting(20, 1, 10**9)
    held_out_every: int = setting(100, 1, 10**9)
    checkpoint_every: int = setting(100, 1, 10**9)


@dataclass(frozen=True)
class FineSample:
    """The sheets: each prompt twice, by the tuned model and by the base."""

    every: int = setting(100, 1, 10**9)
    prompts: tuple[str, ...] = ()  # default: captions of the data
    count: int = setting(4, 1, 64)
    seed: int = setting(0, 0, 2**32 - 1)
    steps: int | None = setting(None, 1, 1000)  # default: the model's own
    guidance: float | None = setting(None, 0, 100)


@dataclass(frozen=True)
class Prior:
    """What the model must not forget (DreamBooth, Ruiz et al. 2022): an example of it beside each of the data."""

    captions: tuple[str, ...] = ()  # without the trigger; none: no prior
    target: str = setting("pictures", of=("pictures", "model"))  # made by the base; or the base's own output
    pictures: int = setting(200, 1, 10**5)
    weight: float = setting(1.0, 0, 100)
    seed: int = setting(1000, 0, 2**31)


@dataclass(frozen=True)
class FineTuneConfig:
    """What the configurations of all fine-tuning jobs have."""

    job: str = ""
    model: str = ""  # what is tuned: any model that `generate -m` takes
    data: FineData = FineData()
    diffusion: FineDiffusion = FineDiffusion()
    prior: Prior = Prior()
    train: FineTrain = field(default_factory=FineTrain)
    sample: FineSample = FineSample()


@dataclass(frozen=True)
class Adapter:
    """A small update of layers: W + (alpha/rank)·B·A, or DoRA's or LoKr's."""

    kind: str = setting("lora", of=("lora", "dora", "lokr"))
    rank: int = setting(16, 1, 1024)
    alpha: float | None = setting(None, 1e-3, 10**4)  # default: the rank, so that a learning rate holds for every rank
    layers: str = setting("attention+mlp", of=("attention", "attention+mlp", "all"))  # all: convolutions too


@dataclass(frozen=True)
class LoraConfig(FineTuneConfig):
    """The configuration of the job "lora"."""

    job: str = setting("lora", of=("lora",))
    adapter: Adapter = Adapter()


@dataclass(frozen=True)
class Embedding:
    """A new word: a few vectors in the text encoders' tables. The trigger is the word."""

    begin: str = ""  # words whose vectors are the first ones; default: the captions' most frequent word
    vectors: int | None = setting(None, 1, 75)  # default: as many as `begin` has tokens


@dataclass(frozen=True)
class EmbeddingConfig(FineTuneConfig):
    """The configuration of the job "embedding"."""

    job: str = setting("embedding", of=("embedding",))
    embedding: Embedding = Embedding()


@dataclass(frozen=True)
class FullConfig(FineTuneConfig):
    """The configuration of the job "full"."""

    job: str = setting("full", of=("full",))


@dataclass(frozen=True)
class Control:
    """The map that a ControlNet reads, and its network."""

    kind: str = setting("canny", of=("canny", "scribble"))  # drawn from the picture
    hint: tuple[float, ...] = setting((16, 32, 96, 256), 1, 4096, length=4)  # widths that read the map
    attention: bool = True  # false: half the size, and the denoiser alone reads the caption


@dataclass(frozen=True)
class ControlConfig(FineTuneConfig):
    """The configuration of the job "control"."""

    job: str = setting("control", of=("control",))
    control: Control = Control()


def check_base(name: str) -> tuple[find.Model, Checked]:
    """The model to tune, its files checked. Raises InputError for one that cannot be trained."""
    model = find.find(name)
    if model.is_run:
        raise InputError(f"{name} is a run of `diffgen train`", "give the model that the run is to be made from")
    checked = find.check(model)
    if "text" not in checked.row.tasks or checked.variant == "inpaint":
        raise InputError(
            f"{name}: models of the family {checked.family} are not fine-tuned", "give a text-to-image model"
        )
    types = {tensor.dtype for tensor in (checked.network.tensors or {}).values()}
    if strange := sorted(types - WEIGHT_TYPES):
        raise InputError(
            f"{name}: its weights are quantised ({strange[0]})", "give the model in float32, float16 or bfloat16"
        )
    return model, checked


def defaults(tables: Mapping[str, Any], checked: Checked) -> dict[str, Any]:
    """The tables with the values that depend on the model, where they are not set."""
    small = checked.network.parameters < SMALL
    values: dict[str, Any] = {"diffusion.caption_dropout": 0.0 if checked.guidance_is_input else 0.1}
    train = tables.get("train")
    if (rates := RATES.get(str(tables.get("job")))) is not None:
        by_itself = isinstance(train, Mapping) and train.get("optimizer") == "prodigy"
        values["train.learning_rate"] = 1.0 if by_itself else rates[small]

    def is_set(key: str) -> bool:
        table, name = key.split(".")
        inner = tables.get(table)
        return isinstance(inner, Mapping) and name in inner

    return with_values(tables, {key: value for key, value in values.items() if not is_set(key)})


def open_base(tables: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the base of a configuration, and fill in what follows from it. Raises InputError."""
    name = tables.get("model")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: it names no model", 'model = "NAME": what is to be fine-tuned')
    return defaults(tables, check_base(name)[1])
