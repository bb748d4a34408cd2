"""The gate: valid folders pass; crafted ones are refused by name, without running anything."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from diffgen.errors import InputError
from diffgen.models.gate import check_folder, file_hashes, model_hash, read_header, read_json

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CONFIGS = {
    "unet": {"_class_name": "UNet2DConditionModel", "sample_size": 8},
    "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [16, 32, 64, 64]},
    "text_encoder": {"model_type": "clip_text_model"},
}
TENSORS = {
    "conv.weight": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "conv.bias": np.ones(2, dtype=np.float32),
    "ids": np.arange(3, dtype=np.int64),
}
UNET, CLIP = "diffusion_pytorch_model.safetensors", "model.safetensors"


def make_folder(folder: Path) -> Path:
    """A diffusers folder as `save_pretrained` lays it out, with tiny weights."""
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    for name, config in CONFIGS.items():
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(TENSORS, folder / name / (CLIP if name == "text_encoder" else UNET))
    (folder / "tokenizer/vocab.json").write_text('{"a": 0}')
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "scheduler/scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model")


def index_with(folder, **changes):
    (folder / "model_index.json").write_text(json.dumps({**INDEX, **changes}))
    return folder


def pack(header, body=b""):
    """A safetensors file by hand; `header` is an object or the bytes themselves."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + body


def entry(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# What passes


def test_a_sound_folder(folder):
    checked = check_folder(folder)
    assert checked.family == "sd1"
    assert {name: [part.library, part.class_name] for name, part in checked.components.items()} == {
        name: INDEX[name] for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    }
    for name, config in CONFIGS.items():
        assert checked.components[name].config == config
    assert checked.components["scheduler"].config == {"prediction_type": "epsilon"}
    assert set(checked.files) == {path for path in folder.rglob("*") if path.is_file()}


def test_tensors_are_those_that_safetensors_reads(folder):
    unet = check_folder(folder).components["unet"]
    with safe_open(unet.weights[0], "numpy") as file:
        slices = {name: file.get_slice(name) for name in TENSORS}
        theirs = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        assert set(file.keys()) == set(TENSORS)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in unet.tensors.items()} == theirs


def test_hashes_are_those_of_sha256sum(folder):
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    lines = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
    hashes = dict(reversed(line.split("  ")) for line in lines.splitlines())
    checked = check_folder(folder)
    assert file_hashes(checked) == hashes
    assert model_hash(checked, file_hashes(checked)) == hashes[f"unet/{UNET}"] == model_hash(checked, hashes)
    flipped = bytearray((folder / "unet" / UNET).read_bytes())
    flipped[-1] ^= 1
    (folder / "unet" / UNET).write_bytes(flipped)
    changed = file_hashes(check_folder(folder))
    assert {name for name in hashes if hashes[name] != changed[name]} == {f"unet/{UNET}"}


