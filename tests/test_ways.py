"""Image to image, inpainting, second passes, ControlNets, variations, tiling: against diffusers' own pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import diffgen
import schedulers
from diffgen.errors import UsageError
from diffgen.images import fit
from diffgen.models.find import find
from diffgen.pipelines.generate import ImageGenerator
from diffgen.pipelines.plan import make_plan
from diffgen.pipelines.sampling import latents

PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a red apple", "blue", 11, 6, 3.0
OPTIONS: dict[str, Any] = {"negative": NEGATIVE, "seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "grid": "karras"}


@pytest.fixture(scope="module")
def generator(tiny: Path) -> ImageGenerator:
    return diffgen.load(str(tiny), device="cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth and coloured, 32×32."""
    y, x = np.mgrid[:32, :32] / 31
    return Image.fromarray(np.stack([255 * x, 255 * y, 255 * (1 - x) * y], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def half() -> Image.Image:
    """A mask, 32×32: the right half is free."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    return mask


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def record(image: Image.Image) -> dict[str, Any]:
    return json.loads(image.info["diffgen"])


def theirs(generator: ImageGenerator, name: str, scheduler: str, **more: Any) -> Any:
    """A plain pipeline of diffusers on the same networks, with the same scheduler."""
    import diffusers

    parts = {key: part for key, part in generator.pipeline.components.items() if key != "scheduler"}
    if name.startswith("StableDiffusion") and "XL" not in name:
        more["requires_safety_checker"] = False
    scheduler_ = schedulers.get(scheduler, noise="scaled_linear", grid="karras")
    pipeline = getattr(diffusers, name)(**parts, scheduler=scheduler_, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: Any, **more: Any) -> np.ndarray:
    arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "negative_prompt": NEGATIVE}
    arguments["generator"] = torch.Generator().manual_seed(SEED)
    return pixels(pipeline(PROMPT, **(arguments | more)).images[0])


# Image to image


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "heun", "euler_ancestral"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_is_diffusers_own(
    generator: ImageGenerator, photo: Image.Image, scheduler: str, strength: float
) -> None:
    (ours,) = generator.generate(PROMPT, image=photo, strength=strength, scheduler=scheduler, **OPTIONS)
    expected = call(theirs(generator, "StableDiffusionImg2ImgPipeline", scheduler), image=photo, strength=strength)
    assert (pixels(ours) == expected).all()
    assert record(ours)["strength"] == strength


def test_the_least_strength_leaves_the_picture_as_it_is(generator: ImageGenerator, photo: Image.Image) -> None:
    """One step from the lowest noise there is: x0 − clean = (σ/α)·(noise − prediction), with σ/α = 0.029."""
    options: dict[str, Any] = {"image": photo, "strength": 1e-6, "steps": 1000, "grid": "leading", "seed": SEED}
    predictions: list[torch.Tensor] = []
    plan = make_plan(generator.model, PROMPT, **options)
    (picture,) = generator.pictures(plan, on_denoised=lambda shots, i, x0: predictions.append(x0.clone()))
    assert picture.record["nfe"] == len(predictions) == 1
    x = torch.from_numpy(np.asarray(photo, np.float32).transpose(2, 0, 1))[None] / 127.5 - 1
    with torch.inference_mode():
        clean = generator.autoencoder().encode(x, torch.Generator().manual_seed(SEED))
        assert float((predictions[0] - clean).square().mean().sqrt()) < 0.029 * 2
        (same,) = generator.decode(predictions[0])
    assert picture.image is not None
    assert (pixels(picture.image) == pixels(same)).all()


def test_pictures_from_a_picture_do_not_depend_on_their_batch(generator: ImageGenerator, photo: Image.Image) -> None:
    options: dict[str, Any] = {"image": photo, "strength": 0.8, "steps": 4}
    together = generator.generate(PROMPT, seeds="3,9,4", batch_size=3, **options)
    alone = [generator.generate(PROMPT, seed=seed, **options)[0] for seed in (3, 9, 4)]
    assert max(abs(pixels(a) - pixels(b)).max() for a, b in zip(together, alone, strict=True)) <= 1
    assert [record(image)["seed"] for image in together] == [3, 9, 4]


def test_a_picture_is_scaled_and_cropped_to_the_size(generator: ImageGenerator, photo: Image.Image) -> None:
    assert generator.generate(PROMPT, image=photo.resize((37, 21)), steps=2)[0].size == (40, 24)
    (image,) = generator.generate(PROMPT, image=photo.resize((60, 30)), size="16x32", steps=2)
    assert image.size == (16, 32)
    assert any("(60x30) is scaled and cropped to 16x32" in warning for warning in record(image)["warnings"])


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
@settings(deadline=None, max_examples=50)
@example(1, 15, 1, 21)  # 15 - 21 / (21 / 15) is a little below 0
def test_cover_keeps_proportions_and_crops_evenly(a: int, b: int, c: int, d: int) -> None:
    """On a ramp: what comes out is a ramp of the scale's slope, centred where the picture is."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, a), (b, 1)).astype(np.float32))
    out = np.asarray(fit.cover(ramp, (c, d), Image.Resampling.BILINEAR))
    assert out.shape == (d, c)
    assert np.isclose(out.mean(), np.asarray(ramp).mean(), atol=3)


# Inpainting


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "heun"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_is_diffusers_own_and_keeps_what_is_outside(
    generator: ImageGenerator, photo: Image.Image, half: Image.Image, scheduler: str, strength: float
) -> None:
    (ours,) = generator.generate(PROMPT, image=photo, mask=half, strength=strength, scheduler=scheduler, **OPTIONS)
    expected = call(
        theirs(generator, "StableDiffusionInpaintPipeline", scheduler),
        image=photo, mask_image=half, strength=strength, height=32, width=32,
    )  # fmt: skip
    assert abs(pixels(ours)[:, 16:] - expected[:, 16:]).max() <= 1
    assert (pixels(ours)[:, :16] == pixels(photo)[:, :16]).all()
    assert (pixels(ours)[:, 16:] != pixels(photo)[:, 16:]).any()


@given(st.data())
@settings(deadline=None, max_examples=15)
def test_outside_any_mask_the_pixels_are_kept(generator: ImageGenerator, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    photo = Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8))
    mask = rng.choice([0, 90, 255], (16, 24), p=[0.5, 0.2, 0.3]).astype(np.uint8)
    mask[0, 0] = 255
    (image,) = generator.generate(PROMPT, image=photo, mask=Image.fromarray(mask), steps=1, seed=1)
    assert (pixels(image)[mask == 0] == pixels(photo)[mask == 0]).all()


def test_a_latent_is_free_where_any_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[0, 0, 7, 8] = 0.5
    assert latents.latent_mask(mask, 2, 2).tolist() == [[[[0.0, 1.0], [0.0, 0.0]]]]
    mask[0, 0, 7, 8] = 0.49
    assert not latents.latent_mask(mask, 2, 2).any()


def test_outpainting_keeps_the_picture_and_fills_the_rest(generator: ImageGenerator, photo: Image.Image) -> None:
    (image,) = generator.generate(PROMPT, image=photo, outpaint="5,0,10,8", steps=3, seed=2)
    assert image.size == (48, 40)  # 47 rounded up at the right
    assert (pixels(image)[:32, 5:37] == pixels(photo)).all()
    assert record(image)["outpaint"] == [5, 0, 11, 8]
    grown, mask = fit.grow(photo, (5, 0, 11, 8))
    (same,) = generator.generate(PROMPT, image=grown, mask=mask, steps=3, seed=2)
    assert (pixels(same) == pixels(image)).all()


# A network that reads the mask


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_nine_channels_are_diffusers_own(
    tiny: Path, tmp_path: Path, photo: Image.Image, half: Image.Image, strength: float
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "inpaint"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": 9}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.randn(8, 9, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.2
    save_file(tensors, path)
    generator = diffgen.load(str(folder), device="cpu")
    assert generator.checked.variant == "inpaint"
    (ours,) = generator.generate(PROMPT, image=photo, mask=half, strength=strength, scheduler="euler", **OPTIONS)
    expected = call(
        theirs(generator, "StableDiffusionInpaintPipeline", "euler"),
        image=photo, mask_image=half, strength=strength, height=32, width=32,
    )  # fmt: skip
    assert abs(pixels(ours)[:, 16:] - expected[:, 16:]).max() <= 1
    with pytest.raises(UsageError, match="needs --image and --mask"):
        generator.generate(PROMPT)


# Second pass


def test_a_second_pass_is_image_to_image(generator: ImageGenerator) -> None:
    """From the first picture's pixels, scaled up; the numbers of the second follow those of the first."""
    options: dict[str, Any] = OPTIONS | {"scheduler": "dpmpp_2m"}
    (image,) = generator.generate(PROMPT, upscale=1.5, upscale_mode="lanczos", upscale_strength=0.5, **options)
    assert image.size == (48, 48)
    (first,) = generator.generate(PROMPT, **options)
    numbers = torch.Generator().manual_seed(SEED)
    torch.randn(1, 4, 4, 4, generator=numbers)  # what the first pass drew
    expected = call(
        theirs(generator, "StableDiffusionImg2ImgPipeline", "dpmpp_2m"),
        image=first.resize((48, 48), Image.Resampling.LANCZOS), strength=0.5, generator=numbers,
    )  # fmt: skip
    assert abs(pixels(image) - expected).max() <= 1
    assert record(image)["upscale"] == {"factor": 1.5, "mode": "lanczos", "strength": 0.5, "from": [32, 32]}


def test_a_second_pass_from_latents(generator: ImageGenerator) -> None:
    (image,) = generator.generate(PROMPT, upscale=2, upscale_mode="latent", **OPTIONS)
    assert image.size == (64, 64)
    assert record(image)["nfe"] > STEPS


# Variations


def test_a_variation_goes_from_one_seed_to_the_other(generator: ImageGenerator) -> None:
    def pixels_of(seed: int, strength: float | None) -> np.ndarray:
        more = {} if strength is None else {"variation_seed": 8, "variation_strength": strength}
        return pixels(generator.generate(PROMPT, seed=seed, steps=4, **more)[0])

    assert (pixels_of(7, 0.0) == pixels_of(7, None)).all()
    assert (pixels_of(7, 1.0) == pixels_of(8, None)).all()
    near, far = (abs(pixels_of(7, share) - pixels_of(7, None)).mean() for share in (0.05, 0.5))
    assert 0 < near < far


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_between_two_noises_is_a_noise(one: int, other: int, share: float) -> None:
    """On the great circle: the angles to both add up, and the norm lies near theirs."""
    a, b = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (one, other))
    mixed = latents.slerp(a, b, share)

    def angle(x: torch.Tensor, y: torch.Tensor) -> float:
        x, y = x.double().flatten(), y.double().flatten()
        return float(torch.arccos((x @ y / x.norm() / y.norm()).clamp(-1, 1)))

    if one != other:
        assert angle(a, mixed) + angle(mixed, b) == pytest.approx(angle(a, b), abs=1e-3)
    assert float(mixed.norm()) == pytest.approx(32, rel=0.15)


# Tiling


def test_with_tiling_a_shift_of_the_noise_is_a_shift_of_the_picture(generator: ImageGenerator) -> None:
    from diffgen.pipelines.weights.adapters import seamless

    unet, vae = generator.pipeline.unet, generator.pipeline.vae
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    shift = {"shifts": (2, 4), "dims": (2, 3)}  # by whole steps of the network's coarsest level

    def apart() -> tuple[float, float]:
        with torch.no_grad():
            e = [unet(z, 500, text, return_dict=False)[0] for z in (x, x.roll(**shift))]
            p = [vae.decode(z, return_dict=False)[0] for z in (x, x.roll(**shift))]
        big = {"shifts": (16, 32), "dims": (2, 3)}
        return float((e[0].roll(**shift) - e[1]).abs().max()), float((p[0].roll(**big) - p[1]).abs().max())

    seamless(generator.pipeline, True)
    tiled = apart()
    seamless(generator.pipeline, False)
    plain = apart()
    assert max(tiled) < 1e-4
    assert min(plain) > 1e-2


def test_a_tiled_picture_has_no_seam(generator: ImageGenerator) -> None:
    """Across the edge the step is no larger than inside; and without --tile the next picture is unchanged."""
    before = generator.generate(PROMPT, size=64, seed=3, steps=4)[0]
    tiled = pixels(generator.generate(PROMPT, size=64, seed=3, steps=4, tile=True)[0])
    after = generator.generate(PROMPT, size=64, seed=3, steps=4)[0]
    assert (pixels(before) == pixels(after)).all()
    inside = abs(np.diff(tiled, axis=1)).mean(axis=(0, 2))
    seam = abs(tiled[:, 0] - tiled[:, -1]).mean()
    assert seam <= inside.max()


# Guidance


def test_guidance_inside_an_interval_only(generator: ImageGenerator) -> None:
    """The whole interval changes nothing; outside an interval only the conditional prediction counts."""
    options: dict[str, Any] = {"seed": 4, "steps": 4, "scheduler": "euler", "negative": NEGATIVE}

    def pixels_of(**more: Any) -> np.ndarray:
        return pixels(generator.generate(PROMPT, **options, **more)[0])

    assert (pixels_of(guidance=6, guidance_interval=(0, 1)) == pixels_of(guidance=6)).all()
    assert abs(pixels_of(guidance=6, guidance_interval="0.99,0.995") - pixels_of(guidance=1)).max() <= 1
    first, second = pixels_of(guidance=6, guidance_interval="0,0.5"), pixels_of(guidance=6, guidance_interval="0.5,1")
    assert len({a.tobytes() for a in (first, second, pixels_of(guidance=6), pixels_of(guidance=1))}) == 4


def test_guidance_rescaled_is_diffusers_own(generator: ImageGenerator) -> None:
    (ours,) = generator.generate(PROMPT, guidance_rescale=0.7, scheduler="euler", **OPTIONS)
    expected = call(theirs(generator, "StableDiffusionPipeline", "euler"), guidance_rescale=0.7)
    assert (pixels(ours) == expected).all()


# Looking on


def test_the_predicted_latents_of_each_step(generator: ImageGenerator) -> None:
    predictions: list[tuple[tuple[int, ...], int, torch.Tensor]] = []
    plan = make_plan(
        find(str(generator.model.folder)), PROMPT, count=2, batch_size=2, **(OPTIONS | {"scheduler": "euler"})
    )
    steps: list[tuple[int, int]] = []
    pictures = list(
        generator.pictures(
            plan,
            lambda done, total: steps.append((done, total)),
            lambda shots, i, x0: predictions.append((tuple(shot.seed for shot in shots), i, x0.clone())),
        )
    )
    assert [(seeds, i) for seeds, i, _ in predictions] == [((SEED, SEED + 1), i) for i in range(STEPS)]
    assert steps == [(i + 1, STEPS) for i in range(STEPS)]
    last = generator.decode(predictions[-1][2])  # at the last step the picture is what is predicted
    for picture, image in zip(pictures, last, strict=True):
        assert picture.image is not None
        assert (pixels(picture.image) == pixels(image)).all()
