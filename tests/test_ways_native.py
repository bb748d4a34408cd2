"""Families that diffgen samples by its own loop: every task and every file, compared with diffusers' own pipelines."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

import diffgen
import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.images.metadata import encode_png
from diffgen.pipelines.generate import ImageGenerator
from diffgen.pipelines.plan import ModelFacts, make_plan
from diffgen.pipelines.sampling.latents import CODECS
from diffgen.reproduce import reproduce

PROMPT, NEGATIVE, SEED, STEPS = "a red apple", "a blue square on the circle", 5, 3


@dataclass(frozen=True)
class Case:
    """How diffusers' pipeline of a family is called."""

    arguments: Callable[[float], dict[str, Any]]  # for a guidance scale in our convention
    latents: Callable[[Any, Tensor], Tensor] = lambda pipeline, latents: latents  # what it returns, in our layout
    reads_negative: bool = True
    negative: str = NEGATIVE  # the one that it reads


def klein(guidance: float) -> dict[str, Any]:
    """diffusers' pipeline reads the negative prompt as embeddings only: it always takes the empty one."""
    return {"guidance_scale": guidance}


def patches(pipeline: Any, latents: Tensor) -> Tensor:
    """Flux 2's latents as they were before the pipeline undid the normalisation and the patches."""
    bn = pipeline.vae.bn
    x = torch.nn.functional.pixel_unshuffle(latents, 2)
    shape = (1, -1, 1, 1)
    return (x - bn.running_mean.reshape(shape)) / (bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt().reshape(
        shape
    )


def unpacked(pipeline: Any, latents: Tensor) -> Tensor:
    return CODECS["packed"].unpack(latents, 8, 8)


CASES = {
    "chroma": Case(lambda guidance: {"guidance_scale": guidance, "negative_prompt": NEGATIVE}, unpacked),
    "flux-kontext": Case(lambda guidance: {"guidance_scale": guidance, "max_area": 64**2}, unpacked, False),
    "flux2": Case(klein, lambda pipeline, latents: latents.mT.reshape(1, -1, 4, 4), reads_negative=False),
    "flux2-klein": Case(klein, patches, negative=""),
    "flux2-klein-base": Case(klein, patches, negative=""),
    "qwen-image": Case(lambda guidance: {"true_cfg_scale": guidance, "negative_prompt": NEGATIVE}, unpacked),
    "krea2": Case(lambda guidance: {"guidance_scale": guidance - 1, "negative_prompt": NEGATIVE}, unpacked),
    "krea2-turbo": Case(lambda guidance: {"guidance_scale": guidance - 1, "negative_prompt": NEGATIVE}, unpacked),
    "ernie-image": Case(lambda guidance: {"guidance_scale": guidance, "negative_prompt": NEGATIVE}),
    "z-image": Case(lambda guidance: {"guidance_scale": guidance - 1, "negative_prompt": NEGATIVE}),
}
GUIDED = [family for family, case in CASES.items() if case.reads_negative]


@pytest.fixture(scope="module")
def load(family_folder: Callable[[str], Path]) -> Callable[[str], ImageGenerator]:
    return functools.cache(lambda family: diffgen.load(str(family_folder(family)), device="cpu"))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    y, x = np.mgrid[:64, :64] / 63
    return Image.fromarray(np.stack([255 * x, 255 * y, 255 * (1 - x) * y], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def half() -> Image.Image:
    """A mask that is white on the right."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask


@functools.cache
def facts(model: Any) -> ModelFacts:
    return ModelFacts(model)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def sampled(generator: ImageGenerator, **options: Any) -> tuple[Tensor, list[Any]]:
    """(the clean latents that the last evaluation predicts, to which every solver steps: [B, C, h, w]; the pictures)"""
    last: list[Tensor] = []
    settings: dict[str, Any] = {"seed": SEED, "steps": STEPS, "scheduler": "euler", "size": 64, **options}
    plan = make_plan(facts(generator.model), settings.pop("prompt", PROMPT), **settings)
    pictures = list(generator.pictures(plan, on_denoised=lambda shots, i, x0: last.append(x0.float().clone())))
    assert all(picture.error is None for picture in pictures)
    return last[-1], pictures


def latents(generator: ImageGenerator, **options: Any) -> Tensor:
    return sampled(generator, **options)[0]


@contextlib.contextmanager
def calls(generator: ImageGenerator) -> Iterator[list[int]]:
    """The batch size of each call of the network inside."""
    sizes: list[int] = []
    network = generator.pipeline.transformer
    hook = network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output[0])))
    yield sizes
    hook.remove()


@functools.cache
def theirs(folder: Path, name: str | None = None) -> Any:
    if name is None:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    else:
        pipeline = getattr(diffusers, name)(**theirs(folder).components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_latents(folder: Path, family: str, guidance: float, name: str | None = None, **more: Any) -> Tensor:
    arguments = {"width": 64, "height": 64, "num_inference_steps": STEPS, **CASES[family].arguments(guidance), **more}
    generator = torch.Generator().manual_seed(SEED)
    pipeline = theirs(folder, name)
    result = pipeline(prompt=PROMPT, generator=generator, output_type="latent", return_dict=False, **arguments)[0]
    return CASES[family].latents(pipeline, result.float())


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", CASES)
def test_text_to_image_is_diffusers_own(
    load: Callable[[str], ImageGenerator], family_folder: Callable[[str], Path], family: str
) -> None:
    """With Euler the same latents. Without guidance a picture takes one call of the network for each step."""
    generator, case = load(family), CASES[family]
    with calls(generator) as sizes:
        plain = latents(generator, guidance=1.0)
    assert sizes == [1] * STEPS
    assert_equal(plain, their_latents(family_folder(family), family, 1.0))
    if family == "flux2-klein":
        return  # diffusers ignores the guidance of a distilled model
    with calls(generator) as sizes:
        guided = latents(generator, guidance=3.0, **({"negative": case.negative} if family in GUIDED else {}))
    assert sum(sizes) == STEPS * (2 if family in GUIDED else 1)
    assert_equal(guided, their_latents(family_folder(family), family, 3.0))
    assert (guided - plain).abs().max() > 1e-4


@pytest.mark.parametrize("family", CASES)
def test_negative_prompts_are_read_or_named(load: Callable[[str], ImageGenerator], family: str) -> None:
    """Where they are read, guidance of an interval of steps has them there alone."""
    generator = load(family)
    plan = make_plan(facts(generator.model), PROMPT, negative=NEGATIVE, guidance=3.0 if family not in GUIDED else 1.0)
    assert any("the negative prompt is not read" in warning for warning in plan.warnings(PROMPT))
    with calls(generator) as sizes:
        options: dict[str, Any] = {"guidance_interval": "0.5,1"} if family in GUIDED else {}
        without, other = (latents(generator, guidance=3.0, negative=text, **options) for text in ("", NEGATIVE))
    assert sum(sizes) == 2 * (STEPS + (STEPS // 2 if family in GUIDED else 0))
    assert bool((without != other).any()) == (family in GUIDED)


@pytest.mark.parametrize("family", CASES)
def test_image_to_image_on_the_requested_grid(
    load: Callable[[str], ImageGenerator], family_folder: Callable[[str], Path], photo: Image.Image, family: str
) -> None:
    """Text to image and image to image walk it; where diffusers has a class for the latter, the latents are its own."""
    generator = load(family)
    plan = make_plan(facts(generator.model), PROMPT, scheduler="euler", grid="karras", steps=STEPS, size=64, seed=SEED)
    scheduler = generator.scheduler(plan, (64, 64))
    scheduler.set_timesteps(STEPS)
    usual = schedulers.get("euler", noise=scheduler.noise, prediction="flow_prediction", grid="trailing")
    usual.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() != pytest.approx(usual.timesteps.tolist())
    for options, share in (({}, 0), ({"image": photo, "strength": 0.5}, 1)):
        _, (picture,) = sampled(generator, grid="karras", keep_steps=True, **options)
        assert picture.record["grid"] == "karras"
        assert [step.t for step in picture.steps] == pytest.approx(scheduler.timesteps[share:].tolist())
    whole, part = (latents(generator, image=photo, strength=strength) for strength in (1.0, 0.5))
    assert (whole - part).abs().max() > 0.01
    name = generator.checked.row.tasks["image"]
    if "Img2Img" in name:
        ours = latents(generator, guidance=3.0, negative=NEGATIVE, image=photo, strength=0.5)
        assert_equal(ours, their_latents(family_folder(family), family, 3.0, name, image=photo, strength=0.5))


@pytest.mark.parametrize("family", CASES)
def test_inpainting_keeps_what_is_outside_the_mask(
    load: Callable[[str], ImageGenerator], photo: Image.Image, half: Image.Image, family: str
) -> None:
    """The latents outside it are the picture's own, and those inside continue them."""
    options: dict[str, Any] = {"image": photo, "strength": 0.75, "steps": 4}
    inside, (picture,) = sampled(load(family), mask=half, **options)
    assert (pixels(picture.image)[:, :32] == pixels(photo)[:, :32]).all()
    assert (pixels(picture.image)[:, 32:] != pixels(photo)[:, 32:]).any()
    alone = latents(load(family), **options)
    assert (inside - alone)[..., inside.shape[-1] // 2 :].abs().max() > 1e-4


def test_inpainting_is_diffusers_own(
    load: Callable[[str], ImageGenerator], family_folder: Callable[[str], Path], photo: Image.Image, half: Image.Image
) -> None:
    generator = load("z-image")
    options: dict[str, Any] = {"seed": SEED, "steps": STEPS, "scheduler": "euler", "guidance": 3.0}
    (ours,) = generator.generate(PROMPT, negative=NEGATIVE, image=photo, mask=half, strength=0.75, **options)
    pipeline = theirs(family_folder("z-image"), "ZImageInpaintPipeline")
    expected = pipeline(
        PROMPT, image=photo, mask_image=half, strength=0.75, num_inference_steps=STEPS, width=64, height=64,
        generator=torch.Generator().manual_seed(SEED), **CASES["z-image"].arguments(3.0),
    ).images[0]  # fmt: skip
    assert abs(pixels(ours) - pixels(expected))[:, 32:].max() <= 1


@pytest.mark.parametrize("family", CASES)
def test_other_solvers_and_a_batch_is_its_pictures(load: Callable[[str], ImageGenerator], family: str) -> None:
    generator = load(family)
    together = latents(generator, count=2, batch_size="auto", scheduler="euler_ancestral", steps=2)
    alone = [latents(generator, seed=SEED + i, scheduler="euler_ancestral", steps=2) for i in range(2)]
    assert (together - torch.cat(alone)).abs().max() <= 1e-5
    results = [alone[0], *(latents(generator, scheduler=name, steps=2) for name in ("heun", "unipc"))]
    assert all(result.isfinite().all() for result in results)
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.combinations(results, 2))


@pytest.mark.parametrize("family", CASES)
def test_prompts_of_different_lengths(load: Callable[[str], ImageGenerator], family: str) -> None:
    """A batch of the plain function of the network holds them side by side: each output is that of its prompt alone."""
    from diffgen.pipelines.sampling.denoiser import denoiser

    generator, prompts = load(family), [PROMPT, "a green circle on the flat blue square"]
    x = torch.randn(1, *generator.autoencoder().shape((64, 64)), generator=torch.Generator().manual_seed(1))
    x = CODECS[generator.checked.row.latents].pack(x.expand(2, -1, -1, -1))
    with torch.no_grad():
        together = denoiser(generator.pipeline, generator.checked, prompts, 3.0, (64, 64))(x, torch.full((2,), 700.0))
        for i, prompt in enumerate(prompts):
            network = denoiser(generator.pipeline, generator.checked, [prompt], 3.0, (64, 64))
            assert (network(x[:1], torch.full((1,), 700.0)) - together[i : i + 1]).abs().max() <= 1e-5
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["flux-kontext", "flux2-klein", "flux2"])
def test_editing_is_diffusers_own(
    load: Callable[[str], ImageGenerator], family_folder: Callable[[str], Path], photo: Image.Image, family: str
) -> None:
    """With one reference, and where the model takes several, with two of different sizes."""
    generator, second = load(family), photo.transpose(Image.Transpose.ROTATE_90).resize((64, 80))
    without = latents(generator, guidance=1.0)
    one = latents(generator, guidance=1.0, references=[photo])
    assert (one - without).abs().max() > 1e-3
    more: dict[str, Any] = {"_auto_resize": False} if family == "flux-kontext" else {}
    expected = their_latents(family_folder(family), family, 1.0, image=photo, **more)
    assert (one - expected).abs().max() <= 1e-5 * expected.abs().max()
    if generator.checked.row.references > 1:
        two = latents(generator, guidance=1.0, references=[photo, second])
        expected = their_latents(family_folder(family), family, 1.0, image=[photo, second], **more)
        assert (two - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_controlnets_of_transformers_are_diffusers_own(
    load: Callable[[str], ImageGenerator],
    family_folder: Callable[[str], Path],
    photo: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """One and two at once, of each kind that there is, and with a picture to begin with.

    diffusers' pipeline for Stable Diffusion 3 draws what it reads of the map from no generator: the mean here.
    """
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    kinds: list[dict[str, Any]] = [
        {},
        {"num_mode": 5} if family == "flux" else {"force_zeros_for_pooled_projection": False},
    ]
    kinds += [{"conditioning_embedding_channels": 4, "patch_size": 2}] if family == "flux" else []
    torch.manual_seed(1)
    networks = [tiny.controlnet(family, **kind) for kind in kinds]
    photo.save(tmp_path / "map.png")
    for i, network in enumerate(networks):
        network.save_pretrained(tmp_path / str(i))
    generator = load(family)
    name = generator.checked.row.tasks["control"]
    shift = {"guidance_scale": 3.0, "width": 64, "height": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    chosen = [[0], [1], [2]] if family == "flux" else [[0], [1], [0, 0]]
    for numbers in chosen:
        controls = [f"depth={tmp_path / 'map.png'}:0.7"] * len(numbers)
        options: dict[str, Any] = {"guidance": 3.0, "controls": controls}
        options["control_models"] = [str(tmp_path / str(numbers[0]))]
        ours = latents(generator, **options)
        one = len(numbers) == 1
        used = [networks[number] for number in numbers]
        parts = {**theirs(family_folder(family)).components, "controlnet": used[0] if one else used}
        pipeline = getattr(diffusers, name)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        arguments: dict[str, Any] = {"control_image": photo if one else [photo, photo]}
        arguments["controlnet_conditioning_scale"] = 0.7 if one else [0.7, 0.7]
        arguments |= {"control_mode": 2} if numbers == [1] and family == "flux" else {}
        arguments |= {"sigmas": np.linspace(1, 1 / STEPS, STEPS)}  # else it takes other times for Stable Diffusion 3
        expected = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **arguments, **shift).images
        expected = expected if family == "sd3" else unpacked(pipeline, expected)
        assert_equal(ours, expected)
    begun = latents(generator, image=photo, strength=0.5, **options)
    assert (begun - latents(generator, image=photo, strength=0.5)).abs().max() > 1e-4
    with pytest.raises(InputError, match="not a"):
        latents(generator, controls=controls, control_models=[str(family_folder("sd1") / "unet")])


def test_a_network_that_reads_the_mask_or_the_map(
    load: Callable[[str], ImageGenerator],
    family_folder: Callable[[str], Path],
    photo: Image.Image,
    half: Image.Image,
    tmp_path: Path,
) -> None:
    """FLUX.1 Fill reads the picture with a hole, Canny and Depth their map, as further channels of their latents."""
    fill, control = load("flux-fill"), load("flux-control")
    settings: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    for strength in (1.0, 0.7):
        ours = latents(fill, image=photo, mask=half, guidance=9.0, strength=strength)
        pipeline, start = theirs(family_folder("flux-fill")), torch.Generator().manual_seed(SEED)
        expected = pipeline(
            PROMPT, image=photo, mask_image=half, guidance_scale=9.0, generator=start, strength=strength, **settings
        )
        assert_equal(ours, unpacked(pipeline, expected.images))
    for text in ("this is an inpainting model", "text to image is not supported"):
        generator = fill if "inpainting" in text else control
        with pytest.raises(UsageError, match=text):
            make_plan(facts(generator.model), PROMPT)
    photo.save(tmp_path / "map.png")
    maps: dict[str, Any] = {"controls": [f"depth={tmp_path / 'map.png'}"]}
    ours, (picture,) = sampled(control, guidance=9.0, **maps)
    pipeline, start = theirs(family_folder("flux-control")), torch.Generator().manual_seed(SEED)
    expected = pipeline(PROMPT, control_image=photo, guidance_scale=9.0, generator=start, **settings)
    assert_equal(ours, unpacked(pipeline, expected.images))
    (tmp_path / "x.png").write_bytes(encode_png(picture.image, picture.record))
    assert reproduce(tmp_path / "x.png", str(family_folder("flux-control"))).identical
    both = latents(control, image=photo, strength=0.5, **maps)
    inside = latents(control, image=photo, mask=half, strength=0.5, count=2, batch_size=2, **maps)
    assert (both - ours).abs().max() > 1e-3
    assert inside.shape[0] == 2
    assert (inside[:1] - both).abs().max() > 1e-4


def test_references_are_recorded_and_reproduced(
    load: Callable[[str], ImageGenerator], family_folder: Callable[[str], Path], photo: Image.Image, tmp_path: Path
) -> None:
    """The picture has the size of the first reference; with a mask and a picture to begin with, too."""
    photo.resize((96, 64)).save(tmp_path / "photo.png")
    photo.save(tmp_path / "other.png")
    generator = load("flux2-klein")
    paths = [str(tmp_path / name) for name in ("photo.png", "other.png")]
    plan = make_plan(generator.model, PROMPT, references=paths, seed=SEED, steps=2)
    assert (plan.width, plan.height) == (96, 64)
    (picture,) = generator.pictures(plan)
    assert picture.image is not None
    assert [one["name"] for one in picture.record["references"]] == ["photo.png", "other.png"]
    path = tmp_path / "x.png"
    path.write_bytes(encode_png(picture.image, picture.record))
    assert reproduce(path, str(family_folder("flux2-klein"))).identical
    (tmp_path / "photo.png").unlink()
    with pytest.raises(InputError, match=r"the reference 'photo\.png'"):
        reproduce(path, str(family_folder("flux2-klein")))


def test_references_that_a_model_cannot_read_are_refused(
    load: Callable[[str], ImageGenerator], photo: Image.Image
) -> None:
    with pytest.raises(UsageError, match=r"--reference is for .*flux-kontext.*, not for z-image"):
        make_plan(load("z-image").model, PROMPT, references=[photo])
    with pytest.raises(UsageError, match="--reference at most 1 times for flux-kontext"):
        make_plan(load("flux-kontext").model, PROMPT, references=[photo, photo])


@pytest.mark.parametrize("family", ["z-image", "flux2-klein", "qwen-image", "chroma"])
def test_a_prompt_that_is_too_long_is_named(load: Callable[[str], ImageGenerator], family: str) -> None:
    generator = load(family)
    for prompt, cut in ((PROMPT, False), (" ".join([PROMPT] * 200), True)):
        (picture,) = generator.pictures(make_plan(facts(generator.model), prompt, steps=1, size=32, seed=0))
        assert any("fills the 512 tokens" in warning for warning in picture.record["warnings"]) == cut
