"""Weights in eight bits: the pictures stay the same within their rounding. Needs torchao, else it is skipped."""

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
from diffgen.pipelines.weights import quantize
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
@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_eight_bits_change_a_picture_by_their_rounding(family: str, tmp_path: Path) -> None:
    pipe = load_pipeline(
        gate.check_folder(models.build(tmp_path / "m", family=family)), torch.device("cpu"), torch.float32
    )
    exact = latents(pipe, family != "sd1")
    assert 0.2 < quantize.quantize(pipe) < 1
    rounded = latents(pipe, family != "sd1")
    assert 0 < abs(rounded - exact).max() < 0.02 * abs(exact).max()


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


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_without_the_package_the_error_says_how_to_install_it() -> None:
    with pytest.raises(InputError, match="torchao"):
        quantize.check()
