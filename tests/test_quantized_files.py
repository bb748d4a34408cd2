"""Weights of few bits in files: GGUF, eight-bit floats with scales, NF4. The picture is that of the decoded weights."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import original_layout
import pytest
import torch
from loading import CPU, F32, load, picture, theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffgen.errors import InputError
from diffgen.models import find, gate, single_file
from diffgen.models.gguf import BLOCKS
from diffgen.pipelines.inputs import read_lora
from diffgen.pipelines.weights import adapters, export, packed
from diffgen.pipelines.weights.load import load_pipeline

FOLDER = "z-image"  # its transformer is 32 wide: whole blocks
Values = Callable[[Tensor], Tensor]  # of a matrix: those that a format keeps of it


def decoded(name: str) -> Values:
    kind = gguf.GGMLQuantizationType[name]
    return lambda x: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))


def is_matrix(x: Tensor) -> bool:
    return x.ndim == 2 and len(x) > 1 and x.shape[1] % 32 == 0


def expected_picture(folder: Path, values: Values) -> np.ndarray:
    """What plain diffusers makes with the decoded weights of the transformer."""
    pipe = theirs(folder)
    for weight in pipe.transformer.parameters():
        if is_matrix(weight):
            weight.copy_(values(weight))
    return picture(pipe, folder)


def write_gguf(folder: Path, file: Path, name: str) -> Path:
    """The transformer alone, in the original layout, as people share it."""
    writer = gguf.GGUFWriter(file, "lumina2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    plain = original_layout.config(folder / "transformer"), original_layout.tensors(folder / "transformer")
    for key, tensor in original_layout.z_image(plain[1], plain[0]).items():
        kind = gguf.GGMLQuantizationType[name if is_matrix(tensor) else "F32"]
        writer.add_tensor(key, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_a_gguf_file_makes_the_picture_of_its_decoded_weights(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder(FOLDER)
    file = write_gguf(folder, tmp_path / "z-image.gguf", name)
    model = find.find(str(file))
    assert (model.family, model.source) == (FOLDER, "file")
    pipe = load_pipeline(single_file.check_file(file, folder), CPU, F32)
    layers = list(packed.packed_layers(pipe.transformer))
    assert {layer.format for layer in layers} == {name}
    assert len(layers) > 10
    ours = picture(pipe, folder)
    assert abs(ours - expected_picture(folder, decoded(name))).max() < 1e-5
    assert abs(ours - picture(load(folder), folder)).max() > 1e-4
    export.save_pipeline(pipe, single_file.check_file(file, folder), tmp_path / "whole")
    assert abs(picture(load(tmp_path / "whole"), folder) - ours).max() < 1e-6


def test_a_lora_is_merged_into_a_decoded_matrix(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder(FOLDER)
    pipe = load_pipeline(single_file.check_file(write_gguf(folder, tmp_path / "x.gguf", "Q8_0"), folder), CPU, F32)
    torch.manual_seed(0)
    low = {"down": torch.randn(2, 32), "up": torch.randn(96, 2)}
    names = {"down": "lora_A", "up": "lora_B"}
    save_file(
        {f"diffusion_model.layers.0.attention.qkv.{names[part]}.weight": x for part, x in low.items()},
        tmp_path / "lora.safetensors",
    )
    layer = pipe.transformer.layers[0].attention.to_k
    before = layer.matrix()
    adapters.merge_lora(pipe, FOLDER, read_lora(str(tmp_path / "lora.safetensors")))
    assert layer.packed is None
    torch.testing.assert_close(layer.weight, before + (low["up"] @ low["down"])[32:64])
    assert pipe.transformer.layers[1].attention.to_k.packed is not None
    assert np.isfinite(picture(pipe, folder)).all()


@pytest.mark.parametrize("name", [name for name in packed.DECODERS if name in BLOCKS])
def test_each_block_format_is_decoded_as_ggml_does(name: str) -> None:
    elements, size = BLOCKS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (elements, size)
    data = np.random.default_rng(0).integers(0, 256, (8, 4 * size), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = gguf.quants.dequantize(data, kind)
    ours = packed.decode(torch.from_numpy(data), name, 4 * elements).numpy()
    np.testing.assert_array_equal(ours, expected)


# Headers


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def entry(name: str = "a", shape: tuple[int, ...] = (32, 2), kind: int = 8, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(
    *parts: bytes, magic: bytes = b"GGUF\3\0\0\0", tensors: int = 1, keys: int = 0, data: bytes = bytes(68)
) -> bytes:
    head = magic + struct.pack("<QQ", tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32) + data


U32, LIST = 4, 9
HOSTILE = {
    "magic": (b"GGML" + bytes(100), "not a safetensors file"),
    "version": (file_of(entry(), magic=b"GGUF\1\0\0\0"), "version 1"),
    "big-endian": (file_of(entry(), magic=b"GGUF\0\0\0\3"), "big-endian"),
    "counts": (file_of(entry(), tensors=2**40), "1099511627776 tensors"),
    "no tensor": (file_of(tensors=0), "0 tensors"),
    "keys": (file_of(entry(), keys=2**40), "1099511627776 keys"),
    "cut": (file_of(entry())[:40], "cut off within the header"),
    "long text": (file_of(struct.pack("<Q", 2**62), keys=1), "at most 256"),
    "long list": (file_of(key("x", LIST, struct.pack("<IQ", 0, 2**33)), entry(), keys=1), "8589934592 entries"),
    "long vocabulary": (
        file_of(key("tokenizer.x", LIST, struct.pack("<IQ", 8, 2**20)), entry(), keys=1), "cut off|a text of",
    ),
    "nested list": (file_of(key("x", LIST, struct.pack("<IQ", 9, 1) * 3000), entry(), keys=1), "type 9"),
    "unknown value": (file_of(key("x", 77, bytes(8)), entry(), keys=1), "type 77"),
    "key twice": (file_of(*[key("x", U32, bytes(4))] * 2, entry(), keys=2), "'x' is there twice"),
    "not UTF-8": (file_of(key("x", 8, text("y")).replace(b"x", b"\xff"), entry(), keys=1), "not UTF-8"),
    "alignment": (file_of(key("general.alignment", U32, struct.pack("<I", 3)), entry(), keys=1), "no power of two"),
    "dimensions": (file_of(entry(shape=(32,) * 9)), "9 dimensions"),
    "zero": (file_of(entry(shape=(32, 0))), r"shape \[0, 32\]"),
    "overflow": (file_of(entry(shape=(2**32, 2**32))), "shape"),
    "type": (file_of(entry(kind=99)), "type 99"),
    "part of a block": (file_of(entry(shape=(33, 2))), "rows of 33"),
    "unaligned": (file_of(entry(offset=8)), "no multiple of 32"),
    "beyond the end": (file_of(entry(offset=2**40)), "leaves a gap"),
    "overlap": (file_of(entry(), entry("b"), tensors=2), "overlaps"),
    "twice": (file_of(entry(), entry(offset=96), tensors=2, data=bytes(164)), "'a' is there twice"),
    "short": (file_of(entry(shape=(32, 99))), "cut off, the tensor 'a'"),
    "rest": (file_of(entry(), data=bytes(200)), "after the last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_at_once(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    start = time.process_time()
    with pytest.raises(InputError, match=message):
        gate.read_weights(file)
    assert time.process_time() - start < 1


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    vocabulary = key("tokenizer.x", LIST, struct.pack("<IQ", 8, 300_000) + text("ab") * 300_000)
    file.write_bytes(file_of(key("y", 12, bytes(8)), vocabulary, entry(), entry("b", offset=96), tensors=2, keys=2,
                             data=bytes(96 + 68)))  # fmt: skip
    assert gate.read_weights(file)[1] == {"a": gate.Tensor("Q8_0", (2, 32)), "b": gate.Tensor("Q8_0", (2, 32))}


def test_a_scale_that_is_not_finite_is_refused(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder(FOLDER)
    file = write_gguf(folder, tmp_path / "x.gguf", "Q8_0")
    with file.open("rb") as opened:
        span = single_file.gate.gguf.read_spans(opened, file)["layers.0.attention.qkv.weight"]
    data = bytearray(file.read_bytes())
    data[span.begin : span.begin + 2] = np.float16(np.nan).tobytes()
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"qkv.weight' has values that are not finite"):
        load_pipeline(single_file.check_file(file, folder), CPU, F32)


# Eight-bit floats


@pytest.mark.parametrize("kind", ["scale_weight", "weight_scale", "rows", "plain"])
def test_eight_bit_floats_with_a_scale(kind: str, family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder(FOLDER)

    def scale_of(x: Tensor) -> Tensor:
        largest = x.abs().amax(1, keepdim=True) if kind == "rows" else x.abs().max().reshape(())
        return torch.ones(()) if kind == "plain" else largest / 448

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name, x in tensors.items() if is_matrix(x) and name.startswith("model.")]:
            three = tensors[name].chunk(3) if ".qkv." in name and kind != "rows" else [tensors[name]]
            scale = torch.cat([scale_of(x).expand(len(x), 1) for x in three])
            if kind != "plain":
                one = kind != "rows" and len(three) == 1
                end = "scale_weight" if kind == "scale_weight" else "weight_scale"
                tensors[name.removesuffix("weight") + end] = scale[0, 0] if one else scale
                tensors[name.removesuffix("weight") + "input_scale"] = torch.ones(())
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors["model.diffusion_model.scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)

    file = original_layout.write(folder, tmp_path / "x.safetensors", FOLDER, change)
    pipe = load_pipeline(single_file.check_file(file, folder), CPU, F32)
    assert {layer.format for layer in packed.packed_layers(pipe.transformer)} == {"F8_E4M3"}
    expected = expected_picture(folder, lambda x: (x / scale_of(x)).to(torch.float8_e4m3fn).float() * scale_of(x))
    assert abs(picture(pipe, folder) - expected).max() < 1e-5


# NF4


def nf4_parts(x: Tensor, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors that bitsandbytes writes for a matrix, the values that they stand for), by the definition."""
    values = torch.tensor(packed.NF4)
    blocks = x.reshape(-1, 64)
    largest = blocks.abs().amax(1)
    codes = (blocks[..., None] / largest[:, None, None] - values).abs().argmin(-1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(x.shape)}
    parts = {"": (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).reshape(-1, 1), ".quant_map": values}
    if nested:
        offset, table = float(largest.mean()), torch.linspace(-1, 1, 256)
        scales = torch.stack([(part - offset).abs().max() for part in largest.split(256)])
        scale = scales.repeat_interleave(256)[: len(largest)]
        numbers = ((largest - offset)[:, None] / scale[:, None] - table).abs().argmin(-1)
        largest = table[numbers] * scale + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {".absmax": numbers.to(torch.uint8), ".nested_absmax": scales,
                  ".nested_quant_map": table}  # fmt: skip
    else:
        parts[".absmax"] = largest
    parts[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts, (values[codes] * largest[:, None]).reshape(x.shape)


def with_nf4(folder: Path, copy: Path, nested: bool) -> Path:
    """A copy of a folder with a transformer in NF4, as diffusers saves one that bitsandbytes has quantised."""
    shutil.copytree(folder, copy)
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in [name for name, x in tensors.items() if is_matrix(x) and x.numel() % 64 == 0]:
        parts, _ = nf4_parts(tensors.pop(name), nested)
        tensors |= {name + end: part for end, part in parts.items()}
    save_file(tensors, path)
    config = path.with_name("config.json")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))
    return copy


