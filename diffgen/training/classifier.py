"""A small classifier, trained in seconds from a fixed seed: it judges pictures without a pretrained network.

The Fréchet distance of `evaluate` is computed in its features. For data without classes it predicts which way up a
picture is (rotation prediction, Gidaris et al. 2018).
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
        """[B, FEATURES], the input of the last layer."""
        return self.body(shrunk(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.features(x)))


def train_classifier(x: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> Classifier:
    """Train a classifier on pictures [N, C, H, W] with labels LongTensor [N]; the same data give the same weights.

    AdamW with a learning rate that falls to 0; always 300 steps of 64 pictures.
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
            batch = torch.randint(len(x), (BATCH,), generator=generator)
            loss = F.cross_entropy(classifier(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.requires_grad_(False).eval()


def features(classifier: Classifier, x: Tensor) -> Tensor:
    """[N, FEATURES] of pictures [N, C, H, W]."""
    return torch.cat([classifier.features(batch) for batch in x.split(512)])


def accuracy(classifier: Classifier, x: Tensor, labels: Tensor) -> float:
    """The fraction of the pictures that is classified correctly."""
    right = [classifier(batch).argmax(1) == label for batch, label in zip(x.split(512), labels.split(512), strict=True)]
    return float(torch.cat(right).double().mean())


def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    """(pictures [4N, C, H, W], labels [4N]): each picture in four positions, by quarter turns if it is square, else by
    mirroring at neither, one or both of its axes."""
    if x.shape[2] == x.shape[3]:
        positions = [x.rot90(quarter, (2, 3)) for quarter in range(4)]
    else:
        positions = [x, x.flip(2), x.flip(3), x.flip(2, 3)]
    return torch.cat(positions), torch.arange(4).repeat_interleave(len(x))


def shrunk(x: Tensor) -> Tensor:
    """Average the pictures down where a side is longer than `LARGEST`."""
    size = (min(x.shape[2], LARGEST), min(x.shape[3], LARGEST))
    return x if size == x.shape[2:] else F.adaptive_avg_pool2d(x, size)
