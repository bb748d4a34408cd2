"""Out of memory and overflow in half precision: the remedy, its record, and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_generate import VAE
from tiny import changed

import diffgen
from diffgen.errors import InvalidOutput, UsageError
from diffgen.pipelines.generate import ImageGenerator

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def generator(tiny: Path) -> ImageGenerator:
    return diffgen.load(str(tiny), device="cpu")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def record(image: Image.Image) -> dict[str, Any]:
    return json.loads(image.info["diffgen"])


# A real end of memory: the address space of a process is limited to 80 MiB more than it has, of which the network
# would need several times as much for the whole batch.
CHILD = """
import json, resource, sys
import diffgen, torch
from diffgen.pipelines.plan import make_plan

torch.backends.mkldnn.enabled = False  # a kernel that oneDNN once had no memory for, it never makes again
generator = diffgen.load(sys.argv[1], device="cpu")
options = {"seed": 1, "steps": 1, "guidance": 3.0, "scheduler": "euler", "size": 256}
plan = make_plan(generator.model, "a", count=64, batch_size=64, **options)
(free,) = generator.generate("a", **options)
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 80 * 2**20, -1))
steps = []
pictures = generator.pictures(plan, lambda done, total: steps.append((done, total)))
pictures = [next(pictures) for _ in range(3)]
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
apart = max(abs(x - y) for x, y in zip(free.tobytes(), pictures[0].image.tobytes()))
print(json.dumps({"memory": [picture.record["memory"] for picture in pictures], "apart": apart, "steps": steps}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's limits")
def test_out_of_memory_halves_the_batch_and_is_recorded(tiny: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert all(1 <= memory["batch_size"] < 64 for memory in report["memory"]), report
    assert report["apart"] <= 1, report
    assert report["steps"] == [[1, -(-64 // report["memory"][0]["batch_size"])]]


def test_tiling_on_request(generator: ImageGenerator) -> None:
    (untiled,) = generator.generate("a", seed=1, size=128, steps=1)
    (tiled,) = generator.generate("a", seed=1, size=128, steps=1, vae_tiling=True)
    assert record(tiled)["memory"] == {"vae_tiling": True}
    assert record(untiled)["memory"] == {}
    assert (pixels(untiled) != pixels(tiled)).any()
    assert (pixels(untiled) == pixels(generator.generate("a", seed=1, size=128, steps=1)[0])).all()
    with pytest.raises(UsageError, match="exclude"):
        generator.generate("a", tile=True, vae_tiling=True)


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """Build the tiny model with its decoder's first activations multiplied by a factor."""

    def of(factor: float) -> Path:
        folder = tmp_path_factory.mktemp("wide") / "model"
        return changed(tiny, folder, VAE, lambda t: t["decoder.conv_in.weight"].mul_(factor))

    return of


def test_an_autoencoder_that_half_precision_cannot_hold_is_run_in_float32(
    wide: Callable[[float], Path], photo: Image.Image
) -> None:
    folder = wide(1e5)
    half = diffgen.load(str(folder), device="cpu", dtype="float16")
    (image,) = half.generate("a red apple", seed=3, steps=2, guidance=1.0)
    assert record(image)["memory"] == {"vae_dtype": "float32"}
    full = diffgen.load(str(folder), device="cpu", dtype="float32")
    (expected,) = full.generate("a red apple", seed=3, steps=2, guidance=1.0)
    assert record(expected)["memory"] == {}
    assert abs(pixels(image) - pixels(expected)).mean() < 4
    (begun,) = half.generate("a red apple", image=photo, seed=3, steps=2)
    assert record(begun)["memory"] == {"vae_dtype": "float32"}


@pytest.fixture
def photo() -> Image.Image:
    return Image.new("RGB", (32, 32), (90, 200, 30))


def test_an_overflow_in_float32_is_an_error_and_the_others_continue(
    wide: Callable[[float], Path], generator: ImageGenerator
) -> None:
    from diffgen.pipelines.plan import make_plan

    broken = diffgen.load(str(wide(1e38)), device="cpu")
    with pytest.raises(InvalidOutput, match="seed 3 is not finite: nothing saved for it"):
        broken.generate("a", seed=3, steps=1)
    plan = make_plan(broken.model, "a", count=2, seed=1, steps=1)
    assert [picture.image for picture in broken.pictures(plan)] == [None, None]


def test_half_precision_makes_nearly_the_same_picture(tiny: Path, generator: ImageGenerator) -> None:
    half = diffgen.load(str(tiny), device="cpu", dtype="bfloat16")
    (image,) = half.generate("a red apple", seed=3, steps=3)
    assert record(image)["dtype"] == "bfloat16"
    assert abs(pixels(image) - pixels(generator.generate("a red apple", seed=3, steps=3)[0])).mean() < 8


def test_offload_needs_a_gpu(tiny: Path) -> None:
    with pytest.raises(UsageError, match="the device is the CPU"):
        diffgen.load(str(tiny), device="cpu", offload="model")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloaded_the_pictures_are_the_same(tiny: Path, photo: Image.Image, kind: str) -> None:
    pytest.importorskip("accelerate")
    there, offloaded = (diffgen.load(str(tiny), device="cuda", dtype="float32", offload=how) for how in ("none", kind))
    for options in ({}, {"image": photo}, {"upscale": 2.0}):
        a, b = (one.generate("a red apple", seed=1, steps=3, **options)[0] for one in (there, offloaded))
        assert abs(pixels(a) - pixels(b)).max() <= 1
    assert record(b)["memory"] == {"offload": kind}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_where_a_gpus_memory_ends_less_is_done_at_once(tiny: Path) -> None:
    generator = diffgen.load(str(tiny), device="cuda", dtype="float32")
    options: dict[str, Any] = {"seed": 1, "steps": 1, "size": 512, "guidance": 3.0}
    generator.generate("a", **options)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 256 * 2**20
    try:
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        images = generator.generate("a", count=64, batch_size=64, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(record(image)["memory"]["batch_size"] < 64 for image in images)
    (free,) = generator.generate("a", **options)
    assert abs(pixels(free) - pixels(images[0])).max() <= 1
