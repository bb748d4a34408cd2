"""Hostile files of every kind that the program reads, made from good ones by a seed, and a watch over what they do.

    good_files(folder, model)          # one good file of each kind in an empty folder
    for case in corpus(folder, seed):  # the same cases for the same seed
        with case.in_place(folder):    # the good file is replaced
            watched(case.command)      # what became of it

`benchmarks/attack.py` gives every case to the command, `tests/test_hostile_files.py` some of each kind; both give
mutations to the readers.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import sys
import tarfile
import time
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffgen.cli import run

MARK = "executed"  # a file of this name, or a variable of the environment, shows that something was executed


# Forms: a file's bytes as a tree of JSON values, and back


def _to_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _from_lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def _to_lines(tree: Any) -> bytes:
    return b"".join(_to_json(line) + b"\n" for line in (tree if isinstance(tree, list) else [tree]))


def _to_toml(tree: Any) -> bytes:
    def value(one: Any) -> str:
        if isinstance(one, dict):
            return "{" + ", ".join(f"{json.dumps(str(k))} = {value(v)}" for k, v in one.items() if v is not None) + "}"
        if isinstance(one, list):
            return "[" + ", ".join(value(v) for v in one if v is not None) + "]"
        if isinstance(one, float):
            return repr(one)
        return json.dumps(one, ensure_ascii=False).replace("\x7f", "\\u007f")

    if not isinstance(tree, dict):
        return value(tree).encode("utf-8", "surrogateescape")
    text = "\n".join(f"{json.dumps(key)} = {value(one)}" for key, one in tree.items() if one is not None)
    return text.encode("utf-8", "replace")


def _from_safetensors(data: bytes) -> Any:
    length = int.from_bytes(data[:8], "little")
    return {"header": json.loads(data[8 : 8 + length]), "body": data[8 + length :].hex()}


def _to_safetensors(tree: Any) -> bytes:
    header = _to_json(tree.get("header") if isinstance(tree, dict) else tree)
    body = str(tree.get("body")) if isinstance(tree, dict) else ""
    content = bytes.fromhex(body) if re.fullmatch("([0-9a-f]{2})*", body) else body.encode("utf-8", "replace")
    return len(header).to_bytes(8, "little") + header + content


def _to_gguf(tree: Any) -> bytes:
    """A GGUF file of the version 3, by its tree: {"keys": {name: text}, "tensors": [[name, shape, type, offset]]}."""

    def text(value: Any) -> bytes:
        data = str(value).encode("utf-8", "replace")
        return struct.pack("<Q", len(data)) + data

    keys, tensors = dict(tree["keys"]), list(tree["tensors"])
    head = b"GGUF" + struct.pack("<IQQ", int(tree["version"]), len(tensors), len(keys))
    for key, value in keys.items():
        head += text(key) + struct.pack("<I", 8) + text(value)
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + bytes(384)


def _from_gguf(data: bytes) -> Any:
    """The tree of the good file."""
    assert data == _to_gguf(GOOD_GGUF)
    return GOOD_GGUF


GOOD_GGUF: dict[str, Any] = {
    "version": 3,
    "keys": {"general.architecture": "flux", "tokenizer.chat_template": "{{ x }}"},
    "tensors": [["double_blocks.0.img_attn.qkv.weight", [8, 4], 0, 0], ["img_in.weight", [32, 2], 0, 128]],
}


def _from_png(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        texts: dict[str, Any] = {}
        for key, value in image.info.items():
            if isinstance(value, str) and not key.startswith("XML:"):
                texts[key] = json.loads(value) if value.startswith(("{", "[")) else value
        return texts


def _to_png(tree: Any) -> bytes:
    info = PngInfo()
    for key, value in (tree if isinstance(tree, dict) else {"parameters": tree}).items():
        text = value if isinstance(value, str) else json.dumps(value)
        info.add_text(str(key)[:70] or "x", text.encode("utf-8", "replace").decode())
    return png(info)


def png(info: PngInfo | None = None, side: int = 32) -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 40)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _to_plan(tree: Any) -> bytes:
    """A batch's plan.json whose own hash is right."""
    from diffgen.batch.rows import canonical

    if isinstance(tree, dict):
        tree.pop("sha256", None)
        with contextlib.suppress(Exception):
            tree["sha256"] = hashlib.sha256(canonical(tree)).hexdigest()
    return _to_json(tree)


