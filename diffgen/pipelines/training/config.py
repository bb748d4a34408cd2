"""The configurations of the jobs "autoencoder" and "latents". No torch at import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffgen.diffusion.names import WEIGHTS
from diffgen.training.config import Train, setting
from schedulers.noise import NoiseSchedule
from schedulers.prediction import PLAIN

# Stable Diffusion's pipelines have no flow_prediction on a table
PREDICTIONS = tuple(name for name in PLAIN if name != "flow_prediction")


@dataclass(frozen=True)
class Data:
    """How to read the pictures: squares, RGB, as in pipelines."""

    size: int | None = setting(None, 8, 1024)  # side to scale and crop pictures to; default: their own
    channels: int = setting(3, of=(3,))
    held_out: float = setting(0.1, 0, 0.9)  # the fraction that is not trained on, unless the data name the pictures
    memory: str = setting("auto", of=("auto", "ram", "map"))
    shuffle_shards: int = setting(0, 0, 10**6)  # shards whose pictures are mixed at a time; 0: all
    cache: float = setting(20.0, 0.001, 10**6)  # GB for copies of remote shards


@dataclass(frozen=True)
class Varied(Data):
    """How to read and to vary the pictures."""

    flip: bool = False  # mirror half of the pictures
    shift: int = setting(0, 0, 512)  # shift half of the pictures by up to so many pixels; edge pixels fill the gap
    permute: float = setting(0.0, 0, 1)  # how often a picture's three channels are permuted


@dataclass(frozen=True)
class Encoded(Data):
    """How to read the pictures, and how many to keep as latents."""

    window: int = setting(0, 0, 10**9)  # pictures that are encoded at a time, a multiple of the batch size; 0: all
    repeats: int = setting(1, 1, 10**6)  # epochs of a window, before the next pictures are encoded
    shards: str | None = None  # a folder that keeps the latents of windows for later trainings


@dataclass(frozen=True)
class Loss:
    """Weights of the autoencoder's losses, each a mean over the elements of a picture or of its latents."""

    l1: float = setting(1.0, 0, 1000)
    l2: float = setting(1.0, 0, 1000)
    gradient: float = setting(1.0, 0, 1000)  # L1 of the differences of neighbouring pixels
    kl: float = setting(1e-3, 0, 1000)  # of the latents from a standard normal


@dataclass(frozen=True)
class Reconstructions:
    """The sheets of reconstructions."""

    every: int = setting(1000, 1, 10**9)
    count: int = setting(16, 1, 1024)  # pictures, each followed by its reconstruction


@dataclass(frozen=True)
class AutoencoderConfig:
    """The configuration of the job "autoencoder". `network` has arguments of diffusers' AutoencoderKL."""

    job: str = setting("autoencoder", of=("autoencoder",))
    data: Varied = Varied()
    network: dict[str, Any] = field(
        default_factory=lambda: {
            "latent_channels": 16,
            "block_out_channels": [24, 48, 128, 128],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
        }
    )
    loss: Loss = Loss()
    train: Train = field(default_factory=Train)
    sample: Reconstructions = Reconstructions()


@dataclass(frozen=True)
class Text:
    """CLIP's text encoder, which reads the captions; trained from scratch with the UNet."""

    tokenizer: str | None = None  # a folder with a CLIP tokenizer; default: CLIP's own, of 49,408 tokens
    length: int = setting(77, 4, 512)  # tokens of a prompt, both ends included
    width: int = setting(192, 8, 4096)
    layers: int = setting(4, 1, 64)
    heads: int = setting(4, 1, 64)


@dataclass(frozen=True)
class Diffusion:
    """The process and its objective: those that Stable Diffusion's pipelines support."""

    noise: str = setting("scaled_linear", of=NoiseSchedule.TABLES)
    T: int = setting(1000, 2, 100_000)
    zero_terminal_snr: bool = False  # the last step is pure noise; not with epsilon
    prediction: str = setting("epsilon", of=PREDICTIONS)
    weight: str | None = setting(None, of=tuple(WEIGHTS))
    times: str = setting("stratified", of=("stratified", "uniform"))  # how t is drawn
    offset_noise: float = setting(0.0, 0, 1)
    caption_dropout: float = setting(0.1, 0, 1)  # how often the caption is empty, for guidance


@dataclass(frozen=True)
class Sample:
    """The sheets of samples."""

    every: int = setting(1000, 1, 10**9)
    count: int = setting(16, 1, 1024)  # samples of the weights, and as many of their average
    prompts: tuple[str, ...] = ()  # used in turn; default: captions of the data
    scheduler: str = "dpmpp_2m"
    steps: int = setting(20, 1, 1000)
    guidance: float = setting(2.0, 0, 100)


@dataclass(frozen=True)
class LatentConfig:
    """The configuration of the job "latents". `network` has arguments of diffusers' UNet2DConditionModel."""

    job: str = setting("latents", of=("latents",))
    autoencoder: str = ""  # a run of the job "autoencoder", or a diffusers folder with an AutoencoderKL
    data: Encoded = Encoded()
    text: Text = Text()
    network: dict[str, Any] = field(
        default_factory=lambda: {
            "block_out_channels": [96, 192],
            "layers_per_block": 1,
            "attention_head_dim": 4,  # in this class: the number of heads
            "norm_num_groups": 16,
        }
    )
    diffusion: Diffusion = Diffusion()
    train: Train = field(default_factory=Train)
    sample: Sample = Sample()
