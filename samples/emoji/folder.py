"""Write the data set as a folder of pictures with a metadata.jsonl for `diffgen train`, and the tokenizer.

    python samples/emoji/folder.py work/          # work/data.npz, work/names.json -> work/data/, work/tokenizer/

A line of metadata.jsonl has all captions of a picture with their weights, its concept and style, and `held_out`: true
for the (concept, style) pairs of `held_out.json`, which are never trained on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from captions import every, mixture, names
from data import trained
from PIL import Image
from tokenizer import build_tokenizer


def main(work: Path) -> None:
    data, table = np.load(work / "data.npz"), names(work)
    new = work / "data.tmp"
    shutil.rmtree(new, ignore_errors=True)
    lines = []
    in_training = trained(data["names"], data["styles"]).tolist()
    for name, style, picture, is_trained in zip(
        data["names"].tolist(), data["styles"].tolist(), data["pictures"], in_training, strict=True
    ):
        file = f"{style}/{name.replace(' ', '-')}.png"
        (new / style).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(new / file)
        captions = mixture(name, table[name], style)
        texts = {"text": list(captions), "weights": [round(weight, 6) for weight in captions.values()]}
        lines.append({"file_name": file, "concept": name, "style": style, "held_out": not is_trained, **texts})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (new / "metadata.jsonl").write_text(text, "utf-8")
    tokenizer = build_tokenizer(every(table), work / "tokenizer")
    shutil.rmtree(work / "data", ignore_errors=True)
    new.rename(work / "data")
    print(
        f"{len(lines)} pictures, {len(lines) - sum(in_training)} held out; {len(tokenizer)} tokens -> {work / 'data'}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    main(parser.parse_args().work)