def _to_state(tree: Any) -> bytes:
    """A checkpoint's state.json whose own hash is right."""
    from diffgen.training.run import state_hash

    if isinstance(tree, dict):
        tree["sha256"] = state_hash(tree)
    return _to_json(tree)


Form = tuple[Callable[[bytes], Any], Callable[[Any], bytes]]
JSON: Form = (json.loads, _to_json)
LINES: Form = (_from_lines, _to_lines)
TOML: Form = (lambda data: tomllib.loads(data.decode()), _to_toml)
SAFETENSORS: Form = (_from_safetensors, _to_safetensors)
PNG: Form = (_from_png, _to_png)
GGUF: Form = (_from_gguf, _to_gguf)
PLAN: Form = (json.loads, _to_plan)
STATE: Form = (json.loads, _to_state)


# Kinds


@dataclass(frozen=True)
class Kind:
    """A kind of file: a good one of it, and what reads it."""

    name: str
    file: str  # below the folder of good files
    command: tuple[str, ...]  # run in that folder
    reader: Callable[[Path], object]  # the function that reads such a file, or the folder that has it
    form: Form | None = None
    codes: tuple[int, ...] = (0, 3)


def _reader(place: str, above: int = 0) -> Callable[[Path], object]:
    """A function of the program that takes the file, or the folder `above` it; imported when it is called."""

    def read(path: Path) -> object:
        from importlib import import_module

        module, _, function = place.partition(":")
        return getattr(import_module(f"diffgen.{module}"), function)(path.parents[above - 1] if above else path)

    return read


def _read_prompts(path: Path) -> object:
    from diffgen.generation.options import json_types
    from diffgen.prompts.files import read_lines

    return read_lines(str(path), json_types())


def _read_styles(path: Path) -> object:
    from diffgen.prompts.styles import apply_styles, read_styles

    return [apply_styles([name], "a", styles=styles) for styles in [read_styles([path])] for name in styles]


def _read_wildcards(path: Path) -> object:
    from diffgen.prompts.wildcards import Wildcards

    return Wildcards([str(path.parent)]).expand(f"__{path.stem}__", 1, "")


def _read_config(path: Path) -> object:
    from diffgen.training.config import parse, read_toml

    return parse(read_toml(path), path)


def _read_plan(path: Path) -> object:
    from diffgen.batch.plan import read_plan
    from diffgen.batch.shards import find_shards
    from diffgen.storage import Storage

    plan = read_plan(Storage(path.parent if path.name == "plan.json" else path.parent.parent))
    return find_shards(plan).as_json(), [plan.rows(shard) for shard in plan.shards]


def _read_index(path: Path) -> object:
    from diffgen.storage import Storage
    from diffgen.training.data.index import write_index

    return write_index(Storage(path.parent))


def _read_model_file(path: Path) -> object:
    from diffgen.models.single_file import check_file, recognise

    recognise(path)
    return check_file(path)


def _read_fields(path: Path) -> object:
    """The body of a request to the server."""
    from diffgen.serve.fields import load_json, read_fields
    from diffgen.serve.settings import Settings

    return read_fields(load_json(path.read_bytes()), Settings())


