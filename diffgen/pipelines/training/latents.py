"""The job "latents": a UNet and its text encoder on the latents of an autoencoder, conditioned on captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
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
from diffgen.diffusion import GaussianDiffusion, guided, offset_noise
from diffgen.errors import InputError, InvalidOutput
from diffgen.images.pixels import to_pil
from diffgen.models import gate
from diffgen.models.single_file import CONFIGS
from diffgen.training.batches import Order, held_out_draws, some, times
from diffgen.training.data.dataset import DataSet, Progress
from diffgen.training.job import Autocast, Networks
from diffgen.training.seeds import CAPTIONS, SAMPLES, STEP, WEIGHTS, generator, mix
from schedulers.draws import normal

from ..weights.network import load_network
from ..weights.tokenizers import load_tokenizer
from .autoencoder import square
from .captions import EMPTY, Tokens, read
from .config import Diffusion, LatentConfig
from .parts import arguments, build, digest, fitting, read_autoencoder

AT_ONCE = 2**19  # pixels that are encoded or decoded in one go
SCALED_BY = 256  # pictures that the latents' scale is measured on
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
TABLE, PLACES = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"


@dataclass(frozen=True)
class Draws:
    """What step k draws for the whole global batch of B."""

    t: Tensor  # LongTensor [B]
    noise: Tensor  # float32 [B, C, h, w]
    caption: Tensor  # LongTensor [B]: numbers of captions


class LatentJob:
    """Raises InputError for a configuration that fits no data, and for an autoencoder or a tokenizer that is none."""

    def __init__(
        self,
        config: LatentConfig,
        data: DataSet,
        where: str = "the configuration",
        *,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """Encodes all pictures, on `device`; `progress` hears (done, total).

        `where` the configuration comes from: the file that errors name.
        """
        self.config, self.data = config, data
        self.seed, self.batch = config.train.seed, config.train.batch_size
        side = square(data, where)
        if data.captions is None:
            hint = "a metadata.jsonl beside the pictures captions them: see docs/training.md"
            raise InputError(f"{data.name} has no captions", hint)
        if not config.autoencoder:
            raise InputError(
                f"{where}: it names no autoencoder", 'autoencoder = "PATH": a run of the job "autoencoder"'
            )
        self.train, test = data.split(config.data.held_out)
        self.test = some(test)
        self.indices = Order(self.train, self.batch, self.seed)
        try:
            self.diffusion = GaussianDiffusion(
                noise_of(config.diffusion), config.diffusion.prediction, weight=config.diffusion.weight
            )
            self.scheduler = schedulers.get(
                config.sample.scheduler, noise=self.diffusion.noise, prediction=self.diffusion.prediction
            )
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        self.tokenizer = tokenizer_of(config.text.tokenizer, config.text.length)
        self.tokens = Tokens(data.captions, self.tokenizer)
        self.notes = _notes(self.tokens)
        self._encode(Path(config.autoencoder), side, torch.device(device), progress)
        self._build(where)
        self._draws = lru_cache(maxsize=1)(self._draw)

    def _encode(self, path: Path, side: int, device: torch.device, progress: Progress | None) -> None:
        """The autoencoder, and the latents of all pictures, float32 [N, C, h, w], times its factor."""
        self.vae, factor = read_autoencoder(path)
        if self.vae.config.in_channels != 3 or side % (shrinks := 2 ** (len(self.vae.config.block_out_channels) - 1)):
            raise InputError(f"{path}: this autoencoder reads no RGB pictures of {side}x{side}")
        if factor is None:  # measured on the CPU, and rounded: the same wherever the run is resumed
            shown = self.train[torch.linspace(0, len(self.train) - 1, min(len(self.train), SCALED_BY)).long()]
            factor = float(f"{1 / self._latents(shown, torch.device('cpu'), None).std().item():.3g}")
        self.vae.register_to_config(scaling_factor=factor)
        self.weights_hash = digest(self.vae)
        self.side = side // shrinks
        self.area = self.side**2
        self.channels = self.vae.config.latent_channels
        self.vae.to(device)
        with out_of_memory():
            self.latents = self._latents(torch.arange(len(self.data)), device, progress) * factor

    @torch.no_grad()
    def _latents(self, pictures: Tensor, device: torch.device, progress: Progress | None) -> Tensor:
        """Means of the latents, on the CPU."""
        height, width = self.data.size
        parts, done = [], 0
        for part in pictures.split(max(1, AT_ONCE // (height * width))):
            x = self.data.to_float(self.data.images[part].to(device))
            parts.append(self.vae.encode(x).latent_dist.mean.cpu())
            done += len(part)
            if progress is not None:
                progress(done, len(pictures))
        return torch.cat(parts)

    def _build(self, where: str) -> None:
        text = self.config.text
        levels = len(self.config.network.get("block_out_channels", LatentConfig().network["block_out_channels"]))
        network = {
            "down_block_types": ["CrossAttnDownBlock2D"] * levels,
            "up_block_types": ["CrossAttnUpBlock2D"] * levels,
            **LatentConfig().network,
            **self.config.network,
        }
        follows = {
            "sample_size": self.side,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "cross_attention_dim": text.width,
        }
        if self.side % 2 ** (levels - 1):
            raise InputError(f"{where}: latents of {self.side}x{self.side} cannot be halved {levels - 1} times")
        if text.width % text.heads:
            raise InputError(f"{where}: text.width {text.width} is no multiple of text.heads {text.heads}")
        unet = arguments(UNet2DConditionModel, network, follows, where)
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
        self.networks: dict[str, nn.Module] = {
            "unet": build("UNet2DConditionModel", unet, where),
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
        """The autoencoder and the tokenizer, as a folder of diffusers has them."""
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
        """Of a Stable Diffusion folder. Where its tokenizer is another one, the tokens that both have take their
        embeddings along and the others keep those that they have; added positions begin as its last one."""
        checked = gate.check_folder(folder)
        if checked.family not in ("sd1", "sd2"):
            raise InputError(
                f"{folder}: a model of the family {checked.family}, and this job trains Stable Diffusion 1"
            )
        cpu = torch.device("cpu")
        held: dict[str, Tensor] = {}
        for name in self.networks:
            network = load_network(checked.components[name], cpu, torch.float32)
            held |= {f"{name}.{key}": tensor for key, tensor in network.state_dict().items()}
        table, places = (
            next((key for key in own if key.startswith("text_encoder.") and key.endswith(end)), end)
            for end in (TABLE, PLACES)
        )
        if table in held and held[table].shape[1] == own[table].shape[1]:
            theirs = load_tokenizer(checked.components["tokenizer"].folder, len(held[places])).get_vocab()
            ours = self.tokenizer.get_vocab()
            if theirs != ours:
                both = sorted(ours.keys() & theirs.keys())
                rows = own[table].clone()
                rows[[ours[token] for token in both]] = held[table][[theirs[token] for token in both]]
                held[table] = rows
            held[places] = _stretched(held[places], len(own[places]))
        return fitting(folder, held, own)

    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        self.device, self.autocast = device, autocast
        self.vae.to(device)
        with out_of_memory():
            self.latents, self.ids = self.latents.to(device), self.tokens.ids.to(device)

    # A step

    def loss(self, networks: Networks, k: int, positions: slice) -> Tensor:
        """DDPM algorithm 1, lines 2 to 5, on latents, for these positions of the batch of step k."""
        draws = self._draws(k)
        x0 = self.latents[self.indices(k)[positions].to(self.device)]
        context = self._context(networks, self.ids[draws.caption[positions]])
        return self.diffusion.loss(self._model(networks, context), x0, draws.t[positions], draws.noise[positions])

    def _draw(self, k: int) -> Draws:
        c, B = self.config.diffusion, self.batch
        on = self.device if self.device.type == "cuda" else torch.device("cpu")
        g = generator(self.seed, STEP, k, device=on)
        t = times(torch.rand(B, generator=g, device=on), self.diffusion.T, c.times == "stratified")
        noise = torch.randn(B, self.channels, self.side, self.side, generator=g, device=on)
        if c.offset_noise:
            noise = offset_noise(noise, c.offset_noise, g)
        which, drop = torch.rand(2, B, generator=generator(self.seed, CAPTIONS, k))
        caption = self.tokens.choose(self.indices(k), which).masked_fill(drop < c.caption_dropout, EMPTY)
        return Draws(*(drawn.to(self.device) for drawn in (t, noise, caption)))

    def _context(self, networks: Networks, ids: Tensor) -> Tensor:
        """[B, length, width]"""
        with self.autocast():
            return networks["text_encoder"](ids).last_hidden_state

    def _model(self, networks: Networks, context: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return self._denoise(networks, x, t, context)

        return model

    def _denoise(self, networks: Networks, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with self.autocast():
            return networks["unet"](x, t, context, return_dict=False)[0].float()

    # Seen from outside

    def held_out(self, networks: Networks) -> list[float]:
        """With each picture's heaviest caption."""
        if not len(self.test):
            return []
        shape, quartiles = (len(self.test), self.channels, self.side, self.side), []
        for quarter in range(4):
            t, noise = held_out_draws(shape, self.diffusion.T, quarter)
            total = 0.0
            for part in torch.arange(shape[0]).split(64):
                pictures = self.test[part]
                context = self._context(networks, self.ids[self.tokens.heaviest[pictures].to(self.device)])
                x0, at, eps = (
                    self.latents[pictures.to(self.device)],
                    t[part].to(self.device),
                    noise[part].to(self.device),
                )
                total += self.diffusion.loss(self._model(networks, context), x0, at, eps).sum().item()
            quartiles.append(total / shape[0])
        return quartiles

    def samples(self, networks: Networks) -> list[Image.Image]:
        s, g = self.config.sample, generator(self.seed, SAMPLES)
        prompts = s.prompts or self._captions(s.count)
        ids = read(self.tokenizer, [prompts[i % len(prompts)] for i in range(s.count)]).to(self.device)
        context = self._context(networks, ids)
        nothing = self._context(networks, self.ids[:1]).expand_as(context)
        shape = (s.count, self.channels, self.side, self.side)
        x = self.scheduler.start(normal(shape, g, self.device), s.steps)

        def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self._denoise(networks, x, t, context)

        try:
            x0 = self.scheduler.sample(guided(model, context, nothing, s.guidance), x, steps=s.steps, generators=g)
        except schedulers.NonFinite as error:
            raise InvalidOutput(f"training diverged: a picture of the sheet is {error}") from error
        return to_pil(self.decode(x0).numpy())

    def _captions(self, count: int) -> list[str]:
        """Captions of training pictures, evenly spread."""
        shown = self.train[torch.linspace(0, len(self.train) - 1, min(len(self.train), count)).long()]
        return [self.tokens.texts[number] for number in self.tokens.heaviest[shown].tolist()]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures float32 [B, 3, H, W], on the CPU."""
        height, width = self.data.size
        parts = (latents / self.vae.config.scaling_factor).split(max(1, AT_ONCE // (height * width)))
        return torch.cat([self.vae.decode(part, return_dict=False)[0].cpu() for part in parts])

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def noise_of(c: Diffusion) -> schedulers.NoiseSchedule:
    """The noise schedule that a configuration asks for. Raises ValueError."""
    noise = schedulers.NoiseSchedule.named(c.noise, T=c.T)
    return noise.zero_terminal_snr() if c.zero_terminal_snr else noise


def tokenizer_of(folder: str | None, length: int) -> Any:
    """CLIP's tokenizer with the vocabulary of a folder, or its own. Raises InputError."""
    place = CONFIGS / "clip_tokenizer" if folder is None else Path(folder)
    gate.check_tokenizer(place)
    return load_tokenizer(place, length)


def _notes(tokens: Tokens) -> tuple[str, ...]:
    if not tokens.too_long:
        return ()
    length = tokens.tokenizer.model_max_length
    return (f"{tokens.too_long} of {len(tokens.texts)} captions are longer than {length} tokens and are cut off",)


def _stretched(places: Tensor, count: int) -> Tensor:
    """The position embeddings for another number of tokens."""
    return torch.cat([places, places[-1:].expand(max(0, count - len(places)), -1)])[:count]


def _json(table: dict[str, Any]) -> bytes:
    return (json.dumps(table, indent=2) + "\n").encode()
