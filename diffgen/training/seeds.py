"""The random numbers of a step: a new generator for each (seed, step, purpose), without state.

So step k is the same in an interrupted and in an uninterrupted run, and a checkpoint has no generator to save.
"""

from __future__ import annotations

import torch

# Purposes of random numbers; each has its own stream.
ORDER, STEP, DROPOUT, HELD_OUT, SAMPLES, WEIGHTS, CAPTIONS, AUGMENT = range(8)

MASK = 2**64 - 1


def mix(*words: int) -> int:
    """Hash integers to 64 bits: SplitMix64 (Steele, Lea & Flood 2014), word after word."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def generator(*words: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator, seeded with these words."""
    return torch.Generator(device).manual_seed(mix(*words))
