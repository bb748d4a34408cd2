"""A small classifier, trained in seconds from a fixed seed: it judges pictures where no pretrained network is at hand.

Its features are what the Fréchet distance of `evaluate` is computed in. Data without classes gets a task of its own:
which way up is the picture (rotation prediction, Gidaris et al. 2018)?
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 32
LARGEST = 32  # pixels of a side; larger pictures are averaged down
STEPS, BATCH, RATE = 300, 64, 3e-3


class Classifier(nn.Module):
    """Convolutions down to 4 × 4, then `FEATURES` numbers, then classes; of floats [B, C, H, W] in [-1, 1]."""

    def __init__(self, channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side, width, here = min(max(size), LARGEST), 32, channels
        while True:
            layers += [nn.Conv2d(here, width, 3, 2 if side > 4 else 1, 1), nn.SiLU()]
            if side <= 4:
                break
            side, here, width = -(-side // 2), width, 64
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(width * 16, FEATURES))
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, FEATURES], what the last layer decides by."""
        return self.body(shrunk(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.features(x)))


def train_classifier(x: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> Classifier:
    """A classifier of pictures [N, C, H, W] with labels LongTensor [N]; the same pictures give the same weights.

    AdamW with a learning rate that falls to 0, 300 steps of 64 pictures however many there are.
    """
    x = shrunk(x)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(x.shape[1], (x.shape[2], x.shape[3]), classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            some = torch.randint(len(x), (BATCH,), generator=generator)
            loss = F.cross_entropy(classifier(x[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.requires_grad_(False).eval()


def features(classifier: Classifier, x: Tensor) -> Tensor:
    """[N, FEATURES] of pictures [N, C, H, W]."""
    return torch.cat([classifier.features(some) for some in x.split(512)])


def accuracy(classifier: Classifier, x: Tensor, labels: Tensor) -> float:
    """The part of the pictures that is put into the right class."""
    right = [classifier(some).argmax(1) == label for some, label in zip(x.split(512), labels.split(512), strict=True)]
    return float(torch.cat(right).double().mean())


def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    """(pictures [4N, C, H, W], labels [4N]): each in four positions, by quarter turns if it is square, else mirrored at
    neither, one, the other or both of its axes."""
    if x.shape[2] == x.shape[3]:
        ways = [x.rot90(quarter, (2, 3)) for quarter in range(4)]
    else:
        ways = [x, x.flip(2), x.flip(3), x.flip(2, 3)]
    return torch.cat(ways), torch.arange(4).repeat_interleave(len(x))


def shrunk(x: Tensor) -> Tensor:
    """The pictures, averaged down where a side is longer than `LARGEST`."""
    size = (min(x.shape[2], LARGEST), min(x.shape[3], LARGEST))
    return x if size == x.shape[2:] else F.adaptive_avg_pool2d(x, size)
