"""The recipe of the bundled model: names, near copies, captions, tokens, exact resume."""

import importlib
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

RECIPE = Path(__file__).parents[1] / "samples" / "emoji"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules by name, as its scripts see them."""
    before = set(sys.modules)
    sys.path.insert(0, str(RECIPE))
    yield lambda name: importlib.import_module(name)
    sys.path.remove(str(RECIPE))
    for name in {"architecture", "captions", "data", "export", "loop", "tokenizer", "vae"} - before:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("red_apple", "red apple"),
        ("T-Rex", "t rex"),
        ("woman’s_clothes", "womans clothes"),
        ("A_button_(blood_type)", "a button blood type"),
        ("piñata", "piñata"),
        ("flag_in_hole", "flag in hole"),
    ],
)
def test_concept(recipe, name: str, concept: str):
    assert recipe("data").concept(name) == concept


@given(st.text(st.characters(codec="latin-1"), max_size=40))
def test_concept_is_settled_at_once(name: str):
    sys.path.insert(0, str(RECIPE))
    try:
        from data import concept
    finally:
        sys.path.remove(str(RECIPE))
    once = concept(name)
    assert concept(once) == once
    assert not re.search(r"[-_]|\s\s", once)


TABLE = {
    "red apple": {"aliases": [], "keywords": ["fruit red", "macintosh"], "zh": ["红苹果"], "zh_keywords": []},
    "octopus": {"aliases": [], "keywords": [], "zh": ["章鱼"], "zh_keywords": ["墨鱼"]},
    "ok hand": {"aliases": ["okay hand"], "keywords": [], "zh": ["OK手势"], "zh_keywords": []},
    "piñata": {"aliases": [], "keywords": [], "zh": [], "zh_keywords": []},
}


def test_near_copies_go(recipe):
    data = recipe("data")
    rng = np.random.default_rng(0)
    farmer, cook, star = (rng.uniform(0, 255, 768).astype(np.float32) for _ in range(3))
    pictures = [
        ("cook", "noto", cook),
        ("farmer", "noto", farmer),
        ("man farmer", "noto", star),  # another picture in one style of three
        ("farmer", "flat", farmer),
        ("man farmer", "flat", farmer + 3),
        ("farmer", "modern", farmer),
        ("man farmer", "modern", farmer - 3),
        ("star", "flat", star),
        ("glowing star", "flat", star + 1),
        ("glowing star", "modern", star),
    ]
    names, styles, features = (np.array(column) for column in zip(*pictures, strict=True))
    stays, aliases = data.distinct(features, names, styles)
    assert aliases == {"man farmer": "farmer"}
    assert [(n, s) for n, s, stay in zip(names, styles, stays, strict=True) if not stay] == [
        ("man farmer", "noto"),
        ("man farmer", "flat"),
        ("man farmer", "modern"),
        ("glowing star", "flat"),
    ]


def test_a_keyword_belongs_to_one_concept(recipe):
    data = recipe("data")
    assert data.only({"cat": ["pet", "purr"], "dog": ["pet", "cat"]}, {"cat", "dog"}) == {"cat": ["purr"], "dog": []}
    assert data.pairs({"cat": ["pet", "small"], "dog": ["pet", "loyal"], "fox": ["loyal", "small"]}) == {
        "cat": ["pet small"],
        "dog": ["loyal pet"],
        "fox": ["loyal small"],
    }


def test_held_out_pairs_are_a_tenth_and_one_of_a_concept(recipe):
    data = recipe("data")
    names = [f"thing {k}" for k in range(100) for _ in data.STYLES] + ["in one style only"] * 1
    styles = [*data.STYLES] * 100 + ["noto"]
    out = data.held_out_pairs(names, styles)
    assert len(out) == 30
    assert max(Counter(name for name, _ in out).values()) == 1
    assert {style for _, style in out} == set(data.STYLES)
    assert out == data.held_out_pairs(names[::-1], styles[::-1])


def test_captions(recipe):
    captions = recipe("captions")
    draw = Random(0)
    made = Counter(captions.phrase("red apple", TABLE["red apple"], "flat", draw) for _ in range(4000))
    assert made[""] == pytest.approx(400, abs=60)
    assert {"red apple", "a red apple", "a red apple, flat style", "macintosh", "红苹果", "红苹果，扁平风格"} <= set(
        made
    )
    assert {"红苹果，flat风格", "红苹果, flat style"} <= set(made)
    assert set(made) - {""} <= set(captions.every(TABLE))
    assert not [c for c in made if "noto" in c or "诺托" in c]
    assert {captions.phrase("piñata", TABLE["piñata"], "noto", draw) for _ in range(200)} == {
        "", "piñata", "a piñata", "piñata, noto style", "a piñata, noto style",
    }  # fmt: skip


def test_each_word_and_each_chinese_character_is_one_token(recipe, tmp_path: Path):
    captions = recipe("captions").every(TABLE)
    tokenizer = recipe("tokenizer").build_tokenizer(captions, tmp_path)
    for text, length in (
        ("a red apple, flat style", 6),
        ("PIÑATA, noto style", 4),
        ("红苹果", 3),
        ("红苹果，扁平风格", 8),
        ("红苹果，flat风格", 7),  # the style's name within a word
        ("红章鱼", 3),  # a name that no caption has
        ("OK手势, modern style", 6),
    ):
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(ids) == 2 + length
        assert tokenizer.unk_token_id not in ids[1:-1]
    for caption in [*captions, "a lighthouse 🗼 灯塔"]:  # the last: words it never saw fall into pieces
        read = tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True)
        assert read.replace(" ", "") == caption.lower().replace(" ", "")


def test_untrained_tokens_say_nothing(recipe, tmp_path: Path):
    captions = recipe("captions").every(TABLE)
    tokenizer = recipe("tokenizer").build_tokenizer(captions, tmp_path)
    table = torch.randn(len(tokenizer), 3)
    settled = recipe("export").settle(table, tokenizer, captions)
    seen = sorted({i for caption in captions for i in tokenizer(caption).input_ids})
    assert torch.equal(settled[seen], table[seen])
    (whole,) = tokenizer("apple").input_ids[1:-1]
    assert settled[whole].any()
    assert not settled[tokenizer.convert_tokens_to_ids("z")].any()
    inside, last = tokenizer("果果").input_ids[1:-1]  # seen as a last character only
    assert last in seen
    assert inside not in seen
    assert torch.equal(settled[inside], table[last])


def test_a_resumed_training_ends_in_the_same_bytes(recipe, tmp_path: Path):
    train = recipe("loop").train

    class Stopped(Exception):  # noqa: N818
        pass

    def run(folder: Path, stop_at: int | None = None) -> bytes:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

        def loss_at(step: int, g: torch.Generator) -> torch.Tensor:
            if step == stop_at:
                raise Stopped
            return net(torch.randn(16, 4, generator=g)).square().mean()

        train(
            "net",
            {"net": net},
            loss_at,
            folder,
            steps=10,
            learning_rate=1e-2,
            save_every=3,
            at_checkpoint=lambda *_: None,
        )
        return (folder / "net.safetensors").read_bytes()

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "broken", stop_at=7)
    assert run(tmp_path / "broken") == whole
    weights = load_file(tmp_path / "whole" / "net.safetensors")
    assert not torch.equal(weights["weights/net/0.weight"], weights["ema/net/0.weight"])