GENERATE = ("generate", "a", "-m", "model", "--dry-run")
FROM_FILE = ("generate", "-m", "model", "--dry-run", "--prompt-file")
TRAIN = ("train", "data", "-o", "new", "--config", "c.toml", "--dry-run")
COMPARE = ("compare", "-m", "mixture", "--schedulers", "euler", "--nfe", "2", "--seeds", "0", "--reference", "none")
A1111 = (
    "a cat\nNegative prompt: a dog\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x512, Model: x"
)
TOOLS: dict[str, dict[str, Any]] = {  # texts of the PNG files of other programs
    "a1111": {"parameters": A1111},
    "comfyui": {
        "prompt": {
            "3": {
                "class_type": "KSampler",
                "inputs": {
                    "seed": 5,
                    "steps": 20,
                    "cfg": 8.0,
                    "sampler_name": "euler",
                    "scheduler": "normal",
                    "denoise": 1.0,
                    "model": ["4", 0],
                    "positive": ["6", 0],
                    "negative": ["7", 0],
                    "latent_image": ["5", 0],
                },
            },
            "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
            "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
            "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
            "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog", "clip": ["4", 1]}},
            "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
            "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
        }
    },
    "invokeai": {
        "invokeai_metadata": {
            "positive_prompt": "a cat",
            "negative_prompt": "a dog",
            "seed": 5,
            "steps": 20,
            "cfg_scale": 7.5,
            "scheduler": "euler",
            "width": 512,
            "height": 512,
            "model": {"name": "x", "base": "sd-1"},
            "loras": [{"model": {"name": "ink"}, "weight": 0.75}],
        }
    },
    "novelai": {
        "Software": "NovelAI",
        "Description": "a cat",
        "Source": "x",
        "Comment": {"uc": "a dog", "steps": 28, "seed": 5, "scale": 11.0, "sampler": "k_euler_ancestral", "noise": 0.2},
    },
    "fooocus": {
        "parameters": {
            "base_model": "x",
            "sampler": "dpmpp_2m_sde_gpu",
            "scheduler": "karras",
            "seed": "5",
            "steps": 30,
            "guidance_scale": 4,
            "resolution": "(1152, 896)",
            "prompt": "a cat",
            "negative_prompt": "a dog",
            "loras": [["ink", 0.1, "48"]],
            "styles": "['Fooocus V2']",
        },
        "fooocus_scheme": "fooocus",
    },
    "kohya": {"prompt": "a cat", "seed": "5", "sampler": "k_euler_a", "steps": "50", "scale": "7.5"},
}

OPTIONS = (0, 2, 3)  # what such a file says are prompts and options: it can be wrong as a command line is

KINDS: tuple[Kind, ...] = (
    Kind("picture", "x.png", ("inspect", "x.png"), _reader("images.read:read_image")),
    Kind("jpeg", "x.jpg", (*GENERATE, "--image", "x.jpg"), _reader("images.read:read_carried")),
    Kind("webp", "x.webp", (*GENERATE, "--image", "x.webp"), _reader("images.read:read_image")),
    Kind("record", "x.png", ("inspect", "x.png"), _reader("generation.record:read_picture_info"), PNG),
    Kind("reproduced", "x.png", ("reproduce", "x.png", "-m", "model"), _reader("generation.record:read_record"), PNG),
    *(
        Kind(tool, f"{tool}.png", ("inspect", f"{tool}.png"), _reader("generation.record:read_picture_info"), PNG)
        for tool in TOOLS
    ),
    Kind(
        "model index", "model/model_index.json", GENERATE,
        _reader("models.gate:check_folder", 1), JSON,
    ),
    *(
        Kind(f"{part} configuration", f"model/{part}/{name}", GENERATE, _reader("models.gate:check_folder", 2), JSON)
        for part, name in (
            ("unet", "config.json"),
            ("vae", "config.json"),
            ("text_encoder", "config.json"),
            ("scheduler", "scheduler_config.json"),
        )
    ),
    Kind("card", "model/card.json", ("models", "info", "model"), _reader("models.gate:read_json"), JSON),
    Kind(
        "tokenizer", "model/tokenizer/tokenizer.json", ("prompt", "explain", "a", "-m", "model"),
        _reader("prompts.tokens:read_vocabulary", 1), JSON,
    ),
    Kind(
        "weights", "model/unet/diffusion_pytorch_model.safetensors", GENERATE, _reader("models.gate:read_safetensors"),
        SAFETENSORS,
    ),
    Kind(
        "checkpoint", "checkpoint.safetensors", ("models", "info", "checkpoint.safetensors"), _read_model_file,
        SAFETENSORS,
    ),
    Kind("GGUF", "x.gguf", ("models", "info", "x.gguf"), _read_model_file, GGUF),
    Kind("8-bit weights", "fp8.safetensors", ("models", "info", "fp8.safetensors"), _read_model_file, SAFETENSORS),
    Kind(
        "adapter", "lora.safetensors", (*GENERATE, "--lora", "lora.safetensors"),
        _reader("models.single_file:recognise"), SAFETENSORS,
    ),
    Kind(
        "embedding", "word.safetensors", (*GENERATE, "--embedding", "a=word.safetensors"),
        _reader("models.single_file:recognise"), SAFETENSORS,
    ),
    Kind("grid", "g.json", (*GENERATE, "--grid", "g.json"), lambda path: _check_grid(str(path)), JSON),
    Kind("prompts", "p.txt", (*FROM_FILE, "p.txt"), _read_prompts, codes=OPTIONS),
    Kind(
        "prompts as JSON", "p.jsonl", (*FROM_FILE, "p.jsonl"), _read_prompts, LINES,
        codes=OPTIONS,
    ),
    Kind(
        "styles", "styles.toml", (*GENERATE, "--style", "ink"), _read_styles, TOML, codes=OPTIONS,
    ),
    Kind("wildcards", "wildcards/a.txt", ("generate", "__a__", *GENERATE[2:]), _read_wildcards, codes=OPTIONS),
    Kind("configuration", "c.toml", TRAIN, _read_config, TOML),
    Kind("list of models", "models.toml", ("models", "list"), lambda _: _entries(), TOML),
    Kind("run", "run/run.json", ("models", "info", "run"), _reader("training.run:read_run", 1), JSON),
    Kind("checkpoint's state", "run/checkpoints/2/state.json", ("generate", "-m", "run", "--dry-run"),
         _reader("training.run:read_state", 1), STATE),
    Kind("log", "run/metrics.jsonl", ("train", "data", "-o", "run", "--config", "c.toml", "--resume", "--steps", "3",
                                      "--dry-run"), lambda _: None, LINES, codes=OPTIONS),
    Kind("results", "c/results.json", ("compare", "--report", "c"),
         _reader("comparison.compare:rewrite_report", 1), JSON),
    Kind("batch", "batch/plan.json", ("batch", "status", "batch"), _read_plan, PLAN),
    Kind("rows", "batch/plan/00000.jsonl", ("batch", "check", "batch"), _read_plan, LINES, codes=(0, 1, 3)),
    Kind("statistics", "batch/stats/00000.json", ("batch", "status", "batch"), _read_plan, JSON),
    Kind("list of pictures", "data/metadata.jsonl", TRAIN,
         _reader("training.data:open_data", 1), LINES),
    Kind("training picture", "data/0.png", TRAIN,
         _reader("training.data:open_data", 1), PNG),
    Kind("shard", "shards/0.tar", ("data", "index", "shards"), _read_index),
    Kind("request", "request.json", ("inspect", "request.json"), _read_fields, JSON, codes=(3,)),
)  # fmt: skip


