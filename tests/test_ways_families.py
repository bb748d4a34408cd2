"""Every family in every way that it supports, compared with diffusers' own pipelines."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffgen
from diffgen.errors import InputError, UsageError
from diffgen.images.metadata import encode_png
from diffgen.models.families import FAMILIES
from diffgen.pipelines.generate import ImageGenerator
from diffgen.pipelines.plan import make_plan
from diffgen.reproduce import reproduce

# Those of diffusers' pipelines: sd1 is in test_ways.py, native families are in test_ways_native.py.
TEXT_TO_IMAGE = [name for name, row in FAMILIES.items() if "text" in row.tasks and not row.native and name != "sd1"]
PROMPT, SEED, STEPS, GUIDANCE = "a red apple", 5, 4, 3.0


@pytest.fixture(scope="module")
def load(family_folder: Callable[[str], Path]) -> Callable[[str], ImageGenerator]:
    return cache(lambda family: diffgen.load(str(family_folder(family)), device="cpu"))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    y, x = np.mgrid[:32, :32] / 31
    return Image.fromarray(np.stack([255 * x, 255 * y, 255 * (1 - x) * y], -1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def theirs(generator: ImageGenerator, name: str, **more: Any) -> Any:
    import diffusers

    import schedulers

    parts = {key: part for key, part in generator.pipeline.components.items() if key != "scheduler"}
    keys = ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "add_watermarker", "requires_safety_checker")
    settings = {key: generator.pipeline.config[key] for key in keys if key in generator.pipeline.config}
    scheduler = schedulers.get("euler", noise=generator.noise, prediction=generator.prediction)
    pipeline = getattr(diffusers, name)(**parts, **settings, scheduler=scheduler, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_rows_name_existing_classes_and_codecs() -> None:
    import diffusers

    from diffgen.pipelines.families import Code, code_of
    from diffgen.pipelines.sampling.latents import CODECS

    for name, family in FAMILIES.items():
        assert isinstance(code_of(name), Code)
        assert family.latents in CODECS
        for cls in (*family.pipelines, *family.tasks.values()):
            assert hasattr(diffusers, cls), cls


def test_packing_is_diffusers_own() -> None:
    from diffusers import FluxPipeline

    from diffgen.pipelines.sampling.latents import CODECS

    x = torch.randn(2, 16, 6, 10)
    packed = CODECS["packed"].pack(x)
    assert torch.equal(packed, FluxPipeline._pack_latents(x, 2, 16, 6, 10))
    assert torch.equal(CODECS["packed"].unpack(packed, 6, 10), x)
    assert torch.equal(FluxPipeline._unpack_latents(packed, 48, 80, 8), x)
    assert torch.equal(CODECS["plain"].unpack(CODECS["plain"].pack(x), 6, 10), x)


def call(pipeline: Any, **more: Any) -> np.ndarray:
    sizes = {"height": 32, "width": 32} if "height" in inspect.signature(pipeline.__call__).parameters else {}
    generator = torch.Generator().manual_seed(SEED)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **sizes, **more}
    return pixels(pipeline(PROMPT, generator=generator, **options).images[0])


@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
def test_text_to_image(load: Callable[[str], ImageGenerator], family: str) -> None:
    generator = load(family)
    options: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "scheduler": "euler"}
    (ours,) = generator.generate(PROMPT, size=32, **options)
    assert abs(pixels(ours) - call(theirs(generator, FAMILIES[family].tasks["text"]))).max() <= 1
    assert json.loads(ours.info["diffgen"])["family"] == family


def test_flux_schnell_reads_256_tokens(load: Callable[[str], ImageGenerator]) -> None:
    generator = load("flux-schnell")
    options: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": 1.0, "scheduler": "euler"}
    (ours,) = generator.generate(PROMPT, size=32, **options)
    read = {n: call(theirs(generator, "FluxPipeline"), guidance_scale=1.0, max_sequence_length=n) for n in (256, 512)}
    assert abs(pixels(ours) - read[256]).max() <= 1
    assert abs(pixels(ours) - read[256]).sum() < abs(pixels(ours) - read[512]).sum()


def test_guidance_as_an_input_takes_one_evaluation_and_reads_no_negative_prompt(
    load: Callable[[str], ImageGenerator], photo: Image.Image
) -> None:
    """An LCM's UNet has a projection for the guidance: the network runs on a batch of one, the encoder on one text."""
    generator = load("lcm")
    parts = generator.pipeline.unet, generator.pipeline.text_encoder
    options: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": 3.0, "scheduler": "euler", "negative": "blue"}
    plan = make_plan(generator.model, PROMPT, size=32, attention="apple", **options)
    assert "the negative prompt is not read" in "".join(plan.warnings(PROMPT))
    sizes: list[int] = []
    hooks = [part.register_forward_hook(lambda part, args, output: sizes.append(len(output[0]))) for part in parts]
    (picture,) = generator.pictures(plan)
    for hook in hooks:
        hook.remove()
    assert sizes == [1] * (1 + STEPS)
    assert picture.image is not None
    assert set(picture.attention) == {"apple"}
    expected = call(theirs(generator, "StableDiffusionPipeline"))
    assert abs(pixels(picture.image) - expected).max() <= 1
    other = generator.generate(PROMPT, size=32, **{**options, "guidance": 9.0})[0]
    assert (pixels(other) != pixels(picture.image)).any()
    (ours,) = generator.generate(PROMPT, image=photo, strength=0.5, **options)
    expected = call(theirs(generator, "StableDiffusionImg2ImgPipeline"), image=photo, strength=0.5)
    assert abs(pixels(ours) - expected).max() <= 1


