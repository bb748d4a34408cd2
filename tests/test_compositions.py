"""What a model composes, as its card says: `models info`, and notes on prompts that ask for more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts import scripts_of

from diffgen.errors import InputError
from diffgen.models.find import find
from diffgen.models.info import COMPOSITIONS, compositions_in_words, info
from diffgen.pipelines.plan import make_plan
from diffgen.prompts.compositions import composition_notes
from diffgen.prompts.words import nearest_words

RECIPE = Path(__file__).parents[1] / "samples" / "emoji"
COMPOSED = {
    "things": ["red apple", "cat", "elephant", "house"],
    "names": {"apple": "red apple", "apples": "red apple", "cats": "cat", "elephants": "elephant", "houses": "house"},
    "colours": ["red", "blue"],
    "counts": [2, 3, 4],
    "relations": ["left of", "above", "and"],
    "backgrounds": ["snow", "night"],
    "sizes": ["tiny", "huge"],
    "held_out": [{"kind": "count", "prompt": "three cats, flat style", "things": ["cat"], "style": "flat", "count": 3}],
}
CARD = {"compositions": COMPOSED, "concepts": [*COMPOSED["things"], "salt and pepper"], "styles": ["flat", "noto"]}


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            "a red apple",
            "an apple",
            "the cat",
            "three apples, flat style",
            "a BLUE elephant",
            "a red apple above a cat",
        ),
        *(
            "a huge blue cat",
            "two red cats",
            "a cat and a blue house, noto style",
            "a cat in the snow",
            "a cat at night",
        ),
        *("salt and pepper", "fruit red", "一只红色的猫在一座房子左边", "a zeppelin", ""),
    ],
)
def test_no_note_on_what_the_model_composes_nor_on_other_texts(prompt: str) -> None:
    assert composition_notes(CARD, prompt) == []


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("seven apples", "it does not count 'seven'; the nearest number is 4"),
        ("a brown cat", "it does not know the colour 'brown': it knows red, blue"),
        ("a tall cat and a house", "it does not compose 'tall cat'; the nearest that it knows is 'cat'"),
        ("two elefants", "it does not compose 'elefants'; the nearest that it knows is 'elephants'"),
        ("a giant cat", "it does not know the size 'giant': it knows tiny, huge"),
        ("a cat behind a house", "it does not know the relation 'behind': it knows left of, above, and"),
        ("a cat in the forest", "it does not know the background 'forest': it knows snow, night"),
        (
            "a cat and a house above an apple",
            "it composes with one count, relation, size or background at a time, not 2",
        ),
        ("two cats left of a house", "it composes with one count, relation, size or background at a time, not 2"),
    ],
)
def test_a_note_names_what_is_beyond_the_model_and_the_nearest_that_it_knows(prompt: str, note: str) -> None:
    assert composition_notes(CARD, f"{prompt}, flat style") == [note]


def test_models_that_do_not_compose_have_no_notes() -> None:
    nothing = {name: [] for name in COMPOSITIONS}
    for card in ({}, {"compositions": None}, {"compositions": nothing}):
        assert composition_notes(card, "seven brown cats behind a house") == []


def test_nearest_words() -> None:
    assert nearest_words({"elephant", "cat", "house"}, ["elefant", "ct", "zebra"]) == ["elephant"]


def test_info_tells_what_the_model_composes(tiny: Path, tmp_path: Path, diffgen_: Callable) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny, folder)
    path = folder / "card.json"
    card = json.loads(path.read_text()) | {"compositions": COMPOSED}
    path.write_text(json.dumps(card))
    code, out, _ = diffgen_("models", "info", folder, "--json")
    assert code == 0
    assert json.loads(out)["result"]["compositions"] == COMPOSED
    code, out, _ = diffgen_("models", "info", folder)
    assert "4 things, 2 colours, 3 counts, 3 relations, 2 backgrounds, 2 sizes, 1 held-out" in out
    assert make_plan(find(str(folder)), "seven cats").warnings("seven (cats:1.2)")[-1] == (
        "tiny: it does not count 'seven'; the nearest number is 4"
    )
    for wrong in ("all", {"things": "cat"}, {"counts": [2, "three"]}, {"held_out": ["a cat"]}, {"names": ["cat"]}):
        path.write_text(json.dumps(card | {"compositions": wrong}))
        with pytest.raises(InputError, match="compositions"):
            info(find(str(folder)))


def test_the_bundled_model_composes_nothing_and_says_so() -> None:
    about = info(find("emoji"))
    assert about["compositions"] == {name: [] for name in COMPOSITIONS}
    assert compositions_in_words(about) == "none"


def test_the_compositions_of_scenes() -> None:
    """Their card is what `models info` reads: 200 held-out prompts of each kind, none of which gets a note."""
    with scripts_of(RECIPE) as modules:
        scenes = modules("scenes")
        composed = scenes.compositions()
        assert set(COMPOSITIONS) < set(composed)
        concepts = {thing.concept for thing in scenes.things().values()}
        card = {"compositions": composed, "concepts": sorted(concepts), "styles": list(scenes.STYLES)}
        kinds = dict.fromkeys(("colour", "count", "pair", "background", "size"), 0)
        for entry in composed["held_out"]:
            kinds[entry["kind"]] += 1
            assert composition_notes(card, entry["prompt"]) == []
            assert set(entry["things"]) <= concepts
            d = scenes.parse(entry["prompt"])
            kind = "place" if entry["kind"] == "background" else entry["kind"]
            assert scenes.held_out_kinds(d) == {kind}
            assert (d.style, d.parts[0].colour) == (entry["style"], entry.get("colour"))
            assert (d.count, d.relation, d.place, d.size) == (
                entry.get("count", 1), entry.get("relation"), entry.get("background"), entry.get("size"),
            )  # fmt: skip
        assert min(kinds.values()) >= 200
