"""ImageGenerator: compared with diffusers' own loading, seed by seed; and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import changed

import diffgen
import schedulers
from diffgen.devices import out_of_memory
from diffgen.errors import InputError, InvalidOutput, OutOfMemory, UsageError
from diffgen.generation.options import json_types
from diffgen.models.find import find
from diffgen.pipelines.generate import ImageGenerator
from diffgen.pipelines.plan import Plan, make_plan
from diffgen.pipelines.weights.tokenizers import load_tokenizer
from diffgen.prompts.files import read_lines
from diffgen.prompts.tokens import read_vocabulary


@pytest.fixture(scope="module")
def generator(tiny: Path) -> ImageGenerator:
    return diffgen.load(str(tiny), device="cpu")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def record(image: Image.Image) -> dict[str, Any]:
    return json.loads(image.info["diffgen"])


# The same as diffusers


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m"])
def test_equals_diffusers_own_loading_bit_for_bit(generator: ImageGenerator, tiny: Path, scheduler: str) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = schedulers.get(scheduler, noise="scaled_linear", grid="karras")
    expected = pipe(
        "a red apple",
        num_inference_steps=5,
        guidance_scale=3.0,
        negative_prompt="blue",
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    (image,) = generator.generate(
        "a red apple", seed=11, steps=5, guidance=3.0, scheduler=scheduler, grid="karras", negative="blue"
    )
    assert (pixels(image) == pixels(expected)).all()


def test_euler_is_diffusers_ddim(generator: ImageGenerator, tiny: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    expected = pipe(
        "a red apple", num_inference_steps=8, guidance_scale=2.0, generator=torch.Generator().manual_seed(3)
    ).images[0]
    (image,) = generator.generate("a red apple", seed=3, steps=8, guidance=2.0, scheduler="euler", grid="trailing")
    assert abs(pixels(image) - pixels(expected)).max() <= 1


def test_guidance_below_one_follows_the_formula(generator: ImageGenerator) -> None:
    (off,) = generator.generate("a blue square", seed=1, guidance=1)
    (nothing_but_the_negative,) = generator.generate("a red apple", seed=1, guidance=0, negative="a blue square")
    (half,) = generator.generate("a red apple", seed=1, guidance=0.5, negative="a blue square")
    (same,) = generator.generate("a blue square", seed=1, guidance=0.5, negative="a red apple")
    assert abs(pixels(off) - pixels(nothing_but_the_negative)).max() <= 1
    assert abs(pixels(half) - pixels(same)).max() <= 1
    assert (pixels(half) != pixels(off)).any()


# Seeds


def test_a_picture_does_not_depend_on_its_neighbours(generator: ImageGenerator) -> None:
    four = generator.generate("a red apple", count=4, seed=20)
    alone = [generator.generate("a red apple", seed=20 + i)[0] for i in range(4)]
    assert [pixels(a).tolist() for a in four] == [pixels(b).tolist() for b in alone]
    assert len({a.tobytes() for a in four}) == 4
    batched = generator.generate("a red apple", count=4, seed=20, batch_size=3)
    assert max(abs(pixels(a) - pixels(b)).max() for a, b in zip(four, batched, strict=True)) <= 1


def test_each_prompt_starts_at_the_seed(generator: ImageGenerator) -> None:
    images = generator.generate(["a red apple", "a green circle"], count=2, seed=5)
    entries = [(record(image)["prompt"], record(image)["seed"], record(image)["index"]) for image in images]
    assert entries == [("a red apple", 5, 0), ("a red apple", 6, 1), ("a green circle", 5, 0), ("a green circle", 6, 1)]
    assert (pixels(images[2]) == pixels(generator.generate("a green circle", seed=5)[0])).all()


def test_the_record_is_enough_to_reproduce_the_picture(generator: ImageGenerator) -> None:
    (image,) = generator.generate(
        "a red zebra", negative="blue", guidance=4.5, scheduler="DPM++ 2M Karras", steps=4, size="40x24"
    )
    r = record(image)
    keys = ("seed", "steps", "guidance", "scheduler", "grid", "negative")
    (again,) = generator.generate(r["prompt"], size=(r["width"], r["height"]), **{key: r[key] for key in keys})
    assert again.info == image.info
    assert (pixels(again) == pixels(image)).all()
    assert (r["scheduler"], r["grid"], r["nfe"], image.size) == ("dpmpp_2m", "karras", 4, (40, 24))
    assert r["warnings"] == ["tiny never saw 'zebra': a picture of 'a red zebra' will not show it"]


def test_defaults_come_from_the_card(generator: ImageGenerator) -> None:
    r = record(generator.generate("a red apple")[0])
    assert (r["steps"], r["guidance"], r["scheduler"], r["grid"], r["width"]) == (3, 2.0, "euler", "karras", 32)
    assert record(generator.generate("a red apple", scheduler="euler")[0])["grid"] == schedulers.info("euler").grid
    assert 0 <= r["seed"] < 2**32
    assert r["seed"] != record(generator.generate("a red apple")[0])["seed"]


def test_a_size_is_rounded_with_a_warning(generator: ImageGenerator) -> None:
    (image,) = generator.generate("a red apple", size="35x4")
    assert image.size == (32, 8)
    assert record(image)["warnings"] == ["size 35x4 rounded to 32x8: this model makes multiples of 8"]


def test_a_long_prompt_warns_about_dropped_words(generator: ImageGenerator) -> None:
    (image,) = generator.generate("a red apple " * 5 + "green circle", prompt_syntax="plain")
    beyond, dropped = record(image)["warnings"]
    assert "draws one thing at a time" in beyond
    assert "has 19 tokens, this model reads 16; dropped: 'apple green circle'" in dropped


def test_metadata_levels(generator: ImageGenerator) -> None:
    assert set(generator.generate("a", metadata="params")[0].info) == {"parameters", "XML:com.adobe.xmp"}
    assert generator.generate("a", metadata="none")[0].info == {}
    with pytest.raises(UsageError, match="metadata"):
        generator.generate("a", metadata="all")


# What is refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"steps": 2.5}, {"steps": True}, {"count": 0}, {"batch_size": 0},
        {"seed": -1}, {"seed": 2**32}, {"seed": 2**32 - 1, "count": 2},
        {"guidance": float("nan")}, {"guidance": -1}, {"guidance": "7"},
        {"size": "32x"}, {"size": "0x8"}, {"size": 9000}, {"size": (8, 8, 8)},
        {"scheduler": "eular"}, {"grid": "carras"},
        {"prompts": ""}, {"prompts": []}, {"negative": "x" * 65537}, {"prompts": "\ud800"}, {"prompts": "x" * 65537},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_usage_errors(tiny: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_plan(find(str(tiny)), **{"prompts": "a", **wrong})


UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        (UNET, lambda t: t.pop("conv_in.bias"), "'conv_in.bias' is missing"),
        (UNET, lambda t: t.update(extra=torch.zeros(1)), "'extra' does not belong"),
        (UNET, lambda t: t.update({"conv_in.bias": torch.zeros(9)}), r"shape \[9\], config.json makes it \[8\]"),
        (VAE, lambda t: t["decoder.conv_in.bias"].fill_(float("nan")), "'decoder.conv_in.bias' has values that"),
        ("unet/config.json", lambda c: c.update(in_channels=9), "has the shape"),
        ("unet/config.json", lambda c: c.update(layers_per_block=10**6), "more layers"),
        ("unet/config.json", lambda c: c.update(cross_attention_dim=10**9), "out of bounds"),
        ("unet/config.json", lambda c: c.update(down_block_types=["os.system"]), "makes no UNet2DConditionModel"),
        ("unet/config.json", lambda c: c.update(sample_size=10**5), "--size"),
        ("vae/config.json", lambda c: c.update(block_out_channels="x"), "makes no AutoencoderKL"),
        ("vae/config.json", lambda c: c.update(act_fn="nothing"), "makes no AutoencoderKL"),
        ("text_encoder/config.json", lambda c: c.update(hidden_act="nothing"), "makes no CLIPTextModel"),
        ("scheduler/scheduler_config.json", lambda c: c.update(beta_schedule="nothing"), "scheduler_config.json"),
        ("tokenizer/tokenizer.json", lambda c: c["model"]["vocab"].update(more=99999), "tokenizer has 100000 tokens"),
        ("tokenizer/tokenizer.json", lambda c: c["model"].update(merges=[["no", "such"]]), "makes no CLIP tokenizer"),
        ("tokenizer/tokenizer.json", lambda c: c.update(model=[]), "not a table of tokens"),
        ("card.json", lambda c: c["defaults"].update(steps="many"), "by the model's card"),
        ("card.json", lambda c: c.pop("resolution") and c["defaults"].update(size="huge"), "by the model's card"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused(tiny: Path, tmp_path: Path, file: str, change: Any, text: str) -> None:
    folder = changed(tiny, tmp_path / "model", file, change)
    if text == "--size":
        (folder / "card.json").unlink()  # it would give the size
    with pytest.raises(InputError, match=text):
        diffgen.load(str(folder), device="cpu").generate("a")


def older(tensors: dict[str, torch.Tensor]) -> None:
    """Give the tensors the names that older versions of diffusers had for them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in list(tensors):
        parts = name.rsplit(".", 1)
        for new in old:
            if parts[0].endswith(f".{new}"):
                tensors[f"{parts[0].removesuffix(new)}{old[new]}.{parts[1]}"] = tensors.pop(name)