@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(
    load: Callable[[str], ImageGenerator], photo: Image.Image, family: str, strength: float
) -> None:
    generator = load(family)
    options: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "scheduler": "euler"}
    (ours,) = generator.generate(PROMPT, image=photo, strength=strength, **options)
    pipeline = theirs(generator, FAMILIES[family].tasks["image"])
    assert abs(pixels(ours) - call(pipeline, image=photo, strength=strength)).max() <= 1


@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
def test_inpainting(load: Callable[[str], ImageGenerator], photo: Image.Image, family: str) -> None:
    generator = load(family)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    options: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "scheduler": "euler"}
    (ours,) = generator.generate(PROMPT, image=photo, mask=mask, strength=0.75, **options)
    assert (pixels(ours)[:, :16] == pixels(photo)[:, :16]).all()
    if family == "sd3":  # diffusers' pipeline takes models of 16 channels only
        return
    pipeline = theirs(generator, next(name for name in FAMILIES[family].pipelines if "Inpaint" in name))
    expected = call(pipeline, image=photo, mask_image=mask, strength=0.75)
    assert abs(pixels(ours) - expected)[:, 16:].max() <= 1


@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
def test_second_passes_and_batches(load: Callable[[str], ImageGenerator], family: str) -> None:
    generator = load(family)
    options: dict[str, Any] = {"steps": 2, "scheduler": "euler", "upscale": 2, "upscale_mode": "latent", "size": 32}
    together = generator.generate(PROMPT, seeds="3,8", batch_size=2, **options)
    assert [image.size for image in together] == [(64, 64)] * 2
    (alone,) = generator.generate(PROMPT, seed=8, **options)
    assert abs(pixels(together[1]) - pixels(alone)).max() <= 1


def test_the_refiner_continues_where_the_model_stops(
    load: Callable[[str], ImageGenerator], family_folder: Callable[[str], Path]
) -> None:
    """The refiner does the last fifth of the denoising, as Stable Diffusion XL's authors do."""
    generator, refiner = load("sdxl"), str(family_folder("sdxl-refiner"))
    options: dict[str, Any] = {"seed": SEED, "steps": 10, "guidance": 3.0, "scheduler": "euler", "size": 32}
    (ours,) = generator.generate(PROMPT, refiner=refiner, **options)
    generator_ = torch.Generator().manual_seed(SEED)
    shared: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 3.0, "generator": generator_}
    latents = theirs(generator, "StableDiffusionXLPipeline")(
        PROMPT, denoising_end=0.8, output_type="latent", height=32, width=32, **shared
    ).images
    second = theirs(load("sdxl-refiner"), "StableDiffusionXLImg2ImgPipeline")
    latents = second(PROMPT, image=latents, denoising_start=0.8, output_type="latent", **shared).images
    (expected,) = generator.decode(latents)
    assert abs(pixels(ours) - pixels(expected)).max() <= 1
    assert (pixels(ours) != pixels(generator.generate(PROMPT, **options)[0])).any()


