"""Loading every family, from folders and from single files: against diffusers' own loading, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import struct
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import original_layout
import pytest
import tiny as models
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import schedulers
from diffgen.errors import InputError
from diffgen.models import gate, single_file
from diffgen.pipelines.weights import layouts
from diffgen.pipelines.weights.load import load_controlnet, load_pipeline, load_refiner, load_safety_checker
from diffgen.pipelines.weights.network import make_network
from diffgen.pipelines.weights.tokenizers import _from_sentencepiece, load_t5_tokenizer, load_tokenizer

CPU, F32 = torch.device("cpu"), torch.float32
FILES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux", "flux-schnell")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny folder of a family; not to be changed."""
    where = tmp_path_factory.mktemp("families")

    @cache
    def build(family: str) -> Path:
        return models.build(where / family, family=family)

    return build


def load(folder: Path, dtype: torch.dtype = F32) -> Any:
    return load_pipeline(gate.check_folder(folder), CPU, dtype)


def theirs(folder: Path) -> Any:
    import diffusers

    without = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3-without-t5" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **without)
    pipe.set_progress_bar_config(disable=True)
    for network in networks(pipe).values():
        network.requires_grad_(False)  # torch multiplies in another order where a gradient may be needed
    return pipe


def networks(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def picture(pipe: Any, folder: Path, guidance: float = 3.0) -> np.ndarray:
    """A picture of two steps, with our scheduler for what the folder's scheduler says."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    noise, prediction = schedulers.from_diffusers_config(config)
    pipe.scheduler = schedulers.get("euler", noise=noise, prediction=prediction)
    settings: dict[str, Any] = {
        "num_inference_steps": 2, "generator": torch.Generator().manual_seed(5), "output_type": "np",
    }  # fmt: skip
    kind = type(pipe).__name__
    if kind != "DDPMPipeline":
        settings |= {"prompt": "a red apple", "guidance_scale": guidance}
    if kind not in ("DDPMPipeline", "FluxPipeline"):
        settings["negative_prompt"] = "blue"
    if kind == "StableDiffusionXLImg2ImgPipeline":
        settings |= {"image": torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32), "strength": 1.0}
    elif kind != "DDPMPipeline":
        settings |= {"width": 32, "height": 32}
    return pipe(**settings).images[0]


def weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, network in networks(pipe).items()
        for name, tensor in network.state_dict().items()
    }


# Folders


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_folder_gives_what_diffusers_loads_bit_for_bit(family: str, folder: Callable[[str], Path]) -> None:
    ours, other = load(folder(family)), theirs(folder(family))
    assert type(ours).__name__ == type(other).__name__
    expected = weights(other)
    assert weights(ours).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours).items())
    assert (picture(ours, folder(family)) == picture(other, folder(family))).all()


# Single files in the original layouts


@pytest.fixture(scope="module")
def file(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file with all the networks of a family's tiny folder; not to be changed."""
    where = tmp_path_factory.mktemp("files")

    @cache
    def write(family: str) -> Path:
        return original_layout.write(folder(family), where / f"{family}.safetensors", family.removesuffix("-schnell"))

    return write


def load_file_(file: Path, base: Path, dtype: torch.dtype = F32) -> Any:
    return load_pipeline(single_file.check_file(file, base), CPU, dtype)


@pytest.mark.parametrize("family", FILES)
def test_a_single_file_gives_what_its_folder_gives(
    family: str, folder: Callable[[str], Path], file: Callable[[str], Path]
) -> None:
    checked = single_file.check_file(file(family), folder(family))
    assert all(part.weights in ((), (file(family),)) for part in checked.components.values())
    ours, expected = load_pipeline(checked, CPU, F32), weights(load(folder(family)))
    if family == "sd3":  # the first CLIP's projection is left out, and the identity
        expected["text_encoder.text_projection.weight"] = torch.eye(16)
    assert weights(ours).keys() == expected.keys()
    wrong = [name for name, tensor in weights(ours).items() if not torch.equal(tensor, expected[name])]
    assert wrong == []
    if family != "sd3":
        assert (picture(ours, folder(family)) == picture(load(folder(family)), folder(family))).all()


def variant(folder: Path, copy: Path, **changes: Any) -> Path:
    """A copy of sd1's folder with another random UNet."""
    shutil.copytree(folder, copy)
    torch.manual_seed(3)
    models.unet(cross_attention_dim=16, **changes).save_pretrained(copy / "unet")
    return copy


@pytest.mark.parametrize("family", ["sd3", "flux", "flux-schnell"])
def test_a_file_with_t5_loads_without_a_folder(
    family: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks as small as the others, but with all rows of CLIP's and T5's vocabularies, which come with diffgen.

    The networks' configurations beside those vocabularies are replaced by small ones. The picture is what diffusers
    makes with the same weights.
    """
    from transformers import CLIPTokenizer

    torch.manual_seed(1)
    pipe, kind = theirs(folder(family)), family.removesuffix("-schnell")
    configs = tmp_path / "configs"
    shutil.copytree(single_file.CONFIGS, configs)
    for name in [name for name in networks(pipe) if name.startswith("text_encoder")]:
        small = pipe.components[name]
        t5 = type(small).__name__ == "T5EncoderModel"
        special = {} if t5 else {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
        config = type(small.config)(**small.config.to_dict() | special | {"vocab_size": 32128 if t5 else 49408})
        large = type(small)(config).eval().requires_grad_(False)
        if (family, name) == ("sd3", "text_encoder"):  # whose projection no file holds
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
    name: str, changes: dict[str, Any], folder: Callable[[str], Path], tmp_path: Path
) -> None:
    where = variant(folder("sd1"), tmp_path / "model", **changes)
    path = original_layout.write(where, tmp_path / "x.safetensors", "sd1")
    checked = gate.check_folder(where)
    assert checked.variant == single_file.check_file(path, where).variant == name
    ours, from_file, other = load(where), load_file_(path, where), theirs(where)
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
        function = f"convert_{family}_transformer_checkpoint_to_diffusers"
        return getattr(utils, function)({name: tensor for name, tensor in file.items() if name.startswith(prefix)})
    if "t5" in prefix:
        return utils.convert_sd3_t5_checkpoint_to_diffusers(file)
    if prefix.endswith("model."):
        return utils.convert_open_clip_checkpoint(network, file, prefix)
    return utils.convert_ldm_clip_checkpoint(file, prefix)


ALL = [(family, part) for family, parts in original_layout.LAYOUTS.items() for part in parts]
NETWORKS = [pair for pair in ALL if pair[0] != "flux"]  # diffusers' converter knows Flux at its real width only


@pytest.mark.parametrize(("family", "part"), [*NETWORKS, ("flux", "vae"), ("flux", "text_encoder")])
def test_conversion_is_diffusers_own(
    family: str, part: str, folder: Callable[[str], Path], file: Callable[[str], Path]
) -> None:
    tensors, config = load_file(file(family)), original_layout.config(folder(family) / part)
    network = load(folder(family)).components[part]
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


# What does not fit is refused


UNET, OPENCLIP = "model.diffusion_model.", "conditioner.embedders.1.model."
T5 = "text_encoder_3/model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("family", "file", "change", "text"),
    [
        ("sd3", TRANSFORMER, lambda t: t.pop("pos_embed.pos_embed"), "'pos_embed.pos_embed' is missing"),
        ("sd3", TRANSFORMER, lambda t: t.update(extra=torch.zeros(1)), "'extra' does not belong to its SD3Trans"),
        ("sd3", T5, lambda t: t.pop("shared.weight"), "'shared.weight' is missing"),
        ("sd3", T5, lambda t: t["shared.weight"].fill_(torch.inf), "'shared.weight' has values that are not finite"),
        ("sd3", "text_encoder_3/config.json", lambda c: c.update(d_ff=31), r"shape \[32, 48\], config.json makes it"),
        ("sd3", "text_encoder_3/config.json", lambda c: c.update(feed_forward_proj="x-y-z"), "makes no T5Encoder"),
        ("sd3", "text_encoder_3/config.json", lambda c: c.update(num_layers=10**5), "more layers"),
        ("sd3", "transformer/config.json", lambda c: c.update(num_layers=10**5), "more layers"),
        ("sd3", "transformer/config.json", lambda c: c.update(pos_embed_max_size=None), "'pos_embed.pos_embed' does"),
        ("sd3", "transformer/config.json", lambda c: c.update(qk_norm="os.system"), "makes no SD3Transformer2DModel"),
        ("sd3", "tokenizer_3/tokenizer.json", lambda c: c["model"].update(vocab=[["a", 0.0]]), "does not begin with"),
        ("sd3", "tokenizer_3/tokenizer.json", lambda c: c["model"].update(vocab="x"), "no list of pieces"),
        ("sd3", "tokenizer_3/tokenizer.json", lambda c: c["model"]["vocab"].append(["more", 0.0]), "tokens, its text"),
        ("sd3", "tokenizer_3/tokenizer.json", lambda c: c.update(normalizer={"precompiled_charsmap": "?"}), "base64"),
        ("flux", "transformer/config.json", lambda c: c.update(axes_dims_rope=[2, 2, 2]), "do not make up"),
        ("sdxl", "unet/config.json", lambda c: c.update(addition_embed_type=None), "does not belong"),
        ("unconditional", "unet/config.json", lambda c: c.update(down_block_types=["A", "B"]), "makes no UNet2DModel"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused(
    folder: Callable[[str], Path], tmp_path: Path, family: str, file: str, change: Any, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        load(models.changed(folder(family), tmp_path / "model", file, change))


@pytest.mark.parametrize(
    ("family", "parts", "text"),
    [
        ("sd1", {"vae": ("sd3", "vae")}, "the UNet has 4 channels in and 4 out, the VAE has 8"),
        ("sd1", {"text_encoder": ("sdxl-refiner", "text_encoder_2")}, "does not belong|missing"),
        ("sd1", {"unet": ("sdxl", "unet")}, "reads texts of width 40, the encoder writes 16"),
        ("sdxl", {"unet": ("sdxl-refiner", "unet")}, "reads texts of width 24, the encoder writes 40"),
        ("sdxl-refiner", {"unet": ("sdxl", "unet")}, "reads texts of width 40, the encoder writes 24"),
        ("sd3", {"vae": ("sd1", "vae")}, "the transformer has 8 channels in, the VAE makes 4"),
        ("flux", {"vae": ("sd3", "vae")}, "the transformer has 16 channels in, the VAE makes 32"),
        ("flux", {"text_encoder": ("sd2", "text_encoder")}, "summary of width 16, the encoders write 1024"),
    ],
)
def test_parts_of_several_families_are_refused(
    folder: Callable[[str], Path], tmp_path: Path, family: str, parts: dict[str, tuple[str, str]], text: str
) -> None:
    copy = Path(shutil.copytree(folder(family), tmp_path / "model"))
    for part, (other, name) in parts.items():
        shutil.rmtree(copy / part)
        shutil.copytree(folder(other) / name, copy / part)
    with pytest.raises(InputError, match=text):
        load(copy)


@pytest.mark.parametrize(
    ("family", "change", "text"),
    [
        ("sd1", lambda t: t.pop(UNET + "out.2.bias"), r"sd1.safetensors: the tensor 'conv_out.bias' is missing"),
        ("sd1", lambda t: t.update({UNET + "extra": torch.zeros(1)}), "'model.diffusion_model.extra' does not belong"),
        ("sd1", lambda t: t.update({"first_stage_model.extra": torch.zeros(1)}), "'first_stage_model.extra' does not"),
        ("sdxl", lambda t: t.update({OPENCLIP + "text_projection": torch.zeros(3)}), "config.json makes it"),
        ("sdxl", lambda t: t.update({OPENCLIP + "x": torch.zeros(3)}), "'conditioner.embedders.1.model.x' does not"),
        ("sd3", lambda t: t.update({UNET + "joint_blocks.0.x_block.attn.qkv.bias": torch.zeros(47)}),
         r"qkv.bias' has the shape \[47\], a part of it \[15\], config.json makes it \[16\]"),
        ("sd3", lambda t: t[UNET + "joint_blocks.2.x_block.attn.qkv.bias"][-1:].fill_(torch.nan), "bias' has values"),
        ("flux", lambda t: t.update({UNET + "single_blocks.0.linear1.bias": torch.zeros(3)}), "bias' has the shape"),
        ("flux", lambda t: t.pop("vae.encoder.mid.attn_1.q.weight"), "attentions.0.to_q.weight' is missing"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(
    folder: Callable[[str], Path], tmp_path: Path, family: str, change: Any, text: str
) -> None:
    path = original_layout.write(folder(family), tmp_path / f"{family}.safetensors", family, change)
    with pytest.raises(InputError, match=text):
        load_file_(path, folder(family))


def test_nothing_is_read_before_names_and_shapes_fit(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a value and a name are wrong, the name is reported: no tensor is read before."""
    copy = models.changed(
        folder("sd1"), tmp_path / "model", "unet/diffusion_pytorch_model.safetensors",
        lambda t: (t["conv_in.bias"].fill_(torch.nan), t.update(zzz=torch.zeros(1))),
    )  # fmt: skip
    with pytest.raises(InputError, match="'zzz' does not belong"):
        load(copy)


# Half precision


def test_half_precision_leaves_the_vae_and_t5s_projections_exact(folder: Callable[[str], Path]) -> None:
    from transformers import T5EncoderModel

    halves = load(folder("sd3"), torch.float16)
    assert (halves.transformer.dtype, halves.vae.dtype, halves.text_encoder.dtype) == (
        torch.float16,
        F32,
        torch.float16,
    )
    other = T5EncoderModel.from_pretrained(folder("sd3") / "text_encoder_3", dtype=torch.float16)
    expected = other.state_dict()
    ours = halves.text_encoder_3.state_dict()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {n: t.dtype for n, t in expected.items()}
    assert {t.dtype for t in ours.values()} == {torch.float16, F32}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    assert {t.dtype for t in load(folder("sd3"), torch.bfloat16).text_encoder_3.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_files_in_eight_bits_are_read(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As large models are published: float8 (e4m3), computed in the requested dtype."""
    narrow = torch.float8_e4m3fn
    path = original_layout.write(
        folder(family), tmp_path / "x.safetensors", family, lambda t: t.update({n: x.to(narrow) for n, x in t.items()})
    )
    ours, exact = load_file_(path, folder(family)), weights(load(folder(family)))
    if family == "sd3":
        exact["text_encoder.text_projection.weight"] = torch.eye(16)
    assert all(torch.equal(x, exact[name].to(narrow).float()) for name, x in weights(ours).items())


def test_t5s_embedding_is_one_tensor_under_either_name(folder: Callable[[str], Path], tmp_path: Path) -> None:
    expected = weights(load(folder("sd3")))
    for i, rename in enumerate((
        lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()}),
        lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}),
    )):  # fmt: skip
        ours = load(models.changed(folder("sd3"), tmp_path / str(i), T5, rename))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours).items())
        assert ours.text_encoder_3.shared.weight is ours.text_encoder_3.encoder.embed_tokens.weight


# Tokenizers


def tag(number: int, kind: int, value: bytes) -> bytes:
    """A field of a protocol buffer whose value has less than 128 bytes, or the size before it."""
    size = []
    if kind == 2:
        left = len(value)
        while True:
            size.append(left & 127 | (128 if left > 127 else 0))
            left >>= 7
            if not left:
                break
    return bytes([number << 3 | kind, *size]) + value


def spiece(pieces: list[tuple[str, float]], charsmap: bytes = b"") -> bytes:
    """A SentencePiece model as sentencepiece_model.proto defines it, with the fields that T5's has."""
    body = b"".join(
        tag(1, 2, tag(1, 2, piece.encode()) + tag(2, 5, struct.pack("<f", score)) + tag(3, 0, b"\x01"))
        for piece, score in pieces
    )
    return body + tag(2, 2, tag(3, 0, b"\x01")) + tag(3, 2, tag(1, 2, b"nmt_nfkc") + tag(2, 2, charsmap))


TEXTS = ["a red apple", "  Two   spaces, and\ta piñata!", "apple</s> <extra_id_7> x", "", "日本 a"]


def test_t5s_tokenizer_is_what_transformers_reads(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    where = folder("flux") / "tokenizer_2"
    other, ours = T5Tokenizer.from_pretrained(where), load_t5_tokenizer(where, 32)
    (tmp_path / "spiece.model").write_bytes(spiece(models.t5_pieces()[:-100]))
    short = load_t5_tokenizer(tmp_path, 32)
    for text in TEXTS:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": 12}
        assert ours(text, **options).input_ids == other(text, **options).input_ids == short(text, **options).input_ids
    assert len(ours) == len(other) == len(short)


def test_t5s_normalization_comes_along(tmp_path: Path) -> None:
    """A precompiled table in which ﬁ becomes fi, from either file."""
    # sentencepiece/src/normalizer.h: the size of a double array, the array, the replacements, each ended by a zero.
    # The array is a trie over bytes (Darts): node n leads by byte b to the place n ^ offset(n) ^ b, which holds b.
    units = [0] * 1024
    node = 0
    for place, byte in zip((256, 512, 768), "ﬁ".encode(), strict=True):
        units[node] |= (node ^ place ^ byte) << 10
        units[place] = byte
        node = place
    leaf = 900
    units[node] |= (node ^ leaf) << 10 | 1 << 8
    units[leaf] = 1 << 31  # the value: 0, where its replacement begins
    table = struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + b"fi\0"
    pieces = [*models.t5_pieces()[:-100], ("▁fi", -1.0)]
    (tmp_path / "spiece.model").write_bytes(spiece(pieces, table))
    tokenizer = load_t5_tokenizer(tmp_path, 32)
    assert tokenizer("ﬁ").input_ids == [len(pieces) - 1, 1]
    tokenizer.save_pretrained(tmp_path / "json")
    assert load_t5_tokenizer(tmp_path / "json", 32)("ﬁ").input_ids == [len(pieces) - 1, 1]


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02no pickle", b"\x0a\xff\xff", b"\x0f", b"\x0a\x04\x0a\x02\xff\xfe", b"\x80" * 20]
)
def test_what_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(InputError, match=r"SentencePiece|does not begin"):
        load_t5_tokenizer(tmp_path, 32)


def test_clips_tokenizer_that_comes_with_diffgen_is_clips() -> None:
    """Ids from OpenAI's own tokenizer, as CLIP's README and diffusers' documentation show them."""
    tokenizer = load_tokenizer(single_file.CONFIGS / "clip_tokenizer", 77)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a", padding="max_length").input_ids[-1] == 49407
    second = load_tokenizer(single_file.CONFIGS / "clip_tokenizer", 77, {"pad_token": "!"})
    assert second("a", padding="max_length").input_ids[2:] == [49407] + [0] * 74


def most_probable(text: str, scores: dict[str, float]) -> float:
    """The sum of the scores of the best division of a text of one space between words, by dynamic programming."""
    text = "▁" + unicodedata.normalize("NFKC", text).replace(" ", "▁")
    best = [0.0] + [-math.inf] * len(text)
    for end in range(1, len(text) + 1):
        best[end] = max(best[at] + scores.get(text[at:end], -math.inf) for at in range(max(0, end - 24), end))
    return best[-1]


def test_t5s_tokenizer_that_comes_with_diffgen_is_t5s() -> None:
    """The ids that transformers' documentation of T5 prints; and the definition of a unigram tokenizer."""
    folder = single_file.CONFIGS / "t5_tokenizer"
    assert gate.check_tokenizer(folder) == [folder / "spiece.model"]
    tokenizer = load_t5_tokenizer(folder, 512)
    assert tokenizer("The house is wonderful.").input_ids == [37, 629, 19, 1627, 5, 1]
    documented = [2116, 43, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1]
    assert tokenizer("studies have shown that owning a dog is good for you").input_ids == documented
    assert tokenizer("  a\tphoto  \n").input_ids == tokenizer("a photo").input_ids
    assert tokenizer("🍎").input_ids == [3, 2, 1]
    pieces, normalization = _from_sentencepiece(folder / "spiece.model")
    assert (len(pieces), len(normalization)) == (32100, 237_539)
    scores = dict(pieces[3:32000])
    for text in ("a photograph of an astronaut riding a horse", "Zürich, café: １２ ﬁne ⅷ", "qwxzjkvq 100mm f/1.8"):
        ids = tokenizer(text).input_ids[:-1]
        assert sum(pieces[i][1] for i in ids) == pytest.approx(most_probable(text, scores), abs=1e-4)


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
def test_a_controlnet_from_a_folder_and_from_files(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    where, unet = control_folder(folder(family), tmp_path / "control"), load(folder(family)).unet
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


def test_a_controlnet_of_another_family_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    where, unet = control_folder(folder("sdxl"), tmp_path / "control"), load(folder("sd1")).unet
    with pytest.raises(InputError, match="for another family of models"):
        load_controlnet(where, unet, CPU, F32)
    with pytest.raises(InputError, match=r"does not belong|has the shape"):
        load_controlnet(where / "diffusion_pytorch_model.safetensors", unet, CPU, F32)
    with pytest.raises(InputError, match="no convolutions for a control picture"):
        load_controlnet(folder("sd1") / "unet" / "diffusion_pytorch_model.safetensors", unet, CPU, F32)
    with pytest.raises(InputError, match="not a ControlNetModel"):
        load_controlnet(folder("sd1") / "unet", unet, CPU, F32)


def test_the_safety_checker_is_the_folders(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    assert load_safety_checker(gate.check_folder(folder("sd1")), CPU, F32) is None
    torch.manual_seed(2)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    other = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=6)).eval()
    other.special_care_embeds.data.normal_()
    other.concept_embeds.data.normal_()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe = theirs(folder("sd1"))
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


def test_only_a_refiner_is_a_refiner(folder: Callable[[str], Path]) -> None:
    pipe = load_refiner(gate.check_folder(folder("sdxl-refiner")), CPU, F32)
    assert pipe.config.requires_aesthetics_score
    assert not pipe.config.force_zeros_for_empty_prompt
    with pytest.raises(InputError, match="not a refiner"):
        load_refiner(gate.check_folder(folder("sdxl")), CPU, F32)
