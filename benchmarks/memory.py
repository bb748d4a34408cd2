"""The memory of loading a model, and of many pictures.

    python benchmarks/full_size.py sd15 FOLDER
    python benchmarks/memory.py FOLDER [--dtype bfloat16]
    python benchmarks/memory.py emoji --pictures 64

Each measurement is a new process. Loading: the greatest resident memory while a model is loaded, less what the imports
take, as a multiple of the weights in the dtype they have then. Pictures: the greatest memory after a quarter of the
pictures, and after all; it must not grow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

CHILD = """
import json, re, sys
import diffgen
from diffgen.loading import make_plan
import diffgen.pipelines.generate

def memory(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

model, dtype, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = memory("VmRSS")
generator = diffgen.load(model, device="cpu", dtype=dtype)
peak = memory("VmHWM") - before
weights = sum(weight.nbytes for part in generator.pipeline.components.values() if hasattr(part, "parameters")
              for weight in part.parameters())
peaks = []
if count:
    plan = make_plan(generator.model, ["a red apple"], count=count, seed=1, batch_size=4)
    for i, picture in enumerate(generator.pictures(plan), 1):
        if i in (count // 4, count):
            peaks.append(memory("VmHWM"))
print(json.dumps({"imports": before, "peak": peak, "weights": weights, "dtype": str(generator.dtype), "peaks": peaks}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pictures", type=int, default=0)
    arguments = parser.parse_args()
    command = [sys.executable, "-c", CHILD, arguments.model, arguments.dtype, str(arguments.pictures)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    peak, weights = measured["peak"], measured["weights"]
    print(f"{measured['dtype']}: weights {weights / 1e9:.3f} GB, peak while loading {peak / 1e9:.3f} GB", end=" ")
    print(f"({peak / weights:.2f} times), besides {measured['imports'] / 1e9:.2f} GB of imports")
    if measured["peaks"]:
        print("after a quarter and all of the pictures:", *(f"{peak / 1e9:.3f} GB" for peak in measured["peaks"]))


if __name__ == "__main__":
    main()
