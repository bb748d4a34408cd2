"""Models of full size with random weights, for benchmarks: what they compute takes as long as the real ones.

    python benchmarks/full_size.py sd15 FOLDER

Writes a diffusers folder. The weights are those that a new network has, in --dtype (float16).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

import diffgen
from diffgen.pipelines.weights.network import make_network
from diffgen.pipelines.weights.tokenizers import load_tokenizer

PACKAGED = Path(diffgen.__file__).parent / "models" / "configs"
CONFIGS = {"sd15": "sd1", "sdxl": "sdxl"}  # the folder of configurations


def write(name: str, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the model unless it is there. Returns the folder."""
    source = PACKAGED / CONFIGS[name]
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    index = json.loads((source / "model_index.json").read_text())
    for part, pair in index.items():
        if not isinstance(pair, list) or pair[0] is None:
            continue
        class_name = pair[1]
        if class_name == "CLIPTokenizer":
            load_tokenizer(PACKAGED / "clip_tokenizer", 77).save_pretrained(folder / part)
        elif (source / part / "config.json").exists():
            config = json.loads((source / part / "config.json").read_text())
            network = make_network(class_name, config).to(dtype)
            network.save_pretrained(folder / part)
            del network
        else:
            shutil.copytree(source / part, folder / part)
    if name == "sd15":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"))
    arguments = parser.parse_args()
    print(write(arguments.model, arguments.folder, getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
