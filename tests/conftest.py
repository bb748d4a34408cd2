"""Fixtures of several test files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from serving import KEY, SITE, Served

from diffgen import environment
from diffgen.cli import run

environment.prepare(offline=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; torch is not imported yet
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion folder with a card; not to be changed."""
    from tiny import build

    return build(tmp_path_factory.mktemp("models") / "tiny", closed=True)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `diffgen train digits` with a very small network; not to be changed."""
    import diffgen

    folder = tmp_path_factory.mktemp("runs") / "digits"
    network = {"width": 8, "multipliers": [1], "attention": [False], "blocks": 1}
    train = {"steps": 2, "batch_size": 32, "held_out_every": 20}
    config = {"network": network, "diffusion": {"T": 30, "noise": "cosine"}, "train": train, "sample": {"count": 2}}
    diffgen.train("digits", folder, config=config, device="cpu")
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build the tiny folder of a family, once; not to be changed."""
    from tiny import build

    where = tmp_path_factory.mktemp("families")
    return cache(lambda family: build(where / family, family=family))


@pytest.fixture
def diffgen_(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run one command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*args: object) -> tuple[int, str, str]:
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        return code, captured.out, captured.err

    return command


@pytest.fixture
def inspect(diffgen_: Callable[..., tuple[int, str, str]]) -> Callable[[Path], dict[str, Any]]:
    """Run `inspect --json` on a file and return the result."""

    def inspected(path: Path) -> dict[str, Any]:
        code, out, err = diffgen_("inspect", path, "--json")
        assert code == 0, err
        return json.loads(out)["result"]

    return inspected


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the bundled model, with a key and small limits, for all tests that leave it as it was: idle."""
    limits = ["--queue", "12", "--max-body", "1M", "--max-pixels", "65536"]
    names = ["--allow-origin", SITE, "--allow-host", "pictures.example"]
    served = Served(tmp_path_factory.mktemp("serve") / "pictures", *limits, *names, key=KEY)
    yield served
    assert served.stop() == 0
    assert served.log.read_text() == ""


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, driven by playwright."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()
