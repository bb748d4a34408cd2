"""A loaded pipeline as the plain function (x, t) → output that the native solvers evaluate: differentiable.

`generate` lets diffusers' pipelines call their networks. Comparing and tuning schedulers needs the network alone, with
its guidance, and gradients by x and t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffgen.diffusion.guidance import guide
from diffgen.errors import UsageError
from diffgen.models.gate import Checked

from ..families import code_of
from .embed import embed, stacked

Network = Callable[[Tensor, Tensor], Tensor]


def denoiser(
    pipeline: Any, checked: Checked, prompts: Sequence[str], guidance: float, size: tuple[int, int], negative: str = ""
) -> Network:
    """network(x [B, C, h, w], t [B]) for a batch that shows `prompts` [B], at `size` (width, height) in pixels.

    `pipeline` is the loaded one of the model that `checked` describes. x has the family's layout of latents
    (`latents.CODECS`; Flux's are packed). Guidance other than 1 evaluates both prompts in one batch of 2B, except where
    the network takes the guidance as an input, or none at all.
    Raises UsageError for a family without text to image.
    """
    family, code = checked.row, code_of(checked.family)
    if not family.reads_prompts:
        return lambda x, t: code.predict(pipeline, x, t, {})
    if "text" not in family.tasks:
        raise UsageError(f"models of the family {family.name} are not read natively, only by generate")
    guided = guidance != 1 and not checked.guidance_is_input
    distinct = {
        text: embed(pipeline, family, text, negative, guided=guided, tokens=checked.tokens)
        for text in dict.fromkeys(prompts)
    }
    rows = [distinct[text] for text in prompts]
    if len({row.tensors["prompt_embeds"].shape for row in rows}) > 1:
        raise UsageError("these prompts are not equally long for the model", "shorten the longest")
    embeddings = {name: x.clone() for name, x in stacked(rows).items()}
    scale = guidance if checked.guidance_is_input else None
    positive = code.inputs(pipeline, embeddings, size, scale)
    if not guided:
        return lambda x, t: code.predict(pipeline, x, t, positive)
    negatives = {name: embeddings[f"negative_{name}"] for name in embeddings if f"negative_{name}" in embeddings}
    opposite = code.inputs(pipeline, negatives, size, None)
    both = {name: torch.cat([opposite[name], positive[name]]) for name in positive}

    def network(x: Tensor, t: Tensor) -> Tensor:
        without, with_prompt = code.predict(pipeline, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(with_prompt, without, guidance)

    return network
