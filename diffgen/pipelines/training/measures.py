"""How good a fine-tuning is: what it learned, and what it changed beside that. Each figure with floor and ceiling.

    fit           held-out loss of the subject's pictures; the base's is the floor
    drift         mean squared difference of the outputs of base and tuned model for captions without the trigger, over
                  the mean square of the output; the same with the trigger is the ceiling: what was meant to change
    subject_rank  of tuned pictures of the captions, how many are nearer to a picture of the subject than to any of the
                  base's; the base's own pictures are the floor
    copying       distance of tuned pictures to the nearest training picture, over that of held-out pictures
    diversity     distance between two seeds of a prompt, over the base's
    prompts_kept  captions without the trigger whose tuned picture is nearest to the base's of the same caption; the
                  base's own pictures of other seeds are the ceiling

Pictures are compared as 16×16 RGB.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffgen.devices import choose_device
from diffgen.errors import InputError
from diffgen.training.config import parse
from diffgen.training.data.dataset import Progress
from diffgen.training.evaluate import FineTuneMeasures
from diffgen.training.evaluation import Figures
from diffgen.training.job import JOBS
from diffgen.training.metrics import memorisation_ratio, nearest
from diffgen.training.run import read_run, weights_file

from .finetune import FineTune, Pick
from .pictures import open_pictures

SIDE = 16
DRAWS = 16  # pairs of a time and a noise for the drift
BETTER = {
    "fit": "lower",
    "drift": "lower",
    "subject_rank": "higher",
    "copying": "near 1",
    "diversity": "near 1",
    "prompts_kept": "higher",
}


class Measured:
    """A run with its base: pictures and outputs of both."""

    def __init__(self, folder: Path, data: str, device: str, seed: int) -> None:
        """Raises InputError for a run without a checkpoint, and for other data than its own."""
        self.run, self.seed = read_run(folder), seed
        kind = JOBS[self.run.job]
        config = parse(self.run.config, folder / "run.json", kind.load("config"))
        pictures = open_pictures(data, config, str(folder))
        if pictures.about()["fingerprint"] != self.run.data.get("fingerprint"):
            raise InputError(f"{data}: not the pictures of this run", "give the folder that it was trained on")
        newest = self.run.latest()
        if newest is None:
            raise InputError(f"{folder} has no checkpoint to read", "train it first")
        self.step = int(newest.name)
        self.job: FineTune = kind.load("job")(config, pictures, str(folder), device=str(choose_device(device)))
        self.job.prepare(self.job.device, contextlib.nullcontext)
        for network in self.job.networks.values():
            network.to(self.job.device).eval()
        self.weights = load_file(weights_file(newest, "ema"))

    def tune(self) -> None:
        """From now on, the model is the tuned one."""
        networks = self.job.networks
        for name, network in networks.items():
            prefix = "" if len(networks) == 1 else f"{name}."
            own = {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}
            network.load_state_dict(own)

    @torch.no_grad()
    def outputs(self, captions: list[str]) -> Tensor:
        """The model's outputs at frozen (x_t, t) for captions in turn: [DRAWS, …]."""
        job, g, size = self.job, torch.Generator().manual_seed(self.seed), (self.job.data.square,) * 2
        parts = []
        for i in range(DRAWS):
            noise = torch.randn(1, *job.coder.shape(size), generator=g).to(job.device)
            picture = int(job.train[i % len(job.train)])
            x0 = job.encoded[picture, 0, False].latents[None]
            if x0.shape != noise.shape:
                x0 = torch.nn.functional.interpolate(x0, noise.shape[-2:])
            t = torch.tensor([(i + 0.5) / DRAWS * job.process.T], device=job.device)
            t = t if job.loaded.noise.is_flow else t.long()
            inputs = job.inputs(job.networks, [captions[i % len(captions)]], size)
            call = job.denoiser(job.networks, [Pick(picture, None, 0.0, noise[0])])
            parts.append(job.predict(call, job.process.q_sample(x0, t, noise), t, inputs))
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, captions: list[str], seed: int) -> Tensor:
        """Pictures of the captions, one each, as 16×16 RGB: [N, 768] in [0, 1]."""
        train = self.job.train.tolist()
        prompts = [(text, train[i % len(train)]) for i, text in enumerate(captions)]
        return small(self.job.sheet(self.job.networks, prompts, seed))


