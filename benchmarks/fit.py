"""Memory of one evaluation at full size, without memory: python benchmarks/fit.py [FAMILY]…

Networks of the bundled configurations run on tensors without data, which counts what is alive after each operation. The
constants of diffgen/generation/needs.py come from the two columns of values per position (or pixel) and channel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffgen.generation.needs import widest
from diffgen.models.families import FAMILIES
from diffgen.models.single_file import CONFIGS
from diffgen.pipelines.weights.network import make_network

SIDE = 1024  # pixels
DTYPE = torch.bfloat16


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def network(family: str, part: str) -> tuple[Any, dict[str, Any]]:
    config = json.loads((CONFIGS / family / part / "config.json").read_text())
    return make_network(config["_class_name"], config).eval().requires_grad_(False), config


def inputs(family: str, net: Any, config: dict[str, Any], side: int) -> dict[str, Any]:
    """What the network reads for one picture, as its pipeline would call it."""
    x = torch.zeros(1, config.get("in_channels", 4), side, side, dtype=DTYPE)
    t = torch.ones(1, dtype=DTYPE)
    if family in ("sd1", "sd2", "sdxl"):
        more: dict[str, Any] = {}
        if family == "sdxl":
            more["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(1, 1280, dtype=DTYPE),
                "time_ids": torch.zeros(1, 6),
            }
        return {"sample": x, "timestep": t, "encoder_hidden_states": torch.zeros(
            1, 77, config["cross_attention_dim"], dtype=DTYPE), **more}  # fmt: skip
    if family == "z-image":
        return {"x": [x[0][:, None]], "t": t, "cap_feats": [torch.zeros(128, config["cap_feat_dim"], dtype=DTYPE)]}
    tokens = side * side // 4
    text = torch.zeros(1, 512, config["joint_attention_dim"], dtype=DTYPE)
    if family == "qwen-image":
        return {"hidden_states": torch.zeros(1, tokens, 64, dtype=DTYPE), "encoder_hidden_states": text, "timestep": t,
                "encoder_hidden_states_mask": torch.ones(1, 512, dtype=torch.bool),
                "img_shapes": [[(1, side // 2, side // 2)]]}  # fmt: skip
    ids = 4 if family.startswith("flux2") else 3
    more = {"guidance": t} if config.get("guidance_embeds") else {}
    if family == "flux":
        more["pooled_projections"] = torch.zeros(1, 768, dtype=DTYPE)
    return {"hidden_states": torch.zeros(1, tokens, config["in_channels"], dtype=DTYPE), "encoder_hidden_states": text,
            "timestep": t, "img_ids": torch.zeros(tokens, ids), "txt_ids": torch.zeros(512, ids), **more}  # fmt: skip


def main() -> None:
    chosen = sys.argv[1:] or ["sd1", "sdxl", "flux", "z-image", "flux2-klein", "qwen-image"]
    print("| family | evaluation at 1024x1024 | values per position and channel | decoder | per pixel and channel |")
    print("|---|---|---|---|---|")
    torch.set_default_dtype(DTYPE)
    for family in chosen:
        row = FAMILIES[family]
        side = SIDE // 8
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            net, config = network(family, row.denoiser)
            asked = inputs(family, net, config, side)
            with Peak() as one:
                net(**asked)
            vae, vae_config = network(family, "vae")
            channels = vae_config.get("latent_channels") or vae_config.get("z_dim")
            latent = torch.zeros(1, channels, *[1] * ("z_dim" in vae_config), side, side, dtype=DTYPE)
            with Peak() as two:
                vae.decode(latent, return_dict=False)
        width, positions = widest(row, config, side * side)
        pixels = (vae_config.get("block_out_channels") or [vae_config.get("base_dim")])[0] * SIDE**2
        size = DTYPE.itemsize
        print(
            f"| {family} | {one.peak / 1e9:.2f} GB | {one.peak / size / width / positions:.0f} |"
            f" {two.peak / 1e9:.2f} GB | {two.peak / size / pixels:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
