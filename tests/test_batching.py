"""Pictures of different prompts and plans are made in one batch where that is possible, and come in their order."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffgen
from diffgen.errors import UsageError
from diffgen.generation.batching import AHEAD, Progress, in_batches
from diffgen.generation.plan import Picture, Plan, Shot
from diffgen.pipelines.generate import ImageGenerator
from diffgen.pipelines.plan import make_plan
from diffgen.pipelines.sampling import memory
from diffgen.reproduce import reproduce

PROMPTS = ["a red apple", "a green circle", "a blue square", "a red circle", "a green apple"]
OPTIONS: dict[str, Any] = {"steps": 3, "guidance": 2.0, "seed": 4}


@pytest.fixture(scope="module")
def generator(tiny: Path) -> ImageGenerator:
    return diffgen.load(str(tiny), device="cpu")


def pixels(image: Image.Image | None) -> np.ndarray:
    assert image is not None
    return np.asarray(image).astype(int)


def record(image: Image.Image) -> dict[str, Any]:
    return json.loads(image.info["diffgen"])


# Which shots make a batch


class Recorder:
    """Makes pictures without pixels, and keeps which prompts came together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches: list[list[str]] = []

    def kind(self, shot: Shot) -> int:
        return len(shot.prompt)

    def make(self, shots: list[Shot]) -> Iterator[Picture]:
        self.batches.append([shot.prompt for shot in shots])
        return (Picture(shot, None, {}) for shot in shots)


def plan_of(*prompts: str, steps: int = 1, count: int = 1, batch_size: int = 2) -> Plan:
    sampling: dict[str, Any] = {"guidance": 1.0, "scheduler": "euler", "label": "euler", "grid": "trailing"}
    sampling |= {"width": 8, "height": 8, "seed": len(prompts), "steps": steps, "count": count}
    model: Any = None
    return Plan(model=model, prompts=prompts, given=frozenset(prompts), batch_size=batch_size, **sampling)


def batches_of(plans: list[Plan], size: int) -> tuple[list[list[str]], list[str]]:
    recorder = Recorder(size)
    pictures = in_batches(plans, lambda plan: recorder, Progress(plans, lambda plan: plan.steps, None))
    prompts = [picture.prompt for picture in pictures]
    return recorder.batches, prompts


def test_plans_that_alternate_fill_batches_and_keep_their_order() -> None:
    plans = [plan_of(f"{name}{i}", steps=steps) for i in range(4) for name, steps in (("a", 1), ("b", 2))]
    batches, prompts = batches_of(plans, size=4)
    assert batches == [["a0", "a1", "a2", "a3"], ["b0", "b1", "b2", "b3"]]
    assert prompts == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_prompts_of_one_plan_and_their_counts_share_batches_of_one_kind() -> None:
    batches, prompts = batches_of([plan_of("a", "long", "b", count=2), plan_of("c")], size=3)
    assert batches == [["a", "a", "b"], ["long", "long"], ["b", "c"]]
    assert prompts == ["a", "a", "long", "long", "b", "b", "c"]


def test_a_picture_is_made_at_most_some_batches_before_its_turn() -> None:
    plans = [plan_of("a", steps=1), plan_of(*["b"] * 9, steps=2), plan_of(*["a"] * 20, steps=1)]
    batches, _ = batches_of(plans, size=3)
    assert batches[0] == ["a", "a", "a"]
    batches, _ = batches_of([plans[0], plan_of(*["b"] * (AHEAD * 3), steps=2), plans[2]], size=3)
    assert batches[0] == ["a"]


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_every_picture_comes_once_and_in_order(size: int) -> None:
    plans = [plan_of(*[str(i)] * (1 + i % 3), steps=1 + i % 2) for i in range(30)]
    batches, prompts = batches_of(plans, size)
    assert prompts == [shot.prompt for plan in plans for shot in plan.shots()]
    assert sorted(prompt for batch in batches for prompt in batch) == sorted(prompts)
    assert max(map(len, batches)) <= size