def _check_grid(name: str) -> object:
    from diffgen.generation.grid_files import check_grid

    return check_grid(name)


def _entries() -> object:
    from diffgen.models.listed import entries

    return entries()


def good_files(folder: Path, model: Path) -> None:
    """Put a good file of each kind into an empty folder; `model` is a small Stable Diffusion folder."""
    import torch
    from safetensors.torch import save_file

    import diffgen
    from diffgen.batch import prepare
    from diffgen.batch import run as batches
    from diffgen.prompts.files import Line

    here = Path.cwd()
    os.chdir(folder)
    try:
        shutil.copytree(model, "model")
        generator = diffgen.load("model", device="cpu")
        (image,) = generator.generate("a", seed=1, steps=1, size=16)
        texts = PngInfo()
        for key, value in image.info.items():
            texts.add_text(key, value)
        image.save("x.png", pnginfo=texts)
        image.save("x.jpg")
        image.save("x.webp")
        for tool, carried in TOOLS.items():
            Path(f"{tool}.png").write_bytes(_to_png(carried))
        key = "model.diffusion_model.input_blocks.0.0.weight"
        save_file({key: torch.zeros(4, 4, 3, 3), "first_stage_model.x": torch.zeros(2)}, "checkpoint.safetensors")
        eight = torch.zeros(4, 4, 3, 3, dtype=torch.float8_e4m3fn)
        marks = {"scaled_fp8": torch.zeros(0), key.replace("weight", "scale_weight"): torch.ones(1)}
        save_file({key: eight, **marks}, "fp8.safetensors")
        Path("x.gguf").write_bytes(_to_gguf(GOOD_GGUF))
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        save_file(
            {f"{name}.lora_down.weight": torch.zeros(2, 8), f"{name}.lora_up.weight": torch.zeros(8, 2)},
            "lora.safetensors",
        )
        save_file({"emb_params": torch.zeros(2, 16)}, "word.safetensors")
        grid = {
            "schema": "diffgen.grid/1",
            "solver": "dpmpp_2m",
            "nfe": 2,
            "sigmas": [14.0, 1.0],
            "model": "x",
            "model_hash": "0" * 64,
        }
        Path("g.json").write_text(json.dumps(grid))
        Path("p.txt").write_text("a cat\n# a remark\na {red|blue} dog\n")
        Path("p.jsonl").write_text(
            '{"prompt": "a cat", "seed": 5, "size": "16x16"}\n{"prompt": "a dog", "steps": 2, "style": "ink"}\n'
        )
        Path("styles.toml").write_text('[ink]\nprompt = "{prompt}, ink"\nnegative = "a dog"\n')
        Path("wildcards").mkdir()
        Path("wildcards/a.txt").write_text("a cat\n0.5::a dog\n__a__\n# a remark\n")
        Path("c.toml").write_text(CONFIG)
        Path("models.toml").write_text(
            'x = "model"\ny = { path = "checkpoint.safetensors", defaults = { steps = 5 } }\n'
        )
        Path("data").mkdir()
        for number in range(8):
            Image.new("RGB", (8, 8), (number * 30, 0, 90)).save(f"data/{number}.png")
        rows = [{"file_name": f"{number}.png", "text": "a cat"} for number in range(8)]
        Path("data/metadata.jsonl").write_bytes(_to_lines(rows))
        diffgen.train("data", out="run", config="c.toml")
        assert watched((*COMPARE, "-o", "c", "-q"), folder).code == 0
        prepare.plan([Line("a cat"), Line("a dog")], "batch", "model", steps=1, size=16, shard_size=1)
        batches.run("batch", part=(0, 1))
        Path("shards").mkdir()
        with tarfile.open("shards/0.tar", "w") as tar:
            for name, data in (
                ("0.png", png(side=8)),
                ("0.txt", b"a cat"),
                ("1.png", png(side=8)),
                ("1.txt", b"a dog"),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        request = {"prompt": "a cat", "seed": 5, "steps": 4, "width": 64, "height": 64, "scheduler": "euler"}
        Path("request.json").write_text(json.dumps(request))
        for python in ("modeling.py", "model/modeling.py", "model/unet/unet.py"):  # what a file may name
            Path(python).write_text(f"import os\nos.environ[{MARK!r}] = '1'\nopen({MARK!r}, 'w')\n")
    finally:
        os.chdir(here)


CONFIG = """
[data]
size = 8
channels = 3
[network]
name = "unet"
width = 8
multipliers = [1]
blocks = 1
attention = [false]
head_width = 8
[train]
steps = 2
batch_size = 4
log_every = 1
held_out_every = 2
checkpoint_every = 2
[sample]
every = 2
count = 1
steps = 1
"""


# Hostile files


@dataclass(frozen=True)
class Case:
    """A hostile file in place of the good one."""

    kind: Kind
    name: str
    data: bytes | None = None  # the content, or
    special: Callable[[Path], None] | None = field(default=None, compare=False)  # what makes no regular file

    @property
    def command(self) -> tuple[str, ...]:
        return self.kind.command

    @contextlib.contextmanager
    def in_place(self, folder: Path) -> Iterator[Path]:
        """Put it in the place of the good file, which comes back."""
        path = folder / self.kind.file
        good = path.read_bytes()
        path.unlink()
        try:
            if self.special is not None:
                self.special(path)
            else:
                path.write_bytes(self.data or b"")
            yield path
        finally:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            path.write_bytes(good)


class _Executed:
    """A pickle of this runs code."""

    def __reduce__(self) -> Any:
        return exec, (f"import os; os.environ[{MARK!r}] = '1'; open({MARK!r}, 'w')",)


def _archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # as torch.save writes
        archive.writestr("archive/data.pkl", pickle.dumps(_Executed()))
    return file.getvalue()


def _bomb() -> bytes:
    """A PNG of 16 million by 16 million pixels."""
    header = struct.pack(">IIBBBBB", 2**24, 2**24, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(4096),
    "pickle": pickle.dumps(_Executed()),
    "archive of a pickle": _archive(),
    "EPS": EPS,
    "EPS that ends as a PNG": EPS + b"IEND\xaeB`\x82",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script><image href="file:///etc/passwd"/></svg>',
    "nested brackets": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a key twice": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN, "b": -Infinity, "c": 1e999}',
    "a very long number": b'{"a": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "not UTF-8": b"\xff\xfe\xfd{}\n",
    "one very long line": b"a" * 200_000,
    "half a character pair": b'{"a": "\\ud800"}',
    "control characters": b"\x1b]0;x\x07\x1b[31m\x00\r\n" * 50,
    "no JSON object": b"5",
    "Python": f"open({MARK!r}, 'w')\n".encode(),
    "a header of 16 exabytes": (2**63).to_bytes(8, "little") + b"{" * 64,
    "a picture of 2^48 pixels": _bomb(),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64),
}
SPECIAL: dict[str, Callable[[Path], None]] = {
    "FIFO": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "link to nothing": lambda path: path.symlink_to("/nothing/at/all"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
    "link to memory": lambda path: path.symlink_to("/proc/self/mem"),
}
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, 1e308, -1e-320, 5.5, "", "x", "nan", "1", "\x1b[31m\x07", "\ud800",
    "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "modeling.Executed", "os.system", "{{7*7}}",
    "<script>1</script>", "%n%s{0.__class__}", "a" * 100_000, [], {}, [[]], [None] * 3, ["x"] * 3, [1, 2, 3],
    [10**400], {"x": 1}, {"a": {"a": {"a": [1e308]}}}, list(range(3000)), {str(i): i for i in range(3000)},
)  # fmt: skip
ADDED: dict[str, Any] = {
    "auto_map": {"AutoModel": "modeling.Executed"},
    "trust_remote_code": True,
    "custom_pipeline": "modeling",
    "_class_name": "os.system",
    "chat_template": "{{ cycler.__init__.__globals__.os.system('x') }}",
    "__proto__": {"x": 1},
    "\x1b[31m" * 20: "x",
    "a" * 50_000: 1,
}


