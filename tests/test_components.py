"""Parts of a model from files of their own: --component NAME=FILE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import original_layout
import pytest
import tiny
import torch
from loading import CPU, F32, picture, theirs
from safetensors.torch import save_file
from test_quantized_files import write_gguf

from diffgen.errors import InputError, UsageError
from diffgen.models import file_configs, find, gate, single_file
from diffgen.models.single_file import CONFIGS
from diffgen.pipelines.weights import layouts
from diffgen.pipelines.weights.load import load_pipeline
from diffgen.pipelines.weights.tokenizers import load_qwen_tokenizer

FOLDER = "z-image"


@pytest.fixture(scope="module")
def parts(family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Other random networks than the folder's: a language model with llama.cpp's names in GGUF, a VAE in a file."""
    where = tmp_path_factory.mktemp("parts")
    torch.manual_seed(7)
    encoder, vae = tiny.qwen3(24), theirs(family_folder(FOLDER)).vae
    for weight in vae.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    writer = gguf.GGUFWriter(where / "qwen.gguf", "qwen3")
    for name, tensor in encoder.state_dict().items():
        stem, _, end = f"model.{name}".rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{end}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = original_layout.config(family_folder(FOLDER) / "vae")
    save_file({name: x.contiguous() for name, x in original_layout.vae(vae.state_dict(), config).items()},
              where / "ae.safetensors")  # fmt: skip
    return {"text_encoder": where / "qwen.gguf", "vae": where / "ae.safetensors", "networks": (encoder, vae)}


def test_a_folder_and_a_file_take_parts_from_other_files(
    parts: dict[str, Any], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder(FOLDER)
    pipe = theirs(folder)
    pipe.register_modules(text_encoder=parts["networks"][0].eval().requires_grad_(False), vae=parts["networks"][1])
    expected = picture(pipe, folder)
    chosen = [f"{name}={parts[name]}" for name in ("text_encoder", "vae")]
    model = find.with_components(find.find(str(folder)), chosen)
    checked = find.check(model)
    assert abs(picture(load_pipeline(checked, CPU, F32), folder) - expected).max() < 1e-5
    assert {"text_encoder/qwen.gguf", "vae/ae.safetensors"} < set(gate.file_hashes(checked))
    assert "vae/diffusion_pytorch_model.safetensors" not in gate.file_hashes(checked)
    file = write_gguf(folder, tmp_path / "z.gguf", "F32")
    from_file = single_file.check_file(file, folder, None, {name: parts[name] for name in ("text_encoder", "vae")})
    assert abs(picture(load_pipeline(from_file, CPU, F32), folder) - expected).max() < 1e-5


def test_a_transformer_and_two_parts_need_no_folder(
    family_folder: Callable[[str], Path], parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary is the bundled one, the widths are read from the files."""
    configs = tmp_path / "configs"
    shutil.copytree(CONFIGS, configs)
    folder = family_folder(FOLDER)
    for name in ("transformer", "vae", "text_encoder"):
        shutil.copy(folder / name / "config.json", configs / FOLDER / name / "config.json")
    monkeypatch.setattr(single_file, "CONFIGS", configs)
    monkeypatch.setattr(tiny, "qwen_tokenizer", lambda: range(151_669))  # rows of the embedding
    torch.manual_seed(3)
    encoder = tiny.qwen3(24, layers=2)
    save_file({f"model.{name}": x for name, x in encoder.state_dict().items()}, tmp_path / "qwen.safetensors")
    file = write_gguf(folder, tmp_path / "z.gguf", "F32")
    with pytest.raises(InputError, match=r"lacks (vae, text_encoder|text_encoder, vae)") as lacking:
        single_file.check_file(file)
    assert "--component" in (lacking.value.hint or "")
    model = find.find(str(file))
    model = find.with_components(model, [f"text_encoder={tmp_path / 'qwen.safetensors'}", f"vae={parts['vae']}"])
    pipe = load_pipeline(find.check(model), CPU, F32)
    assert pipe.text_encoder.config.num_hidden_layers == 2
    assert np.isfinite(picture(pipe, folder)).all()


def test_the_bundled_vocabulary_is_that_of_qwen() -> None:
    tokenizer = load_qwen_tokenizer(CONFIGS / "qwen_tokenizer")
    assert len(tokenizer) == 151_669
    text = "<|im_start|>user\nHello world, 你好<|im_end|>\n"
    numbers = tokenizer(text).input_ids
    assert numbers == [151644, 872, 198, 9707, 1879, 11, 220, 108386, 151645, 198]
    assert tokenizer.decode(numbers) == text


@pytest.mark.parametrize("arch", ["QWEN3", "T5ENCODER"])
def test_the_names_of_llama_cpp(arch: str) -> None:
    """Every name that llama.cpp gives a tensor of these models comes back."""
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), 1)
    torch.manual_seed(0)
    network = tiny.qwen3(8, layers=1) if arch == "QWEN3" else tiny.t5(8)
    layout = layouts.folder_layout("language" if arch == "QWEN3" else "t5", {"model_type": "qwen3"})
    assert layout is not None
    prefix = "model." if arch == "QWEN3" else ""
    for name in network.state_dict():
        stem, _, end = name.rpartition(".")
        if ".block.1." in name or name == "encoder.embed_tokens.weight":
            continue
        assert [target for target, _ in layout(f"{names.get_name(prefix + stem)}.{end}")] == [name]


def test_the_real_language_models_by_their_shapes() -> None:
    config = gate.read_json(CONFIGS / "z-image" / "text_encoder" / "config.json")
    shapes = {f"model.layers.{i}.x": (1,) for i in range(36)} | {
        "model.embed_tokens.weight": (151936, 4096),
        "model.layers.0.mlp.gate_proj.weight": (12288, 4096),
        "model.layers.0.self_attn.q_proj.weight": (4096, 4096),
        "model.layers.0.self_attn.k_proj.weight": (1024, 4096),
    }
    file_configs.language(config, shapes)
    wanted = {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 151936}  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted  # Qwen3-8B


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("vae", UsageError, "must be NAME=FILE"),
        ("vae=none.safetensors", InputError, "there is no file"),
        ("image_encoder={vae}", UsageError, "has no such part"),
        ("text_encoder={vae}", InputError, "it is a VAE, which is no text_encoder"),
        ("vae={text_encoder}", InputError, "it is a text encoder, which is no vae"),
        ("transformer={vae}", InputError, "which is no transformer"),
    ],
)
def test_wrong_components(
    text: str, kind: type[Exception], message: str, parts: dict[str, Any], family_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(kind, match=message):
        find.check(find.with_components(find.find(str(family_folder(FOLDER))), [text.format(**parts)]))


def test_the_command_records_its_components_and_reproduce_finds_them(
    parts: dict[str, Any], family_folder: Callable[[str], Path], diffgen_: Callable[..., tuple[int, str, str]]
) -> None:
    folder = family_folder(FOLDER)
    shutil.copy(parts["vae"], "ae.safetensors")
    code, _, err = diffgen_("generate", "a red apple", "-m", folder, "--component", "vae=ae.safetensors", "--steps", 2,
                            "--seed", 1, "-s", "32x32", "-o", "x.png")  # fmt: skip
    assert code == 0, err
    code, out, err = diffgen_("reproduce", "x.png", "-m", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["result"]["identical"]
    Path("ae.safetensors").unlink()
    assert "ae.safetensors" in diffgen_("reproduce", "x.png", "-m", folder)[2]
