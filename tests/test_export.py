"""Models written as diffusers folders: diffusers reads them, and the pictures are the same."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import original_layout
import pytest
import tiny as models
import torch

import diffgen
from diffgen import networks
from diffgen.errors import CannotWrite, InputError
from diffgen.models import gate, single_file
from diffgen.pipelines.training.export import save_run
from diffgen.pipelines.weights.export import as_unet2d, save_pipeline
from diffgen.pipelines.weights.load import load_pipeline
from diffgen.training import checkpoint
from diffgen.training.run import Run, read_run

CPU, F32 = torch.device("cpu"), torch.float32


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux", "unconditional"])
def test_a_saved_model_is_the_model(family: str, tmp_path: Path) -> None:
    """The model comes from a single file if the family has one."""
    import diffusers

    folder = models.build(tmp_path / "model", family=family)
    checked = gate.check_folder(folder)
    if family != "unconditional":
        file = original_layout.write(folder, tmp_path / "x.safetensors", family)
        checked = single_file.check_file(file, folder)
    pipe = load_pipeline(checked, CPU, F32)
    save_pipeline(pipe, checked, tmp_path / "saved")
    again, other = (
        gate.check_folder(tmp_path / "saved"),
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved"),
    )
    assert again.family == checked.family
    assert again.components["scheduler"].config == checked.components["scheduler"].config
    ours, expected = weights(load_pipeline(again, CPU, F32)), weights(pipe)
    for actual in (ours, weights(other)):
        assert actual.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    for name, tokenizer in pipe.components.items():
        if name.startswith("tokenizer"):
            for text in ("a red apple, piñata", "zebra " * 9):
                options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": 12}
                assert other.components[name](text, **options).input_ids == tokenizer(text, **options).input_ids
    assert {key: other.config[key] for key in pipe.config if type(pipe.config[key]) is bool} == {
        key: value for key, value in pipe.config.items() if type(value) is bool
    }


def test_a_single_file_saved_makes_the_same_pictures(tmp_path: Path) -> None:
    folder = models.build(tmp_path / "x")
    file = original_layout.write(folder, tmp_path / "x.safetensors", "sd1")  # what it lacks is in x/, beside it
    model = diffgen.load(str(file), device="cpu")
    model.save(tmp_path / "saved")
    options: dict[str, Any] = {"seed": 3, "steps": 3}
    (one,), (other,) = (m.generate("a red apple", **options) for m in (model, diffgen.load(str(tmp_path / "saved"))))
    assert one.tobytes() == other.tobytes()


def test_a_folder_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.build(tmp_path / "model", family="unconditional")
    checked = gate.check_folder(folder)
    pipe = load_pipeline(checked, CPU, F32)
    with pytest.raises(CannotWrite, match="it exists"):
        save_pipeline(pipe, checked, folder)
    with pytest.raises(CannotWrite, match="no such folder"):
        save_pipeline(pipe, checked, tmp_path / "nowhere" / "saved")
    old = os.umask(0o027)
    try:
        save_pipeline(pipe, checked, tmp_path / "saved")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert modes == {0o640}

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipe.unet, "save_pretrained", fail)
    with pytest.raises(CannotWrite, match="the disk is full"):
        save_pipeline(pipe, checked, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


# Our own networks


@pytest.mark.parametrize(
    "config",
    [
        {"width": 128, "multipliers": (1, 2), "blocks": 1, "attention": (False, True), "head_width": 64},
        {"width": 2, "multipliers": (1, 1, 1), "blocks": 2, "attention": (True, False, True), "head_width": 2},
        {"width": 2, "multipliers": (1,), "blocks": 3, "attention": (False,), "head_width": 1},
    ],
)
def test_diffusers_equivalent_of_our_unet_computes_the_same(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = networks.UNet(3, **config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 16, 8), torch.tensor([3, 700])
    with torch.no_grad():
        expected = network(x, t)
        actual = as_unet2d(network, [16, 8], "x")(x, t).sample
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("network", "size", "text"),
    [
        (networks.UNet(1, width=4, classes=10), [8, 8], "it has classes"),
        (networks.UNet(1, width=4, text_width=8), [8, 8], "it reads texts"),
        (networks.UNet(1, width=16), [8, 8], r"\[4, 8, 12, 16\] groups"),
        (networks.UNet(1, width=2, multipliers=(1, 1), attention=(False, False), head_width=3), [8, 8], "narrower"),
        (networks.UNet(1, width=2, multipliers=(1, 1), attention=(False, False), head_width=2), [7, 8], "halved"),
        (networks.DiT(1, width=8, depth=1, heads=2), [8, 8], "like its DiT"),
    ],
)  # fmt: skip
def test_a_network_without_equivalent_is_refused_with_the_reason(network: Any, size: list[int], text: str) -> None:
    with pytest.raises(InputError, match=text):
        as_unet2d(network, size, "x")


def run_of(folder: Path, network: networks.UNet, **changes: Any) -> Run:
    """A run of one checkpoint with that network."""
    run = {
        "schema": "diffgen.run/1", "job": "pixels", "config": {}, "versions": {},
        "network": {"name": "unet", **network.config},
        "data": {"name": "x", "channels": 1, "size": [8, 8], "classes": None, "levels": 256, "count": 9,
                 "fingerprint": "0" * 64},
        "noise": {"name": "cosine", "T": 100}, "prediction": "v_prediction", "variance": "fixed_large", **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    checkpoint.write(folder, 5, {"model": network.state_dict(), "ema": network.state_dict()}, {})
    return read_run(folder)


def test_a_run_saved_is_read_by_diffusers_and_by_us(tmp_path: Path) -> None:
    import diffusers

    import schedulers

    torch.manual_seed(0)
    network = networks.UNet(1, width=128, multipliers=(1,), blocks=1, attention=(True,)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_run(run_of(tmp_path / "run", network), tmp_path / "saved")

    checked = gate.check_folder(tmp_path / "saved")
    noise, prediction = schedulers.from_diffusers_config(checked.components["scheduler"].config)
    assert (checked.family, prediction) == ("unconditional", "v_prediction")
    assert noise.betas == schedulers.NoiseSchedule.cosine(T=100).betas
    other = diffusers.DDPMPipeline.from_pretrained(tmp_path / "saved")
    assert other.scheduler.config.variance_type == "fixed_large"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 70])
    with torch.no_grad():
        for unet in (other.unet, load_pipeline(checked, CPU, F32).unet):
            torch.testing.assert_close(unet(x, t).sample, network(x, t), rtol=1e-4, atol=1e-5)
    (image,) = other(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert image.size == (8, 8)

    with pytest.raises(InputError, match="no flow_prediction"):
        save_run(run_of(tmp_path / "flow", network, prediction="flow_prediction"), tmp_path / "no")
    with pytest.raises(InputError, match="cannot be saved as a diffusers folder"):
        save_run(run_of(tmp_path / "latent", network, job="latent"), tmp_path / "no")
    assert not (tmp_path / "no").exists()
