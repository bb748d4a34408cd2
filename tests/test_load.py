"""Loading the folders of every family, as diffusers loads them; half precision, ControlNets, safety checkers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import original_layout
import pytest
import tiny
import torch
from loading import CPU, F32, load, load_single_file, picture, theirs, weights
from PIL import Image
from safetensors.torch import load_file, save_file

from diffgen.errors import InputError
from diffgen.models import gate
from diffgen.pipelines.weights.load import load_controlnet, load_refiner, load_safety_checker
from diffgen.pipelines.weights.packed import unpack


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_folder_gives_what_diffusers_loads_bit_for_bit(family: str, family_folder: Callable[[str], Path]) -> None:
    ours, other = load(family_folder(family)), theirs(family_folder(family))
    assert type(ours).__name__ == type(other).__name__
    expected = weights(other)
    whole = "text_encoder."
    starts = [f"{whole}{x}language_model." for x in ("model.", "")]
    text = next((start for start in starts if any(name.startswith(start) for name in expected)), "")
    if text:  # of its text encoder only the layers that read a text are loaded
        expected = {
            name.replace(text, whole): tensor
            for name, tensor in expected.items()
            if name.startswith(text) or not name.startswith(whole)
        }
    assert weights(ours).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours).items())
    assert (picture(ours, family_folder(family)) == picture(other, family_folder(family))).all()


# Half precision


def test_half_precision_leaves_the_vae_and_t5s_projections_exact(family_folder: Callable[[str], Path]) -> None:
    from transformers import T5EncoderModel

    halves = load(family_folder("sd3"), torch.float16)
    assert (halves.transformer.dtype, halves.vae.dtype, halves.text_encoder.dtype) == (
        torch.float16,
        F32,
        torch.float16,
    )
    other = T5EncoderModel.from_pretrained(family_folder("sd3") / "text_encoder_3", dtype=torch.float16)
    expected = other.state_dict()
    ours = halves.text_encoder_3.state_dict()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {n: t.dtype for n, t in expected.items()}
    assert {t.dtype for t in ours.values()} == {torch.float16, F32}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    assert {t.dtype for t in load(family_folder("sd3"), torch.bfloat16).text_encoder_3.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_files_in_eight_bits_are_read(family: str, family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """float8 (e4m3), as large models are published, computed in the requested dtype."""
    narrow = torch.float8_e4m3fn
    path = original_layout.write(
        family_folder(family),
        tmp_path / "x.safetensors",
        family,
        lambda t: t.update({n: x.to(narrow) for n, x in t.items()}),
    )
    ours, exact = load_single_file(path, family_folder(family)), weights(load(family_folder(family)))
    for part in ours.components.values():
        if isinstance(part, torch.nn.Module):
            unpack(part)
    if family == "sd3":
        exact["text_encoder.text_projection.weight"] = torch.eye(16)
    assert all(torch.equal(x, exact[name].to(narrow).float()) for name, x in weights(ours).items())


def test_t5s_embedding_is_one_tensor_under_either_name(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    expected = weights(load(family_folder("sd3")))
    for i, rename in enumerate((
        lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()}),
        lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}),
    )):  # fmt: skip
        ours = load(tiny.changed(family_folder("sd3"), tmp_path / str(i), "text_encoder_3/model.safetensors", rename))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours).items())
        assert ours.text_encoder_3.shared.weight is ours.text_encoder_3.encoder.embed_tokens.weight


# ControlNets and the safety checker


def control_folder(folder: Path, where: Path) -> Path:
    """A random ControlNet for a folder's UNet."""
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    network = ControlNetModel.from_unet(load(folder).unet, conditioning_embedding_out_channels=(4, 6, 8, 8))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(where)
    return where


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_controlnet_from_a_folder_and_from_files(
    family: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    where, unet = control_folder(family_folder(family), tmp_path / "control"), load(family_folder(family)).unet
    expected = ControlNetModel.from_pretrained(where).state_dict()
    settings, tensors = original_layout.config(where), original_layout.tensors(where)
    original = original_layout.controlnet(tensors, settings)
    if family == "sd1":  # their converter leaves out XL's embedding of the size
        again = convert_controlnet_checkpoint(dict(original), settings)
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    save_file(tensors, tmp_path / "diffusers.safetensors")
    save_file(original, tmp_path / "bare.safetensors")
    save_file({f"control_model.{name}": t for name, t in original.items()}, tmp_path / "original.safetensors")
    for source in (where, *sorted(tmp_path.glob("*.safetensors"))):
        network = load_controlnet(source, unet, CPU, F32)
        assert network.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
        assert list(network.config.conditioning_embedding_out_channels) == [4, 6, 8, 8]


def test_a_controlnet_of_another_family_is_refused(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    where, unet = control_folder(family_folder("sdxl"), tmp_path / "control"), load(family_folder("sd1")).unet
    with pytest.raises(InputError, match="for another family of models"):
        load_controlnet(where, unet, CPU, F32)
    with pytest.raises(InputError, match=r"does not belong|has the shape"):
        load_controlnet(where / "diffusion_pytorch_model.safetensors", unet, CPU, F32)
    with pytest.raises(InputError, match="no convolutions for a control picture"):
        load_controlnet(family_folder("sd1") / "unet" / "diffusion_pytorch_model.safetensors", unet, CPU, F32)
    with pytest.raises(InputError, match="not a ControlNetModel"):
        load_controlnet(family_folder("sd1") / "unet", unet, CPU, F32)


def test_the_safety_checker_is_the_folders(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    assert load_safety_checker(gate.check_folder(family_folder("sd1")), CPU, F32) is None
    torch.manual_seed(2)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    other = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=6)).eval()
    other.special_care_embeds.data.normal_()
    other.concept_embeds.data.normal_()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe = theirs(family_folder("sd1"))
    pipe.register_modules(safety_checker=other, feature_extractor=processor)
    pipe.save_pretrained(tmp_path / "model")
    loaded = load_safety_checker(gate.check_folder(tmp_path / "model"), CPU, F32)
    assert loaded is not None
    checker, ours = loaded
    image = Image.fromarray(np.arange(32 * 24 * 3, dtype=np.uint8).reshape(32, 24, 3))
    pixels = ours(images=[image], return_tensors="pt").pixel_values
    assert torch.equal(pixels, processor(images=[image], return_tensors="pt").pixel_values)
    blank = np.zeros((1, 8, 8, 3), np.float32)
    assert checker(images=blank.copy(), clip_input=pixels)[1] == other(images=blank.copy(), clip_input=pixels)[1]
    with torch.no_grad():
        assert torch.equal(checker.visual_projection(checker.vision_model(pixels)[1]),
                           other.visual_projection(other.vision_model(pixels)[1]))  # fmt: skip

    # As the published ones are: the vision model one level deeper, with its positions.
    path = tmp_path / "model" / "safety_checker" / "model.safetensors"
    older = {name.replace("vision_model.", "vision_model.vision_model."): t for name, t in load_file(path).items()}
    save_file({**older, "vision_model.vision_model.embeddings.position_ids": torch.arange(5)[None]}, path)
    again = load_safety_checker(gate.check_folder(tmp_path / "model"), CPU, F32)
    assert again is not None
    assert all(torch.equal(t, again[0].state_dict()[name]) for name, t in checker.state_dict().items())


def test_only_a_refiner_is_a_refiner(family_folder: Callable[[str], Path]) -> None:
    pipe = load_refiner(gate.check_folder(family_folder("sdxl-refiner")), CPU, F32)
    assert pipe.config.requires_aesthetics_score
    assert not pipe.config.force_zeros_for_empty_prompt
    with pytest.raises(InputError, match="not a refiner"):
        load_refiner(gate.check_folder(family_folder("sdxl")), CPU, F32)
