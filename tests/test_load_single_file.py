"""Single files in the original layouts: what they load as, and their conversion against diffusers' own converters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import original_layout
import pytest
import tiny
import torch
from loading import CPU, F32, load, load_single_file, networks, picture, theirs, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffgen.models import gate, single_file
from diffgen.pipelines.weights import layouts
from diffgen.pipelines.weights.load import load_pipeline
from diffgen.pipelines.weights.network import make_network
from diffgen.pipelines.weights.tokenizers import load_t5_tokenizer

FILES = (
    "sd1",
    "sd2",
    "sdxl",
    "sdxl-refiner",
    "sd3",
    "flux",
    "flux-schnell",
    "z-image",
    "flux2",
    "flux2-klein",
    "qwen-image",
)


@pytest.fixture(scope="module")
def file(family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file with all the networks of a family's tiny folder; not to be changed."""
    where = tmp_path_factory.mktemp("files")

    @cache
    def write(family: str) -> Path:
        return original_layout.write(
            family_folder(family), where / f"{family}.safetensors", family.removesuffix("-schnell")
        )

    return write


@pytest.mark.parametrize("family", FILES)
def test_a_single_file_gives_what_its_folder_gives(
    family: str, family_folder: Callable[[str], Path], file: Callable[[str], Path]
) -> None:
    checked = single_file.check_file(file(family), family_folder(family))
    parts = original_layout.LAYOUTS[family.removesuffix("-schnell")]
    assert all(checked.components[part].weights == (file(family),) for part in parts)
    ours, expected = load_pipeline(checked, CPU, F32), weights(load(family_folder(family)))
    if family == "sd3":  # the first CLIP's projection is left out, and the identity
        expected["text_encoder.text_projection.weight"] = torch.eye(16)
    assert weights(ours).keys() == expected.keys()
    differ = [name for name, tensor in weights(ours).items() if not torch.equal(tensor, expected[name])]
    assert differ == []
    if family != "sd3":
        assert (
            picture(ours, family_folder(family)) == picture(load(family_folder(family)), family_folder(family))
        ).all()


def variant(folder: Path, copy: Path, **changes: Any) -> Path:
    """A copy of sd1's folder with another random UNet."""
    shutil.copytree(folder, copy)
    torch.manual_seed(3)
    tiny.unet(cross_attention_dim=16, **changes).save_pretrained(copy / "unet")
    return copy


