"""Embeddings of prompts against diffusers' own, and weights, chunks and clip skip against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS

from diffgen.errors import UsageError
from diffgen.models.families import family_of
from diffgen.models.find import find
from diffgen.models.gate import check_folder
from diffgen.pipelines.sampling import embed as sampling
from diffgen.pipelines.sampling.embed import WITHOUT_WEIGHTS
from diffgen.pipelines.weights.load import load_pipeline
from diffgen.prompts.syntax import Part, parse
from diffgen.prompts.tokens import ClipTokenizer, chunks

CPU = torch.device("cpu")
SHORT = ["a red apple", "a red apple, flat style", "", "a " * 14, "piñata?! Zebra's"]
LONG = "a red apple on the green square, a blue circle and the modern piñata, flat style and a red square"


@pytest.fixture(scope="module", params=["tiny", "emoji"])
def pipeline(request: pytest.FixtureRequest, tiny: Path) -> Any:
    """Stable Diffusion 1: one encoder, that reads 16 tokens (`tiny`) or 24 (`emoji`)."""
    folder = tiny if request.param == "tiny" else find("emoji").folder
    return load_pipeline(check_folder(folder), CPU, torch.float32)


@pytest.fixture(scope="module")
def emoji() -> Any:
    return load_pipeline(check_folder(find("emoji").folder), CPU, torch.float32)


@pytest.fixture(scope="module")
def sd1(tiny: Path) -> Any:
    return load_pipeline(check_folder(tiny), CPU, torch.float32)


@pytest.fixture(scope="module")
def xl(sd1: Any) -> Any:
    """Stable Diffusion XL: a second encoder of another width, whose tokenizer pads with another token."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(1)
    first = sd1.text_encoder.config
    config = type(first).from_dict(first.to_dict() | {"hidden_size": 24, "projection_dim": 20, "num_hidden_layers": 3})
    vocabulary = sd1.tokenizer.get_vocab()
    merges = sd1.tokenizer._merges
    second = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token="!", model_max_length=16)
    return StableDiffusionXLPipeline(
        vae=sd1.vae,
        unet=sd1.unet,
        text_encoder=sd1.text_encoder,
        tokenizer=sd1.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config).eval().requires_grad_(False),
        tokenizer_2=second,
        scheduler=None,
    )


class Embeddings(NamedTuple):
    """The embeddings that `embed` returns, by short names; None for those it leaves out."""

    prompt: torch.Tensor
    negative: torch.Tensor | None
    pooled: torch.Tensor | None
    negative_pooled: torch.Tensor | None
    warnings: tuple[str, ...]
    arguments: Callable[..., dict[str, torch.Tensor]]


def embed(pipeline: Any, *texts: str, **options: Any) -> Embeddings:
    """`embed` for the family that the pipeline's class belongs to."""
    parts = {name for name, part in pipeline.components.items() if part is not None}
    family = family_of(type(pipeline).__name__, parts, {})
    assert family is not None
    embedded = sampling.embed(pipeline, family, *texts, **options)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    assert set(embedded.tensors) <= {*names}
    tensors: list[Any] = [embedded.tensors.get(name) for name in names]
    return Embeddings(*tensors, embedded.warnings, lambda count: sampling.stacked([embedded] * count))


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("syntax", ["a1111", "plain"])
@pytest.mark.parametrize("prompt", SHORT)
def test_a_short_prompt_has_the_pipelines_own_embeddings(pipeline: Any, prompt: str, syntax: str) -> None:
    theirs = pipeline.encode_prompt(prompt, CPU, 1, True, negative_prompt="on the apple")
    ours = embed(pipeline, prompt, "on the apple", syntax=syntax)
    assert same(ours.prompt, theirs[0])
    assert same(ours.negative, theirs[1])
    assert ours.pooled is None
    assert ours.warnings == ()
    assert same(embed(pipeline, prompt, syntax=syntax).negative, pipeline.encode_prompt(prompt, CPU, 1, True)[1])
    assert embed(pipeline, prompt, guided=False).negative is None


