"""Names become models; a model's facts are read without loading it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_models_gate import make_folder

from diffgen.errors import InputError
from diffgen.models import find as module
from diffgen.models.find import bundled_models, bundled_names, find
from diffgen.models.info import info

CARD = {
    "licence": "Apache-2.0",
    "resolution": 64,
    "concepts": ["red apple", "cat"],
    "styles": ["noto", "flat", "modern"],
    "held_out": [["cat", "flat"]],
    "figures": {"accuracy": 0.9},
    "defaults": {"steps": 20, "guidance": 3, "scheduler": "dpmpp_2m", "grid": "trailing", "size": [64, 64]},
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder, and a bundle with the models `emoji` and `digits` in it."""
    bundle = tmp_path / "bundle"
    for name in ("emoji", "digits"):
        make_folder(bundle / name)
    (bundle / "emoji" / "card.json").write_text(json.dumps(CARD))
    (bundle / "half-made").mkdir()
    monkeypatch.setattr(module, "BUNDLED", bundle)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_bundled_models():
    assert bundled_names() == ["digits", "emoji"] == [model.name for model in bundled_models()]
    assert find() == find("emoji")
    assert (find().folder.name, find().bundled, find().source) == ("emoji", True, "bundled")
    assert find("digits").family == "sd1"


def test_folders(here):
    make_folder(here / "sub/mine")
    for name in ("sub/mine", "./sub/mine/", str(here / "sub/mine")):
        model = find(name)
        assert (model.name, model.folder.resolve(), model.bundled) == ("mine", here / "sub/mine", False)
    os.chdir("sub/mine")
    assert find(".").name == "mine"


def test_runs(here):
    (here / "runs/mine").mkdir(parents=True)
    data = {"name": "digits", "size": [8, 8], "classes": ["0", "1"]}
    config = {"sample": {"steps": 5}}
    (here / "runs/mine/run.json").write_text(json.dumps({"data": data, "config": config, "prediction": "epsilon"}))
    model = find("runs/mine/")
    assert (model.name, model.family, model.source, model.bundled) == ("mine", "run", "folder", False)
    about = info(model)
    assert (about["resolution"], about["concepts"], about["defaults"]) == (8, ["0", "1"], {"steps": 5})
    (here / "runs/mine/run.json").write_text('{"data": 3, "config": []}')
    assert info(model)["resolution"] is None


def test_a_folder_goes_before_a_bundled_name_but_only_if_it_is_a_model(here):
    (here / "emoji").mkdir()
    assert find("emoji").bundled
    shutil.rmtree(here / "emoji")
    make_folder(here / "emoji")
    assert not find("emoji").bundled
    assert find().bundled  # the default is never taken from the current folder


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("emojy", "there is no model 'emojy'", "did you mean 'emoji'?"),
        ("EMOJI", "there is no model 'EMOJI'", "did you mean 'emoji'?"),
        ("quite-other", "there is no model", "Here: digits (bundled), emoji (bundled)"),
        ("", "there is no model", "Here"),
        ("half-made", "there is no model", "Here"),
        (
            "stabilityai/sd-turbo",
            "no such model in the download cache",
            "diffgen models pull stabilityai/sd-turbo; here: digits",
        ),
        ("org/name@v1.0", "no folder 'org/name@v1.0'", "diffgen models pull org/name@v1.0"),
        ("org/../name", "there is no model", "Here"),
        ("x.safetensors", "an empty file", "safetensors"),
        ("dir/X.SafeTensors", "there is no file", "diffusers folders"),
        ("x.gguf", "there is no file", "diffusers folders"),
        ("x.onnx", "an ONNX file", "safetensors"),
        ("x.ckpt", "pickle", "safetensors"),
        ("x.PT", "pickle", "safetensors"),
        ("empty", "no model_index.json", "diffusers folders"),
        ("file", "an empty file", "safetensors"),
        ("pipe", "not a model folder", "diffusers folders"),
        ("../bundle/half-made", "no model_index.json", "Here"),
        ("a\0b", "there is no model", "Here"),
        ("x" * 5000, "there is no model", "Here"),
        ("https://example.com/x", "there is no model", "Here"),
    ],
)
def test_refused_models(here, name, message, hint):
    (here / "empty").mkdir()
    (here / "file").write_text("")
    os.mkfifo(here / "pipe")
    (here / "x.safetensors").write_bytes(b"")
    with pytest.raises(InputError) as excinfo:
        find(name)
    assert message in excinfo.value.message
    assert hint in excinfo.value.hint


def test_a_folder_of_another_pipeline_is_refused(here):
    make_folder(here / "video")
    (here / "video/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(InputError, match="WanPipeline") as excinfo:
        find("video")
    assert "StableDiffusionPipeline" in excinfo.value.hint


def test_without_the_bundled_model(here, monkeypatch):
    monkeypatch.setattr(module, "BUNDLED", here / "nowhere")
    assert bundled_names() == []
    with pytest.raises(InputError, match="emoji"):
        find()


def test_info_of_a_model_with_a_card():
    about = info(find("emoji"))
    folder = find("emoji").folder
    assert {key: about[key] for key in CARD} == CARD
    assert (about["name"], about["folder"], about["family"]) == ("emoji", str(folder), "sd1")
    assert about["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    json.dumps(about)


def test_info_of_a_plain_folder(here):
    make_folder(here / "mine")
    (here / "mine/README.md").write_text("---\nlanguage: en\nlicense: openrail\n---\nlicense: other\n")
    about = info(find("mine"))
    assert (about["licence"], about["resolution"], about["prediction"]) == ("openrail", 8 * 2**3, "epsilon")
    assert about["concepts"] is about["held_out"] is None
    (here / "mine/README.md").write_text("no head\nlicense: other\n")
    (here / "mine/unet/config.json").write_text("{}")
    about = info(find("mine"))
    assert (about["licence"], about["resolution"]) == (None, None)


def test_a_broken_card_is_named(here):
    make_folder(here / "mine")
    broken = ("{", '{"concepts": NaN}', '{"a": 1, "a": 2}', '{"concepts": "cat"}', '{"concepts": [1]}', '{"styles": 3}')
    for text in broken:
        (here / "mine/card.json").write_text(text)
        with pytest.raises(InputError, match=r"card\.json"):
            info(find("mine"))


def test_neither_room_imports_torch():
    rooms = [Path(module.__file__).parent, Path(module.__file__).parent.parent / "images"]
    names = [f"diffgen.{room.name}.{path.stem}" for room in rooms for path in room.glob("*.py")]
    assert len(names) >= 10
    code = f"import sys, {', '.join(names)}; print({{'torch', 'diffusers', 'transformers'}} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(rooms[0].parent.parent)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert process.stdout == "set()\n"
