"""LoRAs in every layout, textual inversions: against the formula, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffgen
from diffgen.errors import InputError, UsageError
from diffgen.pipelines.generate import ImageGenerator

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.attn1.to_out.0",
    f"{BLOCK}.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",  # a convolution over one pixel
    "down_blocks.0.resnets.0.conv1",  # a convolution
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
)
TEXT = ("encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1")
RANK, ALPHA = 2, 1.0

# The same modules of the UNet by the names of the original network.
ORIGINAL = {
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    ".conv1": ".in_layers.2",
}


@pytest.fixture(scope="module")
def generator(tiny: Path) -> ImageGenerator:
    return diffgen.load(str(tiny), device="cpu")


@pytest.fixture(scope="module")
def low(tiny: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)}: random low-rank matrices for modules of the UNet, and of the text encoder ("text …")."""
    random = torch.Generator().manual_seed(9)
    unet, text = (load_file(next((tiny / part).glob("*.safetensors"))) for part in ("unet", "text_encoder"))
    matrices = {}
    for name, tensors in ((m, unet) for m in MODULES):
        matrices[name] = _matrices(tensors[f"{name}.weight"], random)
    for name in TEXT:
        key = next(k for k in text if k.removeprefix("text_model.") == f"{name}.weight")
        matrices[f"text {name}"] = _matrices(text[key], random)
    return matrices