def _places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a tree, by keys and numbers."""
    if place:
        yield place
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _places(value, (*place, key))


def changed_tree(tree: Any, random_: random.Random) -> Any:
    """A copy of a tree with one to three values replaced, removed or added."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        place = random_.choice(places)
        inner = tree
        for key in place[:-1]:
            inner = inner[key]
        how = random_.random()
        if how < 0.75 or len(place) == 1:
            inner[place[-1]] = copy.deepcopy(random_.choice(VALUES))
        elif how < 0.87:
            del inner[place[-1]]
        elif isinstance(inner, dict):
            key = random_.choice(list(ADDED))
            inner[key] = copy.deepcopy(ADDED[key])
    return tree.get("")


def changed_bytes(data: bytes, random_: random.Random) -> bytes:
    """The bytes with some changed, a part cut off, doubled or moved."""
    if not data:
        return random_.randbytes(random_.randrange(64))
    array = bytearray(data)
    at, size = random_.randrange(len(data)), random_.randrange(1, 64)
    how = random_.randrange(5)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + data[at : at + size] * random_.choice((2, 3, 500)) + data[at + size :]
    if how == 2:
        return data[:at] + random_.randbytes(size) + data[at:]
    for _ in range(random_.choice((1, 3, 30))):
        array[random_.randrange(len(array) if how == 3 else min(len(array), 64))] = random_.choice(
            (0, 255, 0x7B, random_.randrange(256))
        )
    return bytes(array)


