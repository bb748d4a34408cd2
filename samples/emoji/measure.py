"""Measure a model of this recipe: how often it draws the right thing, and how much it has memorised.

    python samples/emoji/measure.py work/ --model emoji              # or a folder; writes work/measure.json and .png

Pictures are generated with the model's defaults and compared at 16x16 RGB (Pillow's BOX filter, values 0 … 255) by
their RMS distance. A prompt is drawn correctly if, of all pictures in its style, the nearest is that of its concept.
Accuracies have Wilson's 95 % interval. Chance is one in the number of pictures of the style.

  english, chinese   training captions with a style: in both languages four in five are names (one in three of the
                     English ones with an article), one in five is a keyword
  held_out           names with a style that was held out for the concept; the held-out picture is a candidate too.
                     copying: the accuracy of copying the concept's picture in another style
  diversity          mean distance between pictures of one prompt with several seeds, and between those of two prompts
  memorisation       learned: the share of pictures of English prompts whose nearest training picture is that of their
                     name and style. ratio: the median distance of generated pictures to the nearest training picture,
                     over that of held-out pictures; 0 for copies. Nearly all held-out pictures have a similar training
                     picture, the same concept in another style; ratio_unlike leaves these out. copies: the ratio of
                     training pictures that were encoded and decoded, a lower bound for a model that has memorised them
  sliced_wasserstein between generated and all true pictures. floor: between as many true ones and all the others.
                     ceiling: between noise and the true ones
  autoencoder        mean PSNR in dB of decode(encode(picture)) over the held-out pictures
  cost               seconds for a picture, and the peak memory of the process, on a CPU with two threads

With 300 prompts a language and 300 held-out pairs, that is 964 pictures. They are generated with one process a core.
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

COLUMNS, SHOWN = 16, 32  # of the contact sheet; pairs shown of a group
ENGLISH, CHINESE = ("name", "keyword"), ("zh", "zh_keyword")
KEYWORDS = 0.2  # share of the prompts; it does not depend on the shares in training, so figures stay comparable


class Pictures:
    """The data set: names, styles, pictures uint8 [N, 64, 64, 3], features [N, 768], and which are held out."""

    def __init__(self, work: Path, card: dict) -> None:
        data = np.load(work / "data.npz")
        in_card = np.isin(data["names"], card["concepts"]) & np.isin(data["styles"], card["styles"])
        self.names, self.styles, self.pictures = (data[k][in_card] for k in ("names", "styles", "pictures"))
        self.features = np.stack([small(Image.fromarray(p)) for p in self.pictures])
        held_out = {tuple(pair) for pair in card["held_out"] or ()}
        self.held_out = np.array(
            [pair in held_out for pair in zip(self.names.tolist(), self.styles.tolist(), strict=True)], dtype=bool
        )

    def nearest(self, feature: np.ndarray, style: str) -> int:
        of_style = np.flatnonzero(self.styles == style)
        return int(of_style[distances(feature[None], self.features[of_style])[0].argmin()])


Query = tuple[int, str, str]  # the index of the right picture, the prompt, its kind


class Maker:
    """Generates pictures with a model's defaults, in `workers` processes of one thread each; results are in order."""

    def __init__(self, model: str, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, context, _load, (model,)) if workers > 1 else None
        if self.pool is None:
            _load(model, threads=None)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        run = map if self.pool is None else self.pool.map
        return list(run(_generate, prompts, seeds))


_generator: ImageGenerator | None = None  # of this process


def _load(model: str, threads: int | None = 1) -> None:
    global _generator
    if threads:
        torch.set_num_threads(threads)
    _generator = diffgen.load(model)


def _generate(prompt: str, seed: int) -> Image.Image:
    assert _generator is not None
    return _generator.generate(prompt, seed=seed)[0]


