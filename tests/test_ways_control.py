"""ControlNets against diffusers' own pipelines, and the maps that are drawn here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_ways import OPTIONS, PROMPT, call, pixels, record, theirs

import diffgen
from diffgen.errors import InputError
from diffgen.images import edges
from diffgen.pipelines.generate import ImageGenerator


@pytest.fixture(scope="module")
def generator(tiny: Path) -> ImageGenerator:
    return diffgen.load(str(tiny), device="cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth and coloured, 32×32."""
    y, x = np.mgrid[:32, :32] / 31
    return Image.fromarray(np.stack([255 * x, 255 * y, 255 * (1 - x) * y], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def controlnet(generator: ImageGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the tiny model with random outputs; those of an untrained one are zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(5)
    network = ControlNetModel.from_unet(generator.pipeline.unet, conditioning_channels=3)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("controlnet") / "net"
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("on_picture", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_controlnets_are_diffusers_own(
    generator: ImageGenerator, controlnet: Path, photo: Image.Image, tmp_path: Path, on_picture: bool, several: bool
) -> None:
    from diffusers import ControlNetModel, MultiControlNetModel

    edge, depth = edges.canny(photo, 20, 40), photo.convert("L").convert("RGB")
    edge.save(tmp_path / "edge.png")
    depth.save(tmp_path / "depth.png")
    controls = [f"canny={tmp_path / 'edge.png'}:0.8", f"depth={tmp_path / 'depth.png'}:0.3"][: 1 + several]
    more: dict[str, Any] = {"image": photo, "strength": 0.7} if on_picture else {}
    (ours,) = generator.generate(
        PROMPT, controls=controls, control_models=[str(controlnet)], scheduler="dpmpp_2m", **more, **OPTIONS
    )
    networks = [ControlNetModel.from_pretrained(controlnet) for _ in controls]
    maps, scales = [edge, depth][: 1 + several], [0.8, 0.3][: 1 + several]
    name = "StableDiffusionControlNetImg2ImgPipeline" if on_picture else "StableDiffusionControlNetPipeline"
    pipeline = theirs(
        generator, name, "dpmpp_2m", controlnet=MultiControlNetModel(networks) if several else networks[0]
    )
    shown: Any = maps if several else maps[0]
    pictures = {"control_image": shown, **more} if on_picture else {"image": shown}
    expected = call(pipeline, controlnet_conditioning_scale=scales if several else 0.8, **pictures)
    assert (pixels(ours) == expected).all()
    assert (pixels(ours) != pixels(generator.generate(PROMPT, scheduler="dpmpp_2m", **more, **OPTIONS)[0])).any()
    controls = record(ours)["controls"]
    assert [(one["kind"], one["name"], one["scale"], one["drawn"]) for one in controls] == [
        ("canny", "edge.png", 0.8, False),
        ("depth", "depth.png", 0.3, False),
    ][: 1 + several]


def test_a_controlnet_in_a_file_is_the_one_in_the_folder(
    generator: ImageGenerator, controlnet: Path, photo: Image.Image, tmp_path: Path
) -> None:
    photo.save(tmp_path / "photo.png")
    file = controlnet / "diffusion_pytorch_model.safetensors"
    options: dict[str, Any] = {"controls": [f"canny={tmp_path / 'photo.png'}"], "steps": 2, "seed": 1}
    a, b = (generator.generate(PROMPT, control_models=[f"canny={path}"], **options)[0] for path in (controlnet, file))
    assert (pixels(a) == pixels(b)).all()
    assert record(a)["controls"][0]["drawn"] is True
    assert record(a)["controls"][0]["model_sha256"] == record(b)["controls"][0]["model_sha256"]


def test_canny_finds_the_edges_of_a_square() -> None:
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (8, 8, 24, 24))
    lines = np.asarray(edges.canny(image))[..., 0] > 0
    y, x = np.nonzero(lines)
    distance = np.minimum.reduce([abs(x - 7.5), abs(x - 23.5), abs(y - 7.5), abs(y - 23.5)])
    assert distance.max() <= 1.5
    assert 50 <= len(x) <= 80  # the outline has 64 pixels
    assert not np.asarray(edges.canny(Image.new("RGB", (9, 9), "gray"))).any()
    assert edges.is_map(edges.canny(image))
    assert edges.is_map(edges.scribble(image))
    assert not edges.is_map(Image.new("RGB", (9, 9), "gray"))
    assert not edges.is_map(Image.new("RGB", (9, 9), "white"))


def test_a_controlnet_of_another_family_is_refused(
    generator: ImageGenerator, photo: Image.Image, tmp_path: Path
) -> None:
    from diffusers import ControlNetModel
    from tiny import unet

    photo.save(tmp_path / "photo.png")
    ControlNetModel.from_unet(unet(cross_attention_dim=24)).save_pretrained(tmp_path / "net")
    options: dict[str, Any] = {"controls": [f"canny={tmp_path / 'photo.png'}"], "steps": 1}
    for path, text in (("net", "another family"), ("nothing", "does not exist"), ("photo.png", "photo.png")):
        with pytest.raises(InputError, match=text):
            generator.generate(PROMPT, control_models=[str(tmp_path / path)], **options)
    with pytest.raises(InputError, match="there is no ControlNet for canny"):
        generator.generate(PROMPT, **options)


def test_a_controlnet_in_the_models_folder_is_found(
    generator: ImageGenerator, tiny: Path, controlnet: Path, photo: Image.Image, tmp_path: Path
) -> None:
    import shutil

    photo.save(tmp_path / "photo.png")
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    shutil.copytree(controlnet, folder / "controlnet" / "depth")
    options: dict[str, Any] = {"controls": [f"depth={tmp_path / 'photo.png'}"], "steps": 2, "seed": 1}
    (ours,) = diffgen.load(str(folder), device="cpu").generate(PROMPT, **options)
    (expected,) = generator.generate(PROMPT, control_models=[str(controlnet)], **options)
    assert (pixels(ours) == pixels(expected)).all()
