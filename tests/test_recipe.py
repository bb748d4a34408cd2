"""The recipe of the bundled model: names, near-duplicates, captions, tokens, and all stages on a few pictures."""

import itertools
import json
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
from scripts import scripts_of

import diffgen
from diffgen.comparison.search import Settings
from diffgen.training.data import open_data

RECIPE = Path(__file__).parents[1] / "samples" / "emoji"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules by name, as its scripts import them."""
    with scripts_of(RECIPE) as modules:
        yield modules


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
def test_concept_is_idempotent(name: str):
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


def test_near_duplicates_are_removed(recipe):
    data = recipe("data")
    rng = np.random.default_rng(0)
    farmer, cook, star = (rng.uniform(0, 255, 768).astype(np.float32) for _ in range(3))
    pictures = [
        ("cook", "noto", cook),
        ("farmer", "noto", farmer),
        ("man farmer", "noto", star),  # a different picture in one style of three
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
    module = recipe("captions")
    captions = module.mixture("red apple", TABLE["red apple"], "flat")
    assert sum(captions.values()) == pytest.approx(1)
    assert set(captions) <= set(module.every(TABLE))
    assert not [c for c in captions if "noto" in c or "诺托" in c]
    assert captions["red apple"] == pytest.approx(0.32 * 2 / 3 / 4)
    assert captions["a red apple, flat style"] == pytest.approx(0.32 / 3 * 3 / 4)
    assert captions["macintosh"] == captions["fruit red"] == pytest.approx(0.12 / 2 / 4)
    assert captions["红苹果"] == pytest.approx((0.22 + 0.34) / 4)  # the concept has no Chinese keyword
    chinese = [captions[f"红苹果{end}"] for end in ("，扁平风格", "，flat风格", ", flat style")]
    assert chinese == pytest.approx([0.56 * 3 / 4 * part / 6 for part in (4, 1, 1)])
    assert set(module.mixture("piñata", TABLE["piñata"], "noto")) == {
        "piñata", "a piñata", "piñata, noto style", "a piñata, noto style",
    }  # fmt: skip


def test_each_word_and_each_chinese_character_is_one_token(recipe, tmp_path: Path):
    captions = recipe("captions").every(TABLE)
    tokenizer = recipe("tokenizer").build_tokenizer(captions, tmp_path)
    for text, length in (
        ("a red apple, flat style", 6),
        ("PIÑATA, noto style", 4),
        ("红苹果", 3),
        ("红苹果，扁平风格", 8),
        ("红苹果，flat风格", 7),  # the style's name inside a word
        ("红章鱼", 3),  # a name in no caption
        ("OK手势, modern style", 6),
    ):
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(ids) == 2 + length
        assert tokenizer.unk_token_id not in ids[1:-1]
    for caption in [*captions, "a lighthouse 🗼 灯塔"]:  # the last: unseen words are split into pieces
        read = tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True)
        assert read.replace(" ", "") == caption.lower().replace(" ", "")


def test_the_same_captions_give_the_same_tokens(recipe):
    """Nearly all pairs are equally frequent here: the order of a hash table must not decide."""
    words = ["".join(letters) for letters in itertools.permutations("abcde")]
    first, second = (recipe("tokenizer").word_merges(words) for _ in range(2))
    assert first == second
    assert len({a + b for a, b in first} & {word + "</w>" for word in words}) == len(words)


def test_untrained_tokens_become_zero(recipe, tmp_path: Path):
    captions = recipe("captions").every(TABLE)
    tokenizer = recipe("tokenizer").build_tokenizer(captions, tmp_path)
    table = torch.randn(len(tokenizer), 3)
    settled = recipe("export").settle(table, tokenizer, captions)
    trained = sorted({i for caption in captions for i in tokenizer(caption).input_ids})
    assert torch.equal(settled[trained], table[trained])
    (token,) = tokenizer("apple").input_ids[1:-1]
    assert settled[token].any()
    assert not settled[tokenizer.convert_tokens_to_ids("z")].any()
    inside, last = tokenizer("果果").input_ids[1:-1]  # trained as a last character only
    assert last in trained
    assert inside not in trained
    assert torch.equal(settled[inside], table[last])


VAE = """
job = "autoencoder"
[network]
latent_channels = 4
block_out_channels = [8, 8]
norm_num_groups = 4
[train]
steps = 2
batch_size = 4
[sample]
count = 2
"""
LATENTS = """
job = "latents"
autoencoder = "vae"
[text]
tokenizer = "tokenizer"
length = 24
width = 8
layers = 1
heads = 2
[network]
block_out_channels = [8, 8]
norm_num_groups = 4
attention_head_dim = 2
[diffusion]
prediction = "v_prediction"
[train]
steps = 2
batch_size = 4
[sample]
count = 2
steps = 2
"""
NAMES = ("alarm clock", "bell", "octopus")  # one picture of each is held out


def test_all_stages_of_the_recipe(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a few pictures to the measured model with its card; a second run changes nothing."""
    data, make, card = (recipe(name) for name in ("data", "make", "card"))
    work = tmp_path / "work"
    rng = np.random.default_rng(0)
    for package in ("fluentui-emoji", "emojibase-data"):
        (work / "npm" / "node_modules" / package).mkdir(parents=True)
        (work / "npm" / "node_modules" / package / "LICENSE").write_text("a licence")
    monkeypatch.setattr(card, "NOTO_LICENCE", work / "npm" / "node_modules" / "emojibase-data" / "LICENSE")
    monkeypatch.setenv("PYTHONPATH", str(RECIPE.parents[1]))
    names, styles = [name for name in NAMES for _ in data.STYLES], [*data.STYLES] * len(NAMES)
    pictures = rng.integers(0, 256, (len(names), 16, 16, 3), dtype=np.uint8)
    np.savez(work / "data.npz", pictures=pictures, names=np.array(names), styles=np.array(styles))
    table = {name: {"aliases": [], "keywords": [], "zh": [f"铃{i}"], "zh_keywords": []} for i, name in enumerate(NAMES)}
    (work / "names.json").write_text(json.dumps(table))
    (tmp_path / "vae.toml").write_text(VAE)
    (tmp_path / "latents.toml").write_text(LATENTS)
    monkeypatch.setitem(recipe("export").DEFAULTS, "steps", 3)
    arguments = {"vae": tmp_path / "vae.toml", "latents": tmp_path / "latents.toml", "prompts": 3, "with_cost": False}
    settings = Settings(iterations=4, noises=2, held_out=2, every=2, margin=0.0, teacher=16)
    arguments["tuning"] = {"evaluations": (3,), "prompts": 3, "settings": settings}

    make.main(work, **arguments)
    dataset = open_data(work / "data")
    assert (len(dataset), dataset.size, int(dataset.held_out.sum())) == (9, (16, 16), 3)
    by_file = sorted(zip(styles, names, pictures, strict=True), key=lambda one: f"{one[0]}/{one[1].replace(' ', '-')}")
    assert np.array_equal(dataset.images.numpy(), np.stack([p for *_, p in by_file]).transpose(0, 3, 1, 2))
    about = json.loads((work / "emoji" / "card.json").read_text())
    assert (about["trained_on_images"], about["concepts"], about["resolution"]) == (8, sorted(NAMES), 16)
    grid, accuracy = (json.loads((work / "tune" / f"{n}.json").read_text()) for n in ("dpmpp_2m-3", "accuracy"))
    assert grid["error"] < grid["built_in"]["error"]
    errors = grid["built_in"]["all"]
    own, karras = accuracy["3 dpmpp_2m-3.json"], accuracy["3 karras"]  # the default is three steps here too
    kept = own >= max(accuracy[f"3 {name}"] for name in sorted(errors, key=errors.__getitem__)[:3])
    assert [(one["grid"], one["accuracy"], one["prompts"]) for one in about["tuned"]] == (
        [("dpmpp_2m-3.json", own, 3)] if kept else []
    )
    assert (work / "emoji" / "grids" / "dpmpp_2m-3.json").is_file() == kept
    default = kept and own >= karras - 0.01
    assert about["defaults"]["grid"] == ("grids/dpmpp_2m-3.json" if default else "karras")
    measured = json.loads((work / "measure.json").read_text())
    assert {"english", "chinese", "held_out", "autoencoder"} <= measured.keys()
    assert about["figures"]["psnr_held_out_db"] == measured["autoencoder"]["psnr_held_out_db"]
    readme = (work / "emoji" / "README.md").read_text()
    assert "Autoencoder: 2 steps of\n4 pictures" in readme
    assert "\n8 pictures in steps of 4" in readme
    assert "They started from" not in readme
    assert about["began_with"] is None
    assert about["energy"]["kwh"] == pytest.approx(about["energy"]["watts"] * about["hours"] / 1000, abs=1e-3)
    files = {path.relative_to(work / "emoji").as_posix() for path in (work / "emoji").rglob("*") if path.is_file()}
    assert set(about["sha256"]) == files - {"card.json", "README.md"}
    assert "Microsoft" in (work / "emoji" / "LICENSE-fluent").read_text()
    assert "Taehoon Kim" in (work / "emoji" / "LICENSE-emoji").read_text()
    (picture,) = diffgen.load(work / "emoji").generate("铃1，扁平风格", seed=0, steps=2)
    assert picture.size == (16, 16)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    make.main(work, **arguments)
    assert {path: path.read_bytes() for path in before} == before
    del about["sha256"]  # as after an interruption while writing the card
    (work / "emoji" / "card.json").write_text(json.dumps(about))
    (work / "measure.json").write_text(json.dumps(measured | {"of": "another model"}))
    make.main(work, **arguments)
    assert "sha256" in json.loads((work / "emoji" / "card.json").read_text())

    run = json.loads((work / "latents" / "run.json").read_text())
    (work / "latents" / "run.json").write_text(json.dumps(run | {"init": {"file": "warm", "sha256": "ab"}}))
    for _ in range(2):  # earlier training is not counted twice
        card.main(work, "a machine", watts=30, before=card.Before("an earlier run", 100, 120))
    about, readme = (json.loads((work / "emoji/card.json").read_text()), (work / "emoji/README.md").read_text())
    assert about["trained_on_images"] == 108
    assert about["began_with"] == {"what": "an earlier run", "pictures": 100, "minutes": 120, "sha256": "ab"}
    assert "They started from an earlier run, trained on 100 pictures in 120 minutes, which this" in readme
    assert about["energy"]["kwh"] == pytest.approx(0.06, abs=0.002)
    about["defaults"]["steps"] = 4
    about["tuned"] = [{"grid": "four.json", "evaluations": 4, "accuracy": 0.5}]
    (work / "emoji" / "card.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match="measure again"):
        card.main(work, "a machine")
    (work / "measure.json").write_text(json.dumps(measured | {"of": measured["of"] | {"defaults": about["defaults"]}}))
    card.main(work, "a machine")
    readme = (work / "emoji" / "README.md").read_text()
    assert "| grid | evaluations | accuracy |\n| --- | --- | --- |\n| four.json | 4 | 0.5 |\n" in readme

    recipe("tune").main(work, evaluations=(3, 2), prompts=2, settings=settings)  # the fewest first; no old results
    accuracy = json.loads((work / "tune" / "accuracy.json").read_text())
    measured = [int(key.split()[0]) for key in accuracy]
    assert measured[0] == 3  # the default number of steps
    assert measured[1:] == sorted(measured[1:])
    assert set(accuracy.values()) <= {0.0, 0.5, 1.0}
    about = json.loads((work / "emoji" / "card.json").read_text())
    assert {one["prompts"] for one in about["tuned"]} <= {2}


def test_nearest_pictures_and_memorisation(recipe, tmp_path: Path):
    """Grey pictures, whose distance is the difference of their greys."""
    measure = recipe("measure")
    greys = {("apple", "flat"): 10, ("apple", "modern"): 13, ("bell", "flat"): 100, ("bell", "modern"): 130}
    names, styles = zip(*greys, strict=True)
    pictures = np.array([np.full((16, 16, 3), grey) for grey in greys.values()], np.uint8)
    np.savez(tmp_path / "data.npz", pictures=pictures, names=np.array(names), styles=np.array(styles))
    held_out = [["apple", "modern"], ["bell", "modern"]]
    dataset = measure.Pictures(
        tmp_path, {"concepts": ["apple", "bell"], "styles": ["flat", "modern"], "held_out": held_out}
    )

    def grey(*values: float) -> np.ndarray:
        return np.repeat(np.array(values, float)[:, None], 768, axis=1)

    assert [dataset.nearest(grey(x)[0], "modern") for x in (0, 71, 72, 255)] == [1, 1, 3, 3]
    assert dataset.nearest(grey(72)[0], "flat") == 2  # a held-out picture is a candidate in its own style only
    assert measure.copying(dataset, [(1, "", "name"), (3, "", "name")]) == 1.0
    queries = [(0, "an apple", "name"), (2, "a bell", "name")]
    figures = measure.memorisation(dataset, queries, {"ratio": grey(16, 50), "copies": grey(10, 103)})
    # to the nearest trained: held out 3 and 30 (other concepts: 87 and 120), generated 6 and 40, copies 0 and 3
    assert figures == {
        "learned": 0.5,
        "ratio": round(23 / 16.5, 4),
        "copies": round(1.5 / 16.5, 4),
        "ratio_unlike": round(23 / 103.5, 4),
    }
    dataset.features[dataset.held_out] = grey(96, 40)
    assert measure.copying(dataset, [(1, "", "name"), (3, "", "name")]) == 0.0


def test_prompts_to_measure_with_are_trained_captions(recipe, tmp_path: Path):
    measure, captions, data = recipe("measure"), recipe("captions"), recipe("data")
    pairs = [(name, style) for name in TABLE for style in data.STYLES]
    names, styles = zip(*pairs, strict=True)
    np.savez(tmp_path / "data.npz", pictures=np.zeros((len(pairs), 16, 16, 3), np.uint8), names=names, styles=styles)
    card = {"concepts": list(TABLE), "styles": data.STYLES, "held_out": [["piñata", "noto"]]}
    pictures = measure.Pictures(tmp_path, card)
    for kinds in (measure.ENGLISH, measure.CHINESE):
        for seed in range(20):
            queries = measure.draw_prompts(pictures, TABLE, kinds, 4, Random(seed))
            assert len({k for k, _, _ in queries}) == len(queries) == 4
            assert [kind for _, _, kind in queries].count(kinds[1]) == 1  # a fifth, rounded
            everything = measure.draw_prompts(pictures, TABLE, kinds, 99, Random(seed))
            # there are too few keywords, so the rest are names
            assert len(everything) == {measure.ENGLISH: 11, measure.CHINESE: 9}[kinds]
            for k, text, kind in [*queries, *everything]:
                assert pairs[k] != ("piñata", "noto")
                assert kind in kinds
                assert captions.mixture(pairs[k][0], TABLE[pairs[k][0]], pairs[k][1])[text] > 0


def test_intervals_of_accuracies(recipe):
    """Wilson's bounds are the p at which the observed share lies z standard deviations away."""
    wilson = recipe("measure").wilson
    for right, n in ((0, 10), (3, 10), (290, 300), (300, 300)):
        low, high = wilson(right, n)
        for p in (low, high):
            away = abs(right / n - p)
            assert away == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, abs=1e-9) or p in (0, 1)
        assert 0 <= low <= right / n <= high <= 1