def mutated(kind: Kind, good: bytes, seed: int) -> bytes:
    """A hostile file of a kind, by a seed."""
    random_ = random.Random(seed)
    if kind.form is None or random_.random() < 0.3:
        return changed_bytes(good, random_)
    read, write = kind.form
    try:
        return write(changed_tree(read(good), random_))
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        struct.error,
    ):  # the form cannot say that
        return changed_bytes(good, random_)


def corpus(folder: Path, seed: int, mutations: int = 8, kinds: tuple[Kind, ...] = KINDS) -> Iterator[Case]:
    """The cases of every kind: files of other kinds, files that are none, and `mutations` of the good one."""
    for number, kind in enumerate(kinds):
        good = (folder / kind.file).read_bytes()
        for name, data in CONTENTS.items():
            yield Case(kind, name, data)
        for name, special in SPECIAL.items():
            yield Case(kind, name, special=special)
        for i in range(mutations):
            one = (seed * 1000 + number) * 10_000 + i
            yield Case(kind, f"mutation {one}", mutated(kind, good, one))


def read_fault(kind: Kind, folder: Path, good: bytes, seed: int) -> dict[str, str]:
    """Give a mutation to the function that reads such files; the fault, if it raises what is no error of ours."""
    from diffgen.errors import DiffgenError

    path, here, begin = folder / kind.file, Path.cwd(), time.process_time()
    path.write_bytes(mutated(kind, good, seed))
    os.chdir(folder)
    try:
        kind.reader(path)
    except DiffgenError as error:
        if len(error.message) > 1500:
            return {"over length": error.message[:300]}
    except Exception as error:
        return {"tracebacks": f"{type(error).__name__}: {error}"}
    finally:
        os.chdir(here)
        path.write_bytes(good)
    seconds = time.process_time() - begin
    return {"over time": f"{seconds:.2f} s"} if seconds > 1 else {}


