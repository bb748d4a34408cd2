"""Turn prompts into the embeddings that a network reads: in chunks, weighted as in AUTOMATIC1111.

Stable Diffusion 1 and 2 (one CLIP encoder) and XL (two, and the pooled embedding of the second) read any number of
chunks, with weights. Families without chunks (Stable Diffusion 3, Flux) get the text without its syntax, cut off where
their encoders end. Without weights, a prompt of one chunk gives exactly what the pipeline's own `encode_prompt` gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from diffgen.errors import UsageError
from diffgen.models.families import Family
from diffgen.prompts.syntax import is_weighted, parse, plain_text
from diffgen.prompts.tokens import Chunk, chunks

WITHOUT_WEIGHTS = "this family of models does not support weights and BREAK in prompts: only the text was read"


@dataclass(frozen=True)
class Embedded:
    """A prompt and its negative prompt, as a network reads them."""

    tensors: Mapping[str, torch.Tensor]  # [1, …], by the names of the pipeline's arguments: see Family.embeddings
    warnings: tuple[str, ...]  # what of the prompts was not read


def stacked(prompts: Sequence[Embedded]) -> dict[str, torch.Tensor]:
    """The arguments [B, …] of the pipeline's call for B prompts.

    Texts that come with a mask are padded to the longest. Raises UsageError where others differ in length.
    """
    batch = {}
    for name in prompts[0].tensors:
        tensors = [prompt.tensors[name] for prompt in prompts]
        length = max(tensor.shape[1] for tensor in tensors)
        if f"{name.removesuffix('_mask')}_mask" in prompts[0].tensors:
            tensors = [functional.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1])) for x in tensors]
        elif any(tensor.shape[1] != length for tensor in tensors):
            raise UsageError("these prompts are not equally long for the model", "shorten the longest")
        batch[name] = torch.cat(tensors)
    return batch


def embed_with_gradient(
    pipeline: Any,
    family: Family,
    prompt: str,
    negative: str = "",
    *,
    syntax: str = "a1111",
    clip_skip: int = 1,
    guided: bool = True,
    tokens: int | None = None,
) -> Embedded:
    """Embed a prompt and, where `guided`, its negative prompt, both of the same length.

    `pipeline` is a loaded diffusers pipeline of the family; tokens that textual inversion added to its tokenizers are
    read. With `syntax` "plain" a text is taken literally, and cut off after one chunk. `clip_skip` N takes the output
    of the encoder's N-th last layer, counted from the family's usual one, for both prompts. An empty negative prompt is
    the empty text, or zeros where the pipeline is configured so (XL). `tokens`: how many a family without chunks reads,
    None for the pipeline's default.
    Raises UsageError for what `prompts.syntax.parse` refuses, or more layers skipped than there are.
    """
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    if not family.chunks:
        if clip_skip != 1:
            _check_skip(clip_skip, encoders[:1])
        return _embed_text(pipeline, family, prompt, negative, syntax, clip_skip, guided, tokens)
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
    _check_skip(clip_skip, encoders)
    readers = [
        _Reader(pipeline, tokenizer, encoder, clip_skip)
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
        if encoder is not None
    ]
    zeros = getattr(pipeline.config, "force_zeros_for_empty_prompt", False) and not negative.strip()
    texts = [prompt, negative] if guided and not zeros else [prompt]
    split = [[reader.chunks(text, syntax) for reader in readers] for text in texts]
    count = max(len(chunked) for by_reader in split for chunked in by_reader)
    embedded = [
        _join([reader.encode(chunked, count) for reader, chunked in zip(readers, by_reader, strict=True)])
        for by_reader in split
    ]
    if guided and zeros:
        embedded.append((torch.zeros_like(embedded[0][0]), torch.zeros_like(embedded[0][1])))
    (positive, pooled), (opposite, opposite_pooled) = embedded if guided else (embedded[0], (None, None))
    warnings = tuple(dict.fromkeys(warning for reader in readers for warning in reader.warnings))
    return Embedded(_named(family, (positive, opposite, pooled, opposite_pooled)), warnings)


embed = torch.no_grad()(embed_with_gradient)


def _named(family: Family, tensors: Iterable[Any]) -> dict[str, torch.Tensor]:
    """Give the tensors that encode_prompt returns the names of the call's arguments, and drop those that are None."""
    named: dict[str, torch.Tensor] = {}
    tensors = (tensors,) if isinstance(tensors, list) else tensors  # of a single argument
    for name, value in zip(family.embeddings, tensors, strict=False):  # Flux's returns positions too
        if not name:
            continue
        if isinstance(value, list):  # of one text, as long as it is
            for tensor in value:
                named[name] = tensor[None]
                named[f"{name}_mask"] = torch.ones(1, len(tensor), dtype=torch.bool, device=tensor.device)
        elif value is not None:
            named[name] = value
        elif name.removesuffix("_mask") in named:  # of a text that is not padded
            length = named[name.removesuffix("_mask")].shape[1]
            named[name] = torch.ones(1, length, dtype=torch.bool, device=named[name.removesuffix("_mask")].device)
    return named