@given(st.lists(st.sampled_from([*WORDS, ",", "x7", "日"]), max_size=6).map(" ".join))
@settings(max_examples=30, deadline=None)
def test_any_short_prompt_has_the_pipelines_own_embeddings(sd1: Any, prompt: str) -> None:
    if len(sd1.tokenizer(prompt).input_ids) <= 16:
        assert same(embed(sd1, prompt).prompt, sd1.encode_prompt(prompt, CPU, 1, False)[0])


@pytest.mark.parametrize("negative", ["", "on the apple"])
@pytest.mark.parametrize("zeros", [True, False])
def test_xl_reads_with_both_encoders(xl: Any, negative: str, zeros: bool) -> None:
    xl.register_to_config(force_zeros_for_empty_prompt=zeros)
    for prompt in SHORT:
        theirs = xl.encode_prompt(prompt, device=CPU, negative_prompt=negative or None)
        ours = embed(xl, prompt, negative)
        assert same(ours.prompt, theirs[0])
        assert same(ours.negative, theirs[1])
        assert same(ours.pooled, theirs[2])
        assert same(ours.negative_pooled, theirs[3])
    if zeros and not negative:
        assert not ours.negative.any()


def test_the_refiner_reads_with_the_second_encoder_alone(xl: Any) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    xl.register_to_config(force_zeros_for_empty_prompt=False)
    parts = {**xl.components, "text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, force_zeros_for_empty_prompt=False)
    theirs = refiner.encode_prompt("a red apple", device=CPU)
    ours = embed(refiner, "a red apple")
    assert same(ours.prompt, theirs[0])
    assert same(ours.negative, theirs[1])
    assert same(ours.pooled, theirs[2])
    assert same(ours.negative_pooled, theirs[3])


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(sd1: Any, xl: Any, skip: int) -> None:
    """Stable Diffusion 1: the layer and the final norm after it. XL: diffusers' clip_skip is one less."""
    ids = sd1.tokenizer("a red apple", padding="max_length", return_tensors="pt").input_ids
    encoder = sd1.text_encoder
    with torch.inference_mode():
        states = encoder(ids, output_hidden_states=True).hidden_states
        expected = encoder.final_layer_norm(states[-skip])
    ours = embed(sd1, "a red apple", "a red apple", clip_skip=skip)
    torch.testing.assert_close(ours.prompt, expected, rtol=0, atol=0)
    assert same(ours.negative, ours.prompt)
    theirs = xl.encode_prompt("a red apple", device=CPU, clip_skip=skip - 1, do_classifier_free_guidance=False)
    ours = embed(xl, "a red apple", clip_skip=skip)
    assert same(ours.prompt, theirs[0])
    assert same(ours.pooled, theirs[2])


@pytest.mark.parametrize("skip", [0, 3, -1, True])
def test_a_clip_skip_beyond_the_layers_is_refused(sd1: Any, skip: int) -> None:
    with pytest.raises(UsageError, match="--clip-skip must be a whole number from 1 to 2"):
        embed(sd1, "a", clip_skip=skip)


def by_hand(pipeline: Any, words: list[tuple[str, float]]) -> torch.Tensor:
    """One chunk whose every word is one token: encoded, weighted, scaled back to its mean, in double precision."""
    text = " ".join(word for word, _ in words)
    plain = pipeline.encode_prompt(text, CPU, 1, False)[0].double()
    weights = torch.ones(plain.shape[1], dtype=torch.float64)
    weights[1 : len(words) + 1] = torch.tensor([weight for _, weight in words], dtype=torch.float64)
    weighted = plain * weights[:, None]
    return weighted * plain.mean() / weighted.mean()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a (red) apple", [("a", 1), ("red", 1.1), ("apple", 1)]),
        ("a (red:1.5) [apple]", [("a", 1), ("red", 1.5), ("apple", 1 / 1.1)]),
        ("((a red) apple:0.5)", [("a", 0.55), ("red", 0.55), ("apple", 0.5)]),
        ("(a red apple:0)", [("a", 0), ("red", 0), ("apple", 0)]),
    ],
)
def test_weights_multiply_and_the_mean_comes_back(emoji: Any, prompt: str, words: list[tuple[str, float]]) -> None:
    ours, plain = embed(emoji, prompt).prompt, embed(emoji, "a red apple").prompt
    expected = by_hand(emoji, words)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert ours.mean().item() == pytest.approx(plain.mean().item(), rel=1e-3)
    assert (ours - plain).abs().max() > 0.01