def test_half_precision_variant_and_links_as_in_a_download_cache(folder, tmp_path):
    (folder / "unet" / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    shutil.move(folder / "vae" / UNET, tmp_path / "blob")
    (folder / "vae" / UNET).symlink_to(tmp_path / "blob")
    checked = check_folder(folder)
    weights = {name: part.weights[0].name for name, part in checked.components.items() if part.weights}
    assert weights == {"text_encoder": CLIP, "unet": "diffusion_pytorch_model.fp16.safetensors", "vae": UNET}


def test_shards(folder):
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {"conv.weight": names[0], "conv.bias": names[1], "ids": names[1]}
    expected = check_folder(folder).components["unet"].tensors
    (folder / "unet" / UNET).unlink()
    for name in names:
        save_file({tensor: TENSORS[tensor] for tensor in places if places[tensor] == name}, folder / "unet" / name)
    index = folder / "unet" / f"{UNET}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    checked = check_folder(folder)
    assert checked.components["unet"].tensors == expected
    assert [path.name for path in checked.components["unet"].weights] == names
    assert {index, folder / "unet" / names[0]} <= set(checked.files)
    digests = [hashlib.sha256((folder / "unet" / name).read_bytes()).hexdigest() for name in names]
    assert model_hash(checked, file_hashes(checked)) == hashlib.sha256("".join(digests).encode()).hexdigest()

    outside = folder.parent / "outside.safetensors"
    save_file({"conv.weight": TENSORS["conv.weight"]}, outside)
    for name in ("../../outside.safetensors", str(outside), "..\\x.safetensors", "C:x.safetensors", "x.bin", "", 7):
        index.write_text(json.dumps({"weight_map": {**places, "conv.weight": name}}))
        with pytest.raises(InputError, match=r"plain name|weight_map"):
            check_folder(folder)
    for wrong in ({**places, "extra": names[0]}, {"ids": names[1]}, {**places, "ids": names[0]}, {}, [], None):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(InputError):
            check_folder(folder)


# Names are data


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unet", ["os", "system"]),
        ("unet", ["antigravity", "x"]),
        ("unet", ["diffusers", "UNet2DModel"]),
        ("unet", ["transformers", "UNet2DConditionModel"]),
        ("unet", ["my_module", "UNet2DConditionModel"]),
        ("vae", ["diffusers.models", "AutoencoderKL"]),
        ("scheduler", ["antigravity", "Scheduler"]),
        ("scheduler", ["diffusers", "x.y"]),
        ("safety_checker", ["os", "system"]),
        ("feature_extractor", ["antigravity", "x"]),
        ("another", ["diffusers", "UNet2DConditionModel"]),
        ("another", {"a": 1}),
        ("unet", ["diffusers"]),
        ("unet", ["diffusers", 7]),
        ("unet", [None, "UNet2DConditionModel"]),
        ("unet", [None, None]),
        ("text_encoder", None),
        ("tokenizer", "CLIPTokenizer"),
        ("_class_name", "FluxPipeline"),
        ("_class_name", ["pipeline", "StableDiffusionPipeline"]),
        ("_class_name", None),
    ],
)
def test_components_come_from_our_table_alone(folder, name, value):
    before = set(sys.modules)
    with pytest.raises(InputError, match=r"model_index\.json"):
        check_folder(index_with(folder, **{name: value}))
    assert set(sys.modules) - before <= {"reprlib"}
    assert "antigravity" not in sys.modules


def test_a_scheduler_is_only_a_word(folder):
    checked = check_folder(index_with(folder, scheduler=["diffusers", "NoSuchSchedulerAtAll"]))
    assert checked.components["scheduler"].class_name == "NoSuchSchedulerAtAll"


def test_the_usual_companions_are_left_out(folder):
    index_with(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        tokenizer=["transformers", "CLIPTokenizerFast"],
    )
    assert set(check_folder(folder).components) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


AUDITED = """
import sys
from diffgen.models.gate import check_folder
sys.addaudithook(lambda event, a: print(a[0]) if event == "open" and isinstance(a[0], str) else None)
check_folder(sys.argv[1])
"""


def test_python_files_are_never_opened(folder, tmp_path):
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')"
    for name in ("pipeline.py", "unet/modeling.py", "__init__.py", "tokenizer/tokenization.py"):
        (folder / name).write_text(code)
    (folder / "unet/config.json").write_text(json.dumps({**CONFIGS["unet"], "auto_map": {"AutoModel": "modeling.Net"}}))
    index_with(folder, custom_pipeline="pipeline.py", auto_map="pipeline.Pipe")
    opened = subprocess.run([sys.executable, "-c", AUDITED, folder], capture_output=True, text=True, check=True).stdout
    assert set(opened.splitlines()) == {str(path) for path in check_folder(folder).files}
    assert not [name for name in opened.splitlines() if name.endswith(".py")]
    assert not canary.exists()


# No pickle


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("protocol", [0, 2, 5, "zip"])
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_pickle_named_safetensors_is_refused(folder, tmp_path, protocol, component):
    canary = tmp_path / "canary"
    path = folder / component / (CLIP if component == "text_encoder" else UNET)
    if protocol == "zip":  # as torch.save writes them
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Evil(canary)))
    else:
        path.write_bytes(pickle.dumps(Evil(canary), protocol))
    with pytest.raises(InputError, match=path.name) as excinfo:
        check_folder(folder)
    assert "convert" in excinfo.value.hint
    assert not canary.exists()
    pickle.loads(pickle.dumps(Evil(canary), 2)).close()
    assert canary.exists()  # the trap itself works


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "x.pt", "x.pth", "x.PKL", "X.Bin"])
def test_a_folder_with_pickles_only_is_refused_with_the_way_out(folder, tmp_path, name):
    (folder / "unet" / UNET).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    with pytest.raises(InputError, match="pickle") as excinfo:
        check_folder(folder)
    assert name in excinfo.value.message
    assert "safetensors" in excinfo.value.hint
    assert not (tmp_path / "canary").exists()