def test_plans_that_differ_in_more_than_prompts_and_seeds_do_not_share() -> None:
    a = plan_of("a")
    assert a.batch_key == plan_of("b", "c", count=5).batch_key
    assert a.batch_key != plan_of("a", steps=2).batch_key
    assert a.batch_key != plan_of("a", batch_size=3).batch_key


def test_progress_counts_batches_of_every_kind() -> None:
    steps: list[tuple[int, int]] = []
    plans = [plan_of("a", "b", "c", steps=2), plan_of("d", steps=5)]
    progress = Progress(plans, lambda plan: plan.steps, lambda done, total: steps.append((done, total)))
    progress.begin(plans[0].batch_key, 2)
    progress.tick()
    assert steps == [(1, 2 * 2 + 5)]


# Real pictures


def test_different_prompts_share_a_batch(generator: ImageGenerator) -> None:
    together = [
        make_plan(generator.model, PROMPTS[:3], batch_size=4, negative="blue", **OPTIONS),
        make_plan(generator.model, PROMPTS[3:], batch_size=4, **OPTIONS),
    ]
    sizes: list[int] = []
    pictures = list(generator.pictures(together, None, lambda shots, i, x0: sizes.append(len(x0))))
    assert sizes == [4] * 3 + [1] * 3
    assert [picture.prompt for picture in pictures] == PROMPTS
    assert [picture.record["batch_size"] for picture in pictures] == [4] * 4 + [1]
    assert [picture.record["negative"] for picture in pictures] == ["blue"] * 3 + [""] * 2
    assert [picture.shot.plan for picture in pictures] == [together[0]] * 3 + [together[1]] * 2
    for picture in pictures:
        negative = picture.record["negative"]
        (alone,) = generator.generate(picture.prompt, negative=negative, **OPTIONS)
        assert record(alone)["batch_size"] == 1
        assert abs(pixels(picture.image) - pixels(alone)).max() <= 1
    assert len({picture.record["pixels_sha256"] for picture in pictures}) == 5


def test_a_longer_prompt_makes_a_batch_of_its_own(generator: ImageGenerator) -> None:
    """Its embedding has more chunks. Padding the others would change their pictures."""
    prompts = [PROMPTS[0], "a red apple " * 8, PROMPTS[1]]
    images = generator.generate(prompts, batch_size=3, **OPTIONS)
    assert [record(image)["batch_size"] for image in images] == [3, 3, 3]
    for image, prompt in zip(images, prompts, strict=True):
        assert abs(pixels(image) - pixels(generator.generate(prompt, **OPTIONS)[0])).max() <= 1


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral"])
def test_in_a_filled_batch_the_pixels_do_not_depend_on_the_neighbours(
    generator: ImageGenerator, scheduler: str
) -> None:
    options = OPTIONS | {"scheduler": scheduler, "batch_size": 5}
    together = generator.generate(PROMPTS, **options)
    for prompt, image in zip(PROMPTS, together, strict=True):
        (alone,) = generator.generate(prompt, **options)
        assert (pixels(alone) == pixels(image)).all()
        assert record(alone)["batch_size"] == 5


def test_a_picture_of_a_batch_is_reproduced_to_the_bit(tmp_path: Path) -> None:
    emoji: Any = diffgen.load("emoji", device="cpu")
    prompts = ["a red apple", "a dog", "two cats, flat style"]
    for number, picture in enumerate(emoji.pictures(make_plan(emoji.model, prompts, seed=2, batch_size=8))):
        assert picture.record["batch_size"] == 3
        from diffgen.images.metadata import encode_png

        (path := tmp_path / f"{number}.png").write_bytes(encode_png(picture.image, picture.record, "full"))
        result = reproduce(path)
        assert result.identical, result.reason


