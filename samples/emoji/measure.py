"""What a model of this recipe can do, in figures: does it draw what it is asked for, and what has it learned by heart?

    python samples/emoji/measure.py work/ --model emoji              # or a folder; writes work/measure.json and .png

Pictures are made at the model's defaults and compared at 16x16 RGB (Pillow's BOX filter, values 0 … 255) by their RMS
distance. A prompt is answered right if the nearest of all pictures of its style is the one of its concept. An
accuracy's interval is Wilson's, of 95 %; chance would be right once in as many as the style has pictures.

  english, chinese   prompts drawn from the trained captions that say a style: in both languages four in five are
                     names (one in three of the English ones with its article), one in five is a keyword
  held_out           names with a style in which the concept was kept out of training; that picture counts too.
                     copying: what would be right of the concept's own pictures in other styles, given as they are
  diversity          mean distance between pictures of one prompt from several seeds; between those of two prompts
  memorisation       learned: how many pictures of English prompts are nearer to the very picture learned for that name
                     and style than to any other training picture. ratio: the distance to the nearest training picture,
                     median of the made over median of the held out; 0 for copies. Nearly all held out have a sister,
                     the same thing in another style: ratio_unlike compares them with other things alone. copies: the
                     ratio of training pictures that only went through the autoencoder, which is as near as a model that
                     knows them by heart can come
  sliced_wasserstein between the made and all true pictures; floor: between as many true ones and all the others;
                     ceiling: between noise and the true ones
  autoencoder        mean PSNR in dB of decode(encode(picture)) over the held-out pictures, which trained nothing
  cost               seconds of a picture, and the most memory of a process that makes one, on a CPU with two threads

With 300 prompts a language and 300 held-out pairs that is 964 pictures, made in as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from captions import article, names, prompt, styled
from data import distances, small
from PIL import Image

import diffgen
from diffgen.images.sheet import sheet
from diffgen.models.find import find
from diffgen.pipelines.training.parts import read_autoencoder
from diffgen.training.metrics import memorisation_ratio, sliced_wasserstein

if TYPE_CHECKING:
    from diffgen.pipelines.generate import ImageGenerator

COLUMNS, SHOWN = 16, 32  # of the contact sheet; pairs of a group
ENGLISH, CHINESE = ("name", "keyword"), ("zh", "zh_keyword")
KEYWORDS = 0.2  # of a language's prompts, however often training draws them: what is measured stays the same


class Pictures:
    """The data set: names, styles, pictures uint8 [N, 64, 64, 3], features [N, 768], and which were trained on."""

    def __init__(self, work: Path, card: dict) -> None:
        data = np.load(work / "data.npz")
        known = np.isin(data["names"], card["concepts"]) & np.isin(data["styles"], card["styles"])
        self.names, self.styles, self.pictures = (data[k][known] for k in ("names", "styles", "pictures"))
        self.features = np.stack([small(Image.fromarray(p)) for p in self.pictures])
        out = {tuple(pair) for pair in card["held_out"] or ()}
        self.held_out = np.array(
            [pair in out for pair in zip(self.names.tolist(), self.styles.tolist(), strict=True)], dtype=bool
        )

    def nearest(self, feature: np.ndarray, style: str) -> int:
        of_style = np.flatnonzero(self.styles == style)
        return int(of_style[distances(feature[None], self.features[of_style])[0].argmin()])


Asked = tuple[int, str, str]  # which picture a prompt is about, the prompt, its kind


class Maker:
    """Makes a model's pictures at its defaults, a process with one thread for each core; results are in order."""

    def __init__(self, model: str, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, context, _load, (model,)) if workers > 1 else None
        if self.pool is None:
            _load(model, threads=None)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        found = map(_made, prompts, seeds) if self.pool is None else self.pool.map(_made, prompts, seeds)
        return list(found)


_generator: ImageGenerator | None = None  # of this process


def _load(model: str, threads: int | None = 1) -> None:
    global _generator
    if threads:
        torch.set_num_threads(threads)
    _generator = diffgen.load(model)


