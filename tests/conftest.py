"""What several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffgen.stable_diffusion import environment

environment.prepare(offline=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion folder with a card; not to be changed."""
    from tiny import build

    return build(tmp_path_factory.mktemp("models") / "tiny", closed=True)
