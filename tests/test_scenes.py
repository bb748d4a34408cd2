"""Scenes of the bundled model: drawing by (seed, index), held-out lists, captions and the judge."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scripts import scripts_of

import diffgen
from diffgen.models.find import find

RECIPE = Path(__file__).parents[1] / "samples" / "emoji"
KINDS = ("single", "colour", "count", "pair", "size", "place")
SHAPES = {  # how to draw each thing in a square of 48 pixels, and its colour
    "cat": (lambda d, c: d.polygon([(2, 2), (14, 14), (34, 14), (46, 2), (46, 46), (2, 46)], c), "#f2a33a"),
    "apple": (lambda d, c: d.ellipse((2, 6, 45, 46), c), "#dc2430"),
    "rocket": (lambda d, c: d.polygon([(24, 0), (36, 30), (44, 46), (4, 46), (12, 30)], c), "#8fb3c9"),
    "house": (lambda d, c: d.polygon([(24, 1), (46, 20), (40, 20), (40, 46), (8, 46), (8, 20), (2, 20)], c), "#c08a5a"),
    "key": (lambda d, c: (d.ellipse((1, 14, 21, 34), c), d.rectangle((20, 21, 47, 27), c)), "#fdd31d"),
    "star": (lambda d, c: d.regular_polygon((24, 24, 23), 3, 0, c), "#fdd31d"),
}


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules by name, as its scripts see them."""
    with scripts_of(RECIPE) as modules:
        yield modules


@pytest.fixture(scope="module")
def painter(recipe):
    """A painter of the things in `SHAPES`; styles differ only in lightness."""
    sprites = {}
    for k, style in enumerate(recipe("scenes").STYLES):
        for name, (shape, colour) in SHAPES.items():
            picture = Image.new("RGBA", (48, 48))
            shape(ImageDraw.Draw(picture), colour)
            values = np.array(picture.crop(picture.getbbox()))
            values[..., :3] = values[..., :3] // (10 + k) * 10
            sprites[f"{style}/{name}"] = values
    return recipe("scenes").Painter(sprites)


@pytest.fixture(scope="module")
def many(recipe):
    """Scenes 0 … 1,999 of seed 0."""
    return [recipe("scenes").draw(0, index) for index in range(2000)]


# Scenes


def test_a_scene_is_a_function_of_seed_and_index(recipe, painter, many):
    scenes = recipe("scenes")
    assert [scenes.draw(0, index) for index in (1999, 5, 5)] == [many[1999], many[5], many[5]]
    assert scenes.draw(1, 5) != many[5]
    scene = scenes.draw(0, 5, names=list(SHAPES))
    assert painter.array(scene).tobytes() == painter.array(scene).tobytes()
    assert painter.array(scene).shape == (3, 128, 128)


def test_every_kind_is_drawn_at_its_rate(recipe, many):
    scenes = recipe("scenes")
    kinds = Counter(scene.description.kind for scene in many)
    for kind, share in scenes.MIXTURE.items():
        assert kinds[kind] / len(many) == pytest.approx(share, abs=0.04)
    descriptions = [scene.description for scene in many]
    assert {d.count for d in descriptions} == {1, 2, 3, 4}
    assert {d.place for d in descriptions} == {None, *scenes.WHERE}
    assert {d.relation for d in descriptions} == {None, *scenes.RELATIONS}
    assert {d.size for d in descriptions} == {None, *scenes.SIZES}
    assert {part.colour for d in descriptions for part in d.parts} == {None, *scenes.COLOURS}


def test_things_lie_in_the_picture_and_apart(many):
    for scene in many:
        boxes = scene.boxes
        assert all(box.side / 2 - 1 <= min(box.x, box.y, 128 - box.x, 128 - box.y) for box in boxes)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.side + b.side) / 2 + 4


def test_relations_put_things_where_they_say(many):
    for scene in many:
        d, boxes = scene.description, scene.boxes
        if d.relation == "left of":
            assert boxes[0].x < boxes[1].x - 40
        if d.relation == "right of":
            assert boxes[0].x > boxes[1].x + 40
        if d.relation == "above":
            assert boxes[0].y < boxes[1].y - 40
        if d.relation == "below":
            assert boxes[0].y > boxes[1].y + 40
        if d.relation == "and":
            assert abs(boxes[0].x - boxes[1].x) > 40 > abs(boxes[0].y - boxes[1].y)