def small(pictures: list[Image.Image]) -> Tensor:
    """Pictures as vectors [N, 768] in [0, 1]."""
    values = [np.asarray(p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for p in pictures]
    return torch.from_numpy(np.stack(values).astype(np.float32) / 255).flatten(1)


def measure(
    folder: Path, data: str, *, samples: int = 16, seed: int = 0, device: str = "auto", progress: Progress | None = None
) -> FineTuneMeasures:
    """Measure a run of `diffgen finetune`. Raises InputError."""
    with torch.no_grad():
        return _measure(Measured(folder, data, device, seed), samples, progress or (lambda done, total: None))


def _measure(m: Measured, samples: int, progress: Progress) -> FineTuneMeasures:
    job, trigger = m.job, m.job.config.data.trigger
    own = sorted({max(job.texts[i], key=lambda pair: pair[1])[0] for i in job.train.tolist()})
    plain = list(job.config.prior.captions) or sorted({_without(text, trigger) for text in own} - {""}) or ["a picture"]
    subject = [own[i % len(own)] for i in range(samples)]
    others = plain[:samples]
    base = _of(m, subject, others)
    progress(1, 3)
    m.tune()
    tuned = _of(m, subject, others)
    progress(2, 3)
    real = small([Image.fromarray(job.cut(i, 0, False).pixels) for i in job.train.tolist()])
    metrics: dict[str, Figures] = {}
    left_out: dict[str, str] = {}
    if base["loss"] and tuned["loss"]:
        metrics["fit"] = Figures(_mean(tuned["loss"]), _mean(base["loss"]), 0.0)
    else:
        left_out["fit"] = "no picture is held out"
    scale = base["plain"].square().mean()
    change = {key: float((tuned[key] - base[key]).square().mean() / scale) for key in ("plain", "own")}
    metrics["drift"] = Figures(change["plain"], 0.0, change["own"])
    rank = [_nearer(pictures, real, base["others"]) for pictures in (tuned["subject"], base["subject"])]
    metrics["subject_rank"] = Figures(rank[0], rank[1], 1.0)
    if len(job.test):
        test = small([Image.fromarray(job.cut(i, 0, False).pixels) for i in job.test.tolist()])
        try:
            metrics["copying"] = Figures(memorisation_ratio(tuned["subject"], real, test), 0.0, 1.0)
        except ValueError as error:
            left_out["copying"] = str(error)
    else:
        left_out["copying"] = "no picture is held out"
    spread = [(pictures["subject"] - pictures["again"]).norm(dim=1).mean() for pictures in (tuned, base)]
    metrics["diversity"] = Figures(float(spread[0] / spread[1].clamp_min(1e-6)), 0.0, 1.0)
    if len(others) > 1:
        kept = [_matched(pictures["other_seed"], base["others"]) for pictures in (tuned, base)]
        metrics["prompts_kept"] = Figures(kept[0], 1 / len(others), kept[1])
    else:
        left_out["prompts_kept"] = "prior.captions has fewer than two"
    progress(3, 3)
    return FineTuneMeasures(
        str(m.run.folder),
        m.run.job,
        m.step,
        samples,
        m.seed,
        metrics,
        {name: BETTER[name] for name in metrics},
        left_out,
    )


def _of(m: Measured, subject: list[str], others: list[str]) -> dict[str, Any]:
    """What is measured of base and tuned model alike."""
    return {
        "loss": m.job.held_out(m.job.networks),
        "plain": m.outputs(others),
        "own": m.outputs(subject),
        "subject": m.pictures(subject, m.seed),
        "again": m.pictures(subject, m.seed + 1000),
        "others": m.pictures(others, m.seed),
        "other_seed": m.pictures(others, m.seed + 1000),
    }


def _without(text: str, trigger: str) -> str:
    return " ".join(text.replace(trigger, " ").split()) if trigger else text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _nearer(pictures: Tensor, real: Tensor, others: Tensor) -> float:
    """The share of pictures that are nearer to one of `real` than to any of `others`."""
    return float((nearest(pictures, real)[0] < nearest(pictures, others)[0]).float().mean())


def _matched(pictures: Tensor, references: Tensor) -> float:
    """The share of pictures whose nearest reference is the one of the same prompt."""
    return float((torch.cdist(pictures, references).argmin(1) == torch.arange(len(pictures))).float().mean())
