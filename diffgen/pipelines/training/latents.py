"""The job "latents": a UNet and its text encoder on the latents of an autoencoder, conditioned on captions."""

from __future__ import annotations

import json
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
from diffgen.training.batches import evenly
from diffgen.training.data.dataset import Progress, TrainingData
from diffgen.training.diffusion_job import Choices, Denoiser, DiffusionJob
from diffgen.training.job import Autocast, Networks
from diffgen.training.seeds import CAPTIONS, WEIGHTS, generator, mix

from ..weights.network import load_network
from ..weights.tokenizers import load_tokenizer
from .autoencoder import square
from .captions import EMPTY, Tokens, read
from .config import Diffusion, LatentConfig
from .parts import arguments, build, digest, fitting, read_autoencoder

AT_ONCE = 2**19  # pixels of a batch that is encoded or decoded
SCALED_BY = 256  # pictures on which the scale of the latents is measured
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
TABLE, PLACES = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"


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
        """Encode all pictures, on `device`; `progress` is called with (done, total).

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
        self.tokenizer = tokenizer_of(config.text.tokenizer, config.text.length)
        self.tokens = Tokens(data.captions, self.tokenizer)
        self.notes = _notes(self.tokens)
        self._encode(Path(config.autoencoder), side, torch.device(device), progress)
        self._build(where)

    def _encode(self, path: Path, side: int, device: torch.device, progress: Progress | None) -> None:
        """Load the autoencoder, and encode all pictures: `latents`, float32 [N, C, h, w], times its factor."""
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
        self.vae.to(device)
        with out_of_memory():
            self.latents = self._latents(torch.arange(len(self.data)), device, progress) * factor

    @torch.no_grad()
    def _latents(self, pictures: Tensor, device: torch.device, progress: Progress | None) -> Tensor:
        """The means of the latents of these pictures, on the CPU."""
        height, width = self.data.size
        parts, done = [], 0
        for part in pictures.split(max(1, AT_ONCE // (height * width))):
            x = self.data.to_float(self.data.pictures(part).to(device))
            parts.append(self.vae.encode(x).latent_dist.mean.cpu())
            done += len(part)
            if progress is not None:
                progress(done, len(pictures))
        return torch.cat(parts)

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
        with out_of_memory():
            self.latents, self.ids = self.latents.to(device), self.tokens.ids.to(device)

    def process(self) -> GaussianDiffusion:
        c = self.config.diffusion
        return GaussianDiffusion(noise_of(c), c.prediction, weight=c.weight)

    def choose(self, k: int, u: Tensor) -> Choices:
        """{"caption": the number of a caption of each picture, often the empty one}, LongTensor [B]"""
        which, drop = torch.rand(2, self.batch, generator=generator(self.seed, CAPTIONS, k))
        caption = self.tokens.choose(self.indices(k), which)
        return {"caption": caption.masked_fill(drop < self.config.diffusion.caption_dropout, EMPTY)}

    def clean(self, indices: Tensor, choices: Choices | None = None) -> Tensor:
        return self.latents[indices.to(self.device)]

    def condition(self, networks: Networks, indices: Tensor, choices: Choices | None = None) -> Tensor:
        """[b, length, width]: the encoded captions; without choices, each picture's most frequent one."""
        caption = self.tokens.heaviest[indices].to(self.device) if choices is None else choices["caption"]
        return self._encoded(networks, self.ids[caption])

    def _encoded(self, networks: Networks, ids: Tensor) -> Tensor:
        """[b, length, width] of token ids [b, length]"""
        with self.autocast():
            return networks["text_encoder"](ids).last_hidden_state

    def predict(self, networks: Networks, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        with self.autocast():
            return networks["unet"](x, t, condition, return_dict=False)[0].float()

    def denoiser(self, networks: Networks, count: int) -> Denoiser:
        prompts = self.config.sample.prompts or self._captions(count)
        ids = read(self.tokenizer, [prompts[i % len(prompts)] for i in range(count)]).to(self.device)
        context = self._encoded(networks, ids)
        empty = self._encoded(networks, self.ids[:1]).expand_as(context)

        def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self.predict(networks, x, t, context)

        return guided(model, context, empty, self.config.sample.guidance)

    def _captions(self, count: int) -> list[str]:
        """Captions of training pictures, evenly spread."""
        return [self.tokens.texts[number] for number in self.tokens.heaviest[evenly(self.train, count)].tolist()]

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