@pytest.mark.parametrize("nested", [True, False])
def test_an_nf4_folder_makes_the_picture_of_its_decoded_weights(
    nested: bool, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder(FOLDER)
    ours = picture(load(with_nf4(folder, tmp_path / "m", nested)), folder)
    expected = expected_picture(folder, lambda x: nf4_parts(x, nested)[1] if x.numel() % 64 == 0 else x)
    assert abs(ours - expected).max() < 1e-5


STATE = ".quant_state.bitsandbytes__nf4"
BAD_NF4: dict[str, tuple[Callable[[dict[str, Tensor], str], Any], str]] = {
    "no scales": (lambda x, name: x.pop(name + ".absmax"), "no absmax"),
    "no state": (lambda x, name: x.pop(name + STATE), "whole numbers"),
    "not JSON": (lambda x, name: x.update({name + STATE: torch.zeros(9, dtype=torch.uint8)}), "broken JSON"),
    "long": (lambda x, name: x.update({name + STATE: torch.zeros(9999, dtype=torch.uint8)}), "at most 4096 bytes"),
    "codes": (lambda x, name: x.update({name: x[name][:-1]}), "bytes, its shape"),
    "table": (lambda x, name: x.update({name + ".quant_map": torch.ones(16)}), "other values"),
}


@pytest.mark.parametrize("kind", BAD_NF4)
def test_broken_nf4_is_refused(kind: str, family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = with_nf4(family_folder(FOLDER), tmp_path / "m", nested=False)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change, message = BAD_NF4[kind]
    change(tensors, next(name for name in tensors if name.endswith("to_q.weight")))
    save_file(tensors, path)
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("method", "reason"),
    [("nunchaku_lite", "code that comes from a hub"), ("torchao", "Python objects"), ("gptq", "NF4")],
)
def test_other_ways_to_quantise_are_refused_with_the_reason(
    method: str, reason: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(family_folder(FOLDER), folder := tmp_path / "m")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(InputError) as refused:
        gate.check_folder(folder)
    assert method in refused.value.message
    assert reason in (refused.value.hint or "")


def test_a_nunchaku_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    tensors = {"blocks.0.qweight": torch.zeros(4, 4, dtype=torch.int8), "blocks.0.wscales": torch.ones(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="Nunchaku") as refused:
        find.find(str(tmp_path / "x.safetensors"))
    assert "code that comes from a hub" in (refused.value.hint or "")
