"""Training: images per second and held-out loss of `diffgen train`'s own step and of two peers', in turn, in one run.

    pip install denoising-diffusion-pytorch -c constraints.txt
    python benchmarks/train.py [--data samples/emoji32] [--images 6400] [--threads 2] [--device cpu]

The peers are denoising-diffusion-pytorch's UNet with the step of its `Trainer`, and diffusers' UNet2DModel with the
step of its example train_unconditional.py. Each is compared with a UNet of ours with the same parameters and
multiply-adds within 10 %. All get the same pictures in the same order, 32×32, 32 at a time, from memory (without the
peers' loaders, which decode files in worker processes). They train on epsilon with the linear schedule, at the
same learning rate, after the same warm-up: the peers' default, 1e-4, is for runs of days. Optimizer, clipping,
averages and the reading of each loss are their own, and so is float32, unless --peer-autocast. Ours computes in the
precision that `diffgen train` chooses: bfloat16 on a device that is fast in it.

They take turns, --steps steps at a time; the first round warms up and is not counted. The ratio is the median of the
rounds' ratios. The held-out loss is the mean squared error of epsilon on pictures that none was trained on, at the same
times and with the same noise for all, of the weights and of their average.

denoising-diffusion-pytorch imports torchvision for its data set and its grids, which are not used here. If the
installed torch has no torchvision, an empty module replaces it while the peer is imported.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: a busy process beside it would slow everything down many times

import argparse
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffgen.training.config import Config, Data, Diffusion, Train
from diffgen.training.data import open_data
from diffgen.training.parallel import Ranks
from diffgen.training.pixels import PixelJob
from diffgen.training.trainer import Trainer

LUCIDRAINS, DIFFUSERS = "denoising-diffusion-pytorch", "diffusers"
OURS: dict[str, dict[str, Any]] = {  # by peer: our network of its size
    LUCIDRAINS: dict(width=48, multipliers=[1, 2, 2, 2], blocks=2, attention=[False, False, False, True]),
    DIFFUSERS: dict(width=64, multipliers=[1, 2, 2], blocks=1, attention=[False, False, True]),
}
ROOT = Path(__file__).parent.parent


@dataclass
class Contestant:
    """A network that trains."""

    name: str
    network: nn.Module
    step: Callable[[int], object]
    losses: Callable[[], tuple[float, float]]  # on held-out pictures: of the weights, of their average
    seconds: list[float] = field(default_factory=list)  # of each round


def ours(args: argparse.Namespace, against: str) -> tuple[Contestant, PixelJob, torch.dtype]:
    """(`diffgen train` without its log and checkpoints, its job with the data, its precision)"""
    config = Config(
        data=Data(classes=False),
        network={"name": "unet", **OURS[against]},
        diffusion=Diffusion(noise="linear"),
        train=Train(
            steps=args.images // args.batch_size,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup=args.warmup,
            precision=args.precision,
        ),
    )
    job = PixelJob(config, open_data(args.data, size=args.size, channels=3))
    trainer = Trainer(job, config.train, Ranks(args.device))

    def losses() -> tuple[float, float]:
        values = []
        for average in (None, trainer.averages[0]):
            with trainer.evaluating(average) as networks, trainer.autocast():
                values.append(held_out(networks["network"], job))
        return values[0], values[1]

    return Contestant(f"diffgen, matching {against}", job.network, trainer.step, losses), job, trainer.dtype


def lucidrains(job: PixelJob, args: argparse.Namespace) -> Contestant:
    """denoising_diffusion_pytorch.Trainer.train, with the defaults of `Trainer`."""
    peer = import_lucidrains()
    ema_pytorch = importlib.import_module("ema_pytorch")
    torch.manual_seed(0)
    network = peer.Unet(dim=48, dim_mults=(1, 2, 4), channels=job.data.channels)
    diffusion = peer.GaussianDiffusion(
        network, image_size=job.data.size, timesteps=job.diffusion.T, objective="pred_noise", beta_schedule="linear"
    ).to(job.device)
    same_schedule(job, diffusion.alphas_cumprod)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    ema = ema_pytorch.EMA(diffusion, beta=0.995, update_every=10).to(job.device)

    def step(k: int) -> None:
        warm_up(optimizer, k, args)
        diffusion.train()
        with peer_autocast(job, args):
            loss = diffusion((job.clean(job.indices(k)) + 1) / 2)
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def losses() -> tuple[float, float]:
        with torch.no_grad():
            return held_out(diffusion.model.eval(), job), held_out(ema.ema_model.model.eval(), job)

    return Contestant(LUCIDRAINS, network, step, losses)


def diffusers_example(job: PixelJob, args: argparse.Namespace) -> Contestant:
    """diffusers/examples/unconditional_image_generation/train_unconditional.py with --use_ema, as its page has it.

    The network has the layout of google/ddpm-cifar10-32 (attention at half size), at 3/8 of its width.
    """
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=job.data.size,
        in_channels=job.data.channels,
        out_channels=job.data.channels,
        layers_per_block=2,
        block_out_channels=(48, 96, 96, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=24,
    ).to(job.device)
    scheduler = DDPMScheduler(num_train_timesteps=job.diffusion.T, beta_schedule="linear")
    same_schedule(job, scheduler.alphas_cumprod)
    ema = EMAModel(
        network.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=UNet2DModel,
        model_config=network.config,
    )
    ema.to(job.device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=args.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )

    def step(k: int) -> None:
        warm_up(optimizer, k, args)
        network.train()
        images = job.clean(job.indices(k))
        noise = torch.randn(images.shape, dtype=torch.float32, device=images.device)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(images),), device=images.device).long()
        with peer_autocast(job, args):
            output = network(scheduler.add_noise(images, noise, t), t).sample
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        loss.detach().item()

    def losses() -> tuple[float, float]:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return network(x, t).sample

        network.eval()
        with torch.no_grad():
            raw = held_out(model, job)
            ema.store(network.parameters())
            ema.copy_to(network.parameters())
            averaged = held_out(model, job)
            ema.restore(network.parameters())
        return raw, averaged

    return Contestant(DIFFUSERS, network, step, losses)


def import_lucidrains() -> types.ModuleType:
    """Import the package, with an empty torchvision if none can be imported."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # RuntimeError: it needs another build of torch
        stand_ins = {
            name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.utils")
        }
        stand_ins["torchvision"].__dict__.update(
            transforms=stand_ins["torchvision.transforms"], utils=stand_ins["torchvision.utils"]
        )
    else:
        stand_ins = {}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("denoising_diffusion_pytorch")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def same_schedule(job: PixelJob, alphas_cumprod: Tensor) -> None:
    """Stop unless the peer has the same noise schedule."""
    torch.testing.assert_close(alphas_cumprod.double().cpu(), job.diffusion.alpha_bar, rtol=1e-3, atol=1e-6)