class Group:
    """Queries, the pictures generated for them, and which are correct."""

    def __init__(self, pictures: Pictures, queries: Sequence[Query], maker: Maker, draw: random.Random):
        self.queries = queries
        self.images = maker([text for _, text, _ in queries], [draw.randrange(2**32) for _ in queries])
        self.features = np.stack([small(image) for image in self.images])
        self.nearest = [
            pictures.nearest(f, pictures.styles[k]) for f, (k, _, _) in zip(self.features, queries, strict=True)
        ]
        self.right = [n == k for n, (k, _, _) in zip(self.nearest, queries, strict=True)]
        self.kinds = [kind for _, _, kind in queries]

    def figures(self, pictures: Pictures) -> dict:
        """Accuracy, its interval, the number of prompts, accuracy by kind and style, and the wrong answers."""
        n, rate = len(self.right), statistics.fmean(self.right)
        styles = [str(pictures.styles[k]) for k, _, _ in self.queries]
        return {
            "accuracy": round(rate, 4),
            "interval": [round(x, 4) for x in wilson(sum(self.right), n)],
            "prompts": n,
            "by_kind": share(self.right, self.kinds),
            "by_style": share(self.right, styles),
            "wrong": [
                {"prompt": text, "nearest": str(pictures.names[near])}
                for (_, text, _), near, right in zip(self.queries, self.nearest, self.right, strict=True)
                if not right
            ],
        }

    def rows(self, pictures: Pictures) -> list[list[Image.Image]]:
        """Rows of the first generated pictures, each with a row of the true pictures below."""
        true = [Image.fromarray(pictures.pictures[k]) for k, _, _ in self.queries]
        rows = []
        for start in range(0, min(SHOWN, len(true)), COLUMNS):
            part = slice(start, min(start + COLUMNS, SHOWN))
            rows += [self.images[part], true[part]]
        return rows


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval (1927) of the proportion `right` / n; valid at 0 and 1 too."""
    rate, middle = right / n, (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n * rate * (1 - rate) + z * z / 4) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def share(right: Sequence[bool], keys: Sequence[str]) -> dict[str, float]:
    """The share that is right, for each key."""
    return {
        key: round(statistics.fmean(r for r, k in zip(right, keys, strict=True) if k == key), 4)
        for key in sorted(set(keys))
    }


def draw_prompts(
    pictures: Pictures, table: dict[str, dict], kinds: Sequence[str], count: int, draw: random.Random
) -> list[Query]:
    """Draw `count` training captions with a style, of different pictures; `kinds` are (name, keyword)."""
    queries: dict[int, Query] = {}
    order = draw.sample(np.flatnonzero(~pictures.held_out).tolist(), int((~pictures.held_out).sum()))
    for kind, total in zip(kinds[::-1], (round(count * KEYWORDS), count), strict=True):  # names are the rest
        for k in order:
            if len(queries) == total:
                break
            name, style = str(pictures.names[k]), str(pictures.styles[k])
            text = None if k in queries else prompt(name, table[name], style, kind, draw)
            if text is not None and kind == "name" and draw.random() < 1 / 3:
                text = styled(article(name), style, kind)[0]
            if text is not None:
                queries[k] = (k, text, kind)
    return draw.sample(list(queries.values()), len(queries))


def cost(model: str) -> dict:
    """Seconds to load the model and to make a picture (median of five after the first), and peak memory."""
    torch.set_num_threads(2)
    start = time.perf_counter()
    generator = diffgen.load(model, device="cpu")
    load_seconds = time.perf_counter() - start
    seconds = []
    for seed in range(6):
        start = time.perf_counter()
        generator.generate("a red apple", seed=seed)
        seconds.append(time.perf_counter() - start)
    return {
        "load_seconds": round(load_seconds, 2),
        "seconds": round(statistics.median(seconds[1:]), 3),
        "peak_mib": round(peak_bytes() / 2**20),
        "threads": 2,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def peak_bytes() -> int:
    """The peak memory of this process.

    On Linux, getrusage would include the memory of the parent process at the fork.
    """
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def through(folder: Path, pictures: np.ndarray) -> np.ndarray:
    """Encode and decode pictures uint8 [N, H, W, 3] with the model's autoencoder; same shape and dtype."""
    vae, _ = read_autoencoder(folder)
    decoded = []
    for batch in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(64):
        y = vae.decode(vae.encode(batch.float() / 127.5 - 1).latent_dist.mean).sample.clamp(-1, 1)
        decoded.append(y.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1))
    return torch.cat(decoded).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """The mean PSNR in dB of pictures uint8 [N, H, W, 3]; equal pictures count as 100 dB."""
    mse = np.square((a.astype(float) - b) / 255).mean((1, 2, 3))
    return float(-10 * np.log10(mse.clip(1e-10)).mean())


def diversity(maker: Maker, queries: Sequence[Query], seeds: int, draw: random.Random) -> tuple[dict, list]:
    """(mean distances between pictures of one prompt and between first pictures of two prompts, rows of pictures)."""
    texts = [text for _, text, _ in queries for _ in range(seeds)]
    images = maker(texts, [draw.randrange(2**32) for _ in texts])
    rows = [images[i : i + seeds] for i in range(0, len(images), seeds)]
    features = [np.stack([small(p) for p in row]) for row in rows]

    def mean(x: np.ndarray) -> float:
        return float(np.mean([distances(x[i : i + 1], x[j : j + 1])[0, 0] for i, j in combinations(range(len(x)), 2)]))

    figures = {
        "of_one_prompt": round(float(np.mean([mean(f) for f in features])), 2),
        "of_two_prompts": round(mean(np.stack([f[0] for f in features])), 2),
        "prompts": len(queries),
        "seeds": seeds,
    }
    return figures, rows


def copying(pictures: Pictures, queries: Sequence[Query]) -> float:
    """The accuracy of answering with the nearest of the concept's training pictures in other styles."""
    right = []
    for k, _, _ in queries:
        others = np.flatnonzero((pictures.names == pictures.names[k]) & ~pictures.held_out)
        distance = distances(pictures.features[[k]], pictures.features[others])[0]
        right.append(pictures.nearest(pictures.features[others[distance.argmin()]], str(pictures.styles[k])) == k)
    return round(statistics.fmean(right), 4)


