"""Write docs/pipelines.md from the lines of benchmarks/pipelines.py: python docs/pipelines.py pipelines.jsonl …"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
from tables import table  # type: ignore[import-not-found]

SOUND = ("audio", "dance", "ace_step", "rfd4", "gemma", "llada", "shap_e", "pipeline_utils")  # no pictures
PAGE = Path(__file__).parent / "pipelines.md"
REASONS = {  # of differences, each checked
    "StableVideoDiffusionPipeline": "theirs rounds, its step from σ = 700 subtracts large numbers in float32. "
    "Against float64 theirs is off by 1e-4, `euler` by 2e-7",
    "KandinskyPriorPipeline": "theirs rounds, its last step multiplies x0 by β₀/(1 − ᾱ₀) in float32, not by 1",
    "KandinskyV22PriorPipeline": "as KandinskyPriorPipeline",
    "KandinskyV22PriorEmb2EmbPipeline": "as KandinskyPriorPipeline",
    "Kandinsky3Img2ImgPipeline": "at t = 999 of the cosine schedule x0 is 20 000 times the error of ε, so the last bit "
    "of `add_noise` shows",
}
SHORT = (
    ("OSError", "the test downloads a model"),
    ("NameError: name 'transforms'", "needs torchvision"),
    ("Skipped: Deprecated", "deprecated"),
    ("AttributeError: 'LTXLatentUps", "it has no scheduler"),
    ("ValueError: You need to invert", "it needs an inversion first, with its own scheduler"),
    ("ValueError: Passing integer", "diffusers' first-order scheduler fails too: it steps by index"),
    ("AttributeError: 'DDIMScheduler' object has no attribute 'sigmas'", "diffusers' first-order scheduler fails too"),
    ("RuntimeError: cannot reshape", "the test needs its tokenizer"),
    ("AttributeError: T5Tokenizer", "the test needs its tokenizer"),
    ("NameError: name 'OmniGen", "needs torchvision"),
    ("ImportError: ConsisID", "needs OpenCV"),
)
ABOUT = """# Schedulers in diffusers' pipelines

`pipe.scheduler = s` was tried in the image and video pipelines of diffusers {version}, without the deprecated ones.
`benchmarks/pipelines.py` runs each with the small random networks of diffusers' own tests, first with diffusers'
scheduler of first order, then with ours at the same times:

    git clone --depth 1 https://github.com/huggingface/diffusers
    pip install accelerate parameterized requests-mock
    python benchmarks/pipelines.py diffusers -o pipelines.jsonl
    python docs/pipelines.py pipelines.jsonl

- **works**: the last states are equal, to 1e-5 of the largest value.
- **differs**: they are not, for the reason given.
- **refused**: it raises the error given, before there is a picture.
- **not tried**: its test does not run here, for the reason given.

*grid* says whether `dpmpp_2m` walked its karras grid. Where it is the pipeline's list, the pipeline passes a list of
its own or the times that its model was distilled on. An IndexError means that the pipeline indexes a table with times:
choose a grid of whole times, such as `leading`.

{counts}

"""


def main(files: list[str]) -> None:
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    for row in rows:
        row["pipeline"] = row["pipeline"].removesuffix("Wrapper").removesuffix("Pipeline") + "Pipeline"
    known = {row["pipeline"] for row in rows}
    rows += [{"pipeline": name, "result": "not tried", "words": "no test of diffusers builds it"}
             for name in pipelines() if name not in known]  # fmt: skip
    rows.sort(key=lambda row: row["pipeline"].lower())
    counts = {kind: sum(row["result"] == kind for row in rows) for kind in ("works", "differs", "refused", "not tried")}
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    lines = [["pipeline", "result", "difference", "compared with", "grid"], *map(cells, rows)]
    about = ABOUT.format(version=version("diffusers"), counts=f"{len(rows)} pipelines: {text}.")
    PAGE.write_text(about + table(lines) + "\n", "utf-8")


def pipelines() -> Iterator[str]:
    """The image and video pipelines of the installed diffusers that are not deprecated."""
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
            module = kind.__module__
            if "diffusers.pipelines." in module and not any(word in module for word in ("deprecated", "onnx", *SOUND)):
                yield name


def cells(row: dict[str, Any]) -> list[str]:
    words = next((short for start, short in SHORT if row["words"].startswith(start)), row["words"])
    reason = REASONS.get(row["pipeline"], words)
    difference = f"{row['difference']:.0e}" if "difference" in row else ""
    result = f"{row['result']}: {reason}" if reason else row["result"]
    return [f"`{row['pipeline']}`", result, difference, row.get("scheduler", ""),
            row.get("grid", "")]  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