def warm_up(optimizer: torch.optim.Optimizer, k: int, args: argparse.Namespace) -> None:
    """The learning rate of step k, as `Trainer.learning_rate` has it."""
    optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, (k + 1) / args.warmup)


def peer_autocast(job: PixelJob, args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(job.device.type, torch.bfloat16, enabled=args.peer_autocast)


@torch.no_grad()
def held_out(network: Callable[[Tensor, Tensor], Tensor], job: PixelJob, times: int = 8) -> float:
    """The mean squared error of ε over the held-out pictures, each at `times` times spread over 0 … T−1."""
    g, total, count = torch.Generator().manual_seed(0), 0.0, len(job.test)
    for i in range(times):
        t = ((torch.arange(count) / count + i) * job.diffusion.T / times).long()
        noise = torch.randn(count, job.data.channels, *job.data.size, generator=g)
        for part in torch.arange(count).split(64):
            x0, eps, at = job.clean(job.test[part]), noise[part].to(job.device), t[part].to(job.device)
            output = network(job.diffusion.q_sample(x0, at, eps), at)
            total += (output.float() - eps).square().mean(dim=(1, 2, 3)).sum().item()
    return total / (times * count)


def size_of(network: nn.Module, job: PixelJob) -> tuple[float, float]:
    """(millions of parameters, millions of multiply-adds for one picture)."""
    x, t = (
        torch.zeros(1, job.data.channels, *job.data.size, device=job.device),
        torch.zeros(1, device=job.device).long(),
    )
    # with MATH attention is matrix products, which are counted
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, t)
    return sum(p.numel() for p in network.parameters()) / 1e6, counter.get_total_flops() / 2e6