def test_a_mean_of_zero_is_nothing_to_scale_by(sd1: Any) -> None:
    """The tiny encoder's last norm is untrained: each token's embedding has the mean 0, except for rounding."""
    plain, weighted = embed(sd1, "a red apple").prompt, embed(sd1, "a (red:1.5) apple").prompt
    assert plain.mean().abs() < 1e-6
    plain[:, 2] *= 1.5
    assert same(weighted, plain)


def test_xl_weights_each_encoder_and_leaves_the_pooled_alone(xl: Any) -> None:
    plain, weighted = embed(xl, "a red apple"), embed(xl, "a (red:1.4) apple")
    assert same(plain.pooled, weighted.pooled)
    for columns in (slice(0, 16), slice(16, 40)):
        a, b = plain.prompt[..., columns], weighted.prompt[..., columns]
        assert a.mean().item() == pytest.approx(b.mean().item(), rel=1e-3)
        ratio = (b / a)[0].mean(dim=1)
        assert (ratio[2] / ratio[1]).item() == pytest.approx(1.4, rel=1e-3)


def test_a_long_prompt_is_its_chunks_side_by_side(pipeline: Any) -> None:
    n = pipeline.tokenizer.model_max_length
    first, second = "a red apple, flat style", "piñata"
    both = embed(pipeline, f"{first} BREAK {second}", "on")
    assert both.prompt.shape[1] == 2 * n
    assert same(both.prompt[:, :n], embed(pipeline, first).prompt)
    assert same(both.prompt[:, n:], embed(pipeline, second).prompt)
    assert same(both.negative[:, :n], embed(pipeline, "on").prompt)
    assert same(both.negative[:, n:], embed(pipeline, "").prompt)
    shorter = embed(pipeline, "a", f"{LONG}, {LONG}")
    assert shorter.prompt.shape == shorter.negative.shape
    assert same(shorter.prompt[:, n : 2 * n], embed(pipeline, "").prompt)


def test_weights_are_scaled_back_chunk_by_chunk(sd1: Any) -> None:
    ours = embed(sd1, "a (red:1.5) apple BREAK [green] circle").prompt
    assert same(ours[:, :16], embed(sd1, "a (red:1.5) apple").prompt)
    assert same(ours[:, 16:], embed(sd1, "[green] circle").prompt)


def test_plain_syntax_cuts_long_prompts_with_a_warning(sd1: Any) -> None:
    ours = embed(sd1, LONG, syntax="plain")
    assert same(ours.prompt, sd1.encode_prompt(LONG, CPU, 1, False)[0])
    ids = sd1.tokenizer(LONG).input_ids
    assert ours.warnings == (
        f"the prompt has {len(ids)} tokens, this model reads 16; dropped: {sd1.tokenizer.decode(ids[15:-1])!r}",
    )
    literal = embed(sd1, "(red:1.5)", syntax="plain")
    assert same(literal.prompt, sd1.encode_prompt("(red:1.5)", CPU, 1, False)[0])


