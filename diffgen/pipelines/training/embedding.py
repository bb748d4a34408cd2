"""The job "embedding": a new word for `generate --embedding WORD=RUN` (Gal et al. 2022, arXiv 2208.01618)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from diffgen.errors import InputError, UsageError
from diffgen.training.job import Networks

from ..inputs import check_word
from ..sampling.embed import Embedded, embed_with_gradient, stacked
from .finetune import Call, FineTune, Pick
from .finetune_config import EmbeddingConfig

FILE = "embedding.safetensors"
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
NAMES = ("clip_l", "clip_g")  # of the vectors of two encoders, in files


class Words(nn.Module):
    """The vectors of the new word in the table of each encoder; called with texts. The tables do not change."""

    def __init__(self, vectors: Mapping[str, Tensor], embed: Callable[[Sequence[str | None]], dict[str, Any]]) -> None:
        super().__init__()
        self.vectors = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in vectors.items()})
        self._embed = embed
        self.on = True

    def replace_rows(self, encoder: str, table: nn.Module, first: int) -> None:
        """Let the table answer with the vectors for the tokens from `first` on."""

        def hook(table: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            row = inputs[0] - first
            vectors = self.vectors[encoder]
            own = vectors[row.clamp(0, len(vectors) - 1)].to(output.dtype)
            known = (row >= 0) & (row < len(vectors))
            return torch.where(known[..., None], own, output) if self.on else output

        table.register_forward_hook(hook)

    def forward(self, texts: Sequence[str | None]) -> dict[str, Any]:
        return self._embed(texts)


class EmbeddingJob(FineTune):
    """Textual inversion: the vectors of the trigger."""

    config: EmbeddingConfig

    def build(self) -> dict[str, nn.Module]:
        word = self.config.data.trigger
        if not self.row.chunks:
            raise InputError(f"{self.where}: no words are trained for models of the family {self.checked.family}")
        try:
            check_word(word)
        except UsageError as error:
            raise InputError(f"{self.where}: data.trigger: {error.message}", error.hint) from error
        vectors, parts = {}, self.pipeline.components
        for name, tokenizer in ENCODERS.items():
            if parts.get(name) is not None:
                vectors[name] = self._beginning(parts[tokenizer], parts[name])
        words = self.words = Words(vectors, self._read_texts)
        self._embeddings.on = False  # what a text means depends on the vectors
        for name, rows in vectors.items():
            tokenizer, encoder = parts[ENCODERS[name]], parts[name]
            try:
                self.pipeline.load_textual_inversion(
                    {"emb_params": rows}, token=word, tokenizer=tokenizer, text_encoder=encoder
                )
            except ValueError as error:
                raise InputError(
                    f"{self.where}: data.trigger {word!r} is a word of the model", "another one"
                ) from error
            encoder.requires_grad_(False)
            words.replace_rows(name, encoder.get_input_embeddings(), tokenizer.convert_tokens_to_ids(word))
        return {"words": words}

    def _beginning(self, tokenizer: Any, encoder: Any) -> Tensor:
        """The first vectors of the word in one encoder: those of the words that it begins with."""
        c = self.config.embedding
        ids = tokenizer(c.begin or "object", add_special_tokens=False).input_ids
        count = c.vectors or len(ids)
        ids = (ids * count)[:count]
        return encoder.get_input_embeddings().weight[ids].detach().float().cpu()

    def denoiser(self, networks: Networks, picks: Sequence[Pick]) -> Call:
        return self.base

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """Inside, the word has the vectors that it began with."""
        self.words.on = False
        try:
            yield
        finally:
            self.words.on = True

    def condition(self, networks: Networks, texts: Sequence[str | None]) -> dict[str, Any]:
        with self.autocast():
            read: dict[str, Any] = networks["words"](list(texts))
        return read

    def _read_texts(self, texts: Sequence[str | None]) -> dict[str, Any]:
        """The embeddings of texts, with the gradient of the vectors; dropped captions have none."""

        def read(text: str | None) -> Embedded:
            if text is None:
                return Embedded({k: v.to(self.device) for k, v in self._text(None).tensors.items()}, ())
            return embed_with_gradient(self.pipeline, self.row, text, syntax="plain", guided=False)

        distinct = {text: read(text) for text in dict.fromkeys(texts)}
        return stacked([distinct[text] for text in texts])

    def products(self, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
        rows = [weights[f"vectors.{name}"].cpu().contiguous() for name in ENCODERS if f"vectors.{name}" in weights]
        names = NAMES if len(rows) > 1 else ("emb_params",)
        return {FILE: save(dict(zip(names, rows, strict=True)), {"format": "pt"})}
