"""The configurations in samples/configs fit the data that they are for, and train."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from diffgen.pipelines.training.config import AutoencoderConfig, LatentConfig
from diffgen.training import config as configuration
from diffgen.training.data import open_data
from diffgen.training.pixels import PixelJob

SAMPLES = Path(__file__).parent.parent / "samples"
CONFIGS = sorted((SAMPLES / "configs").glob("*.toml"))
DATA = {"emoji32.toml": SAMPLES / "emoji32"}


def test_each_job_has_a_configuration():
    assert [path.stem for path in CONFIGS] == ["digits-class", "digits", "emoji32", "learned-variance"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration(path):
    """It parses, its network and process are built, and the loss of a step has a gradient."""
    config = configuration.parse(configuration.read_toml(path), path)
    small = configuration.with_values(configuration.to_dict(config), {"train.batch_size": 2})
    job = PixelJob(configuration.parse(small, path), open_data(DATA.get(path.name, "digits")))
    assert (job.classes is None) == (path.stem in ("digits", "learned-variance"))
    job.prepare(torch.device("cpu"), torch.enable_grad)
    job.loss(job.networks, 0, slice(0, 2)).sum().backward()
    assert any(weight.grad is not None and bool(weight.grad.any()) for weight in job.network.parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_in_it(path):
    text = path.read_text("utf-8")
    data = "samples/emoji32" if path.stem == "emoji32" else "digits"
    assert f"diffgen train {data} -o runs/" in text
    assert f"--config samples/configs/{path.name}" in text
    assert not re.search(r"# [A-Z]+$", text, re.MULTILINE)  # figures that were to be filled in


def test_emoji32():
    data = open_data(SAMPLES / "emoji32")
    assert (len(data), data.channels, data.size, data.notes) == (1050, 3, (32, 32), ())
    assert data.classes == ["animal", "face", "food"]
    assert data.labels is not None
    assert data.labels.bincount().tolist() == [390, 351, 309]
    assert sum(path.stat().st_size for path in (SAMPLES / "emoji32").rglob("*") if path.is_file()) < 1_500_000


def defaults(config) -> dict[str, str]:
    """{key: default as TOML} of a configuration without [network]; – if none is set."""
    tables = {table: vars(v) for table, v in vars(config).items() if dataclasses.is_dataclass(v)}
    tables[""] = {name: v for name, v in vars(config).items() if isinstance(v, str)}
    return {
        f"{table}.{name}".lstrip("."): "–" if value is None else json.dumps(value)
        for table, keys in tables.items()
        for name, value in keys.items()
    }


def test_the_guide_lists_every_key_with_its_default():
    guide = (SAMPLES.parent / "docs" / "training.md").read_text("utf-8")
    pixels, others = guide.split("The other jobs have the same `train` keys.")
    listed = dict(re.findall(r"^\| `((?:data|diffusion|train|sample)\.\w+)` \| (\S.*?) \|", pixels, re.MULTILINE))
    keys = defaults(configuration.Config())
    assert listed == {key: value for key, value in keys.items() if key != "job"}

    listed_by_job: list[dict[str, str]] = [{}, {}]
    for row in re.findall(r"^\| (`.*) \|$", others.partition("`[network]`")[0], re.MULTILINE):
        names, *cells, _ = (cell.strip() for cell in row.split(" |"))
        named = re.findall(r"`([\w.]+)`", names)
        for job, cell in zip(listed_by_job, cells[:2], strict=True):
            values = cell.split(", ") if ", " in cell else [cell] * len(named)
            job |= dict(zip(named, values, strict=True))
    jobs = [defaults(AutoencoderConfig()), defaults(LatentConfig())]
    differ = {key for key in {*keys, *jobs[0], *jobs[1]} if len({of.get(key) for of in (keys, *jobs)}) > 1} - {"job"}
    assert listed_by_job == [{key: of.get(key, "") for key in differ} for of in jobs]
