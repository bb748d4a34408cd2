"""One command for the whole recipe: data, autoencoder, diffusion, measurements. What is finished is not done again.

    pip install -e '.[recipe]' -c constraints.txt
    apt-get install fonts-noto-color-emoji libcairo2        # and npm, for the SVG pictures
    python samples/emoji/make.py samples/emoji/work

Stop it at any time; the same command goes on from the last checkpoint. The finished model is work/emoji; copy it to
diffgen/models/bundled/emoji to ship it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

here = Path(__file__).parent
work = Path(sys.argv[1]) if len(sys.argv) == 2 and not sys.argv[1].startswith("-") else None
if work is None:
    raise SystemExit(__doc__)
work.mkdir(parents=True, exist_ok=True)

for script, product, extra in (
    ("data.py", "data.npz", []),
    ("vae.py", "vae.json", []),
    ("diffusion.py", "diffusion.json", []),
    ("measure.py", "measure.json", ["--model", str(work / "emoji")]),
    ("card.py", "emoji/README.md", []),
):
    if not (work / product).exists():
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, here / script, work, *extra], check=True)
