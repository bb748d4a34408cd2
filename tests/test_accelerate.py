"""Compiled blocks, other implementations of attention, group offload: the same picture, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loading import load, picture
from PIL import Image

from diffgen.errors import InputError, UsageError
from diffgen.generation.checks import ATTENTION_BACKENDS, check_backend
from diffgen.pipelines.sampling import memory
from diffgen.pipelines.sampling.accelerate import accelerate

Folder = Callable[[str], Path]


def test_exactly_the_repeated_blocks_are_compiled(family_folder: Folder) -> None:
    """What they compute: benchmarks/faster.py compares the picture, since the compiler takes half a minute."""
    transformer = load(family_folder("flux")).transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for wanted in (True, True, False):
        accelerate(transformer, "native", wanted, compiler="eager")
        compiled = [module for module in transformer.modules() if module._compiled_call_impl is not None]
        assert compiled == (blocks if wanted else [])


@pytest.mark.parametrize("family", ["flux", "z-image"])
def test_attention_by_plain_operations(family: str, family_folder: Folder) -> None:
    folder = family_folder(family)
    pipe = load(folder)
    expected = picture(pipe, folder)
    accelerate(pipe.transformer, "math", False)
    names = {
        module.processor._attention_backend for module in pipe.transformer.modules() if hasattr(module, "processor")
    }
    assert {name.value for name in names} == {"_native_math"}
    assert abs(picture(pipe, folder) - expected).max() < 1e-5
    accelerate(pipe.transformer, "native", False)
    assert (picture(pipe, folder) == expected).all()


def test_what_is_refused(family_folder: Folder) -> None:
    transformer = load(family_folder("flux")).transformer
    with pytest.raises(InputError, match="--attention-backend flash: Flash Attention backend"):
        accelerate(transformer, "flash", False)
    unet = load(family_folder("sd1")).unet
    accelerate(unet, "native", False)
    with pytest.raises(UsageError, match="not supported for UNet2DConditionModel"):
        accelerate(unet, "math", False)
    with pytest.raises(UsageError, match="code that is fetched and run"):
        check_backend("--attention-backend", "flash_hub")
    with pytest.raises(UsageError, match="must be one of native, math"):
        check_backend("--attention-backend", "fast")
    assert not [name for name in ATTENTION_BACKENDS.values() if "hub" in name]


def test_group_offload_makes_the_same_picture(family_folder: Folder) -> None:
    folder = family_folder("z-image")
    pipe = load(folder)
    expected = picture(pipe, folder)
    memory.offload(pipe, "group", torch.device("cpu"))
    assert hasattr(pipe.transformer, "_diffusers_hook")
    assert (picture(pipe, folder) == expected).all()


def test_the_record_names_them(family_folder: Folder, diffgen_: Callable[..., tuple[int, str, str]]) -> None:
    folder = family_folder("z-image")
    code, _, err = diffgen_("generate", "a red apple", "-m", folder, "--attention-backend", "math", "--steps", 2,
                            "-s", "32x32", "--seed", 1, "-o", "x.png")  # fmt: skip
    assert code == 0, err
    record = json.loads(Image.open("x.png").info["diffgen"])
    assert (record["attention_backend"], record.get("compile")) == ("math", None)
    code, out, err = diffgen_("reproduce", "x.png", "-m", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["result"]["identical"]
