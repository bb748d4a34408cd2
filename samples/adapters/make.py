"""Train a textual inversion, a LoRA and a ControlNet for a model: three calls of `diffgen finetune`.

    python samples/adapters/make.py diffgen/models/bundled/emoji samples/emoji/work/data samples/adapters

The data is a folder that samples/emoji/make.py leaves in its work folder. pictures.py makes a folder of pictures for
each adapter; lora.toml, embedding.toml and control.toml say how it is trained. Files that exist in OUT are not trained
again, and an interrupted training continues.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import pictures

import diffgen
from diffgen.errors import DiffgenError
from diffgen.pipelines.training.export import save_run
from diffgen.training.run import read_run

HERE = Path(__file__).resolve().parent
ADAPTERS = {  # the file or folder in OUT: its configuration, and what makes its pictures
    "dropling.safetensors": ("embedding.toml", pictures.droplings),
    "delft.safetensors": ("lora.toml", pictures.delft),
    "canny": ("control.toml", pictures.transformed),
}


def main(model: str, data: str, out: Path, steps: int | None = None) -> None:
    """Train the adapters that `out` lacks; `steps` replaces the number of steps of each. Raises InputError."""
    missing = [name for name in ADAPTERS if not (out / name).exists()]
    if not missing:
        print(f"all exist: {', '.join(str(out / name) for name in ADAPTERS)}")
        return
    for name in missing:
        config, make = ADAPTERS[name]
        work = out / "work" / Path(config).stem
        if not (work / "pictures").exists():
            make(Path(data), work / "pictures")
        diffgen.finetune(model, work / "pictures", work / "run", config=HERE / config, steps=steps, resume=True)
        options = {"dtype": "float16"} if name == "delft.safetensors" else {}
        save_run(read_run(work / "run"), out / name, **options)
        shutil.rmtree(work)
        print(out / name, flush=True)
    shutil.rmtree(out / "work", ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Stable Diffusion 1 model: a diffusers folder, or emoji")
    parser.add_argument("data", help="a folder of pictures with a metadata.jsonl")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help="steps of each adapter, for a trial")
    a = parser.parse_args()
    try:
        main(a.model, a.data, a.out, a.steps)
    except DiffgenError as error:
        print(f"error: {error.message}", f"hint: {error.hint}" if error.hint else "", sep="\n", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