def places(pipeline: Any, prompt: str, word: str, syntax: str = "a1111") -> list[int]:
    """The places of the tokens of a word, or of consecutive words, in the embeddings of a prompt."""
    reader = _Reader(pipeline, pipeline.tokenizer, pipeline.text_encoder, clip_skip=1)
    ids = reader.ids(word)
    matches: list[int] = []
    for number, chunk in enumerate(reader.chunks(prompt, syntax)):
        tokens = [token for token, _ in chunk]
        for first in range(len(tokens) - len(ids) + 1):
            if tokens[first : first + len(ids)] == ids:
                matches += range(number * reader.length + 1 + first, number * reader.length + 1 + first + len(ids))
    return sorted(set(matches))


class _Reader:
    """One CLIP encoder of a pipeline, with its tokenizer."""

    def __init__(self, pipeline: Any, tokenizer: Any, encoder: Any, clip_skip: int) -> None:
        self.pipeline, self.tokenizer, self.encoder, self.clip_skip = pipeline, tokenizer, encoder, clip_skip
        # diffusers' property looks through every module: 20 ms of a small model
        self.device = pipeline._execution_device if hasattr(encoder, "_hf_hook") else encoder.device
        self.length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        self.warnings: list[str] = []

    def chunks(self, text: str, syntax: str) -> list[Chunk]:
        """A prompt's chunks; with the syntax "plain" only the first."""
        if syntax != "plain":
            return chunks(parse(text, syntax), self.ids, self.length - 2)
        ids = self.ids(text)
        room = self.length - 2
        if len(ids) > room:
            lost = self.tokenizer.decode(ids[room:]).strip()
            self.warnings.append(
                f"the prompt has {len(ids) + 2} tokens, this model reads {self.length}; dropped: {lost!r}"
            )
        return [[(number, 1.0) for number in ids[:room]]]

    def ids(self, text: str) -> list[int]:
        text = self.pipeline.maybe_convert_prompt(text, self.tokenizer)
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def encode(self, prompt: list[Chunk], count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The chunks, and empty ones up to `count`: embeddings [1, count·length, width], and the first one's pooled."""
        read = [self._encode(chunk) for chunk in [*prompt, *[[] for _ in range(count - len(prompt))]]]
        return torch.cat([hidden for hidden, _ in read], dim=1), read[0][1]

    def _encode(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokenizer, device = self.tokenizer, self.device
        padding = self.length - 2 - len(chunk)
        numbers = [number for number, _ in chunk]
        ids = [tokenizer.bos_token_id, *numbers, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
        weights = torch.tensor([1.0, *[weight for _, weight in chunk], *[1.0] * (padding + 1)])
        mask = None
        if getattr(self.encoder.config, "use_attention_mask", False):
            mask = torch.tensor([[1] * (len(chunk) + 2) + [0] * padding], device=device)
        read = self.encoder(torch.tensor([ids], device=device), attention_mask=mask, output_hidden_states=True)
        pooled = None
        if "text_encoder_2" in self.pipeline.components:  # XL reads one layer earlier, as it is
            hidden = read.hidden_states[-1 - self.clip_skip]
            pooled = read[0] if read[0].ndim == 2 else None
        elif self.clip_skip == 1:
            hidden = read[0]
        else:
            inner = getattr(self.encoder, "text_model", self.encoder)
            hidden = inner.final_layer_norm(read.hidden_states[-self.clip_skip])
        return _weigh(hidden, weights).to(device), pooled


def _weigh(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Embeddings [1, length, width] times their tokens' weights [length], scaled back to the mean that they had.

    Where a mean is zero except for rounding, nothing can be scaled, and the product stays.
    """
    if bool((weights == 1).all()):
        return hidden
    weighted = hidden.float() * weights.to(hidden.device)[None, :, None]
    mean, now, size = hidden.float().mean(), weighted.mean(), hidden.float().abs().mean()
    if min(mean.abs(), now.abs()) > 1e-5 * size:
        weighted *= mean / now
    return weighted.to(hidden.dtype)


def _join(read: list[tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[torch.Tensor, Any]:
    """The embeddings of several encoders side by side, and the last one's pooled embedding."""
    return torch.cat([hidden for hidden, _ in read], dim=-1), read[-1][1]


def _embed_text(
    pipeline: Any,
    family: Family,
    prompt: str,
    negative: str,
    syntax: str,
    clip_skip: int,
    guided: bool,
    tokens: int | None,
) -> Embedded:
    """The pipeline's own embeddings of the prompts' texts: families without chunks."""
    parameters = inspect.signature(pipeline.encode_prompt).parameters
    if clip_skip != 1 and "clip_skip" not in parameters:
        raise UsageError("--clip-skip: this family of models reads no layers of a CLIP encoder, so none can be skipped")
    text, opposite = plain_text(prompt, syntax), plain_text(negative, syntax)
    weighted = any(is_weighted(parse(source, syntax)) for source in (prompt, negative))
    options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in parameters}
    if clip_skip != 1:
        options["clip_skip"] = clip_skip - 1
    if tokens is not None:
        options["max_sequence_length"] = tokens
    if "device" in parameters and parameters["device"].default is inspect.Parameter.empty:
        options["device"] = pipeline._execution_device
    if "do_classifier_free_guidance" in parameters:
        options |= {"do_classifier_free_guidance": guided, "negative_prompt": opposite if guided else None}
    masks: list[torch.Tensor] = []  # of the texts that the encoder reads
    hook = pipeline.text_encoder.register_forward_pre_hook(
        lambda encoder, inputs, named: masks.append(named.get("attention_mask")), with_kwargs=True
    )
    tensors = _named(family, pipeline.encode_prompt(text, **options))
    hook.remove()
    warnings = [WITHOUT_WEIGHTS] if weighted else []
    full = family.native and tokens is not None and tensors["prompt_embeds"].shape[1] >= tokens
    if full and masks[0] is not None and bool(masks[0][:1].all()):  # no padding is left
        warnings.append(f"the prompt fills the {tokens} tokens that this model reads; what is beyond them was dropped")
    if guided and "do_classifier_free_guidance" not in parameters:
        tensors |= {f"negative_{n}": x for n, x in _named(family, pipeline.encode_prompt(opposite, **options)).items()}
    return Embedded(tensors, tuple(warnings))


def _check_skip(clip_skip: int, encoders: list[Any]) -> None:
    layers = min(encoder.config.num_hidden_layers for encoder in encoders if encoder is not None)
    if type(clip_skip) is not int or not 1 <= clip_skip <= layers:
        raise UsageError(f"--clip-skip must be a whole number from 1 to {layers} with this model (got {clip_skip!r})")
