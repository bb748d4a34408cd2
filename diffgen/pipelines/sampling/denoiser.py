"""A loaded pipeline as the plain function (x, t) → output that the native solvers evaluate: differentiable.

`generate` lets diffusers' pipelines call their networks, or samples natively (native.py). That, comparing and tuning
schedulers need the network alone, with its guidance, and the last two gradients by x and t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffgen.diffusion.guidance import rescale as guidance_rescaled
from diffgen.errors import UsageError
from diffgen.models.families import Family
from diffgen.models.gate import Checked

from ..families import Inputs, code_of
from .embed import embed, stacked

Network = Callable[[Tensor, Tensor], Any]  # its outputs [B, …], or pairs of them for CFG++
CONTEXT = ("references", "masked", "controls")


def denoiser(
    pipeline: Any, checked: Checked, prompts: Sequence[str], guidance: float, size: tuple[int, int], negative: str = ""
) -> Network:
    """network(x [B, C, h, w], t [B]) for a batch that shows `prompts` [B], at `size` (width, height) in pixels.

    `pipeline` is the loaded one of the model that `checked` describes. x has the family's layout of latents
    (`latents.CODECS`; Flux's are packed). Guidance other than 1 evaluates both prompts in one batch of 2B, except where
    the network takes the guidance as an input, or none at all.
    Raises UsageError for a family without text to image.
    """
    family = checked.row
    if not family.reads_prompts:
        code = code_of(family.name)
        return lambda x, t: code.predict(pipeline, x, t, {})
    if "text" not in family.tasks:
        raise UsageError(f"models of the family {family.name} are not read natively, only by generate")
    guided = guidance != 1 and not checked.guidance_is_input
    distinct = {
        text: embed(pipeline, family, text, negative, guided=guided, tokens=checked.tokens)
        for text in dict.fromkeys(prompts)
    }
    embeddings = {name: tensor.clone() for name, tensor in stacked([distinct[text] for text in prompts]).items()}
    return network_of(pipeline, family, embeddings, guidance, size, guidance_is_input=checked.guidance_is_input)


def network_of(
    pipeline: Any,
    family: Family,
    embeddings: Mapping[str, Any],
    guidance: float,
    size: tuple[int, int],
    *,
    guidance_is_input: bool,
    rescale: float = 0.0,
    guided_at: Callable[[], bool] = lambda: True,
    pair: bool = False,
) -> Network:
    """network(x [B, …], t [B]) for the embeddings of B prompts; those of negative prompts have the prefix negative_.

    Among them may be what the network reads of pictures (CONTEXT): `references`, the clean latents [1, C, h, w] of each
    picture beside its own; `masked`, the latents [B, C, h, w] and the mask [1, 1, H, W] of `Start.masked`; `controls`.
    Guided outputs get the conditional output's standard deviation by the share `rescale`. Where `guided_at()`, asked
    before each evaluation, is false, there is no guidance. With `pair` the network gives (output, output without the
    prompt), which are the same where there is no guidance.
    """
    code = code_of(family.name)
    positive = code.inputs(pipeline, embeddings, size, guidance if guidance_is_input else None)
    if guidance == 1 or guidance_is_input:
        return lambda x, t: code.predict(pipeline, x, t, positive)
    negatives: dict[str, Any] = {
        name: embeddings[f"negative_{name}"] for name in embeddings if f"negative_{name}" in embeddings
    }
    negatives |= {name: embeddings[name] for name in CONTEXT if name in embeddings}
    opposite = code.inputs(pipeline, negatives, size, None)
    both = {name: _together(opposite[name], positive[name]) for name in positive if name != "controls"}
    both |= {name: positive[name] for name in positive if name == "controls"}

    def network(x: Tensor, t: Tensor) -> Any:
        if not guided_at():
            output = code.predict(pipeline, x, t, positive)
            return (output, output) if pair else output
        without, with_prompt = code.predict(pipeline, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        output = code.guide(with_prompt, without, guidance)
        output = guidance_rescaled(output, with_prompt, rescale) if rescale else output
        return (output, without) if pair else output

    return network


def _together(first: Inputs, second: Inputs) -> Inputs:
    """Inputs [B, …] of two batches as those of one [2B, …]."""
    if isinstance(first, list) or isinstance(second, list):
        return [*first, *second]
    return torch.cat([first, second])