def test_auto_takes_as_many_as_fit(generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    images = generator.generate(PROMPTS * 2, batch_size="auto", **OPTIONS)
    assert [record(image)["batch_size"] for image in images] == [8] * 8 + [2] * 2
    parts = (generator.pipeline, torch.device("cpu"), torch.float32)

    def fitting(size: int, guided: bool) -> int:
        plan = make_plan(generator.model, "a", size=size, batch_size="auto")
        return memory.fitting(parts[0], plan, parts[1], parts[2], guided)

    assert memory.free_memory(torch.device("cpu")) > 2**20
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**25)
    assert fitting(512, False) >= 2 * fitting(512, True) >= fitting(512, False) - 1 > 1
    assert fitting(2048, True) == 1


@pytest.mark.parametrize("wrong", [0, 4097, "many", "0", 2.0, True])
def test_a_batch_size_is_a_whole_number_or_auto(generator: ImageGenerator, wrong: Any) -> None:
    with pytest.raises(UsageError, match="--batch-size must be a whole number from 1 to 4096, or auto"):
        make_plan(generator.model, "a", batch_size=wrong)


def test_a_prompt_file_is_one_batch_and_files_are_in_its_order(
    generator: ImageGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffgen.generation.write import write_pictures
    from diffgen.images.naming import Outputs
    from diffgen.loading import make_plans, read_prompts

    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": prompt, "size": "32x32" if i % 2 else "40x24"} for i, prompt in enumerate(PROMPTS)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plans = make_plans(generator.model, read_prompts((), "prompts.jsonl"), {**OPTIONS, "batch_size": 3})
    assert len(plans) == 5
    result = write_pictures(generator, plans, Outputs("o/", 5, False))
    assert [entry["prompt"] for entry in result.images] == PROMPTS
    assert [entry["width"] for entry in result.images] == [40, 32, 40, 32, 40]
    assert [Path(entry["path"]).name[:6] for entry in result.images] == [f"{i:06}" for i in range(1, 6)]
    sizes = [json.loads(Image.open(entry["path"]).text["diffgen"])["batch_size"] for entry in result.images]
    assert sizes == [3, 3, 3, 3, 3]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_pictures_that_are_encoded_beside_the_next_ones_are_all_written_in_order(
    generator: ImageGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As on an accelerator. An error ends the work after the finished pictures are written."""
    from diffgen.generation import write
    from diffgen.images.naming import Outputs

    on_disk: list[int] = []  # files when each picture is handed on

    class Elsewhere:
        """The generator, under another device's name, which fails after some pictures."""

        device, fits = torch.device(kind), generator.fits

        def pictures(self, plans: Any, *callbacks: Any, fill: bool) -> Iterator[Picture]:
            for number, picture in enumerate(generator.pictures(plans, *callbacks, fill=fill)):
                on_disk.append(len(list(tmp_path.glob("o/*.png"))))
                if number == 4:
                    raise RuntimeError("the device is gone")
                yield picture

    plan = make_plan(generator.model, PROMPTS, **OPTIONS)
    result = write.Result([plan])
    elsewhere: Any = Elsewhere()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="the device is gone"):
        write.write_pictures(elsewhere, [plan], Outputs("o/", 5, False), result=result)
    assert [entry["prompt"] for entry in result.images] == PROMPTS[:4]
    assert [Path(entry["path"]).name[:6] for entry in result.images] == [f"{i:06}" for i in range(1, 5)]
    if kind == "cpu":
        assert on_disk == [0, 1, 2, 3, 4]


def test_a_picture_from_an_accelerator_is_compressed_less() -> None:
    from diffgen.images.metadata import encode_png

    noise = np.random.default_rng(0).integers(0, 4, (64, 64, 3), dtype=np.uint8) * 60
    image = Image.fromarray(noise)
    usual, fast = (encode_png(image, {"device": device}, "none") for device in ("cpu", "cuda"))
    assert len(usual) < len(fast) < 1.6 * len(usual)
    assert (pixels(Image.open(io.BytesIO(fast))) == pixels(image)).all()