def test_older_names_and_half_precision_files_give_the_same_model(
    generator: ImageGenerator, tiny: Path, tmp_path: Path
) -> None:
    folder = changed(tiny, tmp_path / "tiny", VAE, older)
    text = load_file(folder / TEXT)
    text = {f"text_model.{name}": tensor for name, tensor in text.items()}
    save_file({**text, "text_model.embeddings.position_ids": torch.arange(16)[None]}, folder / TEXT)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["_attn_implementation"] = "somebody/kernel"  # names code, so it is ignored
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"seed": 1, "steps": 3}
    assert (
        pixels(diffgen.load(str(folder)).generate("a", **options)[0]) == pixels(generator.generate("a", **options)[0])
    ).all()

    halves = {name: tensor.half() for name, tensor in load_file(tiny / UNET).items()}
    save_file(halves, folder / UNET)
    from_half = diffgen.load(str(folder))
    save_file({name: tensor.float() for name, tensor in halves.items()}, folder / UNET)
    from_float = diffgen.load(str(folder))
    assert from_half.pipeline.unet.dtype == torch.float32
    assert (pixels(from_half.generate("a", **options)[0]) == pixels(from_float.generate("a", **options)[0])).all()


def test_vocab_and_merges_are_read_as_transformers_reads_them(tiny: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    vocabulary, merges = read_vocabulary(tiny / "tokenizer")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)), encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "pad_token": "!",
        "model_max_length": 16,
    }  # as Stable Diffusion 2 pads
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path, 16), CLIPTokenizer.from_pretrained(tmp_path)
    for text in ["a red apple", "zebra, 2 piñatas!", "a " * 20, ""]:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True}
        assert ours(text, **options).input_ids == theirs(text, **options).input_ids
    assert ours("a", padding="max_length").input_ids[-1] == vocabulary["!"]


