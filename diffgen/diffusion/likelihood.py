"""The likelihood of a picture: by the variational bound, and by the probability-flow ODE.

Both are in bits per dimension of discrete data: `levels` values, evenly from −1 to 1 (256 for 8-bit pictures, 17 for
the digits). A value between two levels counts as the bin of the same width around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from schedulers.draws import Generators, normal

from .reverse import Clip, Model, ReverseProcess


def decoder_nll(x0: Tensor, mean: Tensor, log_variance: Tensor, levels: int) -> Tensor:
    """DDPM eq. 13: −ln of the probability of x0's bin under N(mean, variance), element by element, in nats.

    The bins are 2/(levels − 1) wide; the first and the last extend to infinity.
    """
    half, scale = 1 / (levels - 1), torch.exp(-0.5 * log_variance)
    # a bin above the mean is mirrored, so that Φ is never near 1, where ln Φ loses all its digits
    above, distance = x0 > mean, (x0 - mean).abs()
    near, far = scale * (half - distance), scale * (-half - distance)  # the bin is [far, near], and far < 0
    ln_near, ln_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    ln_inside = ln_near + torch.log(-torch.expm1((ln_far - ln_near).clamp(max=-torch.finfo(scale.dtype).tiny)))
    ln_beyond = torch.special.log_ndtr(-far)  # the bin and everything on the mean's side of it
    outward = torch.where(above, x0 > 1 - half, x0 < half - 1)  # an end bin, with the mean on the inner side of it
    inward = torch.where(above, x0 < half - 1, x0 > 1 - half)  # an end bin, with the mean beyond it
    return -torch.where(outward, ln_near, torch.where(inward, ln_beyond, ln_inside))


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N₁ ‖ N₂) of two normal distributions, element by element, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (torch.exp(ratio) - 1 - ratio + (mean1 - mean2).square() * torch.exp(-log_variance2))


def bits(nats: Tensor) -> Tensor:
    """Convert nats of each element [B, …] to bits per dimension [B]."""
    return nats.flatten(1).mean(1) / math.log(2)


def bound_term(
    process: ReverseProcess, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, levels: int, clip: Clip = None
) -> Tensor:
    """DDPM eq. 5: KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t)), or the decoder at t = 0; [B] bits per dim."""
    output, v = process.split(model_output, x_t)
    mean, log_variance = process.p_mean(output, x_t, t, clip), process.p_log_variance(v, x_t, t)
    kl = gaussian_kl(process.q_posterior(x0, x_t, t)[0], process.at("log_beta_tilde", t, x_t), mean, log_variance)
    return torch.where(t == 0, bits(decoder_nll(x0, mean, log_variance, levels)), bits(kl))


def prior_term(process: ReverseProcess, x0: Tensor) -> Tensor:
    """DDPM eq. 5: L_T = KL(q(x_T | x_0) ‖ N(0, I)), [B] bits per dimension; it does not depend on the network."""
    last = torch.full((x0.shape[0],), process.T - 1, device=x0.device)
    mean, log_variance = process.at("alpha", last, x0) * x0, 2 * process.at("sigma", last, x0).log()
    return bits(gaussian_kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(log_variance)))


@torch.no_grad()
def variational_bound(
    process: ReverseProcess,
    model: Model,
    x0: Tensor,
    generator: Generators = None,
    *,
    levels: int = 256,
    clip: Clip = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """DDPM eq. 5: the terms L_0, …, L_{T-1}, L_T, [T + 1, B] bits per dimension, each from one draw of noise."""
    terms = []
    for step in range(process.T):
        t = torch.full((x0.shape[0],), step, device=x0.device)
        x_t = process.q_sample(x0, t, normal(x0.shape, generator, x0.device))
        terms.append(bound_term(process, model(x_t, t), x0, x_t, t, levels, clip))
        if progress is not None:
            progress(step)
    return torch.stack([*terms, prior_term(process, x0)])


def trace(y: Tensor, x: Tensor, probes: int | None, generator: Generators) -> Tensor:
    """tr ∂y/∂x of each example, [B]: Hutchinson's estimate, the mean of zᵀ(∂y/∂x)z over `probes` random sign vectors z.

    With `probes` None it is exact, at one backward pass for each dimension.
    """
    if probes is None:
        columns = [torch.autograd.grad(c.sum(), x, retain_graph=True)[0].flatten(1) for c in y.flatten(1).unbind(1)]
        return torch.stack([c[:, i] for i, c in enumerate(columns)]).sum(0)
    estimates = []
    for _ in range(probes):
        z = normal(x.shape, generator, x.device).sign().to(x.dtype)
        (product,) = torch.autograd.grad((y * z).sum(), x, retain_graph=True)
        estimates.append((product * z).flatten(1).sum(1))
    return torch.stack(estimates).mean(0)


def ode_log_density(
    process: ReverseProcess,
    model: Model,
    x: Tensor,
    generator: Generators = None,
    *,
    steps: int | None = None,
    probes: int | None = 1,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Song et al. 2021 (score SDE), eq. 39: ln p(x), [B] nats, of x [B, …] at the noise level t = 0.

    Along the probability-flow ODE, dx = x̂0·dα + ε̂·dσ, ln p falls by the trace of the right side's Jacobian. The
    trapezoidal rule integrates both over `steps` intervals between integer times, at which the network was trained; the
    default is all T − 1. Near discrete data the trace of ε̂ grows as 1/σ, so it is integrated in ln σ.
    `probes`: see `trace`. The network must process each example of a batch independently.
    """
    last = process.T - 1
    count = last if steps is None else steps
    if last > 0 and not 1 <= count <= last:
        raise ValueError(f"steps must lie in 1 … {last}, got {steps}")
    nodes = [round(i * last / count) for i in range(count + 1)] if last else [0]

    def rate(x: Tensor, at: int, d_alpha: float, d_sigma: float, d_log_sigma: float) -> tuple[Tensor, Tensor]:
        t = torch.full((x.shape[0],), at, device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            output, _ = process.split(model(x, t), x)
            dx0, eps = d_alpha * process.predict_x0(output, x, t), process.predict_eps(output, x, t)
            divergence = trace(dx0 + process.sigma[at].item() * d_log_sigma * eps, x, probes, generator)
            return (dx0 + d_sigma * eps).detach(), divergence

    decrease = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    for p, q in pairwise(nodes):
        step = [(table[q] - table[p]).item() for table in (process.alpha, process.sigma, process.sigma.log())]
        dx1, trace1 = rate(x, p, *step)
        dx2, trace2 = rate(x + dx1, q, *step)
        x, decrease = x + (dx1 + dx2) / 2, decrease + (trace1 + trace2) / 2
        if progress is not None:
            progress(q)
    return decrease - 0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


@torch.no_grad()
def bits_per_dim_ode(
    process: ReverseProcess,
    model: Model,
    x0: Tensor,
    generator: Generators = None,
    *,
    levels: int = 256,
    steps: int | None = None,
    probes: int | None = 1,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Bits per dimension [B], with the exact density of x at t = 0 instead of the bound's terms above it.

    −ln P(x0) ≤ E[ln q(x | x0) − ln p(x) − ln p_θ(x0 | x)]. Only the first step is a bound: it turns the density into
    the probability of discrete data, with the decoder of `variational_bound`, so that the two can be compared.
    """
    t = torch.zeros(x0.shape[0], dtype=torch.int64, device=x0.device)
    noise = normal(x0.shape, generator, x0.device).to(x0.dtype)
    x = process.q_sample(x0, t, noise)
    ln_q = -0.5 * (noise.square() + math.log(2 * math.pi)) - process.at("sigma", t, x0).log()
    output, v = process.split(model(x, t), x)
    ln_decoder = -decoder_nll(x0, process.p_mean(output, x, t), process.p_log_variance(v, x, t), levels)
    ln_p = ode_log_density(process, model, x, generator, steps=steps, probes=probes, progress=progress)
    return bits(ln_q - ln_decoder) - ln_p / (x0[0].numel() * math.log(2))