# Held-out combinations


def test_the_stored_lists_are_those_that_the_hash_chooses(recipe):
    scenes = recipe("scenes")
    stored = json.loads(scenes.HELD_OUT.read_text("utf-8"))
    assert stored == scenes.choose_held_out()
    assert set(stored) == {"colour", "count", "pair", "size", "place"}
    for entries in stored.values():
        assert len(entries) >= 200
        assert len({tuple(entry) for entry in entries}) == len(entries)
    assert max(Counter(thing for _, thing in stored["count"]).values()) == 1
    assert max(Counter(thing for _, thing in stored["size"]).values()) == 1
    assert {count for count, _ in stored["count"]} == {2, 3, 4}


def test_held_out_combinations_are_never_drawn(recipe, many):
    scenes, lists = recipe("scenes"), recipe("scenes").held_out()
    for scene in many:
        d = scene.description
        names = [part.thing for part in d.parts]
        assert lists["colour"].isdisjoint((part.colour, part.thing) for part in d.parts)
        assert (d.count, names[0]) not in lists["count"]
        assert tuple(sorted(names)) not in lists["pair"]
        assert (d.size, names[0]) not in lists["size"]
        assert (d.place, names[0]) not in lists["place"]
    assert not any(scenes.held_out_kinds(scene.description) for scene in many)


def test_scenes_of_held_out_combinations(recipe):
    scenes = recipe("scenes")
    for kind in scenes.KINDS[1:]:
        examples = scenes.held_out_scenes(kind, 200)
        assert len(examples) == 200
        assert {scene.description.kind for scene in examples} == {kind}
        assert all(scenes.held_out_kinds(scene.description) == {kind} for scene in examples)
        assert examples[:20] == scenes.held_out_scenes(kind, 20)
        few = scenes.held_out_scenes(kind, 200, names=list(scenes.things())[: scenes.GATE])
        assert len(few) >= 10
        assert {p.thing for s in few for p in s.description.parts} <= set(list(scenes.things())[: scenes.GATE])


# Captions


def test_captions_in_both_languages(recipe):
    scenes = recipe("scenes")
    D, P = scenes.Description, scenes.Part
    for description, english, chinese in (
        (D((P("apple"),), "noto"), "an apple, noto style", "一个苹果，诺托风格"),
        (D((P("elephant", "blue"),), "flat"), "a blue elephant, flat style", "一头蓝色的大象，扁平风格"),
        (D((P("cactus"),), None, count=3), "three cacti", "三棵仙人掌"),
        (D((P("strawberry", "black"),), None, count=2), "two black strawberries", "两颗黑色的草莓"),
        (D((P("t rex", "orange"),), None, size="tiny"), "a tiny orange t rex", "一只微小的橙色的霸王龙"),
        (D((P("owl"),), None, place="night"), "an owl at night", "一只猫头鹰在夜里"),
        (
            D((P("cat", "red"), P("house")), "modern", relation="left of"),
            "a red cat left of a house, modern style",
            "一只红色的猫在一座房子左边，现代风格",
        ),
        (D((P("cat"), P("house")), None, relation="and"), "a cat and a house", "一只猫和一座房子"),
    ):
        assert scenes.english(description) == english
        assert scenes.chinese(description) == chinese
        assert scenes.parse(english) == scenes.parse(chinese) == description


def test_captions_can_be_read_back(recipe, many):
    scenes = recipe("scenes")
    for scene in many[:500]:
        mixture = scenes.captions(scene.description)
        assert sum(mixture.values()) == pytest.approx(1)
        for caption in mixture:
            read = scenes.parse(caption)
            assert read is not None
            assert (read.parts, read.count, read.relation, read.size, read.place) == (
                scene.description.parts, scene.description.count, scene.description.relation,
                scene.description.size, scene.description.place,
            )  # fmt: skip
            assert read.style in (None, scene.description.style)


@pytest.mark.parametrize(
    "text", ["", "hello", "a purple", "five cats", "two cat", "a cat behind a house", "a catch", "一", "五只猫", "猫在"]
)
def test_texts_outside_the_grammar(recipe, text: str):
    assert recipe("scenes").parse(text) is None


@settings(max_examples=50)
@given(text=st.text(max_size=40))
def test_any_text_can_be_read(text: str):
    with scripts_of(RECIPE) as modules:
        modules("scenes").parse(text)