def test_the_pipeline_accepts_our_embeddings(sd1: Any) -> None:
    """A picture of a prompt of three chunks; one of a short one is the same as from the prompt itself."""
    import schedulers

    sd1.scheduler = schedulers.get("euler")
    sd1.set_progress_bar_config(disable=True)

    def picture(**options: Any) -> torch.Tensor:
        noise = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(3))
        return sd1(num_inference_steps=2, latents=noise, output_type="latent", height=32, width=32, **options).images

    long = picture(**embed(sd1, LONG, "on").arguments(2))
    assert long.isfinite().all()
    short = picture(**embed(sd1, "a red apple", "on").arguments(2))
    assert torch.equal(short, picture(prompt=["a red apple"] * 2, negative_prompt=["on"] * 2))
    assert not torch.equal(short, long)


def test_tokens_of_textual_inversion_are_read(tiny: Path) -> None:
    pipeline = load_pipeline(check_folder(tiny), CPU, torch.float32)
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    pipeline.load_textual_inversion(vectors, token="<mine>")
    ids = pipeline.tokenizer("a <mine> <mine>_1 <mine>_2 apple").input_ids
    assert len(ids) == 7
    assert same(embed(pipeline, "a <mine> apple").prompt, pipeline.encode_prompt("a <mine> apple", CPU, 1, False)[0])
    weighted = embed(pipeline, "a (<mine>:1.5) apple").prompt
    plain = embed(pipeline, "a <mine> apple").prompt
    ratio = (weighted / plain)[0].mean(dim=1)
    assert (ratio[:6] / ratio[0]).tolist() == pytest.approx([1, 1, 1.5, 1.5, 1.5, 1], rel=1e-3)


# Stable Diffusion 3 and Flux


@pytest.fixture(scope="module")
def t5() -> Any:
    from transformers import T5Config, T5EncoderModel
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    torch.manual_seed(2)
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz(:.15)"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval().requires_grad_(False)


def test_flux_reads_the_text_without_weights(sd1: Any, t5: Any) -> None:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline(
        scheduler=None,
        vae=sd1.vae,
        text_encoder=sd1.text_encoder,
        tokenizer=sd1.tokenizer,
        text_encoder_2=t5[1],
        tokenizer_2=t5[0],
        transformer=None,
    )
    theirs = pipeline.encode_prompt("a red apple", device=CPU, max_sequence_length=32)
    other = pipeline.encode_prompt("on", device=CPU, max_sequence_length=32)
    ours = embed(pipeline, "a (red:1.5) apple", "on", tokens=32)
    assert same(ours.prompt, theirs[0])
    assert same(ours.pooled, theirs[1])
    assert same(ours.negative, other[0])
    assert same(ours.negative_pooled, other[1])
    assert ours.warnings == (WITHOUT_WEIGHTS,)
    plain = embed(pipeline, "a red apple", guided=False)
    assert plain.warnings == ()
    assert plain.prompt.shape[1] == 512
    assert set(plain.arguments(3)) == {"prompt_embeds", "pooled_prompt_embeds"}
    assert plain.arguments(3)["pooled_prompt_embeds"].shape[0] == 3
    with pytest.raises(UsageError, match="--clip-skip"):
        embed(pipeline, "a", clip_skip=2)


