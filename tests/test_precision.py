"""The dtype that a model computes in by default, and the layout of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffgen
from diffgen import devices
from diffgen.models.find import check, find

CPU = torch.device("cpu")
AMX = pytest.mark.skipif(not devices.has_amx(), reason="needs a CPU with AMX")


def test_small_networks_stay_in_float32_on_a_cpu(tiny: Path) -> None:
    assert check(find("emoji")).network.parameters < devices.LARGE
    assert diffgen.load("emoji", device="cpu").dtype == torch.float32
    assert devices.choose_dtype("auto", CPU, devices.LARGE - 1) == torch.float32


def test_large_networks_are_in_bfloat16_where_that_is_fast() -> None:
    expected = torch.bfloat16 if devices.fast_bfloat16(CPU) else torch.float32
    assert devices.choose_dtype("auto", CPU, devices.LARGE) == expected
    for name in ("float32", "float16", "bfloat16"):
        assert devices.choose_dtype(name, CPU, 10**12) == getattr(torch, name)


@AMX
def test_a_product_shows_what_the_processor_is_fast_in() -> None:
    assert devices.fast_bfloat16(CPU)
    assert max(devices.product_speedup() for _ in range(3)) > 1.5


def test_parameters_are_counted_from_the_headers(tiny: Path) -> None:
    model = check(find(str(tiny)))
    unet = diffgen.load(str(tiny), device="cpu").pipeline.unet
    assert model.network.parameters == sum(weight.numel() for weight in unet.parameters())


def test_a_large_network_is_chosen_recorded_and_reproduced(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is lowered, so that the tiny network counts as large."""
    from diffgen.images.metadata import encode_png
    from diffgen.pipelines.plan import make_plan
    from diffgen.reproduce import reproduce

    fast = devices.fast_bfloat16(CPU)
    monkeypatch.setattr(devices, "LARGE", 1)
    generator: Any = diffgen.load(str(tiny), device="cpu")
    (picture,) = generator.pictures(make_plan(generator.model, "a red apple", seed=1, steps=3))
    assert picture.record["dtype"] == ("bfloat16" if fast else "float32")
    (path := tmp_path / "a.png").write_bytes(encode_png(picture.image, picture.record, "full"))
    monkeypatch.undo()
    assert reproduce(path, model=str(tiny)).identical


def test_half_precision_lays_convolutions_out_with_channels_last_and_saves_them_as_files_have_them(
    tiny: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"seed": 1, "steps": 2, "guidance": 2.0, "scheduler": "euler", "grid": "trailing"}
    half: Any = diffgen.load(str(tiny), device="cpu", dtype="bfloat16")
    weight = half.pipeline.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert half.pipeline.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    (before,) = half.generate("a red apple", **options)
    half.save(tmp_path / "copy")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    (after,) = half.generate("a red apple", **options)
    assert after.tobytes() == before.tobytes()
    copy: Any = diffgen.load(str(tmp_path / "copy"), device="cpu", dtype="bfloat16")
    (again,) = copy.generate("a red apple", **options)
    assert again.tobytes() == before.tobytes()
    full: Any = diffgen.load(str(tiny), device="cpu", dtype="float32")
    assert full.pipeline.unet.conv_in.weight.is_contiguous()
    (exact,) = full.generate("a red apple", **options)
    assert json.loads(exact.info["diffgen"])["dtype"] == "float32"
    assert abs(np.asarray(exact).astype(int) - np.asarray(before)).mean() < 8