def test_a_damaged_file_does_not_lead_to_the_pickle_beside_it(folder, tmp_path):
    (folder / "unet" / UNET).write_bytes(b"damaged")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    with pytest.raises(InputError, match=UNET):
        check_folder(folder)
    assert not (tmp_path / "canary").exists()


def test_other_spellings_are_not_weights(folder):
    (folder / "unet" / UNET).rename(folder / "unet/diffusion_pytorch_model.SafeTensors")
    with pytest.raises(InputError, match=r"no diffusion_pytorch_model\.safetensors"):
        check_folder(folder)


# Weights files


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"\0" * 7, "not a safetensors"),
        (b"\xff" * 16, "not a safetensors"),
        ((2**63).to_bytes(8, "little") + b"{}", "header of"),
        ((99 * 10**6).to_bytes(8, "little") + b"{}", "header of"),
        ((10**6).to_bytes(8, "little") + b'{"a":', "within the header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        (b"<html>not found</html>", "not a safetensors"),
        (pack({}), "0 tensors"),
        (pack({"__metadata__": {"a": "b"}}), "0 tensors"),
        (pack(b"[]"), "not a safetensors"),
        (pack(b"{"), "broken JSON"),
        (pack(b'{"a":' + b'{"a":' * 100_000), "broken JSON"),
        (pack(b'{"a":' + b"[" * 100_000), "broken JSON"),
        (pack(b'{"a": "\xff"}'), "broken JSON"),
        (pack(b'{"a": ' + b"9" * 5000 + b"}"), "broken JSON"),
        (pack({"__metadata__": {"a": 1}, "t": entry()}, bytes(8)), "__metadata__"),
        (pack({"t": entry()}, bytes(4)), "'t' ends at byte 8 of 4"),
        (pack({"t": entry()}, bytes(9)), "1 bytes after"),
        (pack({"t": entry(), "u": entry(4, 12)}, bytes(12)), "'u' overlaps"),
        (pack({"t": entry(), "u": entry(0, 8)}, bytes(8)), "overlaps"),
        (pack({"t": entry(), "u": entry(12, 20)}, bytes(20)), "'u' leaves a gap"),
        (pack({"t": entry(8, 16)}, bytes(16)), "'t' leaves a gap"),
        (pack({"t": entry(8, 0)}, bytes(8)), "'t' has -8 bytes"),
        (pack({"t": entry(0, 4)}, bytes(4)), "'t' has 4 bytes"),
        (pack({"t": entry(-8, 0)}, bytes(8)), "'t' has the data_offsets"),
        (pack({"t": entry(0.0, 8.0)}, bytes(8)), "'t' has the data_offsets"),
        (pack({"t": entry(False, 8)}, bytes(8)), "'t' has the data_offsets"),
        (pack({"t": {**entry(), "data_offsets": [0, 8, 8]}}, bytes(8)), "'t' has the data_offsets"),
        (pack({"t": entry(shape=(2**40, 2**40))}, bytes(8)), "'t' has 8 bytes"),
        (pack({"t": entry(shape=(2**64,))}, bytes(8)), "'t' has the shape"),
        (pack({"t": entry(0, 0, shape=(0, 2**62))}), "'t' has the shape"),
        (pack({"t": entry(shape=(-2, -1))}, bytes(8)), "'t' has the shape"),
        (pack({"t": entry(shape=(True, 2))}, bytes(8)), "'t' has the shape"),
        (pack({"t": entry(shape=(1,) * 9)}, bytes(4)), "'t' has the shape"),
        (pack({"t": {**entry(), "shape": "2"}}, bytes(8)), "'t' has the shape"),
        (pack({"t": entry(dtype="F8_E8M0")}, bytes(8)), "'t' has the dtype"),
        (pack({"t": entry(dtype=["F32"])}, bytes(8)), "'t' has the dtype"),
        (pack({"t": {**entry(), "extra": 1}}, bytes(8)), "'t' has not exactly"),
        (pack({"t": {"dtype": "F32"}}, bytes(8)), "'t' has not exactly"),
        (pack({"t": [1]}, bytes(8)), "'t' has not exactly"),
        (pack(b'{"t": %(t)s, "t": %(t)s}' % {b"t": json.dumps(entry()).encode()}, bytes(8)), "'t' is there twice"),
        (pack({str(i): entry(4 * i, 4 * i + 4, shape=()) for i in range(20_001)}, bytes(80_004)), "20001 tensors"),
    ],
)
def test_crafted_weights_are_refused_by_name(folder, data, match):
    path = folder / "unet" / UNET
    path.write_bytes(data)
    with pytest.raises(InputError, match=match) as excinfo:
        check_folder(folder)
    assert str(path) in excinfo.value.message
    assert len(excinfo.value.message) < len(str(path)) + 300


