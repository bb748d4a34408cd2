"""The configuration: what a file may contain, and the errors for an invalid one."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffgen.errors import InputError
from diffgen.pipelines.training.config import AutoencoderConfig, LatentConfig
from diffgen.training import config
from diffgen.training.config import Config, differences, parse, read_toml, to_dict, with_values
from diffgen.training.job import JOBS

ROOT = Path(__file__).parent.parent


def toml(text: str) -> Any:
    return parse(tomllib.loads(text), "a.toml")


def test_an_empty_file_is_the_defaults() -> None:
    assert toml("") == Config()


def test_every_key_arrives_with_its_type() -> None:
    read_config = toml(
        """
        [data]
        size = 32
        channels = 1
        flip = true
        [network]
        name = "dit"
        depth = 3
        [diffusion]
        noise = "cosine"
        variance = "learned_range"
        [train]
        learning_rate = 1
        ema = [0.05, 0.1]
        betas = [0.9, 0.95]
        [sample]
        guidance = 2
        """
    )
    assert read_config.data == config.Data(size=32, channels=1, flip=True)
    assert read_config.network == {"name": "dit", "depth": 3}
    assert read_config.diffusion == config.Diffusion(noise="cosine", variance="learned_range")
    assert read_config.train == config.Train(learning_rate=1.0, ema=(0.05, 0.1), betas=(0.9, 0.95))
    assert type(read_config.train.learning_rate) is type(read_config.sample.guidance) is float


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[train]\nstepz = 3", "unknown key train.stepz", "did you mean train.steps?"),
        ("[trian]\nsteps = 3", "unknown key trian", "did you mean train?"),
        ("steps = 3", "unknown key steps", "did you mean train.steps or sample.steps?"),
        ("stps = 3", "unknown key stps", "did you mean train.steps or sample.steps?"),
        ("[sample]\nprecision = 'float32'", "unknown key sample.precision", "did you mean train.precision?"),
        ("[data]\nxyzzy = 3", "unknown key data.xyzzy", "there are data.size, data.channels"),
        ("[train]\nsteps = 0", "train.steps is 0: it must lie between 1 and 1e+09", ""),
        ("[train]\nsteps = 3.5", "train.steps is 3.5, not a whole number", ""),
        ("[train]\nsteps = true", "train.steps is True, not a whole number", ""),
        ("[train]\nlearning_rate = nan", "train.learning_rate is nan", ""),
        ("[train]\nlearning_rate = -1.0", "train.learning_rate is -1.0", ""),
        ("[train]\nlearning_rate = '1'", "train.learning_rate is '1', not a number", ""),
        ("[train]\nbetas = [0.9]", "train.betas is [0.9], not a list of 2 numbers", ""),
        ("[train]\nbetas = [0.9, 1.0]", "train.betas is 1.0", ""),
        ("[train]\nema = []", "train.ema is [], not a list of numbers", ""),
        ("[train]\nema = [0.1, 'x']", "train.ema is 'x', not a number", ""),
        ("[train]\nema = [0.1, 0.10]", "train.ema is [0.1, 0.1]: two of them are the same", ""),
        ("[train]\ncompile = 1", "train.compile is 1, not true or false", ""),
        ("[diffusion]\nnoise = 'cosin'", "diffusion.noise is 'cosin'", "did you mean 'cosine'?"),
        ("[data]\nchannels = 2", "data.channels is 2", "there are 1, 3, 4"),
        ("train = 3", "train is 3, not a table", ""),
        ("network = 'unet'", "network is 'unet', not a table", ""),
        ("job = 'pixel'", "job is 'pixel'", "did you mean 'pixels'?"),
    ],
)
def test_an_error_names_its_file_and_key(text: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as excinfo:
        toml(text)
    assert excinfo.value.message.startswith(f"a.toml: {message}")
    assert hint in excinfo.value.hint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"steps = ", "broken TOML"),
        (b"a = 1\na = 2", "broken TOML"),
        (b"\xff", "broken TOML"),
        (b"a = " + b"[" * 100_000, "broken TOML"),
        (b"#" * 2**21, "at most 1048576 are read"),
    ],
)
def test_a_file_that_is_no_toml(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_toml(path)


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.toml", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            read_toml(path)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Configurations of that kind, each key a value in its range."""
    keys = {}
    for field in dataclasses.fields(kind):
        limits, default = field.metadata, field.default
        if dataclasses.is_dataclass(default):
            keys[field.name] = values_of(type(default))
        elif limits and limits["of"]:
            keys[field.name] = st.sampled_from(limits["of"])
        elif isinstance(default, bool):
            keys[field.name] = st.booleans()
        elif limits and isinstance(default, tuple):
            numbers = st.floats(limits["low"], limits["high"])
            keys[field.name] = st.lists(numbers, min_size=2, max_size=2, unique_by="{:g}".format).map(tuple)
        elif limits and isinstance(default, float):
            keys[field.name] = st.floats(limits["low"], limits["high"])
        elif limits:
            keys[field.name] = st.integers(limits["low"], limits["high"])
    return st.builds(kind, **keys)


