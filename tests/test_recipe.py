"""The recipe of the bundled model: names, tokens, exact resume."""

import importlib
import re
import sys
from pathlib import Path

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
    for name in {"data", "loop", "tokenizer", "vae", "export"} - before:
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


def test_each_word_of_the_captions_is_one_token(recipe, tmp_path: Path):
    names = ["red apple", "pineapple", "apple", "pear", "spear", "eagle", "t rex", "x ray", "octopus", "zebra"]
    tokenizer = recipe("tokenizer").build_tokenizer(names, tmp_path)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for name in names:
        ids = tokenizer(f"a {name}, noto style").input_ids
        assert len(ids) == 2 + 4 + len(name.split())
        assert (ids[0], ids[-1]) == (start, end)
    assert tokenizer("spear").input_ids[1] != tokenizer("pear").input_ids[1]
    assert len(tokenizer("lighthouse").input_ids) > 3  # a word it never saw falls into pieces


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