def test_names_in_messages_cannot_play_tricks(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(pack({"\x1b[2J\n" + "n" * 10_000: entry(0, 4)}, bytes(4)))
    with pytest.raises(InputError) as excinfo:
        read_header(path)
    assert excinfo.value.message.isprintable()
    assert len(excinfo.value.message) < 400


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 40))
def test_what_the_gate_lets_through_safetensors_reads(tmp_path_factory, damage, cut):
    """On damaged files the gate is stricter than the library, never the other way round."""
    data = bytearray(save(TENSORS))
    for place, value in damage:
        data[place % 260] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(data[: len(data) - cut * (cut % 3 == 0)])
    try:
        ours = read_header(path)
    except InputError:
        return
    try:
        with safe_open(path, "numpy") as file:
            assert set(file.keys()) == set(ours)
            for name in ours:
                assert file.get_tensor(name).shape == ours[name].shape
    except SafetensorError as error:  # pragma: no cover
        raise AssertionError(f"the gate let it through: {error}") from error


LIMITED = """
import resource, sys
from diffgen.errors import InputError
from diffgen.models.gate import read_header
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_header(__import__("pathlib").Path(sys.argv[1]))
except InputError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["zeros", "deep", "many", "claim"])
def test_memory_stays_bounded(tmp_path, kind):
    """A header of 8 MiB at its most wasteful, and a claim of far more."""
    filler = {
        "zeros": b'{"t":[' + b"0," * (4 * 2**20 - 10) + b"0]}",
        "deep": b'{"t":[' + b"[]," * (2**23 // 3 - 10) + b"0]}",
        "many": b"{" + b",".join(b'"%x":[]' % i for i in range(700_000)) + b"}",
        "claim": b"{",
    }[kind]
    path = tmp_path / "x"
    path.write_bytes((2**62 if kind == "claim" else len(filler)).to_bytes(8, "little") + filler)
    command = [sys.executable, "-c", LIMITED, path]
    growth = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert int(growth) < {"claim": 1, "zeros": 100}.get(kind, 400) * 1024, growth  # KiB


# Other files


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "broken JSON"),
        ("[]", "not a JSON object"),
        ("{'a': 1}", "broken JSON"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"b": {"a": 1, "a": 2}}', "'a' is there twice"),
        ('{"a": NaN}', "finite"),
        ('{"a": -Infinity}', "finite"),
        ('{"a": 1e400}', "finite"),
        ("[" * 100_000, "broken JSON"),
        ('{"a": "' + "x" * 2**20 + '"}', "at most"),
        ("\ufeff{}", "broken JSON"),
    ],
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_broken_configurations(folder, name, text, match):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=match) as excinfo:
        check_folder(folder)
    assert str(folder / name) in excinfo.value.message


def test_json_is_what_the_standard_parser_reads(tmp_path):
    value = {"a": [1, 2.5, -1e-3, None, True, "東京"], "b": {"c": {}}}
    (tmp_path / "x").write_text(json.dumps(value))
    assert read_json(tmp_path / "x") == value


@pytest.mark.parametrize(
    "name",
    [
        *("model_index.json", "vae/config.json", "scheduler/scheduler_config.json", f"unet/{UNET}"),
        *("unet", "tokenizer", f"text_encoder/{CLIP}", "tokenizer/merges.txt"),
    ],
)
def test_missing_files_are_named(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError) as excinfo:
        check_folder(folder)
    assert Path(name).name.removesuffix(".safetensors") in excinfo.value.message


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", f"unet/{UNET}", "tokenizer/vocab.json", "tokenizer/merges.txt"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling"])
def test_only_regular_files(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(InputError) as excinfo:
        check_folder(folder)
    assert path.parent.name in excinfo.value.message


def test_tokenizer_files_are_bounded(folder):
    with open(folder / "tokenizer/merges.txt", "wb") as file:
        file.truncate(33 * 2**20)
    with pytest.raises(InputError, match=r"merges\.txt"):
        check_folder(folder)
