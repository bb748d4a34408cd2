"""Guidance against its formula and against Gaussians: of two with one variance, the guided denoiser is a third's."""

import pytest
import torch
from gaussian import exact

from diffgen.diffusion import GaussianDiffusion, guided
from diffgen.diffusion.guidance import guide, rescale
from schedulers import NoiseSchedule

S = 0.5


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TwoGaussians:
    """A network with the labels 0 (unconditional, N(−0.2, s²)) and 1 (N(0.4, s²)) that notes its batch sizes."""

    def __init__(self, d: GaussianDiffusion) -> None:
        self.models, self.batch_sizes = [exact(d, m, S) for m in (-0.2, 0.4)], []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.batch_sizes.append(len(x))
        outputs = torch.stack([m(x, t) for m in self.models])
        return outputs[label, torch.arange(len(x))]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_guided_gaussian(scale: float, prediction: str):
    """uncond + scale·(cond − uncond): 0 is the unconditional one, 1 the conditional one, 3 the mean −0.2 + 3·0.6."""
    d = GaussianDiffusion(NoiseSchedule.linear(100), prediction)
    network, x, t = TwoGaussians(d), double(4, 1, 2, 2), torch.tensor([0, 10, 50, 99])
    ones, zeros = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    actual = guided(network, ones, zeros, scale)(x, t)
    torch.testing.assert_close(actual, exact(d, -0.2 + scale * 0.6, S)(x, t), rtol=1e-9, atol=1e-9)
    assert network.batch_sizes == ([4] if scale == 1 else [8])


def test_only_inside_the_interval():
    """Outside the interval the output is the conditional one, and the unconditional one is not evaluated."""
    d = GaussianDiffusion(NoiseSchedule.linear(100))
    network, x = TwoGaussians(d), double(4, 1, 2, 2)
    ones, zeros = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    call, t = guided(network, ones, zeros, 3.0, interval=(10, 50)), torch.tensor([9, 10, 50, 51])
    expected = torch.where((t % 10 == 0)[:, None, None, None], exact(d, 1.6, S)(x, t), exact(d, 0.4, S)(x, t))
    torch.testing.assert_close(call(x, t), expected, rtol=1e-9, atol=1e-9)
    network.batch_sizes.clear()
    d.sample(call, (4, 1, 2, 2), torch.Generator())
    assert network.batch_sizes == [4] * 49 + [8] * 41 + [4] * 10


def test_rescaling_gives_the_contrast_back():
    """2305.08891: φ = 1 has the standard deviation of the conditional output, φ = 0 is off, 0.7 lies between."""
    cond, uncond = double(3, 2, 8, 8), double(3, 2, 8, 8, seed=1)
    strong = guide(cond, uncond, 7.5)

    def deviation(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).std(1)

    torch.testing.assert_close(deviation(rescale(strong, cond, 1.0)), deviation(cond))
    torch.testing.assert_close(rescale(strong, cond, 0.0), strong)
    between = 0.7 * deviation(cond) + 0.3 * deviation(strong)
    torch.testing.assert_close(deviation(rescale(strong, cond, 0.7)), between)
    call = guided(lambda x, t, c: c, cond, uncond, 7.5, phi=0.7)
    torch.testing.assert_close(call(cond, torch.zeros(3).long()), rescale(strong, cond, 0.7))


def test_rescaling_as_diffusers_does():
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    cond, uncond = double(3, 4, 8, 8), double(3, 4, 8, 8, seed=1)
    strong = guide(cond, uncond, 7.5)
    want = pipeline.rescale_noise_cfg(strong, cond, guidance_rescale=0.7)
    torch.testing.assert_close(rescale(strong, cond, 0.7), want)


def test_a_learned_variance_is_not_guided():
    x, t = double(2, 3, 4, 4), torch.zeros(2).long()
    cond, uncond = double(2, 6, 4, 4, seed=1), double(2, 6, 4, 4, seed=2)
    actual = guided(lambda x, t, c: c, cond, uncond, 3.0)(x, t)
    torch.testing.assert_close(actual[:, :3], guide(cond[:, :3], uncond[:, :3], 3.0))
    assert torch.equal(actual[:, 3:], cond[:, 3:])