KINDS = {"pixels": Config, "autoencoder": AutoencoderConfig, "latents": LatentConfig}


@given(st.one_of(*map(values_of, KINDS.values())))
def test_a_configuration_survives_writing_and_reading(values: Any) -> None:
    assert parse(json.loads(json.dumps(to_dict(values))), "run.json", type(values)) == values


@given(values_of(Config), values_of(Config))
def test_differences_are_the_keys_that_differ(a: Config, b: Config) -> None:
    changed = differences(to_dict(a), to_dict(b))
    assert (changed == []) == (a == b)
    assert differences(to_dict(a), to_dict(a)) == []
    assert any(line.startswith("train.steps: ") for line in changed) == (a.train.steps != b.train.steps)


def test_flags_win() -> None:
    tables = {"train": {"steps": 3, "seed": 1}}
    assert parse(with_values(tables, {"train.steps": 5}), "").train == config.Train(steps=5, seed=1)
    assert tables["train"]["steps"] == 3
    assert parse(with_values({}, {"train.steps": 5}), "").train.steps == 5


@pytest.mark.parametrize("path", sorted((ROOT / "samples").glob("*/*.toml")), ids=lambda path: path.name)
def test_the_samples_are_configurations(path: Path) -> None:
    if path.name != "pyproject.toml":
        tables = read_toml(path)
        parse(tables, path, JOBS[tables["job"]].load("config"))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[sample]\nprompts = 'a'", "sample.prompts is 'a', not a list of strings", ""),
        ("[sample]\nprompts = ['a', 3]", "sample.prompts is ['a', 3], not a list of strings", ""),
        ("autoencoder = 3", "autoencoder is 3, not a string", ""),
        (
            "[text]\ncaption_dropout = 0.1",
            "unknown key text.caption_dropout",
            "did you mean diffusion.caption_dropout?",
        ),
        ("[diffusion]\nprediction = 'flow_prediction'", "diffusion.prediction is 'flow_prediction'", "v_prediction"),
        ("job = 'pixels'", "job is 'pixels'", "there are latents"),
    ],
)
def test_other_jobs_have_their_own_keys(text: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as excinfo:
        parse(tomllib.loads(text), "a.toml", LatentConfig)
    assert excinfo.value.message.startswith(f"a.toml: {message}")
    assert hint in excinfo.value.hint
    assert parse({"sample": {"prompts": ["a", "a"]}}, "", LatentConfig).sample.prompts == ("a", "a")


def test_a_learned_variance_that_nothing_trains_is_refused() -> None:
    from diffgen.training.pixels import process_of

    chosen = config.Config(diffusion=config.Diffusion(variance="learned_range", objective="simple"))
    with pytest.raises(ValueError, match="leaves a learned variance untrained"):
        process_of(chosen, 256)
