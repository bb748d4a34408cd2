"""Weights in fewer bits: the pictures stay the same within their rounding. Those of torchao are skipped without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny as models
import torch

import schedulers
from diffgen.errors import InputError
from diffgen.models import gate
from diffgen.pipelines.weights import packed, quantize
from diffgen.pipelines.weights.load import load_pipeline

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def latents(pipe: Any, flow: bool) -> np.ndarray:
    noise, prediction = ("flow", "flow_prediction") if flow else ("scaled_linear", "epsilon")
    pipe.scheduler = schedulers.get("euler", noise=noise, prediction=prediction)
    with torch.inference_mode():
        return pipe(
            "a red apple", width=32, height=32, num_inference_steps=2, guidance_scale=3.0, output_type="latent",
            generator=torch.Generator().manual_seed(5), return_dict=False,
        )[0].numpy()  # fmt: skip


@needs_torchao
@pytest.mark.parametrize(
    ("family", "kind", "most"),
    [("sd1", "int8", 0.02), ("sd3", "int8", 0.02), ("flux", "int8", 0.02), ("sd3", "fp8", 0.1)],
)
def test_eight_bits_change_a_picture_by_their_rounding(family: str, kind: str, most: float, tmp_path: Path) -> None:
    pipe = load_pipeline(
        gate.check_folder(models.build(tmp_path / "m", family=family)), torch.device("cpu"), torch.float32
    )
    exact = latents(pipe, family != "sd1")
    assert 0.2 < quantize.quantize(pipe, kind) < 1
    rounded = latents(pipe, family != "sd1")
    assert 0 < abs(rounded - exact).max() < most * abs(exact).max()


@needs_torchao
def test_each_row_has_255_steps() -> None:
    unet = torch.nn.Sequential(torch.nn.Linear(64, 8))
    before = unet[0].weight.detach().clone()
    assert quantize.quantize(SimpleNamespace(components={"unet": unet, "vae": torch.nn.Linear(4, 4)})) == pytest.approx(
        (64 * 8 + 8 * 4 + 8 * 4) / (64 * 8 * 4 + 8 * 4)
    )
    after = unet[0].weight.dequantize()
    step = before.abs().amax(1, keepdim=True) / 127.5
    assert (abs(after - before) <= 0.51 * step + 1e-7).all()


def test_storage_in_eight_bits_also_holds_convolutions(tmp_path: Path) -> None:
    pipe = load_pipeline(gate.check_folder(models.build(tmp_path / "m")), torch.device("cpu"), torch.float32)
    exact, weight = latents(pipe, False), pipe.unet.down_blocks[0].resnets[0].conv1.weight.clone()
    assert quantize.quantize(pipe, "fp8-storage") < 0.9
    assert pipe.unet.down_blocks[0].resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    assert 0 < abs(latents(pipe, False) - exact).max() < 0.1 * abs(exact).max()
    stored = pipe.unet.down_blocks[0].resnets[0].conv1.weight
    assert torch.equal(stored.float(), weight.to(torch.float8_e4m3fn).float())


def test_four_bits_are_the_nearest_of_sixteen_values() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(128, 8), torch.nn.Linear(8, 4))
    weight, x = network[0].weight.detach().clone(), torch.randn(3, 128)
    left = quantize.quantize(SimpleNamespace(components={"unet": network}), "nf4")
    assert left == pytest.approx((8 * 128 * (4 + 32) / 64 + 8 * 4 + 4 * 8 * 4 + 4 * 4) / (4 * (8 * 128 + 8 + 32 + 4)))
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(packed.NF4)
    expected = (values[(blocks[..., None] / largest[..., None] - values).abs().argmin(-1)] * largest).reshape(8, 128)
    torch.testing.assert_close(network[0].matrix(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(network[0](x), x @ expected.T + network[0].bias)
    assert isinstance(network[1], torch.nn.Linear)  # its rows are no whole blocks


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_without_the_package_the_error_says_how_to_install_it() -> None:
    with pytest.raises(InputError, match="torchao"):
        quantize.check("int8")
