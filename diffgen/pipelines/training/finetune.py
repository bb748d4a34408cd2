"""The base of the fine-tuning jobs: a frozen model, pictures as latents, captions as embeddings, one loss for all.

A family's row and module give what differs: the embeddings of a text, the network's inputs, the layout of its latents,
noise schedule and prediction. A job says which networks are trained, and how the denoiser is called with them.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import schedulers
from diffgen.devices import out_of_memory
from diffgen.diffusion import GaussianDiffusion, RectifiedFlow, offset_noise
from diffgen.errors import InputError, InvalidOutput
from diffgen.models.gate import Checked
from diffgen.training.batches import BucketShuffle, evenly, held_out_draws, times
from diffgen.training.data.dataset import Captions, Progress
from diffgen.training.job import Autocast, Job, Networks
from diffgen.training.seeds import CAPTIONS, STEP, WEIGHTS, generator, mix
from schedulers.draws import normal

from .. import sizes
from ..families import code_of
from ..generate import ImageGenerator
from ..plan import make_plan
from ..sampling.denoiser import network_of
from ..sampling.embed import Embedded, embed, stacked
from ..sampling.latents import CODECS
from ..weights import quantize as quantization
from .adapted import Substitute
from .content import Content
from .finetune_config import FineTuneConfig, check_base
from .pictures import Crop, Pictures, Size

HELD_OUT_PICTURES = 64  # at most
HELD_OUT_DRAWS = 16  # of each quartile of the times, at least
FEW = 4  # pictures: of so few none is held out
TEXTS = 4096  # embeddings that are kept in memory
AT_ONCE = 8  # held-out pictures in a batch

Call = Callable[..., Any]  # the denoiser, called as its class is


@dataclass(frozen=True)
class EncodedPicture:
    """A picture as the network reads it."""

    latents: Tensor  # float32 [C, h, w]
    weight: Tensor | None  # float32 [1, h, w]: of the squared error, with a mean of 1
    corner: tuple[int, int]  # (top, left) of the crop


@dataclass(frozen=True)
class Pick:
    """What a position of a step trains on."""

    picture: int  # its number; the prior pictures follow those of the data
    text: str | None  # None: the dropped caption
    t: float
    noise: Tensor  # float32 [C, h, w]
    crop: int = 0
    mirrored: bool = False
    weight: float = 1.0
    position: int = 0
    imitates: bool = False  # the target is the base's own output


class FineTune(Job):
    """A `job.Job` that changes a model by a few pictures. A subclass says what is trained."""

    networks: dict[str, nn.Module]

    def __init__(
        self,
        config: FineTuneConfig,
        data: Pictures,
        where: str = "the configuration",
        *,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """Load the model and encode the pictures, on `device`; `progress` is called with (done, total).

        `where` names the source of the configuration in errors. Raises InputError for what does not go together.
        """
        self.config, self.data, self.where = config, data, where
        self.seed, self.batch = config.train.seed, config.train.batch_size
        self.device = torch.device(device)
        model, checked = check_base(config.model)
        self.loaded = ImageGenerator(model, str(self.device), self.base_dtype())
        self.checked: Checked = self.loaded.checked
        self.row, self.pipeline = checked.row, self.loaded.pipeline
        self.base: nn.Module = self.pipeline.components[self.row.denoiser]
        if config.train.quantize != "none":
            quantization.quantize(self.pipeline, config.train.quantize)
        self.frozen = {n: p for n, p in self.pipeline.components.items() if isinstance(p, nn.Module)}
        for part in self.frozen.values():
            part.requires_grad_(False).eval()
        self.code, self.codec = code_of(checked.family), CODECS[self.row.latents]
        self.process = self._process()
        self.coder = self.loaded.autoencoder()
        self.area = data.square**2 // self.coder.factor**2
        self.texts: list[Captions] = [example.captions for example in data.examples]
        self.originals = [example.size for example in data.examples]
        self.buckets = [example.bucket for example in data.examples]
        train, test, notes = self._split()
        self.train = train
        self.test = evenly(test, HELD_OUT_PICTURES)
        self.notes: tuple[str, ...] = notes
        self.order = BucketShuffle(train, self.batch, self.seed, self.buckets)
        keep, of_base = config.data.cache, (str(self.loaded.dtype), config.train.quantize)
        self._latents = Content("latents", keep, self.model_sha256("vae"), *of_base)
        encoders = self.model_sha256("text_encoder", "tokenizer")
        self._embeddings = Content("texts", keep, encoders, *of_base, checked.family, checked.tokens)
        self._prior_pictures = Content("prior", keep, self.model_sha256(""), *of_base)
        self._text = lru_cache(maxsize=TEXTS)(self._embed)
        self._draws = lru_cache(maxsize=1)(self._draw)
        self.encoded = self._encode(progress)
        self.prior = self._prior(progress)
        torch.manual_seed(mix(self.seed, WEIGHTS))
        self.networks = self.build()
        if config.train.parallel == "fsdp" and self.base not in self.networks.values():
            raise InputError(f'{where}: train.parallel = "fsdp" divides what is trained: here that is small', "use ddp")
        if config.train.recompute:
            for network in (self.base, *self.networks.values()):
                if hasattr(network, "enable_gradient_checkpointing"):
                    network.enable_gradient_checkpointing()

    # What a job defines

    @abstractmethod
    def build(self) -> dict[str, nn.Module]:
        """The networks that are trained, with fresh weights drawn from torch's global generator."""

    @abstractmethod
    def denoiser(self, networks: Networks, picks: Sequence[Pick]) -> Call:
        """What is called in the place of the model's denoiser, for a batch of these picks."""

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """Inside, `denoiser` is the model as it was."""
        yield

    def base_dtype(self) -> str:
        """The dtype of the frozen model: float32 on a CPU, bfloat16 on a GPU, unless the precision says otherwise."""
        precision = self.config.train.precision
        if precision == "auto":
            return "bfloat16" if self.device.type == "cuda" else "float32"
        return precision if self.device.type == "cuda" else "float32"

    def condition(self, networks: Networks, texts: Sequence[str | None]) -> dict[str, Any]:
        """The embeddings [b, …] of texts, by the names of the pipeline's arguments."""
        return {name: self._moved(value) for name, value in stacked([self._text(text) for text in texts]).items()}

    # The model

    def _process(self) -> GaussianDiffusion | RectifiedFlow:
        noise, prediction, weight = self.loaded.noise, self.loaded.prediction, self.config.diffusion.weight
        try:
            if noise.is_flow:
                if weight is not None:
                    raise ValueError("diffusion.weight is for tables of noise levels, this model is a flow")
                return RectifiedFlow(noise)
            return GaussianDiffusion(noise, prediction, weight=weight)
        except ValueError as error:
            raise InputError(f"{self.where}: {error}") from error

    def model_sha256(self, *parts: str) -> str:
        """SHA-256 in hex of the files of the parts whose names begin so; of a single file, of all of it."""
        hashes = self.loaded.hashes
        own = {name: digest for name, digest in hashes.items() if name.startswith(parts)} or hashes
        return hashlib.sha256(json.dumps(sorted(own.items())).encode()).hexdigest()

    def _moved(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _embed(self, text: str | None) -> Embedded:
        """The embedding of a caption; of None, that of an empty prompt, as guidance evaluates it."""

        def make() -> dict[str, Tensor]:
            guided = text is None and not self.checked.guidance_is_input
            options: dict[str, Any] = {"syntax": "plain", "guided": guided, "tokens": self.checked.tokens}
            with torch.autocast(self.device.type, enabled=False):  # the same wherever it is first needed
                read = embed(self.pipeline, self.row, text or "", **options).tensors
            start = "negative_"
            return {k.removeprefix(start): v for k, v in read.items() if not guided or k.startswith(start)}

        return Embedded(self._embeddings(text, make), ())

    def inputs(self, networks: Networks, texts: Sequence[str | None], size: Size) -> dict[str, Any]:
        """What the denoiser reads beside x and t, for pictures of one size."""
        guidance = self.config.diffusion.guidance if self.checked.guidance_is_input else None
        return dict(self.code.inputs(self.pipeline, self.condition(networks, texts), size, guidance))

    def predict(self, call: Call, x: Tensor, t: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The denoiser's output for x [b, C, h, w] at times t [b], float32, in the layout of x."""
        view = Substitute(self.pipeline, **{self.row.denoiser: Substitute(self.base, call)})
        with self.autocast():
            packed = self.codec.pack(x).to(self.loaded.dtype)
            output = self.code.predict(view, packed, t, inputs)
        return self.codec.unpack(output.float(), *x.shape[-2:])

    # The data

    def _split(self) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """(train, test, notes): pictures named as held out, else a fraction, chosen by their hashes."""
        examples, fraction = self.data.examples, self.config.data.held_out
        named = [i for i, example in enumerate(examples) if example.held_out]
        notes: list[str] = []
        if not named and fraction and len(examples) >= FEW:
            ranked = sorted(range(len(examples)), key=lambda i: examples[i].sha256)
            named = ranked[: max(1, round(fraction * len(examples)))]
            equal = {examples[i].sha256 for i in named}  # copies of a held-out picture are held out too
            named = [i for i, example in enumerate(examples) if example.sha256 in equal]
        train = [i for i in range(len(examples)) if i not in set(named)]
        if not train:
            raise InputError(f"{self.data.name}: all pictures are held out, none is left to train on")
        if not named and fraction:
            notes.append(f"no picture is held out of {len(examples)}: there is no held-out loss")
        elif 0 < len(named) < FEW:
            files = ", ".join(examples[i].file.name for i in sorted(named))
            notes.append(f"held out: {files}; so few say little about a model")
        return torch.tensor(train), torch.tensor(sorted(named), dtype=torch.int64), tuple(notes)

    def _variants(self) -> list[tuple[int, bool]]:
        """(crop, mirrored) of every way in which a picture is read; the first is the plain one."""
        flips = (False, True) if self.config.data.flip else (False,)
        return [(crop, mirrored) for crop in range(self.config.data.crops) for mirrored in flips]

    @torch.no_grad()
    def _encode(self, progress: Progress | None) -> dict[tuple[int, int, bool], EncodedPicture]:
        """All pictures in all variants: {(picture, crop, mirrored): latents}."""
        encoded = {}
        for i in range(len(self.data)):
            for crop, mirrored in self._variants():
                encoded[i, crop, mirrored] = self._read(self.cut(i, crop, mirrored))
            if progress is not None:
                progress(i + 1, len(self.data))
        return encoded

    def _prior(self, progress: Progress | None) -> range:
        """Make the prior pictures by the base, unless they are in the cache; returns their numbers."""
        c, n = self.config.prior, len(self.buckets)
        if not c.captions or c.target != "pictures":
            return range(n, n)
        side = self.data.square
        for j in range(c.pictures):
            caption, seed = c.captions[j % len(c.captions)], c.seed + j

            def make(caption: str = caption, seed: int = seed) -> dict[str, Tensor]:
                (picture,) = self.loaded.generate(caption, seed=seed, size=(side, side), prompt_syntax="plain")
                return {"pixels": torch.from_numpy(np.array(picture))}

            pixels = self._prior_pictures((caption, seed, side), make)["pixels"].numpy()
            self.encoded[n + j, 0, False] = self._read(Crop(pixels, None, (0, 0)))
            self.texts.append(((caption, 1.0),))
            self.originals.append((side, side))
            self.buckets.append((side, side))
            if progress is not None:
                progress(j + 1, c.pictures)
        return range(n, n + c.pictures)

    def cut(self, picture: int, crop: int, mirrored: bool) -> Crop:
        """The pixels of a picture of the data in one of its variants."""
        place = (0.5, 0.5)
        if crop:
            digest = bytes.fromhex(self.data.examples[picture].sha256)
            u = torch.rand(2, generator=generator(int.from_bytes(digest[:8]), crop)).tolist()
            place = (u[0], u[1])
        return self.data.crop(picture, place, mirrored)

    def _read(self, cut: Crop) -> EncodedPicture:
        """The latents of a crop, from the cache or encoded."""
        key = (cut.pixels.shape, hashlib.sha256(cut.pixels.tobytes()).hexdigest())
        pixels = torch.from_numpy(cut.pixels).permute(2, 0, 1)[None].float() / 127.5 - 1

        def make() -> dict[str, Tensor]:
            with out_of_memory():
                return {"latents": self.coder.encode(pixels, None)[0].float().cpu()}

        latents = self._latents(key, make)["latents"]
        weight = None
        if cut.mask is not None:
            mask = torch.from_numpy(cut.mask)[None, None]
            mask = nn.functional.adaptive_avg_pool2d(mask, (latents.shape[-2], latents.shape[-1]))[0]
            mask = mask.clamp(min=self.config.data.unmasked)
            weight = (mask / mask.mean().clamp(min=1e-6)).to(self.device)
        return EncodedPicture(latents.to(self.device), weight, cut.corner)

    # A step

    def prepare(self, device: torch.device, autocast: Autocast) -> None:
        self.autocast = autocast

    def loss(self, networks: Networks, k: int, positions: slice) -> Tensor:
        at = self._draws(k)[positions]
        return self._losses(
            networks, [replace(pick, position=i) for i, picks in enumerate(at) for pick in picks], len(at)
        )

    def _losses(self, networks: Networks, picks: Sequence[Pick], count: int) -> Tensor:
        """The losses [count] at the positions of the picks: one forward pass for each size of pictures."""
        total = torch.zeros(count, device=self.device)
        groups: dict[Size, list[Pick]] = {}
        for pick in picks:
            groups.setdefault(self.buckets[pick.picture], []).append(pick)
        for size, group in groups.items():
            losses = self._group_losses(networks, group, size)
            weights = torch.tensor([pick.weight for pick in group], device=self.device)
            places = torch.tensor([pick.position for pick in group], device=self.device)
            total = total.index_add(0, places, losses * weights)
        return total

    def _group_losses(self, networks: Networks, picks: Sequence[Pick], size: Size) -> Tensor:
        encoded = [self.encoded[pick.picture, pick.crop, pick.mirrored] for pick in picks]
        x0 = torch.stack([each.latents for each in encoded])
        noise = torch.stack([pick.noise for pick in picks]).to(self.device)
        t = torch.tensor([pick.t for pick in picks], device=self.device)
        if not self.loaded.noise.is_flow:
            t = t.long()
        inputs = self.inputs(networks, [pick.text for pick in picks], size)
        self._place(inputs, picks, encoded, size)
        x_t = self.process.q_sample(x0, t, noise)
        output = self.predict(self.denoiser(networks, picks), x_t, t, inputs)
        target = self.process.target(x0, t, noise)
        if any(pick.imitates for pick in picks):
            with torch.no_grad(), self.base_only():
                own = self.predict(self.base, x_t, t, inputs)
            imitates = torch.tensor([pick.imitates for pick in picks], device=self.device)
            target = torch.where(imitates.reshape(-1, 1, 1, 1), own, target)
        error = self.process.weights(t, x0) * (output - target).square()
        weights = [each.weight for each in encoded]
        if any(weight is not None for weight in weights):
            one = torch.ones(1, *x0.shape[-2:], device=self.device)
            error = error * torch.stack([one if weight is None else weight for weight in weights])
        return error.flatten(1).mean(1)

    def _place(
        self, inputs: dict[str, Any], picks: Sequence[Pick], encoded: Sequence[EncodedPicture], size: Size
    ) -> None:
        """Tell networks that read them (XL) the pictures' own sizes and crops: (height, width) of each."""
        if "sizes" in inputs:
            width, height = size
            originals = [self.originals[pick.picture][::-1] for pick in picks]
            rows = [(*own, *each.corner, height, width) for own, each in zip(originals, encoded, strict=True)]
            inputs["sizes"] = torch.tensor(rows).to(inputs["sizes"])

    def _draw(self, k: int) -> list[list[Pick]]:
        """What step k trains on, at each position: a pure function of (seed, k)."""
        c, B, pictures = self.config, self.batch, self.order(k).tolist()
        g = generator(self.seed, STEP, k)
        u = torch.rand(6, B, generator=g)
        t = self.times(u[0], pictures)
        words = generator(self.seed, CAPTIONS, k)
        picks = []
        for i, picture in enumerate(pictures):
            noise = torch.randn(1, *self.shape_of(picture), generator=g)
            if c.diffusion.offset_noise:
                noise = offset_noise(noise, c.diffusion.offset_noise, g)
            text: str | None = self._caption(picture, u[1, i].item(), words)
            if u[2, i] < c.diffusion.caption_dropout:
                text = None
            crop = int(u[3, i] * c.data.crops)
            mirrored = bool(c.data.flip and u[4, i] < 0.5)
            own = Pick(picture, text, t[i], noise[0], crop, mirrored)
            picks.append([own, *self._prior_of(own, u[5, i].item(), g)])
        return picks

    def _prior_of(self, pick: Pick, u: float, g: torch.Generator) -> list[Pick]:
        """The prior example that goes with one of the data: of what the model knew before."""
        c = self.config.prior
        if c.captions and c.target == "model":
            caption = c.captions[int(u * len(c.captions))]
            return [replace(pick, text=caption, weight=c.weight, imitates=True)]
        if not self.prior:
            return []
        picture = self.prior[int(u * len(self.prior))]
        noise = torch.randn(self.shape_of(picture), generator=g)
        return [Pick(picture, self.texts[picture][0][0], pick.t, noise, weight=c.weight)]

    def times(self, u: Tensor, pictures: Sequence[int]) -> list[float]:
        """A time for each picture, from u [B] uniform in [0, 1); stratified over the batch."""
        kind = self.config.diffusion.times
        if not self.loaded.noise.is_flow:
            if kind == "logit_normal":
                raise InputError(f"{self.where}: diffusion.times = 'logit_normal' is for flows")
            return times(u, self.process.T, stratified=True).tolist()
        s = (torch.arange(len(u)) + u) / len(u)
        if kind != "uniform":  # Esser et al. 2024, section 3.1: logit-normal with mean 0 and scale 1
            s = torch.special.ndtri(s.double().clamp(1e-6, 1 - 1e-6)).sigmoid()
        return [self.process.T * self.noise_at(p).shifted(x) for p, x in zip(pictures, s.tolist(), strict=True)]

    def noise_at(self, picture: int) -> schedulers.NoiseSchedule:
        """The flow for the size of a picture, with the configuration's shift if it has one."""
        return self._noise_of(self.buckets[picture])

    def _noise_of(self, size: Size) -> schedulers.NoiseSchedule:
        noise = self.loaded.noise
        if (shift := self.config.diffusion.shift) is not None:
            return schedulers.NoiseSchedule.flow(shift, noise.T)
        if noise.dynamic is not None:
            noise = noise.at_resolution(sizes.tokens(self.checked, size))
        return noise.for_steps(self.checked.defaults.steps)

    def shape_of(self, picture: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture's latents."""
        return self.coder.shape(self.buckets[picture])

    def _caption(self, picture: int, u: float, g: torch.Generator) -> str:
        """A caption of a picture by its weight, u being uniform in [0, 1); its tags shuffled."""
        captions = self.texts[picture]
        ends = list(itertools.accumulate(weight for _, weight in captions))
        text = captions[min(bisect.bisect_right(ends, u * ends[-1]), len(ends) - 1)][0]
        separator, keep = self.config.data.shuffle, self.config.data.keep
        if not separator:
            return text
        tags = [tag.strip() for tag in text.split(separator)]
        order = torch.randperm(max(0, len(tags) - keep), generator=g).tolist()
        return f"{separator} ".join([*tags[:keep], *(tags[keep + i] for i in order)])

    # Seen from outside

    def held_out(self, networks: Networks) -> list[float]:
        if not len(self.test):
            return []
        repeats = -(-HELD_OUT_DRAWS // len(self.test))
        pictures = self.test.repeat(repeats).tolist()
        quartiles = []
        for quarter in range(4):
            longest = max((self.shape_of(p) for p in pictures), key=lambda shape: shape[0] * shape[1] * shape[2])
            t, noise = held_out_draws((len(pictures), longest[0] * longest[1] * longest[2]), self.process.T, quarter)
            picks = []
            for i, picture in enumerate(pictures):
                shape = self.shape_of(picture)
                own = noise[i, : shape[0] * shape[1] * shape[2]].reshape(shape)
                text = max(self.texts[picture], key=lambda pair: pair[1])[0]
                picks.append(Pick(picture, text, t[i].item(), own, position=i % AT_ONCE))
            parts = [picks[i : i + AT_ONCE] for i in range(0, len(picks), AT_ONCE)]
            quartiles.append(sum(self._losses(networks, part, len(part)).sum().item() for part in parts) / len(picks))
        return quartiles

    def samples(self, networks: Networks) -> list[Image.Image]:
        """Each prompt twice from the same noise: by the tuned model, and by the base."""
        tuned = self.sheet(networks, self._prompts(), self.config.sample.seed)
        return [picture for pair in zip(tuned, self._base_sheet, strict=True) for picture in pair]

    def sample_names(self) -> Sequence[str]:
        return [name for text, _ in self._prompts() for name in (text, f"base: {text}")]

    @property
    def _base_sheet(self) -> list[Image.Image]:
        if not hasattr(self, "_base_pictures"):
            with self.base_only():
                self._base_pictures = self.sheet(None, self._prompts(), self.config.sample.seed)
        return self._base_pictures

    def sheet(self, networks: Networks | None, prompts: Sequence[tuple[str, int]], seed: int) -> list[Image.Image]:
        """Pictures of (prompt, training picture), the i-th of the seed `seed` + i; without networks, by the base."""
        s = self.config.sample
        options = {key: value for key in ("steps", "guidance") if (value := getattr(s, key)) is not None}
        size = (self.data.square,) * 2
        plan = make_plan(self.loaded.model, [text for text, _ in prompts], count=1, seed=seed, size=size, **options)
        scheduler = self.loaded.scheduler(plan, size)
        pictures = []
        for i, (prompt, picture) in enumerate(prompts):
            g = torch.Generator().manual_seed(seed + i)
            noise = normal((1, *self.coder.shape(size)), g).to(self.device)
            with self.autocast():
                pick = Pick(picture, prompt, 0, noise[0])
                call = self.base if networks is None else self.denoiser(networks, [pick])
                view = Substitute(self.pipeline, **{self.row.denoiser: Substitute(self.base, call)})
                embeddings = self.prompted(networks, prompt, guided=plan.guidance != 1)
                network = network_of(
                    view,
                    self.row,
                    embeddings,
                    plan.guidance,
                    size,
                    guidance_is_input=self.checked.guidance_is_input,
                )
                start = scheduler.start(self.codec.pack(noise), plan.steps)

                def ours(x: Tensor, t: Tensor, network: Call = network) -> Tensor:
                    return network(x.to(self.loaded.dtype), t).float()

                try:
                    x0 = scheduler.sample(ours, start, plan.steps, generators=g)
                except schedulers.NonFinite as error:
                    raise InvalidOutput(f"training diverged: a picture of the sheet is {error}") from error
            pictures += self.loaded.decode(self.codec.unpack(x0, *noise.shape[-2:]))
        return pictures

    def prompted(self, networks: Networks | None, prompt: str, guided: bool) -> dict[str, Any]:
        """The embeddings of a prompt of the sheets, and of the empty one."""
        read = FineTune.condition if networks is None else type(self).condition
        own = read(self, networks or {}, [prompt])
        if guided and not self.checked.guidance_is_input:
            empty = read(self, networks or {}, [None])
            own |= {f"negative_{name}": value for name, value in empty.items()}
        return own

    def _prompts(self) -> list[tuple[str, int]]:
        """The prompts of the sheets, each with a training picture: the configuration's, else the pictures' captions."""
        pictures = self.train.tolist()
        if prompts := self.config.sample.prompts:
            return [(text, pictures[i % len(pictures)]) for i, text in enumerate(prompts)]
        captions = {max(self.texts[i], key=lambda pair: pair[1])[0] or "picture": i for i in reversed(pictures)}
        distinct = sorted(captions.items(), key=lambda pair: pair[1])
        return [distinct[i] for i in evenly(torch.arange(len(distinct)), self.config.sample.count).tolist()]

    def about(self) -> dict[str, Any]:
        base = {"name": self.loaded.model.name, "family": self.checked.family, "sha256": self.loaded.model_hash}
        return {
            "job": self.config.job,
            "base": base,
            "data": self.data.about(),
            "network": {},
            "noise": {"name": self.loaded.noise.name, "T": self.loaded.noise.T},
            "prediction": self.loaded.prediction,
            "variance": "fixed_small",
        }