@pytest.mark.parametrize("family", ["sd3", "flux", "flux-schnell"])
def test_a_file_with_t5_loads_without_a_folder(
    family: str, family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks as small as the others, but with all rows of CLIP's and T5's vocabularies, which come with diffgen.

    The networks' configurations beside those vocabularies are replaced by small ones. The picture is what diffusers
    makes with the same weights.
    """
    from transformers import CLIPTokenizer

    torch.manual_seed(1)
    pipe, kind = theirs(family_folder(family)), family.removesuffix("-schnell")
    configs = tmp_path / "configs"
    shutil.copytree(single_file.CONFIGS, configs)
    for name in [name for name in networks(pipe) if name.startswith("text_encoder")]:
        small = pipe.components[name]
        t5 = type(small).__name__ == "T5EncoderModel"
        special = {} if t5 else {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
        config = type(small.config)(**small.config.to_dict() | special | {"vocab_size": 32128 if t5 else 49408})
        large = type(small)(config).eval().requires_grad_(False)
        if (family, name) == ("sd3", "text_encoder"):  # no file has its projection
            large.text_projection.weight.copy_(torch.eye(16))
        if t5:
            tokenizer: Any = load_t5_tokenizer(configs / "t5_tokenizer", 77)
        else:
            tokenizer = CLIPTokenizer.from_pretrained(configs / "clip_tokenizer", model_max_length=16)
        if (family, name) == ("sd3", "text_encoder_2"):
            tokenizer.pad_token = "!"
        pipe.register_modules(**{name: large, name.replace("text_encoder", "tokenizer"): tokenizer})
    parts = {}
    for name, network in networks(pipe).items():
        network.save_pretrained(configs / kind / name)
        parts[name] = (original_layout.config(configs / kind / name), network.state_dict())
    tensors = original_layout.single_file(parts, kind)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    monkeypatch.setattr(single_file, "CONFIGS", configs)
    ours = load_pipeline(single_file.check_file(tmp_path / "x.safetensors"), CPU, F32)
    where = configs / kind
    assert (picture(ours, where) == picture(pipe, where)).all()


@pytest.mark.parametrize(("name", "changes"), [("lcm", {"time_cond_proj_dim": 8}), ("inpaint", {"in_channels": 9})])
def test_variants_from_folder_and_file(
    name: str, changes: dict[str, Any], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    where = variant(family_folder("sd1"), tmp_path / "model", **changes)
    path = original_layout.write(where, tmp_path / "x.safetensors", "sd1")
    checked = gate.check_folder(where)
    assert checked.variant == single_file.check_file(path, where).variant == name
    ours, from_file, other = load(where), load_single_file(path, where), theirs(where)
    assert all(torch.equal(tensor, weights(other)[key]) for key, tensor in weights(ours).items())
    assert all(torch.equal(tensor, weights(other)[key]) for key, tensor in weights(from_file).items())
    if name == "lcm":
        assert (picture(from_file, where, 8.0) == picture(other, where, 8.0)).all()


# The conversion, network by network, against diffusers' own converters


def converted(family: str, part: str, config: dict[str, Any], file: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors as diffgen takes them, under the network's names as transformers 5.6 and later have them."""
    layout = layouts.file_layout(family, part, config, file)
    return {
        target.removeprefix("text_model."): take(tensor)
        for name, tensor in file.items()
        for target, take in layout(name)
    }


def by_diffusers(family: str, part: str, config: dict[str, Any], network: Any, file: dict[str, Tensor]) -> Any:
    from diffusers.loaders import single_file_utils as utils

    prefix, _ = original_layout.LAYOUTS[family][part]
    file = dict(file)  # they take tensors out of it
    if part == "unet":
        return utils.convert_ldm_unet_checkpoint(file, config)
    if part == "vae":
        return utils.convert_ldm_vae_checkpoint(file, config)
    if part == "transformer":
        if family == "qwen-image":  # its files have diffusers' own names
            return {name.removeprefix(prefix): tensor for name, tensor in file.items()}
        named = family.removesuffix("-klein").replace("-", "_")
        function = f"convert_{named}_transformer_checkpoint_to_diffusers"
        return getattr(utils, function)({name: tensor for name, tensor in file.items() if name.startswith(prefix)})
    if "qwen" in prefix:  # transformers' own names, in the language model with its last layer
        begin = f"{prefix}model."
        return {name.removeprefix(begin): tensor for name, tensor in file.items() if name.startswith(begin)}
    if "t5" in prefix:
        return utils.convert_sd3_t5_checkpoint_to_diffusers(file)
    if prefix.endswith("model."):
        return utils.convert_open_clip_checkpoint(network, file, prefix)
    return utils.convert_ldm_clip_checkpoint(file, prefix)


ALL = [(family, part) for family, parts in original_layout.LAYOUTS.items() for part in parts]
# diffusers' converters know Flux and Chroma at their real width only.
NETWORKS = [pair for pair in ALL if pair[0] not in ("flux", "chroma")]


@pytest.mark.parametrize(("family", "part"), [*NETWORKS, ("flux", "vae"), ("flux", "text_encoder")])
def test_conversion_is_diffusers_own(
    family: str, part: str, family_folder: Callable[[str], Path], file: Callable[[str], Path]
) -> None:
    tensors, config = load_file(file(family)), original_layout.config(family_folder(family) / part)
    network = load(family_folder(family)).components[part]
    ours = converted(family, part, config, tensors)
    expected = by_diffusers(family, part, config, network, tensors)
    expected = {name.removeprefix("text_model."): tensor for name, tensor in expected.items()}
    last = f"encoder.layers.{config.get('num_hidden_layers')}."  # of sd2: theirs knows it by its real number, 23
    expected = {name: tensor for name, tensor in expected.items() if not (family == "sd2" and name.startswith(last))}
    for name in ("text_projection.weight", "embeddings.position_ids"):
        if name not in ours or name not in expected:
            ours.pop(name, None), expected.pop(name, None)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("family", "part"), ALL)
def test_conversion_fits_the_real_networks(family: str, part: str) -> None:
    """With the configurations that come with diffgen, by names and shapes."""
    folder = single_file.CONFIGS / family / part
    config = gate.read_json(folder / "config.json")
    class_name = gate.read_index(single_file.CONFIGS / family).pairs[part][1]
    with torch.device("meta"):
        network = make_network(class_name, config)
    full = {**network.config.to_dict()} if part.startswith("text") else dict(network.config)
    file = original_layout.single_file({part: (full, dict(network.state_dict()))}, family)
    ours = converted(family, part, config, file)
    expected = {name.removeprefix("text_model."): tensor.shape for name, tensor in network.state_dict().items()}
    if (family, part) == ("sd3", "text_encoder"):
        del expected["text_projection.weight"]
    ours.pop("embeddings.position_ids", None)
    assert {name: tensor.shape for name, tensor in ours.items()} == expected


def test_flux_conversion_is_diffusers_own() -> None:
    """At the real width, with one column for each weight: the converters only touch rows."""
    from diffusers import FluxTransformer2DModel

    config = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 24, "attention_head_dim": 128}
    with torch.device("meta"):
        network = FluxTransformer2DModel(**config, guidance_embeds=True)
    torch.manual_seed(0)
    state = {
        n: torch.randn(t.shape[0], 1) if t.ndim == 2 else torch.randn(t.shape) for n, t in network.state_dict().items()
    }
    file = original_layout.single_file({"transformer": (config, state)}, "flux")
    ours, expected = (
        converted("flux", "transformer", config, file),
        by_diffusers("flux", "transformer", config, None, file),
    )
    assert ours.keys() == expected.keys() == state.keys()
    assert all(torch.equal(t, expected[name]) and torch.equal(t, state[name]) for name, t in ours.items())