def memorisation(pictures: Pictures, queries: Sequence[Query], generated: dict[str, np.ndarray]) -> dict:
    """The ratio of each set of `generated` features [N, D]; and `learned`, for the set "ratio" of the queries."""
    trained = np.flatnonzero(~pictures.held_out)
    seen, unseen = pictures.features[trained], pictures.features[pictures.held_out]
    real = [torch.from_numpy(features) for features in (seen, unseen)]
    near = distances(generated["ratio"], seen)
    same_concept = pictures.names[pictures.held_out][:, None] == pictures.names[trained]
    unlike = np.where(same_concept, np.inf, distances(unseen, seen))
    return {
        "learned": round(float(np.mean(trained[near.argmin(1)] == [k for k, _, _ in queries])), 4),
        **{name: round(memorisation_ratio(torch.from_numpy(x), *real), 4) for name, x in generated.items()},
        "ratio_unlike": round(float(np.median(near.min(1)) / np.median(unlike.min(1))), 4),
    }


def what_is_measured(folder: Path, card: dict) -> dict:
    """Identifies what was measured, so that card.py can reject figures of other weights or other defaults."""
    network = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return {"unet_sha256": hashlib.sha256(network.read_bytes()).hexdigest(), "defaults": card["defaults"]}


def workers() -> int:
    """The number of processes: one for each core, or one if there is a GPU."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def main(
    work: Path, model: str, prompts: int, held_out: int, seed: int, out: Path, with_cost: bool, workers: int = 1
) -> None:
    folder = find(model).folder
    card = json.loads((folder / "card.json").read_text("utf-8"))
    pictures, table = Pictures(work, card), names(work)
    maker, draw = Maker(model, workers), random.Random(seed)
    start = time.perf_counter()
    queries = {
        "english": draw_prompts(pictures, table, ENGLISH, prompts, draw),
        "chinese": draw_prompts(pictures, table, CHINESE, prompts, draw),
    }
    held_out_indices = np.flatnonzero(pictures.held_out).tolist()
    if held_out_indices:
        queries["held_out"] = [
            (k, styled(str(pictures.names[k]), str(pictures.styles[k]), "name")[0], "name")
            for k in draw.sample(held_out_indices, min(held_out, len(held_out_indices)))
        ]
    groups = {}
    for name, group_queries in queries.items():
        groups[name] = Group(pictures, group_queries, maker, draw)
        print(
            f"{name}: {statistics.fmean(groups[name].right):.3f} of {len(group_queries)}", file=sys.stderr, flush=True
        )
    english = groups["english"]
    spread, rows = diversity(maker, english.queries[:COLUMNS], 4, draw)

    generated = torch.from_numpy(english.features)
    true = torch.from_numpy(pictures.features)
    shuffle = torch.Generator().manual_seed(seed)
    some, others = true[torch.randperm(len(true), generator=shuffle)].split(
        [len(generated), len(true) - len(generated)]
    )
    noise = torch.rand(generated.shape, generator=shuffle) * 255
    scale = generated.shape[1] ** 0.5  # to RMS distances over the 768 values, in 0 … 255 like all figures
    figures = {
        "model": Path(model).name,
        "of": what_is_measured(folder, card),
        "seed": seed,
        "concepts": len(set(pictures.names.tolist())),
        **{name: group.figures(pictures) for name, group in groups.items()},
        "diversity": spread,
        "sliced_wasserstein": {
            "value": round(sliced_wasserstein(generated, true) / scale, 3),
            "floor": round(sliced_wasserstein(some, others) / scale, 3),
            "ceiling": round(sliced_wasserstein(noise, true) / scale, 3),
        },
    }
    if held_out_indices:
        unseen = pictures.pictures[pictures.held_out]
        decibels = psnr(through(folder, unseen), unseen)
        figures["autoencoder"] = {"psnr_held_out_db": round(decibels, 2), "pictures": len(unseen)}
        copies = through(folder, pictures.pictures[[k for k, _, _ in english.queries]])
        figures["memorisation"] = memorisation(
            pictures,
            english.queries,
            {
                "ratio": english.features,
                "ratio_held_out_prompts": groups["held_out"].features,
                "copies": np.stack([small(Image.fromarray(p)) for p in copies]),
            },
        )
        figures["held_out"]["copying"] = copying(pictures, queries["held_out"])
    figures["seconds"] = round(time.perf_counter() - start)
    if with_cost:
        command = [sys.executable, __file__, str(work), "--model", model, "--cost-only"]
        figures["cost"] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    blank = [[Image.new("RGB", (64, 64), (128, 128, 128))]]
    shown = [row for group in groups.values() for row in (*group.rows(pictures), *blank)]
    sheet([*shown, *(list(column) for column in zip(*rows, strict=True))]).save(out.with_suffix(".png"))
    short = {k: {n: v for n, v in f.items() if n != "wrong"} if isinstance(f, dict) else f for k, f in figures.items()}
    print(json.dumps(short, indent=1))
    print(f"{out.with_suffix('.png')}: generated above, true below; English, Chinese, held out; last, prompts by seeds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="emoji", help="a name or a folder")
    parser.add_argument("--prompts", type=int, default=300, help="prompts of each language")
    parser.add_argument("--held-out", type=int, default=300, help="maximum number of pairs")
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