def _made(prompt: str, seed: int) -> Image.Image:
    assert _generator is not None
    return _generator.generate(prompt, seed=seed)[0]


class Group:
    """Prompts, each about one picture of the set, what was made of them, and how often it was right."""

    def __init__(self, pictures: Pictures, asked: Sequence[Asked], maker: Maker, draw: random.Random):
        self.asked = asked
        self.made = maker([text for _, text, _ in asked], [draw.randrange(2**32) for _ in asked])
        self.features = np.stack([small(m) for m in self.made])
        self.nearest = [
            pictures.nearest(f, pictures.styles[k]) for f, (k, _, _) in zip(self.features, asked, strict=True)
        ]
        self.right = [n == k for n, (k, _, _) in zip(self.nearest, asked, strict=True)]
        self.kinds = [kind for _, _, kind in asked]

    def figures(self, pictures: Pictures) -> dict:
        """accuracy, its interval, prompts, accuracy of each kind and style, and what was wrong."""
        n, rate = len(self.right), statistics.fmean(self.right)
        styles = [str(pictures.styles[k]) for k, _, _ in self.asked]
        return {
            "accuracy": round(rate, 4),
            "interval": [round(x, 4) for x in wilson(sum(self.right), n)],
            "prompts": n,
            "by_kind": share(self.right, self.kinds),
            "by_style": share(self.right, styles),
            "wrong": [
                {"prompt": text, "nearest": str(pictures.names[near])}
                for (_, text, _), near, right in zip(self.asked, self.nearest, self.right, strict=True)
                if not right
            ],
        }

    def rows(self, pictures: Pictures) -> list[list[Image.Image]]:
        """Of the first prompts: what was made, and below it the true picture."""
        true = [Image.fromarray(pictures.pictures[k]) for k, _, _ in self.asked]
        found = []
        for start in range(0, min(SHOWN, len(true)), COLUMNS):
            part = slice(start, min(start + COLUMNS, SHOWN))
            found += [self.made[part], true[part]]
        return found


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a proportion of which `right` of n were seen (Wilson 1927), sensible at 0 and 1 too."""
    rate, middle = right / n, (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n * rate * (1 - rate) + z * z / 4) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def share(right: Sequence[bool], keys: Sequence[str]) -> dict[str, float]:
    """How much is right, for each key."""
    return {
        key: round(statistics.fmean(r for r, k in zip(right, keys, strict=True) if k == key), 4)
        for key in sorted(set(keys))
    }


def draw_prompts(
    pictures: Pictures, table: dict[str, dict], kinds: Sequence[str], count: int, draw: random.Random
) -> list[Asked]:
    """`count` trained captions with a style, of different pictures: (picture, prompt, kind); `kinds`: name, keyword."""
    asked: dict[int, Asked] = {}
    order = draw.sample(np.flatnonzero(~pictures.held_out).tolist(), int((~pictures.held_out).sum()))
    for kind, together in zip(kinds[::-1], (round(count * KEYWORDS), count), strict=True):  # names are the rest
        for k in order:
            if len(asked) == together:
                break
            name, style = str(pictures.names[k]), str(pictures.styles[k])
            text = None if k in asked else prompt(name, table[name], style, kind, draw)
            if text is not None and kind == "name" and draw.random() < 1 / 3:
                text = styled(article(name), style, kind)[0]
            if text is not None:
                asked[k] = (k, text, kind)
    return draw.sample(list(asked.values()), len(asked))


def cost(model: str) -> dict:
    """Seconds to load the model, of a picture (median of five after the first), and the process's peak memory."""
    torch.set_num_threads(2)
    began = time.perf_counter()
    generator = diffgen.load(model, device="cpu")
    loaded = time.perf_counter() - began
    seconds = []
    for seed in range(6):
        began = time.perf_counter()
        generator.generate("a red apple", seed=seed)
        seconds.append(time.perf_counter() - began)
    return {
        "load_seconds": round(loaded, 2),
        "seconds": round(statistics.median(seconds[1:]), 3),
        "peak_mib": round(peak_bytes() / 2**20),
        "threads": 2,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def peak_bytes() -> int:
    """The most memory that this process has had, without what the one that started it had when it forked.

    That is why Linux is not asked by getrusage, whose number outlives an exec.
    """
    status = Path("/proc/self/status")
    if status.exists() and (said := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(said[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def through(folder: Path, pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] as the model's autoencoder gives them back, the same."""
    vae, _ = read_autoencoder(folder)
    found = []
    for batch in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(64):
        y = vae.decode(vae.encode(batch.float() / 127.5 - 1).latent_dist.mean).sample.clamp(-1, 1)
        found.append(y.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1))
    return torch.cat(found).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures uint8 [N, H, W, 3] of their PSNR in dB; equal ones count 100."""
    mse = np.square((a.astype(float) - b) / 255).mean((1, 2, 3))
    return float(-10 * np.log10(mse.clip(1e-10)).mean())


def diversity(maker: Maker, asked: Sequence[Asked], seeds: int, draw: random.Random) -> tuple[dict, list]:
    """Mean distances between pictures of one prompt, and between the first pictures of two; and rows of pictures."""
    texts = [text for _, text, _ in asked for _ in range(seeds)]
    made = maker(texts, [draw.randrange(2**32) for _ in texts])
    rows = [made[i : i + seeds] for i in range(0, len(made), seeds)]
    features = [np.stack([small(p) for p in row]) for row in rows]

    def mean(x: np.ndarray) -> float:
        return float(np.mean([distances(x[i : i + 1], x[j : j + 1])[0, 0] for i, j in combinations(range(len(x)), 2)]))

    figures = {
        "of_one_prompt": round(float(np.mean([mean(f) for f in features])), 2),
        "of_two_prompts": round(mean(np.stack([f[0] for f in features])), 2),
        "prompts": len(asked),
        "seeds": seeds,
    }
    return figures, rows


def copying(pictures: Pictures, asked: Sequence[Asked]) -> float:
    """How often the nearest of the concept's trained pictures in other styles would be taken for the one asked for."""
    right = []
    for k, _, _ in asked:
        others = np.flatnonzero((pictures.names == pictures.names[k]) & ~pictures.held_out)
        away = distances(pictures.features[[k]], pictures.features[others])[0]
        right.append(pictures.nearest(pictures.features[others[away.argmin()]], str(pictures.styles[k])) == k)
    return round(statistics.fmean(right), 4)


def memorisation(pictures: Pictures, asked: Sequence[Asked], made: dict[str, np.ndarray]) -> dict:
    """learned, of the pictures `ratio` asked for; and of all that were made [N, D], by name, their ratios."""
    trained = np.flatnonzero(~pictures.held_out)
    known, new = pictures.features[trained], pictures.features[pictures.held_out]
    real = [torch.from_numpy(features) for features in (known, new)]
    near = distances(made["ratio"], known)
    own = pictures.names[pictures.held_out][:, None] == pictures.names[trained]
    unlike = np.where(own, np.inf, distances(new, known))
    return {
        "learned": round(float(np.mean(trained[near.argmin(1)] == [k for k, _, _ in asked])), 4),
        **{name: round(memorisation_ratio(torch.from_numpy(x), *real), 4) for name, x in made.items()},
        "ratio_unlike": round(float(np.median(near.min(1)) / np.median(unlike.min(1))), 4),
    }


def what_is_measured(folder: Path, card: dict) -> dict:
    """By what card.py knows whether figures are of the model as it is: its network, and how it makes pictures."""
    network = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return {"unet_sha256": hashlib.sha256(network.read_bytes()).hexdigest(), "defaults": card["defaults"]}


def workers() -> int:
    """How many processes make pictures at once: one for each core, or one if there is a GPU."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def main(
    work: Path, model: str, prompts: int, held_out: int, seed: int, out: Path, with_cost: bool, workers: int = 1
) -> None:
    folder = find(model).folder
    card = json.loads((folder / "card.json").read_text("utf-8"))
    pictures, table = Pictures(work, card), names(work)
    maker, draw = Maker(model, workers), random.Random(seed)
    began = time.perf_counter()
    orders = {
        "english": draw_prompts(pictures, table, ENGLISH, prompts, draw),
        "chinese": draw_prompts(pictures, table, CHINESE, prompts, draw),
    }
    kept = np.flatnonzero(pictures.held_out).tolist()
    if kept:
        orders["held_out"] = [
            (k, styled(str(pictures.names[k]), str(pictures.styles[k]), "name")[0], "name")
            for k in draw.sample(kept, min(held_out, len(kept)))
        ]
    groups = {}
    for name, asked in orders.items():
        groups[name] = Group(pictures, asked, maker, draw)
        print(f"{name}: {statistics.fmean(groups[name].right):.3f} of {len(asked)}", file=sys.stderr, flush=True)
    english = groups["english"]
    spread, rows = diversity(maker, english.asked[:COLUMNS], 4, draw)

    made = torch.from_numpy(english.features)
    true = torch.from_numpy(pictures.features)
    shuffle = torch.Generator().manual_seed(seed)
    some, others = true[torch.randperm(len(true), generator=shuffle)].split([len(made), len(true) - len(made)])
    noise = torch.rand(made.shape, generator=shuffle) * 255
    scale = made.shape[1] ** 0.5  # as RMS distances of the 768 values, so that all figures are in 0 … 255
    figures = {
        "model": Path(model).name,
        "of": what_is_measured(folder, card),
        "seed": seed,
        "concepts": len(set(pictures.names.tolist())),
        **{name: group.figures(pictures) for name, group in groups.items()},
        "diversity": spread,
        "sliced_wasserstein": {
            "value": round(sliced_wasserstein(made, true) / scale, 3),
            "floor": round(sliced_wasserstein(some, others) / scale, 3),
            "ceiling": round(sliced_wasserstein(noise, true) / scale, 3),
        },
    }
    if kept:
        apart = pictures.held_out
        decibels = psnr(through(folder, pictures.pictures[apart]), pictures.pictures[apart])
        figures["autoencoder"] = {"psnr_held_out_db": round(decibels, 2), "pictures": int(apart.sum())}
        copies = through(folder, pictures.pictures[[k for k, _, _ in english.asked]])
        figures["memorisation"] = memorisation(
            pictures,
            english.asked,
            {
                "ratio": english.features,
                "ratio_held_out_prompts": groups["held_out"].features,
                "copies": np.stack([small(Image.fromarray(p)) for p in copies]),
            },
        )
        figures["held_out"]["copying"] = copying(pictures, orders["held_out"])
    figures["seconds"] = round(time.perf_counter() - began)
    if with_cost:
        command = [sys.executable, __file__, str(work), "--model", model, "--cost-only"]
        figures["cost"] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    blank = [[Image.new("RGB", (64, 64), (128, 128, 128))]]
    shown = [row for group in groups.values() for row in (*group.rows(pictures), *blank)]
    sheet([*shown, *(list(column) for column in zip(*rows, strict=True))]).save(out.with_suffix(".png"))
    short = {k: {n: v for n, v in f.items() if n != "wrong"} if isinstance(f, dict) else f for k, f in figures.items()}
    print(json.dumps(short, indent=1))
    print(f"{out.with_suffix('.png')}: made above, true below; English, Chinese, held out; last, prompts by seeds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="emoji", help="a name or a folder")
    parser.add_argument("--prompts", type=int, default=300, help="of each language")
    parser.add_argument("--held-out", type=int, default=300, help="at most so many pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="without suffix [work/measure]")
    parser.add_argument("--workers", type=int, default=workers(), help="processes [one for each core; 1 with a GPU]")
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--cost-only", action="store_true", help="print only the cost, as JSON")
    a = parser.parse_args()
    if a.cost_only:
        print(json.dumps(cost(a.model)))
    else:
        main(a.work, a.model, a.prompts, a.held_out, a.seed, a.out or a.work / "measure", not a.no_cost, a.workers)
