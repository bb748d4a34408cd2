"""Training data in shards: the index, the order, the cache, and a training that equals one from a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import diffgen
from diffgen.batch.formats import FORMATS
from diffgen.batch.maker import Made
from diffgen.batch.rows import Row
from diffgen.errors import InputError
from diffgen.storage import Storage
from diffgen.training.batches import Permutation, ShardOrder, Shuffle
from diffgen.training.data import open_data, open_training_data
from diffgen.training.data.index import FILE, write_index
from diffgen.training.data.shards import ShardedData

COUNT, PER_SHARD = 48, 10


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same 48 pictures in each format of a batch, and as a "folder"; not to be changed."""
    top = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(COUNT):
        path = top / f"{i:09}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        pictures.append(Made(Row(f"{i:09}", f"picture {i}", i), path.read_bytes(), {"width": 8, "height": 8}))
    folder = top / "folder"
    folder.mkdir()
    lines = []
    for made in pictures:
        (folder / f"{made.row.key}.png").write_bytes(made.png)
        lines.append(json.dumps({"file_name": f"{made.row.key}.png", "text": made.row.prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    for name, kind in FORMATS.items():
        store, count = Storage(top / name), -(-COUNT // PER_SHARD)
        store.put("plan.json", b"{}")
        for shard in range(count):
            with store.scratch() as scratch:
                writer = kind(scratch, shard, count)
                for made in pictures[shard * PER_SHARD : (shard + 1) * PER_SHARD]:
                    writer.add(made)
                for place, path in writer.close().items():
                    store.put_path(place, path)
    return lambda name: top / name


def opened(path: Path | str, **options: Any) -> ShardedData:
    data = open_training_data(path, **options)
    assert isinstance(data, ShardedData)
    return data


@pytest.mark.parametrize("format", FORMATS)
def test_shards_hold_what_the_folder_holds(format: str, sets: Callable[[str], Path]) -> None:
    folder, shards = open_data(sets("folder")), opened(sets(format))
    indices = torch.tensor([47, 0, 9, 10, 33, 0])
    assert torch.equal(shards.pictures(indices), folder.pictures(indices))
    assert list(shards.captions or ()) == folder.captions
    assert (shards.size, shards.channels, len(shards)) == (folder.size, folder.channels, len(folder))
    for share in (0.0, 0.01, 0.1, 0.5):
        for ours, theirs in zip(shards.split(share), folder.split(share), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(shards.in_memory().images, folder.images)
    assert torch.equal(open_data(sets(format)).digests, folder.digests)


@pytest.mark.parametrize("format", FORMATS)
def test_training_from_shards_equals_training_from_a_folder(
    format: str, sets: Callable[[str], Path], tmp_path: Path
) -> None:
    """Byte for byte, also when it was interrupted and resumed."""
    options: Any = dict(
        device="cpu",
        config={"network": {"width": 8, "multipliers": [1], "attention": [False]}, "sample": {"every": 10**6}},
    )
    sizes = {"batch_size": 8, "checkpoint_every": 4}
    diffgen.train(sets("folder"), tmp_path / "folder", steps=8, **sizes, **options)
    diffgen.train(sets(format), tmp_path / "shards", steps=8, **sizes, **options)
    run = tmp_path / "again"
    shutil.copytree(tmp_path / "shards", run)
    shutil.rmtree(run / "checkpoints" / "8")
    diffgen.train(sets(format), run, steps=8, resume=True, **sizes, **options)
    for name in ("model", "ema", "optimizer"):
        expected = (tmp_path / "folder" / "checkpoints" / "8" / f"{name}.safetensors").read_bytes()
        assert (tmp_path / "shards" / "checkpoints" / "8" / f"{name}.safetensors").read_bytes() == expected
        assert (run / "checkpoints" / "8" / f"{name}.safetensors").read_bytes() == expected
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "folder" / "metrics.jsonl").read_bytes()


def test_reading_ahead_changes_nothing(sets: Callable[[str], Path]) -> None:
    ahead, plain = opened(sets("webdataset")), opened(sets("webdataset"))
    for k in range(20):
        ahead.prefetch(torch.arange(k, k + 8) % COUNT)
        indices = torch.tensor([k, (3 * k) % COUNT, k])
        assert torch.equal(ahead.pictures(indices), plain.pictures(indices))
    assert len(ahead._ahead) <= 64


def test_a_remote_set_is_copied_to_a_cache_with_a_limit(
    sets: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(sets("webdataset")), "/set", recursive=True)
    local = opened(sets("webdataset"))
    size = max(path.stat().st_size for path in sets("webdataset").glob("*.tar"))
    remote = opened("memory://set", cache=2.5 * size / 1e9)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(remote.pictures(order), local.pictures(order))
    copies = [path for path in remote.cache.folder.iterdir() if path.suffix == ".tar"]
    assert 0 < sum(path.stat().st_size for path in copies) <= 2.5 * size
    memory.rm("/set", recursive=True)


def test_an_index_is_refused_if_a_shard_changed_or_it_is_broken(sets: Callable[[str], Path], tmp_path: Path) -> None:
    place = tmp_path / "set"
    shutil.copytree(sets("webdataset"), place)
    write_index(Storage(place))
    with (place / "00001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(InputError, match=r"00001\.tar .* is not as it was when the set was indexed"):
        opened(place)
    write_index(Storage(place))
    assert len(opened(place)) == COUNT
    index = (place / FILE).read_bytes()
    for broken in (index[:200], b"", b"\xff" * 8 + index[8:], index.replace(b"diffgen.index/1", b"diffgen.index/9")):
        (place / FILE).write_bytes(broken)
        with pytest.raises(InputError, match="is broken"):
            opened(place)


def test_data_index_says_what_it_found(
    sets: Callable[[str], Path], tmp_path: Path, diffgen_: Callable[..., tuple[int, str, str]]
) -> None:
    shutil.copytree(sets("files"), tmp_path / "set")
    code, text, _ = diffgen_("data", "index", "set", "--json")
    result = json.loads(text)["result"]
    assert code == 0
    assert (result["count"], result["shards"], result["captioned"], result["sizes"]) == (COUNT, 5, True, {"8x8": COUNT})
    assert (tmp_path / "set" / FILE).is_file()
    code, _, errors = diffgen_("data", "index", "nothing")
    assert code == 3
    assert "has no shards" in errors


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_without_memory_takes_each_number_once(n: int, key: int) -> None:
    order = Permutation(n, key)(torch.arange(n))
    assert torch.equal(order.sort().values, torch.arange(n))


def test_a_permutation_without_memory_looks_random() -> None:
    """Correlation of neighbours and of a number with its place below 4 standard errors; other keys, other orders."""
    n = 100_000
    order = Permutation(n, 7)(torch.arange(n)).double()
    pairs = (torch.stack([order, torch.arange(n).double()]), torch.stack([order[1:], order[:-1]]))
    for pair in pairs:
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / n**0.5
    other = Permutation(n, 8)(torch.arange(n))
    assert (other == order).sum() < 20
    large = Permutation(10**12, 7)(torch.arange(1000))
    assert len(set(large.tolist())) == 1000
    assert large.max() < 10**12


def test_the_order_of_a_huge_set_is_the_permutation_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffgen.training import batches

    monkeypatch.setattr(batches, "IN_MEMORY", 10)
    order = Shuffle(torch.arange(100, 131), 7, seed=3)
    epochs = torch.cat([order(k) for k in range(31)]).split(31)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(100, 131))
    assert not torch.equal(epochs[0], epochs[1])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum),
    at_once=st.integers(1, 13),
    batch=st.integers(1, 7),
)
def test_an_epoch_by_shards_takes_each_picture_once(counts: list[int], at_once: int, batch: int) -> None:
    """And its pictures come from so many shards at a time, whatever the batch."""
    bounds = torch.tensor([0, *np.cumsum(counts)])
    pictures = torch.arange(1000, 1000 + sum(counts))
    shuffle = Shuffle(pictures, batch, 5, bounds=bounds, shards=at_once)
    steps = torch.cat([shuffle(k) for k in range(3 * len(pictures))])
    whole = steps[: len(steps) // len(pictures) * len(pictures)].view(-1, len(pictures))
    for epoch in whole:
        assert torch.equal(epoch.sort().values, pictures)
    order = ShardOrder(pictures, bounds, at_once, (5, 0, 0))
    shard_of = torch.searchsorted(bounds, order(0, len(pictures)) - 1000, right=True) - 1
    begin = 0
    for end in order.ends.tolist():
        assert len(set(shard_of[begin:end].tolist())) <= at_once
        begin = end


def test_training_by_shards_is_resumed_exactly(sets: Callable[[str], Path], tmp_path: Path) -> None:
    config = {
        "network": {"width": 8, "multipliers": [1], "attention": [False]},
        "sample": {"every": 10**6},
        "data": {"shuffle_shards": 2},
    }
    options: Any = dict(config=config, device="cpu", batch_size=8, checkpoint_every=3, steps=9)
    diffgen.train(sets("parquet"), tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "9")
    diffgen.train(sets("parquet"), tmp_path / "part", resume=True, **options)
    one, two = (tmp_path / name / "checkpoints" / "9" / "model.safetensors" for name in ("whole", "part"))
    assert one.read_bytes() == two.read_bytes()