# The watch


@dataclass
class Outcome:
    """What became of a command line."""

    code: int
    out: str
    err: str
    seconds: float  # of the processor
    memory: int  # bytes that the greatest resident memory grew by
    events: list[str]  # what started a program, unpickled, connected, or opened a file it must not

    def faults(self, codes: tuple[int, ...], seconds: float = 1.0, memory: int = 64 << 20) -> dict[str, str]:
        """What is wrong, by the names of the counts of `benchmarks/attack.py`."""
        faults = {}
        if self.events:
            faults["executed"] = str(self.events)
        if re.search(r"Traceback|\b[A-Z]\w+(Error|Exception)\b|--debug", self.err):
            faults["tracebacks"] = self.err[-300:]
        if self.code not in codes:
            faults["wrong codes"] = f"{self.code}: {self.err[-300:]}"
        error = self.err[self.err.find("error: ") :] if self.code else ""
        longest = max(map(len, [error, *self.err.splitlines()]))
        if longest > 2000 or len(error.splitlines()) > 3:
            faults["over length"] = f"{longest} characters, {len(error.splitlines())} lines: {self.err[:300]}"
        if self.code and self.seconds > seconds:  # what is accepted is honest work
            faults["over time"] = f"{self.seconds:.2f} s"
        if self.code and self.memory > memory:
            faults["over memory"] = f"{self.memory >> 20} MiB"
        if "\x1b" in self.err + self.out:
            faults["control characters"] = repr(self.err[-300:])
        return faults


DANGEROUS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "pickle.find_class",
    "marshal.loads", "socket.connect", "code.__new__",
)  # fmt: skip
SECRET = ("/etc/passwd", "/etc/shadow")
_watching: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in DANGEROUS and not _at_import():
        _watching[-1].append(f"{event} {str(arguments)[:100]}")
    elif event == "open" and isinstance(arguments[0], str) and arguments[0] in SECRET:
        _watching[-1].append(f"open {arguments[0]}")
    elif event == "import" and arguments[0] in ("modeling", "unet"):
        _watching[-1].append(f"import {arguments[0]}")


def _at_import() -> bool:
    """Whether Python itself reads a compiled module, which unmarshals."""
    frame = sys._getframe(2)
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _high_water() -> int:
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


def watch() -> None:
    """Install the hook that sees what is executed; it stays for the life of the process."""
    if not getattr(sys, "_hostile_hook", False):
        sys._hostile_hook = True  # type: ignore[attr-defined]
        sys.addaudithook(_audit)


PATIENCE = 60.0  # seconds, for what does not end at all


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"it did not end in {PATIENCE:.0f} s")


def watched(command: tuple[str, ...], folder: Path) -> Outcome:
    """Run a command line in this process, in that folder, under the watch."""
    watch()
    out, err, here = io.StringIO(), io.StringIO(), Path.cwd()
    os.environ.pop(MARK, None)
    events: list[str] = []
    os.chdir(folder)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    memory, begin = _high_water(), time.process_time()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    _watching.append(events)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([*command])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _watching.pop()
        seconds, memory = time.process_time() - begin, _high_water() - memory
        if Path(MARK).exists() or MARK in os.environ:
            events.append("a file's code ran")
            Path(MARK).unlink(missing_ok=True)
        os.chdir(here)
    return Outcome(int(code), out.getvalue(), err.getvalue(), seconds, memory, events)
