"""The user's own list: names for paths and hub ids, with defaults; invalid lists are named, entries are removed."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_families import SD, build
from test_models_gate import make_folder
from test_models_single_file import SD2, unet, write

from diffgen.errors import InputError
from diffgen.models import listed
from diffgen.models.find import NotCached, check, find
from diffgen.models.info import info


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder, an empty download cache and a list; `here(text)` writes the list."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(listed, "list_file", lambda: tmp_path / "config/models.toml")
    (tmp_path / "config").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda text: (tmp_path / "config/models.toml").write_text(text, "utf-8")


def test_paths_of_folders(here, tmp_path):
    make_folder(tmp_path / "config/sub/model")
    make_folder(tmp_path / "home")
    here(f'a = "{tmp_path}/home"\n[b]\npath = "sub/model"\ndefaults = {{steps = 7, guidance = 3}}\n')
    model = find("a")
    assert (model.name, model.source, model.folder, model.family) == ("a", "list", tmp_path / "home", "sd1")
    assert info(find("b"))["defaults"] == {"steps": 7, "guidance": 3}
    assert check(find("b")).family == "sd1"
    (tmp_path / "home/card.json").write_text(json.dumps({"defaults": {"steps": 9, "grid": "karras"}}))
    here(f'[a]\npath = "{tmp_path}/home"\ndefaults = {{steps = 7}}\n')
    assert info(find("a"))["defaults"] == {"steps": 7, "grid": "karras"}


def test_files_with_a_base_and_a_prediction(here, tmp_path):
    write(tmp_path / "config/x.safetensors", SD2)
    write(tmp_path / "config/y.safetensors", unet(768))
    make_folder(tmp_path / "base")
    here(
        '[two]\npath = "x.safetensors"\nprediction = "v_prediction"\n'
        f'[bare]\npath = "y.safetensors"\nbase = "{tmp_path / "base"}"\n'
        '[relative]\npath = "y.safetensors"\nbase = "../base"\n'
        '["no-base"]\npath = "y.safetensors"\n'
    )
    assert check(find("two")).components["scheduler"].config["prediction_type"] == "v_prediction"
    assert info(find("two"))["prediction"] == "v_prediction"
    assert check(find("bare")).components["vae"].folder == tmp_path / "base/vae"
    assert check(find("relative")).components["vae"].folder.samefile(tmp_path / "base/vae")
    with pytest.raises(InputError, match="lacks vae"):
        check(find("no-base"))


def test_hub_ids(here, tmp_path):
    commit = "a" * 40
    build(tmp_path / "hub/models--org--name/snapshots" / commit, "StableDiffusionPipeline", SD)
    here(f'one = "org/name"\n[two]\nhub = "org/name@{commit}"\n[three]\nhub = "org/other"\n')
    assert find("one").revision == find("two").revision == commit
    with pytest.raises(NotCached, match="org/other"):
        find("three")


def test_the_models_own_name_decides_the_variant(here, tmp_path):
    build(tmp_path / "config/sd-turbo", "StableDiffusionPipeline", SD)
    here('mine = "./sd-turbo"\n')
    assert find("mine").variant == check(find("mine")).variant == "turbo"
    assert info(find("mine"))["family_defaults"]["steps"] == 4


def test_the_order_of_places(here, tmp_path):
    """A path goes before a bundled name, which goes before the list."""
    make_folder(tmp_path / "config/other")
    here('emoji = "./other"\nmine = "./other"\n')
    assert find("emoji").bundled
    assert find("mine").source == "list"
    make_folder(tmp_path / "here/mine")
    assert find("mine").source == "folder"
    shutil.rmtree(tmp_path / "here/mine")
    with pytest.raises(InputError) as excinfo:
        find("mime")
    assert "did you mean 'mine'?" in excinfo.value.hint


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a = ", "models.toml: "),
        ("a = 1", "'a' is neither a text nor a table"),
        ("a = true", "neither"),
        ('"a/b" = "x"', "not a valid name for a model"),
        ('"" = "x"', "not a valid name for a model"),
        ("[a]", "must have either a path or a hub id"),
        ('[a]\npath = "x"\nhub = "a/b"', "must have either a path or a hub id"),
        ('[a]\nhub = "x"', "hub = 'x'"),
        ('[a]\nhub = "a/b/c"', "hub = "),
        ("[a]\npath = 7", "'path' = 7"),
        ('[a]\npath = "x"\ncode = "y"', "'code' = 'y'"),
        ('[a]\npath = "x"\nprediction = "flow"', "prediction = 'flow'"),
        ('[a]\npath = "x"\ndefaults = {steps = "7"}', "'steps' = '7'"),
        ('[a]\npath = "x"\ndefaults = {steps = true}', "'steps' = True"),
        ('[a]\npath = "x"\ndefaults = {more = 1}', "'more' = 1"),
        ("\n".join(f'a{i} = "x"' for i in range(1001)), "1001 models"),
        ("a = " + "[" * 100_000, "models.toml: "),
        ('a = "' + "x" * 2**20 + '"', "at most"),
        ('a = "./nothing"', "where there is no model"),
        ('[a]\npath = "./b"\nbase = "nothing"', "no model"),
        ('[a]\npath = "../file.safetensors"\nbase = "nothing"', "base of 'a' is not a diffusers folder"),
        ('[a]\npath = "../file.safetensors"\nbase = "a"', "base of 'a' is not a diffusers folder"),
        ('[a]\npath = "../file.safetensors"\nbase = "o/n"', "no such model in the download cache"),
    ],
)
def test_wrong_lists(here, tmp_path, text, match):
    write(tmp_path / "file.safetensors", unet(768))
    here(text)
    with pytest.raises(InputError, match=match) as excinfo:
        find("a")
    assert excinfo.value.message.isprintable()


def test_an_entry_is_removed_and_the_rest_of_the_list_stays(here, tmp_path):
    text = '# mine\na = "./a"  # the first\n\n[b]  # second\npath = "x"\ndefaults.steps = 7\n\n[c]\nhub = "o/n"\n'
    here(text)
    path, left = listed.without("b")
    assert (path, left.decode()) == (tmp_path / "config/models.toml", text[: text.index("[b]")] + '[c]\nhub = "o/n"\n')
    assert listed.without("a")[1].decode() == text.replace('a = "./a"  # the first\n', "")
    with pytest.raises(InputError, match="there is no 'd'"):
        listed.without("d")
    for strange in (
        'a.path = "x"\nb = "y"\n',
        'b = """y"""\na = """x\n"""\n',
        '[b]\npath="""\n[a]\n"""\n[a]\npath="x"\n',
    ):
        here(strange)
        with pytest.raises(InputError) as excinfo:
            listed.without("a")
        assert excinfo.value.hint == "edit the file"


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9.-]{0,6}", fullmatch=True), st.booleans(), min_size=1, max_size=5))
def test_the_remaining_entries_are_the_others(tmp_path_factory, names):
    folder = tmp_path_factory.getbasetemp()
    lines = [f'"{name}" = "./x"\n' for name, table in names.items() if not table]
    lines += [f'["{name}"]\npath = "./x"\n' for name, table in names.items() if table]
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(listed, "list_file", lambda: folder / "list.toml")
        (folder / "list.toml").write_text("".join(lines))
        for name in names:
            assert set(listed.entries()) == set(names)
            (folder / "other.toml").write_bytes(listed.without(name)[1])
            context.setattr(listed, "list_file", lambda: folder / "other.toml")
            assert set(listed.entries()) == set(names) - {name}
            context.setattr(listed, "list_file", lambda: folder / "list.toml")