def test_a_refined_picture_is_reproduced(
    load: Callable[[str], ImageGenerator],
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The refiner is found by its hash, among the files of --file or in the user's list."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    refiner, path = family_folder("sdxl-refiner"), tmp_path / "x.png"
    options: dict[str, Any] = {"seed": SEED, "steps": 5, "scheduler": "euler", "size": 32}
    plan = make_plan(load("sdxl").model, PROMPT, refiner=str(refiner), **options)
    (picture,) = load("sdxl").pictures(plan)
    assert picture.image is not None
    path.write_bytes(encode_png(picture.image, picture.record))
    with pytest.raises(InputError, match=r"the refiner 'sdxl-refiner' .* is not among"):
        reproduce(path, str(family_folder("sdxl")), [family_folder("sdxl")])
    assert reproduce(path, str(family_folder("sdxl")), [refiner]).identical
    (tmp_path / "diffgen").mkdir()
    (tmp_path / "diffgen" / "models.toml").write_text(f'mine = "{refiner}"\n')
    assert reproduce(path, str(family_folder("sdxl"))).identical


def test_pixels_without_a_prompt(load: Callable[[str], ImageGenerator]) -> None:
    from diffusers import DDPMPipeline

    generator = load("unconditional")
    options: dict[str, Any] = {"steps": 6, "scheduler": "ddpm", "grid": "leading"}
    ours = generator.generate((), count=2, seed=SEED, **options)
    plan = make_plan(generator.model, (), **options)
    pipeline = DDPMPipeline(unet=generator.pipeline.unet, scheduler=generator.scheduler(plan))
    pipeline.set_progress_bar_config(disable=True)
    for i, image in enumerate(ours):
        expected = pipeline(generator=torch.Generator().manual_seed(SEED + i), num_inference_steps=plan.steps).images[0]
        assert abs(pixels(image) - pixels(expected)).max() <= 1
        assert json.loads(image.info["diffgen"])["prompt"] == ""


@pytest.mark.parametrize(
    ("family", "options", "text"),
    [
        ("sd3", {"tile": True}, "no convolutions"),
        ("flux", {"embeddings": ["x=EMBEDDING"]}, "--embedding is not supported for flux"),
        ("sd2", {"refiner": "REFINER"}, "Stable Diffusion XL"),
        ("flux", {"guidance_rescale": 0.5}, "--guidance-rescale is not for a network that takes"),
        ("flux", {"guidance_interval": "0,0.5"}, "--guidance-interval is not for a network that takes"),
        ("sdxl-refiner", {}, "text to image is not supported"),
        ("unconditional", {"tile": True}, "nothing but noise"),
        ("unconditional", {"guidance": 3}, "--guidance is not supported: .*nothing but noise"),
        ("unconditional", {"guidance_interval": "0,0.5"}, "nothing but noise"),
        ("unconditional", {"clip_skip": 2}, "nothing but noise"),
        ("unconditional", {"style": "icon"}, "nothing but noise"),
        ("unconditional", {"refiner": "REFINER"}, "nothing but noise"),
    ],
)
def test_unsupported_options_of_a_family_are_refused(
    family_folder: Callable[[str], Path], tmp_path: Path, family: str, options: dict[str, Any], text: str
) -> None:
    from safetensors.torch import save_file

    from diffgen.models.find import find

    save_file({"emb_params": torch.zeros(1, 16)}, tmp_path / "x.safetensors")
    options = {key: [v.replace("EMBEDDING", str(tmp_path / "x.safetensors")) for v in value] if key == "embeddings"
               else str(family_folder("sdxl-refiner")) if value == "REFINER" else value
               for key, value in options.items()}  # fmt: skip
    prompts: Any = () if family == "unconditional" else PROMPT
    with pytest.raises(UsageError, match=text):
        make_plan(find(str(family_folder(family))), prompts, **options)


def test_guidance_is_rescaled_in_every_way(load: Callable[[str], ImageGenerator], photo: Image.Image) -> None:
    """Compare with the formula, and with diffusers' own rescaling where it has one.

    One step of a flow from σ = 1 predicts x0 = x − v, so v = x − x0.
    """
    from diffgen.diffusion.guidance import rescale

    generator = load("sd3")

    def velocity(**options: Any) -> torch.Tensor:
        predictions: list[torch.Tensor] = []
        plan = make_plan(generator.model, PROMPT, steps=1, seed=SEED, size=32, negative="blue", **options)
        list(generator.pictures(plan, None, lambda shots, i, x0: predictions.append(x0.clone())))
        return torch.randn(predictions[0].shape, generator=torch.Generator().manual_seed(SEED)) - predictions[0]

    cond, uncond = velocity(guidance=1), velocity(guidance=0)
    expected = rescale(uncond + 6 * (cond - uncond), cond, 0.7)
    torch.testing.assert_close(velocity(guidance=6, guidance_rescale=0.7), expected, rtol=1e-4, atol=1e-5)
    assert abs(velocity(guidance=6) - expected).max() > 0.01
    assert torch.equal(velocity(guidance=1, guidance_rescale=0.7), cond)

    xl = load("sdxl")
    options: dict[str, Any] = {"image": photo, "strength": 0.75, "seed": SEED, "steps": STEPS, "scheduler": "euler"}
    images = [pixels(xl.generate(PROMPT, guidance=6, guidance_rescale=share, **options)[0]) for share in (0.0, 0.7)]
    pipeline = theirs(xl, "StableDiffusionXLImg2ImgPipeline")
    pipeline.scheduler = xl.scheduler(make_plan(xl.model, PROMPT, **options))
    expected = pipeline(
        PROMPT, image=photo, strength=0.75, num_inference_steps=STEPS, guidance_scale=6, guidance_rescale=0.7,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    assert abs(images[1] - pixels(expected)).max() <= 1
    assert (images[0] != images[1]).any()


def test_prompts_and_refiners_that_do_not_fit_are_refused(family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="reads no prompts"):
        diffgen.load(str(family_folder("unconditional")), device="cpu").generate("a")
    with pytest.raises(InputError, match="not a refiner"):
        diffgen.load(str(family_folder("sdxl")), device="cpu").generate("a", refiner=str(family_folder("sd2")))