def test_names_are_unique(recipe):
    things = recipe("scenes").things()
    assert len(things) >= 300
    for names in ({t.name for t in things.values()}, {t.plural for t in things.values()}):
        assert len(names) == len(things)
    assert len({t.chinese for t in things.values()}) == len(things)
    assert all(t.measure and t.chinese for t in things.values())
    assert set(recipe("scenes").colours()) == set(things)


# Colours


def test_oklab_there_and_back(recipe):
    sprites = recipe("sprites")
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.abs(sprites.from_oklab(sprites.to_oklab(rgb)).astype(int) - rgb).max() <= 1
    assert sprites.to_oklab(np.array([255, 255, 255], np.uint8)) == pytest.approx([1, 0, 0], abs=1e-3)
    red = sprites.to_oklab(np.array([255, 0, 0], np.uint8))  # Ottosson's own example
    assert red == pytest.approx([0.628, 0.225, 0.126], abs=2e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_colours_reach_their_targets(recipe, painter, name: str):
    sprites = recipe("sprites")
    picture = painter.sprites[f"flat/{name}"]
    for colour, target in sprites.TARGETS.items():
        moved, share = sprites.painted(picture, colour)
        inside = picture[..., 3] > 0
        mean = sprites.to_oklab(moved[..., :3])[inside].mean(0)
        assert np.linalg.norm(mean - target) < 0.06
        assert np.array_equal(moved[..., 3], picture[..., 3])
        if colour in (colours := sprites.colours_of(picture)):
            assert colours[colour] or share >= sprites.MOVED
    assert set(sprites.colours_of(picture)) >= {"green", "blue", "purple", "black"}


def test_only_the_things_own_colour_is_natural(recipe, painter):
    colours = recipe("sprites").colours_of(painter.sprites["noto/apple"])
    assert colours["red"] is True
    assert not any(natural for colour, natural in colours.items() if colour != "red")


# The judge


@pytest.fixture(scope="module")
def judge(recipe, painter):
    return recipe("judge").Judge(painter, list(SHAPES))


def drawn(recipe, kind: str, count: int, first: int = 0):
    return [recipe("scenes").draw(5, first + k, mixture={kind: 1.0}, names=list(SHAPES)) for k in range(count)]


@pytest.mark.parametrize("kind", ["single", "colour", "count", "pair", "size", "place"])
def test_the_judge_accepts_correct_scenes(recipe, painter, judge, kind: str):
    verdicts = [judge(painter(scene), scene.description) for scene in drawn(recipe, kind, 12)]
    assert sum(verdict["all"] for verdict in verdicts) >= 11


def test_the_judge_rejects_other_scenes(recipe, painter, judge):
    D, P, scenes = recipe("scenes").Description, recipe("scenes").Part, recipe("scenes")

    def verdict(shown, expected):
        return judge(painter(scenes.placed(shown, np.random.default_rng(0))), expected)

    red, blue = D((P("cat", "red"),), "flat"), D((P("cat", "blue"),), "flat")
    assert verdict(red, blue) == {"thing": True, "colour": False, "count": True, "all": False}
    two, three = D((P("cat"),), "flat", count=2), D((P("cat"),), "flat", count=3)
    assert verdict(two, three) == {"thing": True, "count": False, "all": False}
    assert verdict(D((P("key"),), "flat", count=3), three) == {"thing": False, "count": True, "all": False}
    tiny, huge = D((P("cat"),), "flat", size="tiny"), D((P("cat"),), "flat", size="huge")
    assert not verdict(tiny, huge)["size"]
    assert not verdict(D((P("cat"),), "flat"), huge)["size"]
    snow, night = D((P("cat"),), "flat", place="snow"), D((P("cat"),), "flat", place="night")
    assert verdict(snow, night)["place"] is False
    assert not verdict(D((P("cat"),), "flat"), night)["place"]
    left, right, above, apart = (
        D((P("cat"), P("key")), "flat", relation=r) for r in ("left of", "right of", "above", "and")
    )
    assert verdict(left, right) == {"count": True, "thing": True, "axis": True, "layout": False, "all": False}
    assert verdict(left, above)["axis"] is False
    assert verdict(left, apart)["all"]
    swapped = D((P("key"), P("cat")), "flat", relation="left of")
    assert verdict(swapped, right)["all"]


def test_the_judge_rejects_empty_pictures_and_noise(recipe, judge, painter):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    for picture in (Image.new("RGB", (128, 128), "white"), Image.new("RGB", (64, 64), "white"), noise):
        for kind in ("single", "colour", "count", "pair", "size", "place"):
            for scene in drawn(recipe, kind, 2):
                assert not judge(picture, scene.description)["all"]


def test_wilson(recipe):
    wilson = recipe("judge").wilson
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)  # R, binom::binom.wilson
    assert wilson(85, 100) == pytest.approx((0.767, 0.907), abs=1e-3)


