"""A folder or file with weights, configurations or components that do not fit is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import original_layout
import pytest
import tiny
import torch
from loading import load, load_single_file

from diffgen.errors import InputError

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
    family_folder: Callable[[str], Path], tmp_path: Path, family: str, file: str, change: Any, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        load(tiny.changed(family_folder(family), tmp_path / "model", file, change))


@pytest.mark.parametrize(
    ("family", "parts", "text"),
    [
        ("sd1", {"vae": ("sd3", "vae")}, "the UNet has 4 channels in and 4 out, the VAE has 8"),
        ("sd1", {"text_encoder": ("sdxl-refiner", "text_encoder_2")}, "does not belong|missing"),
        ("sd1", {"unet": ("sdxl", "unet")}, "reads texts of width 40, the encoder writes 16"),
        ("sdxl", {"unet": ("sdxl-refiner", "unet")}, "reads texts of width 24, the encoder writes 40"),
        ("sdxl-refiner", {"unet": ("sdxl", "unet")}, "reads texts of width 40, the encoder writes 24"),
        ("sd3", {"vae": ("sd1", "vae")}, "the transformer has 8 channels in, the VAE makes 4"),
        ("flux", {"vae": ("sd3", "vae")}, "16 channels in and 16 out, with this VAE FLUX.1 has 32 and 32"),
        ("flux", {"text_encoder": ("sd2", "text_encoder")}, "summary of width 16, the encoders write 1024"),
    ],
)
def test_parts_of_several_families_are_refused(
    family_folder: Callable[[str], Path], tmp_path: Path, family: str, parts: dict[str, tuple[str, str]], text: str
) -> None:
    copy = Path(shutil.copytree(family_folder(family), tmp_path / "model"))
    for part, (other, name) in parts.items():
        shutil.rmtree(copy / part)
        shutil.copytree(family_folder(other) / name, copy / part)
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
    family_folder: Callable[[str], Path], tmp_path: Path, family: str, change: Any, text: str
) -> None:
    path = original_layout.write(family_folder(family), tmp_path / f"{family}.safetensors", family, change)
    with pytest.raises(InputError, match=text):
        load_single_file(path, family_folder(family))


def test_nothing_is_read_before_names_and_shapes_fit(
    family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a value and a name are wrong, the name is reported: no tensor is read before."""
    copy = tiny.changed(
        family_folder("sd1"), tmp_path / "model", "unet/diffusion_pytorch_model.safetensors",
        lambda t: (t["conv_in.bias"].fill_(torch.nan), t.update(zzz=torch.zeros(1))),
    )  # fmt: skip
    with pytest.raises(InputError, match="'zzz' does not belong"):
        load(copy)