def test_stable_diffusion_3_reads_the_text_without_weights(sd1: Any, xl: Any, t5: Any) -> None:
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = sd1.text_encoder.config
    first = CLIPTextModelWithProjection(type(config).from_dict(config.to_dict() | {"projection_dim": 16}))
    wide = T5EncoderModel(T5Config(vocab_size=64, d_model=48, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    pipeline = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=sd1.vae,
        text_encoder=first.eval().requires_grad_(False),
        tokenizer=sd1.tokenizer,
        text_encoder_2=xl.text_encoder_2,
        tokenizer_2=xl.tokenizer_2,
        text_encoder_3=wide.eval().requires_grad_(False),
        tokenizer_3=t5[0],
    )
    for skip in (1, 2):
        theirs = pipeline.encode_prompt(
            "a red apple", None, None, device=CPU, negative_prompt="on", clip_skip=skip - 1, max_sequence_length=32
        )
        ours = embed(pipeline, "a (red) apple", "on", clip_skip=skip, tokens=32)
        assert same(ours.prompt, theirs[0])
        assert same(ours.negative, theirs[1])
        assert same(ours.pooled, theirs[2])
        assert same(ours.negative_pooled, theirs[3])
    assert ours.warnings == (WITHOUT_WEIGHTS,)
    assert embed(pipeline, "a", guided=False, tokens=32).negative is None


# Tokens without torch, and how they fall into chunks


@pytest.mark.parametrize("model", ["tiny", "emoji"])
def test_our_tokens_are_those_of_transformers(tiny: Path, model: str) -> None:
    folder = tiny if model == "tiny" else find("emoji").folder
    theirs = load_pipeline(check_folder(folder), CPU, torch.float32).tokenizer
    ours = ClipTokenizer(folder / "tokenizer", 16)

    @given(
        st.text(max_size=30) | st.lists(st.sampled_from([*WORDS, "<|endoftext|>", "!", "日本", "É", "\n"])).map("".join)
    )
    @settings(max_examples=150, deadline=None)
    def check(text: str) -> None:
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids

    check()
    ids = ours.ids("a red piñata?!")
    assert ours.text(ids) == theirs.decode(ids)
    assert "".join(map(ours.token, ours.ids("a red apple"))) == "a red apple "


def test_special_tokens_come_from_the_folder(tiny: Path, tmp_path: Path) -> None:
    """Stable Diffusion 2 pads with "!", which makes a special token of it."""
    import json
    import shutil

    from diffgen.errors import InputError
    from diffgen.pipelines.weights.tokenizers import load_tokenizer

    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    config = {"pad_token": {"content": "!"}}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = load_tokenizer(tmp_path / "tokenizer", 16)
    ours = ClipTokenizer(tmp_path / "tokenizer", 16)
    assert theirs.pad_token == "!"
    for text in ("a red apple!", "!!", "a ! b", "on?!"):
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids
    with pytest.raises(InputError, match="'nowhere' is not in the vocabulary"):
        ClipTokenizer(tmp_path / "tokenizer", 16, {"pad_token": "nowhere"})


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text if letter != " "]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("abcde", ["abcde"]),
        ("abcdefghijk", ["abcde", "fghij", "k"]),
        ("abcdefghij", ["abcde", "fghij"]),
        ("ab,cdef", ["ab,", "cdef"]),
        ("ab,cd", ["ab,cd"]),
        ("abcd,ef", ["abcd,", "ef"]),
        ("abcde,f", ["abcde", ",f"]),
        ("a,b,cdefg", ["a,b,", "cdefg"]),
        ("ab BREAK c", ["ab", "c"]),
        ("BREAK c", ["", "c"]),
        ("c BREAK", ["c"]),
        ("abcdefg BREAK h", ["abcde", "fg", "h"]),
    ],
)
def test_chunks_of_five(text: str, expected: list[str]) -> None:
    prompt_chunks = chunks(parse(text), letters, 5)
    assert ["".join(chr(number) for number, _ in chunk) for chunk in prompt_chunks] == expected


def test_a_comma_too_far_back_does_not_end_a_chunk() -> None:
    for before, kept in ((56, 56), (55, 75)):
        text = "a" * (before - 1) + "," + "b" * 40
        assert len(chunks([[Part(text, 1.0)]], letters, 75)[0]) == kept


@given(
    st.lists(
        st.tuples(st.text(st.sampled_from("ab,"), min_size=1, max_size=9), st.sampled_from([0.5, 1.0, 2.0])), max_size=6
    ),
    st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_no_token_and_no_weight_is_lost(parts: list[tuple[str, float]], room: int) -> None:
    prompt_chunks = chunks([[Part(*part) for part in parts]], letters, room)
    assert [pair for chunk in prompt_chunks for pair in chunk] == [
        (n, weight) for text, weight in parts for n in letters(text)
    ]
    assert all(len(chunk) <= room for chunk in prompt_chunks)
    assert len(prompt_chunks) == 1 or all(prompt_chunks)