def _matrices(weight: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    a = torch.randn(RANK, *weight.shape[1:], generator=random) * 0.5
    b = torch.randn(len(weight), RANK, *([1, 1] if weight.ndim == 4 else []), generator=random) * 0.5
    return a, b


def in_layout(layout: str, low: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a LoRA file; alpha is half the rank, in the layouts that have one, else in B."""
    tensors = {}
    for name, (a, b) in low.items():
        text, module = name.startswith("text "), name.removeprefix("text ")
        part = "text_encoder" if text else "unet"
        full = f"text_model.{module}" if text else module
        original = module
        for new, old in ORIGINAL.items():
            original = original.replace(new, old)
        flat = full.replace(".", "_")
        halved = b * (ALPHA / RANK)
        if layout == "peft":
            tensors |= {f"{part}.{full}.lora_A.weight": a, f"{part}.{full}.lora_B.weight": halved}
        elif layout == "older diffusers":
            owner, _, last = full.removesuffix(".0").rpartition(".")
            if ".attn" in owner and not text:
                stem = f"{part}.{owner}.processor.{last}_lora"
            elif last == "q_proj":
                stem = f"{part}.{owner}.to_q_lora"
            else:
                stem = f"{part}.{full}.lora"
            tensors |= {f"{stem}.down.weight": a, f"{stem}.up.weight": halved}
        else:
            stem = {
                "kohya": ("lora_te_" if text else "lora_unet_") + flat,
                "kohya, original names": f"lora_te_{flat}" if text else f"lora_unet_{original.replace('.', '_')}",
                "original": f"lora_te_{flat}" if text else f"diffusion_model.{original}",
            }[layout]
            up, down = ("lora_B", "lora_A") if layout == "original" and not text else ("lora_up", "lora_down")
            tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b, f"{stem}.alpha": torch.tensor(ALPHA)}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def draw(generator: ImageGenerator, **options: Any) -> np.ndarray:
    return pixels(generator.generate("a red apple", seed=3, steps=3, **options)[0])


LAYOUTS = ("peft", "older diffusers", "kohya", "kohya, original names", "original")


def test_merged_is_the_weight_and_scale_times_b_times_a(
    tiny: Path, generator: ImageGenerator, low: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    save_file(in_layout("kohya", low), tmp_path / "x.safetensors")
    draw(generator, loras=[f"{tmp_path / 'x.safetensors'}:0.7"])
    before = load_file(next((tiny / "unet").glob("*.safetensors")))
    now = generator.pipeline.unet.state_dict()
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in low:
            a, b = low[module]
            delta = (b.flatten(1) @ a.flatten(1)).reshape(tensor.shape)
            tensor = tensor + 0.7 * ALPHA / RANK * delta
        assert torch.allclose(now[name], tensor, rtol=0, atol=1e-6), name
    assert generator.fits == [f"x.safetensors: matched {3 * len(low)} of {3 * len(low)} tensors, rank {RANK}"]


def test_every_layout_gives_the_same_pixels(
    generator: ImageGenerator, low: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    plain = draw(generator)
    pictures = []
    for i, layout in enumerate(LAYOUTS):
        tensors = in_layout(layout, low)
        save_file(tensors, tmp_path / f"{i}.safetensors")
        pictures.append(draw(generator, loras=[str(tmp_path / f"{i}.safetensors")]))
        assert generator.fits == [f"{i}.safetensors: matched {len(tensors)} of {len(tensors)} tensors, rank {RANK}"], (
            layout
        )
    for layout, picture in zip(LAYOUTS, pictures, strict=True):
        assert abs(picture - pictures[0]).max() <= 1, layout
    assert (pictures[0] != plain).any()
    assert (draw(generator) == plain).all()  # without it, the model is as before
    assert (draw(generator, loras=[f"{tmp_path / '0.safetensors'}:0"]) == plain).all()


def test_several_add_up(generator: ImageGenerator, low: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(in_layout("peft", low), path)
    once = draw(generator, loras=[f"{path}:0.8"])
    twice = draw(generator, loras=[f"{path}:0.5", f"{path}:0.3"])
    assert abs(once - twice).max() <= 1
    (image,) = generator.generate("a", seed=3, steps=1, loras=[f"{path}:0.5", f"{path}:0.3"])
    loras = json.loads(image.info["diffgen"])["loras"]
    assert [(one["name"], one["scale"], len(one["sha256"])) for one in loras] == [
        ("x.safetensors", 0.5, 64),
        ("x.safetensors", 0.3, 64),
    ]


def test_alpha_as_peft_writes_it_into_the_header(
    generator: ImageGenerator, low: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    """`save_lora_weights(..., unet_lora_adapter_metadata=…)` of diffusers."""
    only = {name: pair for name, pair in low.items() if not name.startswith("text")}
    save_file(in_layout("peft", only), tmp_path / "half.safetensors")
    raw = {f"unet.{name}.lora_{x}.weight": t.contiguous() for name, pair in only.items()
           for x, t in zip("AB", pair, strict=True)}  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})}
    save_file(raw, tmp_path / "header.safetensors", metadata)
    a, b = (draw(generator, loras=[str(tmp_path / f"{name}.safetensors")]) for name in ("half", "header"))
    assert abs(a - b).max() <= 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: {f"other_{k}": v for k, v in t.items()}, "none of its"),
        (lambda t: {k: torch.cat([v, v], 1) if "attn1_to_q.lora_down" in k else v for k, v in t.items()}, "shape"),
        (lambda t: {k: v.fill_(float("nan")) if "attn1_to_q.lora_up" in k else v for k, v in t.items()}, "not finite"),
        (lambda t: {k: v[:, :1] if "attn1_to_q.lora_up" in k else v for k, v in t.items()}, "not a product"),
        (lambda t: t | {"lora_unet_x.lokr_t2": torch.ones(1)}, "not read"),
        (lambda t: t | {"lora_unet_x.hada_t1": torch.ones(1)}, "not read"),
    ],
)
def test_what_does_not_fit_is_refused(
    generator: ImageGenerator, low: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, change: Any, text: str
) -> None:
    tensors = {k: v.clone() for k, v in in_layout("kohya", low).items()}
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=text):
        draw(generator, loras=[str(tmp_path / "x.safetensors")])
    assert (draw(generator) == draw(diffgen.load(str(generator.model.folder)))).all()


def test_tensors_without_a_place_are_named(
    generator: ImageGenerator, low: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    tensors = in_layout("kohya", low) | {"lora_unet_elsewhere.lora_up.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    draw(generator, loras=[str(tmp_path / "x.safetensors")])
    assert "lora_unet_elsewhere.lora_up.weight" in generator.fits[0]


def test_files_are_seen_by_the_gate(generator: ImageGenerator, tmp_path: Path, tiny: Path) -> None:
    pickle = tmp_path / "x.safetensors"
    torch.save({"a": torch.zeros(1)}, pickle)
    checkpoint = next((tiny / "unet").glob("*.safetensors"))
    for options, text in (
        ({"loras": [str(pickle)]}, "not safetensors"),
        ({"loras": [str(tmp_path / "none.safetensors:0.5")]}, "none.safetensors"),
        ({"embeddings": [f"x={pickle}"]}, "not safetensors"),
        ({"loras": [str(checkpoint)]}, "no LoRA, but 208 tensors"),
        ({"controls": ["canny=none.png"], "control_models": [str(pickle)]}, "none.png"),
    ):
        with pytest.raises(InputError, match=text):
            generator.generate("a", **options)  # type: ignore[arg-type]
    for options in ({"embeddings": [str(pickle)]}, {"embeddings": ["a b=x"]}, {"loras": [f"{pickle}:11"]}):
        with pytest.raises(UsageError):
            generator.generate("a", **options)  # type: ignore[arg-type]


# Textual inversions


@pytest.fixture(scope="module")
def vectors(tiny: Path) -> Tensor:
    """The vectors of the words red and apple, as the model has them."""
    table = load_file(next((tiny / "text_encoder").glob("*.safetensors")))
    rows = next(t for k, t in table.items() if k.endswith("token_embedding.weight"))
    vocabulary = json.loads((tiny / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    return rows[[vocabulary["red</w>"], vocabulary["apple</w>"]]]


@pytest.mark.parametrize("name", ["emb_params", "<thing>", "clip_l"])
def test_an_embedding_of_known_words_equals_them(
    generator: ImageGenerator, vectors: Tensor, tmp_path: Path, name: str
) -> None:
    save_file({name: vectors.contiguous()}, tmp_path / "x.safetensors")
    options: dict[str, Any] = {"seed": 3, "steps": 3, "embeddings": [f"<thing>={tmp_path / 'x.safetensors'}"]}
    (ours,) = generator.generate("a <thing> on the circle", **options)
    assert generator.fits == ["x.safetensors: <thing> is 2 vectors"]
    (expected,) = generator.generate("a red apple on the circle", seed=3, steps=3)
    assert (pixels(ours) == pixels(expected)).all()
    record = json.loads(ours.info["diffgen"])
    assert record["embeddings"][0]["word"] == "<thing>"
    assert not any("'thing'" in warning for warning in record["warnings"])  # "never saw" it
    assert (pixels(generator.generate("a <thing> on the circle", seed=3, steps=3)[0]) != pixels(ours)).any()


@pytest.mark.parametrize(
    ("tensors", "word", "text"),
    [
        ({"x": torch.zeros(2, 17)}, "<x>", "for another family"),
        ({"x": torch.zeros(2, 2, 16)}, "<x>", "for another family"),
        ({"x": torch.full((1, 16), float("inf"))}, "<x>", "not finite"),
        ({"x": torch.zeros(1, 16)}, "red</w>", "another name"),
    ],
)
def test_a_file_that_is_no_embedding_is_refused(
    generator: ImageGenerator, tmp_path: Path, tensors: dict[str, Tensor], word: str, text: str
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError) as excinfo:
        generator.generate("a", embeddings=[f"{word}={tmp_path / 'x.safetensors'}"])
    assert text in f"{excinfo.value.message} {excinfo.value.hint}"
