"""Read the shared download cache of the Hugging Face tools, without their library and without a network.

Its layout: models--org--name/ with refs/<branch> (a commit in a file), snapshots/<commit>/ (links) and blobs/<hash>.
The name of a large file's blob is its SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffgen.errors import InputError

# org/name or org/name@revision
ID = re.compile(r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(?P<revision>\w[\w./-]{0,99}))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Snapshot:
    """A model in the cache, as it was at one commit."""

    repo: str
    commit: str
    refs: tuple[str, ...]  # branches and tags of this commit
    folder: Path

    @property
    def bytes(self) -> int:
        """Size of its files, each counted once."""
        return sum({path.resolve(): path.stat().st_size for path in files_of(self.folder)}.values())


def cache_dir() -> Path:
    """The cache's folder, as huggingface_hub finds it: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(chosen)))


def parse_id(text: str) -> tuple[str, str | None]:
    """Split an id into (org/name, revision or None). Raises InputError for anything else."""
    match = ID.fullmatch(text)
    if match is None or ".." in text or text.endswith(("/", ".lock")):
        raise InputError(f"{text!r} is not the id of a model on a hub", "for example CompVis/stable-diffusion-v1-4")
    return match["repo"], match["revision"]


def look_up(repo: str, revision: str | None = None) -> Snapshot | None:
    """A repository's snapshot of that commit, branch or tag; without a revision, main's or the only one."""
    snapshots = snapshots_of(repo)
    if revision is not None:
        return next((s for s in snapshots if revision in s.refs or revision == s.commit), None)
    main = next((s for s in snapshots if "main" in s.refs), None)
    return main or (snapshots[0] if len(snapshots) == 1 else None)


def snapshots_of(repo: str) -> list[Snapshot]:
    """The snapshots of a repository in the cache."""
    return list(_snapshots(cache_dir() / ("models--" + repo.replace("/", "--"))))


def snapshots() -> list[Snapshot]:
    """All models in the cache that have a model_index.json, by name."""
    root = cache_dir()
    if not os.path.isdir(root):
        return []
    every = (snapshot for folder in sorted(root.glob("models--*--*")) for snapshot in _snapshots(folder))
    return [snapshot for snapshot in every if (snapshot.folder / "model_index.json").is_file()]


def _snapshots(folder: Path) -> Iterator[Snapshot]:
    if not os.path.isdir(folder / "snapshots"):
        return
    repo = folder.name.removeprefix("models--").replace("--", "/", 1)
    refs: dict[str, list[str]] = {}
    for path in sorted(files_of(folder / "refs")):
        with path.open("rb") as file:
            commit = file.read(64).decode("ascii", "replace").strip()
        refs.setdefault(commit, []).append(path.relative_to(folder / "refs").as_posix())
    for snapshot in sorted((folder / "snapshots").iterdir()):
        if COMMIT.fullmatch(snapshot.name) and snapshot.is_dir():
            yield Snapshot(repo, snapshot.name, tuple(refs.get(snapshot.name, ())), snapshot)


def files_of(folder: Path) -> list[Path]:
    """The regular files below a folder, links to them included."""
    paths = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    return [path for path in paths if path.is_file()]


def recorded(path: Path) -> str | None:
    """The hub's hash of a cached file, which is the name of its blob: SHA-256 of a large file, Git's of others."""
    name = Path(os.path.realpath(path)).name
    return name if SHA256.fullmatch(name) or COMMIT.fullmatch(name) else None


def git_hash(path: Path) -> str:
    """Git's hash of a file, SHA-1 in hex of "blob", its size and its bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
