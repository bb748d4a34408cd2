"""Augmentation: what each change does, decided by seed and step alone; the network is told of ADA's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import diffgen
from diffgen import networks
from diffgen.errors import UsageError
from diffgen.pipelines.weights.export import as_unet2d
from diffgen.training.augment import NUMBERS, Augmentation, changed, shifted, tinted
from diffgen.training.run import load_network, read_run

NAMES = ("mirrored", "cos", "sin", "scale", "aspect", "right", "down", "brightness", "contrast", "saturation")
SMALL = {
    "network": {"width": 8, "multipliers": [1], "blocks": 1, "attention": [False], "head_width": 8},
    "train": {"batch_size": 8, "warmup": 1, "checkpoint_every": 2, "log_every": 1},
    "sample": {"count": 2, "steps": 2},
}


def numbers(**values: float) -> torch.Tensor:
    return torch.tensor([[values.get(name, 0.0) for name in NAMES]])


def test_a_step_draws_the_same_whatever_else_is_on() -> None:
    everything = Augmentation(3, crop=2, colour=0.5, augment=0.4)
    drawn = everything.draw(7, 500)
    for alone in (Augmentation(3, crop=2), Augmentation(3, colour=0.5), Augmentation(3, augment=0.4)):
        for name, values in alone.draw(7, 500).items():
            assert values.equal(drawn[name])
    assert not everything.draw(8, 500)["changes"].equal(drawn["changes"])
    assert sorted(set(drawn["shift"].flatten().tolist())) == [-2, -1, 0, 1, 2]
    assert 0.45 < drawn["tint"].abs().max() <= 0.5
    changes = drawn["changes"]
    shares = (changes != 0).float().mean(0)
    assert shares[[2, 3, 4, 5, 6, 7, 8, 9]].tolist() == pytest.approx([0.4] * 8, abs=0.08)
    assert shares[0].item() == pytest.approx(0.2, abs=0.06)
    assert ((changes[:, 1] + 1) ** 2 + changes[:, 2] ** 2).tolist() == pytest.approx([1.0] * 500, abs=1e-5)
    assert (Augmentation(3).draw(7, 5), bool(Augmentation(3)), Augmentation(3).numbers) == ({}, False, 0)


def test_crops_and_colours() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert shifted(x, torch.tensor([[1, 0]]))[0, 0, :, 0].tolist() == [0, 0, 4, 8]  # down by one, mirrored at the edge
    assert shifted(x, torch.tensor([[0, -2]]))[0, 0, 0].tolist() == [2, 3, 3, 2]
    grey = torch.full((1, 1, 2, 2), 0.5)
    assert tinted(grey, torch.tensor([[0.1, 0.2, 9.0]]))[0, 0, 0, 0].item() == pytest.approx(0.5 * 1.2 + 0.1)
    colour = torch.tensor([0.6, 0.0, -0.6, 0.25]).reshape(1, 4, 1, 1)  # the last one is opacity
    assert tinted(colour, torch.tensor([[0.0, 0.0, 0.5]])).flatten().tolist() == pytest.approx([0.9, 0, -0.9, 0.25])
    assert tinted(colour, torch.tensor([[0.5, 0.0, 0.0]])).flatten().tolist() == pytest.approx([1, 0.5, -0.1, 0.25])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mirrored": 1.0}, lambda x: x.flip(3)),
        ({"cos": -1.0, "sin": 1.0}, lambda x: x.rot90(-1, (2, 3))),
        ({"cos": -2.0}, lambda x: x.flip(2, 3)),
        ({"right": 0.25}, lambda x: shifted(x, torch.tensor([[0, 2]]))),
        ({"down": -0.125}, lambda x: shifted(x, torch.tensor([[-1, 0]]))),
        ({"brightness": 0.25}, lambda x: x + 0.25),
        ({"contrast": -1.0}, lambda x: x / 2),
    ],
)
def test_each_change_of_ada(values: dict[str, float], expected: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(changed(x, numbers(**values)), expected(x), atol=1e-5, rtol=0)


def test_a_scale_enlarges_about_the_middle_and_nothing_changes_no_bit() -> None:
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(-1, 1, 9)[:-1].add(1 / 8).expand(1, 1, 8, 8)
    torch.testing.assert_close(changed(ramp, numbers(scale=1.0)), ramp / 2, atol=1e-6, rtol=0)
    both = changed(ramp.transpose(2, 3).contiguous(), numbers(aspect=1.0))  # wider and less tall
    torch.testing.assert_close(both[0, 0, 3:5, 0], torch.tensor([-0.25, 0.25]), atol=1e-6, rtol=0)
    assert changed(x, numbers()).equal(x)
    wide = torch.zeros(1, 1, 8, 16)
    wide[:, :, 3:5, 6:10] = 1  # a quarter turn stays 2 x 4 pixels, where the sides differ
    turned = changed(wide, numbers(cos=-1.0, sin=1.0))[0, 0, :, 4:12]  # beyond, there are mirror images
    assert (turned > 0.99).nonzero().tolist() == [[y, x] for y in range(2, 6) for x in (3, 4)]


def test_a_network_is_told_of_the_changes() -> None:
    for name, sizes in (("unet", SMALL["network"]), ("dit", {"width": 8, "depth": 1, "heads": 2})):
        torch.manual_seed(0)
        network = networks.build({"name": name, "channels": 1, "augment": 3, **sizes})
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.2)
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 5])
        plain, zeros = network(x, t), network(x, t, changes=torch.zeros(2, 3))
        torch.testing.assert_close(plain, zeros, atol=0, rtol=0)
        assert not torch.allclose(plain, network(x, t, changes=torch.ones(2, 3)))
        with pytest.raises(ValueError, match="changes must be"):
            network(x, t, changes=torch.zeros(2, 4))
        with pytest.raises(ValueError, match="is not told"):
            networks.build({"name": name, "channels": 1, **sizes})(x, t, changes=torch.zeros(2, 3))


def test_a_run_with_every_augmentation_is_trained_resumed_exactly_and_read(tmp_path: Path) -> None:
    options = {"config": SMALL, "flip": True, "crop": 1, "colour": 0.2, "augment": 0.3, "learning_rate": 0.01}
    diffgen.train("digits", tmp_path / "run", steps=4, **options)
    diffgen.train("digits", tmp_path / "parts", steps=2, **options)
    diffgen.train("digits", tmp_path / "parts", steps=4, resume=True)
    whole, parts = (load_network(read_run(tmp_path / name))[0] for name in ("run", "parts"))
    assert all(a.equal(b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert read_run(tmp_path / "run").network["augment"] == NUMBERS
    assert read_run(tmp_path / "run").config["data"]["crop"] == 1
    assert len(diffgen.load(tmp_path / "run").generate("7", seed=1)) == 1


def test_diffusers_network_needs_no_numbers_of_an_augmentation() -> None:
    sizes = {"width": 128, "multipliers": [1], "blocks": 1, "attention": [False], "head_width": 128}
    network = networks.build({"name": "unet", "channels": 1, "augment": NUMBERS, **sizes}).eval()
    torch.nn.init.normal_(network.last.weight, std=0.2)  # type: ignore[arg-type, union-attr]
    x, t = torch.randn(1, 1, 4, 4), torch.tensor([7])
    with torch.no_grad():
        theirs = as_unet2d(network, [4, 4], "a run")(x, t).sample
        torch.testing.assert_close(theirs, network(x, t), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "--learning-rate is -1.0: it must lie between 0 and 10"),
        ({"size": 5000}, "--size is 5000: it must lie between 1 and 1024"),
        ({"config": {"job": "latents"}, "flip": True}, "--flip is not for the job 'latents'"),
        ({"colours": 1}, "did you mean 'colour'"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        diffgen.train("digits", tmp_path / "run", **options)
    assert message in f"{caught.value.message} {caught.value.hint}"