def test_figures(recipe, painter, judge):
    group = {"seen colour": drawn(recipe, "colour", 4)}
    figures = recipe("judge").figures(judge, group, lambda scenes: [painter(scene) for scene in scenes])
    assert figures["seen colour"]["all"]["n"] == 4
    assert set(figures["seen colour"]) == {"thing", "colour", "count", "all"}
    assert recipe("judge").table(figures).splitlines()[2].startswith("| seen colour | 4 |")


# The autoencoder's measurements


def test_decibels_and_grid(recipe):
    vae = recipe("scenes_vae")
    true = np.random.default_rng(0).integers(50, 200, (2, 3, 128, 128), dtype=np.uint8)
    assert vae.decibels(true + np.uint8(5), true) == pytest.approx(10 * np.log10(255**2 / 25), abs=1e-3)
    noisy = (true + np.random.default_rng(1).normal(0, 9, true.shape)).clip(0, 255).round().astype(np.uint8)
    assert vae.grid_strength(noisy, true) == pytest.approx(1, abs=0.05)
    blocks = true + ((np.indices((128, 128)) // 8).sum(0) % 2 * 9).astype(np.uint8)
    assert vae.grid_strength(blocks, true) > 3


# Training


def test_captions_fit_their_tokens(recipe, many, tmp_path: Path):
    scenes, latents, tokenizer = recipe("scenes"), recipe("scenes_latents"), recipe("tokenizer")
    built = tokenizer.build_tokenizer(latents.texts(), tmp_path / "tokenizer", latents.LENGTH)
    for scene in many[:300]:
        for caption in scenes.captions(scene.description):
            ids = built(caption).input_ids
            assert len(ids) <= latents.LENGTH
            wide = sum(character >= tokenizer.WIDE for character in caption)
            assert len(ids) == 2 + wide + len([p for p in tokenizer.pieces(caption) if p[0] < tokenizer.WIDE])


def test_easy_scenes_come_first(recipe, painter, tmp_path: Path):
    latents, scenes = recipe("scenes_latents"), recipe("scenes")
    np.savez(tmp_path / "sprites.npz", **painter.sprites)
    data = latents.scenes_data(tmp_path, list(SHAPES), jitter=0, first=200, places=False)

    def kinds(numbers: range) -> Counter:
        return Counter(scenes.parse(data.captions[i][0][0]).kind for i in numbers)

    easy, later = kinds(range(200)), kinds(range(200, 400))
    assert easy["single"] + easy["colour"] > 120 > later["single"] + later["colour"]
    assert not easy["place"] + later["place"]
    assert sum(weight for _, weight in data.captions[7]) == pytest.approx(1)


def test_singles_are_mixed_in(recipe, painter, tmp_path: Path):
    latents, scenes = recipe("scenes_latents"), recipe("scenes")
    np.savez(tmp_path / "sprites.npz", **painter.sprites)
    write_names(tmp_path, painter)
    held_out = latents.held_out_singles()
    assert 0 < len(held_out) < len(json.loads(latents.HELD_OUT.read_text("utf-8")))
    assert not {concept for concept, _ in held_out} & {thing.concept for thing in scenes.things().values()}
    data = latents.scenes_data(tmp_path, list(SHAPES), jitter=1, singles=0.5)
    captions = [dict(data.captions[i]) for i in range(300)]
    alone = [i for i in range(300) if any("gizmo" in text for text in captions[i])]
    assert len(alone) == pytest.approx(150, abs=40)
    assert all(sum(texts.values()) == pytest.approx(1) for texts in captions)
    styles = {style for i in alone for style in scenes.STYLES if f"a gizmo, {style} style" in captions[i]}
    assert styles == set(scenes.STYLES)
    i = alone[0]
    (style,) = [style for style in scenes.STYLES if f"a gizmo, {style} style" in captions[i]]
    gizmo = scenes.Painter({f"{style}/gizmo": painter.sprites[f"{style}/key"]})
    expected = gizmo.array(scenes.alone("gizmo", style, latents.SEED, i))
    assert np.array_equal(data.pictures(torch.tensor([i]))[0].numpy(), expected)


def write_names(work: Path, painter) -> None:
    """A concept that does not compose: the key under another name."""
    keys = {name: array for name, array in painter.sprites.items() if name.endswith("/key")}
    np.savez(work / "singles.npz", **{name.replace("/key", "/gizmo"): array for name, array in keys.items()})
    table = {"gizmo": {"aliases": [], "keywords": ["widget"], "zh": ["小玩意"], "zh_keywords": []}}
    (work / "names.json").write_text(json.dumps(table))


VAE = """
job = "autoencoder"
[network]
latent_channels = 16
block_out_channels = [24, 48, 128, 128]
layers_per_block = 1
norm_num_groups = 8
mid_block_add_attention = false
[train]
steps = 1
batch_size = 2
[sample]
count = 2
"""
LATENTS = """
job = "latents"
[data]
window = 4
[text]
length = 32
[network]
block_out_channels = [96, 192]
down_block_types = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
up_block_types = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
layers_per_block = 1
attention_head_dim = 4
norm_num_groups = 16
[diffusion]
prediction = "v_prediction"
zero_terminal_snr = true
[train]
steps = 1
batch_size = 4
[sample]
count = 2
steps = 1
"""


def test_the_whole_recipe_of_scenes(recipe, painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From cut-out things to the judged model with its card; a second run changes nothing."""
    make, card, latents = recipe("make_scenes"), recipe("card"), recipe("scenes_latents")
    work = tmp_path / "work"
    for package in ("fluentui-emoji", "emojibase-data"):
        (work / "npm" / "node_modules" / package).mkdir(parents=True)
        (work / "npm" / "node_modules" / package / "LICENSE").write_text("a licence")
    monkeypatch.setattr(card, "NOTO_LICENCE", work / "npm" / "node_modules" / "emojibase-data" / "LICENSE")
    monkeypatch.setitem(make.DEFAULTS, "steps", 1)
    for module in (latents, recipe("scenes_vae")):
        monkeypatch.setattr(module, "COUNT", 300)
        monkeypatch.setattr(module, "LAST", 4)
    np.savez(work / "data.npz", names=np.array([]))
    np.savez(work / "sprites.npz", **painter.sprites)
    write_names(work, painter)
    (work / "vae.toml").write_text(VAE)
    (work / "latents.toml").write_text(LATENTS)
    make.main(work, work / "vae.toml", work / "latents.toml", names=list(SHAPES), count=1)

    model = work / "scenes-model"
    facts = json.loads((model / "card.json").read_text())
    assert (facts["resolution"], facts["concepts"]) == (128, ["gizmo"])
    assert set(facts["compositions"]["things"]) == {recipe("scenes").things()[name].concept for name in SHAPES}
    assert set(facts["figures"]) == {"seen single", *(f"{a} {b}" for a in ("seen", "held-out") for b in KINDS[1:])}
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert set(facts["sha256"]) == files - {"card.json", "README.md"}
    generator = diffgen.load(model)
    (picture,) = generator.generate("a red cat left of a blue house, flat style", seed=0, steps=1)
    assert picture.size == (128, 128)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    make.main(work, work / "vae.toml", work / "latents.toml", names=list(SHAPES), count=1)
    assert {path: path.read_bytes() for path in before} == before


def test_the_first_model_has_the_layers_that_fit(recipe, tmp_path: Path):
    """All of the bundled model's; without the attention at its finest level, the rest."""
    from diffusers import UNet2DConditionModel

    folder = find("emoji").folder
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    whole = tomllib.loads(LATENTS)["network"]
    less = whole | {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    less |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    for network in (whole, less):
        out = recipe("scenes_latents").first_model(folder, network, 16, tmp_path / "out")
        unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
        ours = unet.state_dict()
        assert set(ours) < set(theirs) if network is less else set(ours) == set(theirs)
        assert all((tensor == theirs[name]).all() for name, tensor in ours.items())
        assert unet.config.sample_size == 16