def timed(contestant: Contestant, steps: range, device: torch.device) -> float:
    """Seconds that these steps take."""
    started = time.perf_counter()
    for k in steps:
        contestant.step(k)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(ROOT / "samples" / "emoji32"), help="digits, or a folder of pictures")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=6400, help="that each one trains on")
    parser.add_argument("--steps", type=int, default=5, help="before it is the next one's turn")
    parser.add_argument("--learning-rate", type=float, default=Train().learning_rate)
    parser.add_argument("--warmup", type=int, default=Train().warmup)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="ours")
    parser.add_argument("--peer-autocast", action="store_true", help="let the peers compute in bfloat16 too")
    parser.add_argument("--peers", default=f"{LUCIDRAINS},{DIFFUSERS}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = args.images // args.batch_size // args.steps * args.steps
    if steps < 2 * args.steps:
        parser.error(f"--images must be at least two rounds of {args.batch_size * args.steps}")
    makers = {LUCIDRAINS: lucidrains, DIFFUSERS: diffusers_example}
    pairs = []
    for name in args.peers.split(","):
        mine, job, dtype = ours(args, name)
        try:
            pairs.append((mine, makers[name](job, args)))
        except ModuleNotFoundError as error:
            sys.exit(f"{error}: pip install {name}, or choose other --peers")
    print(f"{len(job.train)} pictures to train on, {len(job.test)} held out, {args.size}x{args.size}, on {job.device}")
    print(f"batch {args.batch_size}, learning rate {args.learning_rate:g}, {args.threads} threads; ours in {dtype}")
    for mine, peer in pairs:
        (p, m), (peer_p, peer_m) = size_of(mine.network, job), size_of(peer.network, job)
        print(f"{peer.name}: {peer_p:.2f} M parameters, {peer_m:.0f} M multiply-adds a picture")
        print(f"  ours: {p:.2f} M ({p / peer_p - 1:+.1%}), {m:.0f} M ({m / peer_m - 1:+.1%}); {OURS[peer.name]}")
        if max(abs(p / peer_p - 1), abs(m / peer_m - 1)) > 0.1:
            print("  NOT within 10 %: they are matched for three channels, 32x32")
    contestants = [contestant for pair in pairs for contestant in pair]
    for first in range(0, steps, args.steps):
        for contestant in contestants:
            contestant.seconds.append(timed(contestant, range(first, min(first + args.steps, steps)), job.device))
    print(f"medians of {len(mine.seconds) - 1} rounds; losses after {steps * args.batch_size} images")
    for contestant in contestants:
        rate = args.steps * args.batch_size / statistics.median(contestant.seconds[1:])
        raw, averaged = contestant.losses()
        print(f"  {contestant.name}: {rate:.1f} images/s, loss {raw:.4f}, of averaged weights {averaged:.4f}")
    for mine, peer in pairs:
        ratios = [theirs / own for own, theirs in zip(mine.seconds[1:], peer.seconds[1:], strict=True)]
        low, high = min(ratios), max(ratios)
        print(f"ratio to {peer.name}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
