"""The job "latents": a UNet and its text encoder on the latents of an autoencoder, conditioned on captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

import schedulers
from diffgen.devices import out_of_memory
from diffgen.diffusion import GaussianDiffusion, guided
from diffgen.errors import InputError
from diffgen.images.pixels import to_pil
from diffgen.models import gate
from diffgen.models.single_file import CONFIGS
from diffgen.training.batches import evenly, shuffle_of
from diffgen.training.data.dataset import Progress, TrainingData
from diffgen.training.diffusion_job import Choices, Denoiser, DiffusionJob
from diffgen.training.job import Autocast, Networks
from diffgen.training.seeds import CAPTIONS, WEIGHTS, generator, mix

from ..weights.network import load_network
from ..weights.tokenizers import load_tokenizer
from .autoencoder import square
from .captions import EMPTY, Tokens, read
from .config import Diffusion, LatentConfig
from .parts import PlainAttention, arguments, build, digest, fitting, read_autoencoder
from .shards import Shards

AT_ONCE = 2**19  # pixels of a batch that is encoded or decoded
SCALED_BY = 256  # pictures on which the scale of the latents is measured
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
TABLE, PLACES = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"


@dataclass(frozen=True)
class Encoding:
    """Some pictures as latents, with their captions as tokens."""

    pictures: Tensor  # LongTensor [n], numbers of pictures, ascending
    latents: Tensor  # float32 [n, C, h, w], times the autoencoder's factor
    tokens: Tokens
    ids: Tensor  # of the tokens, on the device of the latents

    def rows(self, indices: Tensor) -> Tensor:
        """The positions of these pictures: LongTensor [b], on the CPU."""
        return torch.searchsorted(self.pictures, indices)


class LatentJob(DiffusionJob):
    """Data, networks and loss of latent diffusion.

    Raises InputError for a configuration that does not fit the data, and for an invalid autoencoder or tokenizer.
    """

    def __init__(
        self,
        config: LatentConfig,
        data: TrainingData,
        where: str = "the configuration",
        *,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """Encode all pictures, on `device`; `progress` is called with (done, total). If `data.window` is set, encode
        the held-out pictures only; those of a window are encoded when the first step needs them.

        `where` names the source of the configuration in errors.
        """
        side = square(data, where)
        if data.captions is None:
            hint = "a metadata.jsonl beside the pictures captions them: see docs/training.md"
            raise InputError(f"{data.name} has no captions", hint)
        if not config.autoencoder:
            raise InputError(
                f"{where}: it names no autoencoder", 'autoencoder = "PATH": a run of the job "autoencoder"'
            )
        super().__init__(config, data, where)
        window, repeats = config.data.window, config.data.repeats
        if window % self.batch or window > len(self.train):
            raise InputError(
                f"{where}: data.window is {window}",
                f"it must be a multiple of the batch size ({self.batch}), at most {len(self.train)}",
            )
        self.indices = shuffle_of(config, data, self.train, window, repeats)
        self.tokenizer = tokenizer_of(config.text.tokenizer, config.text.length)
        self.texts = data.captions
        self._load_autoencoder(Path(config.autoencoder), side)
        self.shards = None
        if window and config.data.shards:
            depends = (data.about()["fingerprint"], self.weights_hash, window, config.train.precision, str(device))
            self.shards = Shards(Path(config.data.shards), *depends)
        self.device = torch.device(device)
        self.vae.to(self.device)
        self._window = lru_cache(maxsize=1)(self._encode_window)
        self.encoding = self._encode(self.test if window else torch.arange(len(data)), progress)
        shown = Tokens([self.texts[i] for i in evenly(self.train, SCALED_BY).tolist()], self.tokenizer)
        self.notes = _notes(shown if window else self.encoding.tokens)
        self._build(where)

    def _load_autoencoder(self, path: Path, side: int) -> None:
        """Load the autoencoder, and choose the factor of its latents."""
        self.vae, factor = read_autoencoder(path)
        if self.vae.config.in_channels != 3 or side % (shrinks := 2 ** (len(self.vae.config.block_out_channels) - 1)):
            raise InputError(f"{path}: this autoencoder does not read RGB pictures of {side}x{side}")
        if factor is None:  # measured on the CPU, and rounded: the same wherever the run is resumed
            pictures = evenly(self.train, SCALED_BY)
            factor = float(f"{1 / self._latents(pictures, torch.device('cpu'), None).std().item():.3g}")
        self.vae.register_to_config(scaling_factor=factor)
        self.weights_hash = digest(self.vae)
        self.shape = (self.vae.config.latent_channels, side // shrinks, side // shrinks)
        self.area = self.shape[1] * self.shape[2]

    def _encode(self, pictures: Tensor, progress: Progress | None = None) -> Encoding:
        """Encode these pictures, ascending numbers, on the device."""
        with out_of_memory():
            return self._encoded_as(pictures, self._latents(pictures, self.device, progress))

    def _encoded_as(self, pictures: Tensor, latents: Tensor) -> Encoding:
        """The encoding of these pictures with their unscaled latents."""
        assert self.texts is not None
        tokens = Tokens([self.texts[i] for i in pictures.tolist()], self.tokenizer)
        return Encoding(pictures, latents * self.vae.config.scaling_factor, tokens, tokens.ids)

    def _encode_window(self, number: int) -> Encoding:
        """Encode a window of the training pictures, in the precision of the training, or read its latents."""
        window = self.config.data.window
        pictures = self.train[number * window : (number + 1) * window]

        def latents() -> Tensor:
            with out_of_memory(), self.autocast():
                return self._latents(pictures, self.device, None)

        values = self.shards(number, (window, *self.shape), latents) if self.shards else latents()
        return self._moved(self._encoded_as(pictures, values))

    def _moved(self, encoding: Encoding) -> Encoding:
        """The same encoding, on the device."""
        with out_of_memory():
            latents, ids = encoding.latents.to(self.device), encoding.ids.to(self.device)
        return replace(encoding, latents=latents, ids=ids)

    def _encoding(self, indices: Tensor) -> Encoding:
        """The encoding that has these pictures: all of the data, the held-out pictures, or a window."""
        window = self.config.data.window
        if not window or bool(torch.isin(indices[0], self.test)):
            return self.encoding
        return self._window(int(torch.searchsorted(self.train, indices[0])) // window)

    @torch.no_grad()
    def _latents(self, pictures: Tensor, device: torch.device, progress: Progress | None) -> Tensor:
        """The means of the latents of these pictures, float32, on the CPU."""
        height, width = self.data.size
        parts, done = [], 0
        for part in pictures.split(max(1, AT_ONCE // (height * width))):
            x = self.data.to_float(self.data.pictures(part).to(device))
            parts.append(self.vae.encode(x).latent_dist.mean.float().cpu())
            done += len(part)
            if progress is not None:
                progress(done, len(pictures))
        return torch.cat(parts) if parts else torch.empty(0, *self.shape)

    def _build(self, where: str) -> None:
        """Build the UNet and the text encoder with fresh weights."""
        text, (channels, side, _) = self.config.text, self.shape
        levels = len(self.config.network.get("block_out_channels", LatentConfig().network["block_out_channels"]))
        network = {
            "down_block_types": ["CrossAttnDownBlock2D"] * levels,
            "up_block_types": ["CrossAttnUpBlock2D"] * levels,
            **LatentConfig().network,
            **self.config.network,
        }
        derived = {
            "sample_size": side,
            "in_channels": channels,
            "out_channels": channels,
            "cross_attention_dim": text.width,
        }
        if side % 2 ** (levels - 1):
            raise InputError(f"{where}: latents of {side}x{side} cannot be halved {levels - 1} times")
        if text.width % text.heads:
            raise InputError(f"{where}: text.width {text.width} is not a multiple of text.heads {text.heads}")
        unet = arguments(UNet2DConditionModel, network, derived, where)
        encoder = {
            "vocab_size": max(self.tokenizer.get_vocab().values()) + 1,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.length,
            **{f"{name[:3]}_token_id": getattr(self.tokenizer, f"{name}_id") for name in SPECIAL[:3]},
        }
        self.about_network = {"unet": unet, "text_encoder": encoder}
        torch.manual_seed(mix(self.seed, WEIGHTS))
        denoiser = build("UNet2DConditionModel", unet, where)
        denoiser.set_attn_processor(PlainAttention())
        self.networks: dict[str, nn.Module] = {
            "unet": denoiser,
            "text_encoder": build("CLIPTextModel", encoder, where),
        }

    def about(self) -> dict[str, Any]:
        c = self.config.diffusion
        return {
            "job": "latents",
            "data": self.data.about(),
            "network": {**self.about_network, "vae": {"sha256": self.weights_hash}},
            "noise": {"name": c.noise, "T": c.T, "zero_terminal_snr": c.zero_terminal_snr},
            "prediction": c.prediction,
            "variance": "fixed_small",
        }

    def files(self) -> dict[str, bytes]:
        """The autoencoder and the tokenizer, in the layout of a diffusers folder."""
        vae = {name: tensor.cpu().contiguous() for name, tensor in self.vae.state_dict().items()}
        config = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        special = {name: token for name in SPECIAL if (token := getattr(self.tokenizer, name))}
        return {
            "vae/config.json": _json({"_class_name": "AutoencoderKL", **config}),
            "vae/diffusion_pytorch_model.safetensors": save(vae, {"format": "pt"}),
            "tokenizer/tokenizer.json": self.tokenizer.backend_tokenizer.to_str().encode(),
            "tokenizer/tokenizer_config.json": _json(
                {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.config.text.length, **special}
            ),
        }

    def first_weights(self, folder: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a Stable Diffusion folder.

        If its tokenizer differs, the tokens of both take its embeddings and the others keep their own; added positions
        begin as copies of its last one.
        """
        checked = gate.check_folder(folder)
        if checked.row.tasks.get("text") != "StableDiffusionPipeline":
            raise InputError(f"{folder}: a model of the family {checked.family}; this job trains Stable Diffusion 1")
        cpu = torch.device("cpu")
        weights: dict[str, Tensor] = {}
        for name in self.networks:
            network = load_network(checked.components[name], cpu, torch.float32)
            weights |= {f"{name}.{key}": tensor for key, tensor in network.state_dict().items()}
        table, places = (
            next((key for key in own if key.startswith("text_encoder.") and key.endswith(end)), end)
            for end in (TABLE, PLACES)
        )
        if table in weights and weights[table].shape[1] == own[table].shape[1]:
            theirs = load_tokenizer(checked.components["tokenizer"].folder, len(weights[places])).get_vocab()
            ours = self.tokenizer.get_vocab()
            if theirs != ours:
                both = sorted(ours.keys() & theirs.keys())
                rows = own[table].clone()
                rows[[ours[token] for token in both]] = weights[table][[theirs[token] for token in both]]
                weights[table] = rows
            weights[places] = _stretched(weights[places], len(own[places]))
        return fitting(folder, weights, own)

    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        super().prepare(device, autocast)
        self.vae.to(device)
        self.encoding = self._moved(self.encoding)

    def process(self) -> GaussianDiffusion:
        c = self.config.diffusion
        return GaussianDiffusion(noise_of(c), c.prediction, weight=c.weight)

    def choose(self, k: int, u: Tensor) -> Choices:
        """{"caption": the number of a caption of each picture, often the empty one}, LongTensor [B]"""
        which, drop = torch.rand(2, self.batch, generator=generator(self.seed, CAPTIONS, k))
        indices = self.indices(k)
        encoding = self._encoding(indices)
        caption = encoding.tokens.choose(encoding.rows(indices), which)
        return {"caption": caption.masked_fill(drop < self.config.diffusion.caption_dropout, EMPTY)}

    def clean(self, indices: Tensor, choices: Choices | None = None) -> Tensor:
        encoding = self._encoding(indices)
        return encoding.latents[encoding.rows(indices).to(self.device)]

    def condition(self, networks: Networks, indices: Tensor, choices: Choices | None = None) -> Tensor:
        """[b, length, width]: the encoded captions; without choices, each picture's most frequent one."""
        encoding = self._encoding(indices)
        heaviest = encoding.tokens.heaviest[encoding.rows(indices)] if choices is None else choices["caption"]
        return self._encoded(networks, encoding.ids[heaviest.to(self.device)])

    def _encoded(self, networks: Networks, ids: Tensor) -> Tensor:
        """[b, length, width] of token ids [b, length]"""
        with self.autocast():
            return networks["text_encoder"](ids).last_hidden_state

    def predict(self, networks: Networks, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        with self.autocast():
            return networks["unet"](x, t, condition, return_dict=False)[0].float()

    def denoiser(self, networks: Networks, count: int) -> Denoiser:
        ids = read(self.tokenizer, list(self.sample_names())).to(self.device)
        context = self._encoded(networks, ids)
        empty = self._encoded(networks, read(self.tokenizer, [""]).to(self.device)).expand_as(context)

        def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self.predict(networks, x, t, context)

        return guided(model, context, empty, self.config.sample.guidance)

    def sample_names(self) -> Sequence[str]:
        """The prompt of each sample."""
        count = self.config.sample.count
        prompts = self.config.sample.prompts or self._captions(count)
        return [prompts[i % len(prompts)] for i in range(count)]

    def _captions(self, count: int) -> list[str]:
        """Captions of training pictures, evenly spread."""
        assert self.texts is not None
        return [max(self.texts[i], key=lambda pair: pair[1])[0] for i in evenly(self.train, count).tolist()]

    def pictures(self, x0: Tensor) -> list[Image.Image]:
        return to_pil(self.decode(x0).numpy())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures float32 [B, 3, H, W], on the CPU."""
        height, width = self.data.size
        parts = (latents / self.vae.config.scaling_factor).split(max(1, AT_ONCE // (height * width)))
        return torch.cat([self.vae.decode(part, return_dict=False)[0].cpu() for part in parts])


def noise_of(c: Diffusion) -> schedulers.NoiseSchedule:
    """The noise schedule of a configuration. Raises ValueError."""
    noise = schedulers.NoiseSchedule.named(c.noise, T=c.T)
    return noise.zero_terminal_snr() if c.zero_terminal_snr else noise


def tokenizer_of(folder: str | None, length: int) -> Any:
    """CLIP's tokenizer, with the vocabulary of a folder if one is named. Raises InputError."""
    path = CONFIGS / "clip_tokenizer" if folder is None else Path(folder)
    gate.check_tokenizer(path)
    return load_tokenizer(path, length)


def _notes(tokens: Tokens) -> tuple[str, ...]:
    if not tokens.too_long:
        return ()
    length = tokens.tokenizer.model_max_length
    return (f"{tokens.too_long} of {len(tokens.texts)} captions are longer than {length} tokens and are cut off",)


def _stretched(places: Tensor, count: int) -> Tensor:
    """Cut the position embeddings, or repeat the last one, for `count` tokens."""
    return torch.cat([places, places[-1:].expand(max(0, count - len(places)), -1)])[:count]


def _json(table: dict[str, Any]) -> bytes:
    return (json.dumps(table, indent=2) + "\n").encode()
