"""What --compile and --attention-backend gain here: python benchmarks/faster.py MODEL [--size WxH] [--steps N]

Each way makes the same picture twice; the second time counts, in seconds of the clock and of the processor. The error
is the largest difference of a pixel, from 0 to 255.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import diffgen
from diffgen.errors import DiffgenError
from diffgen.generation.checks import ATTENTION_BACKENDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--size", default=None)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    generator: Any = diffgen.load(arguments.model)
    ways = [{}, {"compile": True}, *({"attention_backend": name} for name in ATTENTION_BACKENDS if name != "native")]
    exact = None
    print("| way | seconds | processor | error |\n|---|---|---|---|")
    for way in ways:
        label = " ".join(f"{key}={value}" for key, value in way.items()) or "plain"
        try:
            for _ in range(2):
                clock, processor = time.perf_counter(), time.process_time()
                (image,) = generator.generate("a red apple", seed=1, steps=arguments.steps, size=arguments.size, **way)
                clock, processor = time.perf_counter() - clock, time.process_time() - processor
        except DiffgenError as error:
            print(f"| {label} | {error.message[:80]} | | |", flush=True)
            continue
        pixels = np.asarray(image).astype(int)
        exact = pixels if exact is None else exact
        print(f"| {label} | {clock:.2f} | {processor:.2f} | {abs(pixels - exact).max()} |", flush=True)


if __name__ == "__main__":
    main()