def test_a_failed_picture_is_named_and_the_rest_are_generated(tiny: Path, tmp_path: Path) -> None:
    token = read_vocabulary(tiny / "tokenizer")[0]["green</w>"]
    folder = changed(tiny, tmp_path / "tiny", TEXT, lambda t: t["embeddings.token_embedding.weight"][token].fill_(3e38))
    model = diffgen.load(str(folder), device="cpu")
    plan: Plan = make_plan(model.model, ["a red apple", "a green apple", "blue"], seed=1)
    pictures = list(model.pictures(plan))
    assert [picture.image is not None for picture in pictures] == [True, False, True]
    assert isinstance(pictures[1].error, InvalidOutput)
    assert "'a green apple' with seed 1 is not finite" in pictures[1].error.message
    with pytest.raises(InvalidOutput):
        model.generate("a green apple")


def test_out_of_memory_has_its_own_error() -> None:
    with pytest.raises(OutOfMemory, match="memory"), out_of_memory():
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="other"), out_of_memory():
        raise RuntimeError("something other")


def test_stdin_is_read_for_a_hyphen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert [line.prompt for line in read_lines("-", json_types())] == ["a", "b"]


# The names of options


def test_diffusers_names_are_aliases(generator: ImageGenerator) -> None:
    ours = generator.generate("a red apple", seed=3, steps=2, guidance=2.0, negative="blue", count=2, size=(64, 32))
    theirs: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "blue"}
    theirs |= {"num_images_per_prompt": 2, "width": 64, "height": 32}
    again = generator.generate("a red apple", seed=3, **theirs)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in ours]
    assert [image.info for image in again] == [image.info for image in ours]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"stepps": 3}, "generate takes no keyword 'stepps'", "'steps'"),
        ({"num_inference_step": 3}, "'num_inference_step'", "'num_inference_steps'"),
        ({"zzz": 3}, "'zzz'", "steps"),
        ({"steps": 3, "num_inference_steps": 3}, "num_inference_steps and steps set the same option", "one of them"),
        ({"guidance_scale": 3, "guidance": None}, "guidance_scale and guidance", ""),
        ({"width": 64}, "width and height go together", "size"),
        ({"width": 64, "height": 64, "size": 64}, "width and height and size set the same option", ""),
    ],
)
def test_unknown_and_doubled_names_are_refused(
    generator: ImageGenerator, options: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as excinfo:
        generator.generate("a red apple", seed=3, **options)
    assert hint in excinfo.value.hint


# Callbacks


class CallbackError(Exception):
    """Raised by a callback."""


@pytest.mark.parametrize("callback", ["on_step", "on_denoised"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "count": 2}, {"attention": "apple"}, {"upscale": 2.0}])
def test_an_error_in_a_callback_ends_the_work_within_one_step(
    generator: ImageGenerator, callback: str, options: dict[str, Any]
) -> None:
    """The generator stays usable: the next picture is the same to the bit."""
    plan = make_plan(generator.model, "a red apple", seed=3, steps=4, **options)
    expected = [picture.image for picture in generator.pictures(plan)]
    calls = []

    def raising(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise CallbackError

    with pytest.raises(CallbackError):
        list(generator.pictures(plan, **{callback: raising}))
    assert len(calls) == 2
    again = [picture.image for picture in generator.pictures(plan)]
    assert [image and image.tobytes() for image in again] == [image and image.tobytes() for image in expected]


def test_load_refuses_an_unknown_keyword() -> None:
    with pytest.raises(UsageError, match="load takes no keyword 'devce'") as excinfo:
        diffgen.load("emoji", devce="cpu")
    assert excinfo.value.hint == "did you mean 'device'?"
