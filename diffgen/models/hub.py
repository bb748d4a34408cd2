"""Download models from a hub: first an offer of what would be fetched, then exactly that, into the shared cache.

The revision is resolved to a commit first, and everything is fetched at that commit. Only files that the family's row
needs are fetched: model_index.json, configurations, tokenizers, safetensors; never a pickle, never code.
huggingface_hub honours HF_ENDPOINT, HF_TOKEN and HF_HOME. No message contains a token.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgen.errors import CannotWrite, InputError

from . import cache, families, gate, known

TEXTS = re.compile(rf"README\.md|LICEN[CS]E[\w.-]*|card\.json|grids/{gate.GRID_NAME.pattern}", re.ASCII)
MAX_TEXT = 2**20
RESERVE = 2**28  # bytes to leave free on the disk


@dataclass(frozen=True)
class Remote:
    """A file of a repository."""

    path: str
    bytes: int
    sha256: str | None  # of large files
    cached: bool


@dataclass(frozen=True)
class Offer:
    """A download that has not begun yet."""

    repo: str
    revision: str  # as requested
    commit: str
    family: str
    licence: str | None
    gated: bool
    files: tuple[Remote, ...]
    precision: str  # "float16", "full", or "float16, full" where some parts have no float16

    @property
    def bytes(self) -> int:
        """The bytes still to fetch."""
        return sum(file.bytes for file in self.files if not file.cached)


def offline() -> bool:
    """Whether the user forbids the network."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def offer(repo: str, revision: str | None = None, *, full: bool = False, safety: bool = False) -> Offer:
    """What pulling a diffusers repository would fetch: weights in half precision if there are any, unless `full`.

    With `safety`, the safety checker too. Asks the hub. Raises InputError offline, without a connection, for an unknown
    repository or revision, a gated one without permission, weights only in pickles, and other kinds of models.
    """
    with _hub(repo) as hub:
        about = hub.HfApi(os.environ.get("HF_ENDPOINT")).model_info(
            repo, revision=revision or "main", files_metadata=True
        )
        commit = str(about.sha)
        if not cache.COMMIT.fullmatch(commit):
            raise InputError(f"{repo}: the hub names no commit")
        sizes = {s.rfilename: (s.size or 0, s.lfs.sha256 if s.lfs else None) for s in about.siblings or ()}
        if "model_index.json" not in sizes:
            raise InputError(*_no_index(repo, sizes))
        with tempfile.TemporaryDirectory() as aside:  # in the cache it would look like a model
            index = gate.read_json(_download(hub, Path(aside), repo, "model_index.json", commit))
        licence, gated = _licence(about), bool(about.gated)
    pipeline = index.get("_class_name")
    present = {part for part, pair in index.items() if isinstance(pair, list) and pair != [None, None]}
    candidates = families.candidates(pipeline, present) if isinstance(pipeline, str) else []
    if not candidates:
        hint = f"read here: {', '.join(families.PIPELINES)}"
        raise InputError(f"{repo}: a pipeline of the class {gate.short(pipeline)}", hint)
    wanted = []
    precisions = set()
    parts = {n: part for family in candidates for n, part in family.parts.items()}
    if safety:
        parts |= {name: families.COMPANIONS[name] for name in ("safety_checker", "feature_extractor")}
    for name, part in parts.items():
        pair = index.get(name)
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair):
            names, precision = _files_of(repo, name, part, pair[0], sizes, full)
            wanted += names
            if precision:
                precisions.add(precision)
    wanted += [name for name, (size, _) in sizes.items() if TEXTS.fullmatch(name) and size <= MAX_TEXT]
    wanted.append("model_index.json")  # last: a folder that has one is complete
    snapshot = cache.cache_dir() / ("models--" + repo.replace("/", "--")) / "snapshots" / commit
    files = tuple(Remote(name, *sizes[name], (snapshot / name).exists()) for name in wanted)
    title = " or ".join(family.name for family in candidates)
    return Offer(repo, revision or "main", commit, title, licence, gated, files, ", ".join(sorted(precisions)))


def pull(offer: Offer, on_bytes: Callable[[int], None] | None = None) -> Path:
    """Fetch an offer and return the snapshot's folder. `on_bytes(n)` is called after each n bytes.

    Files in the cache are not fetched again, and interrupted ones are resumed. Raises CannotWrite before anything is
    fetched if the disk has too little room; InputError as `offer`, and for a file that differs from the hub's hash.
    """
    root = cache.cache_dir()
    check_room(root, offer.bytes)
    with _hub(offer.repo) as hub:
        for file in offer.files:
            path = _download(hub, root, offer.repo, file.path, offer.commit, _counter(on_bytes) if on_bytes else None)
            if file.sha256 and not file.cached and gate.sha256_of(path) != file.sha256:
                os.unlink(os.path.realpath(path))
                path.unlink(missing_ok=True)
                raise InputError(f"{offer.repo}: {file.path} arrived damaged", "pull again")
        folder = root / ("models--" + offer.repo.replace("/", "--"))
        if offer.revision != offer.commit:
            ref = folder / "refs" / offer.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(offer.commit)
    return folder / "snapshots" / offer.commit


def remove(snapshots: list[cache.Snapshot]) -> None:
    """Delete snapshots from the cache, with the blobs that no other snapshot uses. Raises CannotWrite."""
    from huggingface_hub import scan_cache_dir

    try:
        scan_cache_dir(cache.cache_dir()).delete_revisions(*(s.commit for s in snapshots)).execute()
    except OSError as error:
        raise CannotWrite(f"cannot delete from {cache.cache_dir()}: {error.strerror or error}") from error


def check_room(folder: Path, needed: int) -> None:
    """Raise CannotWrite unless the folder's disk has room for `needed` bytes."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed and needed + RESERVE > free:
        raise CannotWrite(
            f"{folder}: the download needs {size_text(needed)}, and {size_text(free)} are free",
            "make room, or choose another disk with HF_HOME",
        )


def size_text(count: float) -> str:
    """A number of bytes in words: 4.3 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _files_of(
    repo: str, name: str, part: families.Part, library: str, sizes: dict[str, Any], full: bool
) -> tuple[list[str], str | None]:
    """(the files of one component, the precision of its weights or None)."""
    configs = {
        "scheduler": ["scheduler_config.json"],
        "processor": ["preprocessor_config.json"],
        "tokenizer": list(gate.TOKENIZER_FILES),
        "network": ["config.json"],
    }[part.kind]
    files = [f"{name}/{file}" for file in configs if f"{name}/{file}" in sizes]
    if part.kind != "network":
        return files, None
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    for half in (False, True) if full else (True, False):
        dot = ".fp16" if half else ""
        shard = re.compile(rf"{name}/{stem}{re.escape(dot)}-\d{{5}}-of-\d{{5}}\.safetensors")
        shards = sorted(file for file in sizes if shard.fullmatch(file))
        single, index = f"{name}/{stem}{dot}.safetensors", f"{name}/{stem}.safetensors.index{dot}.json"
        weights = [single] if single in sizes else [index, *shards] if shards and index in sizes else []
        if weights:
            return files + weights, "float16" if half else "full"
    names = [file for file in sizes if file.startswith(f"{name}/")]
    if any(file.lower().endswith(gate.PICKLES) for file in names):
        raise InputError(f"{repo}: the only weights of {name} are a pickle", gate.CONVERT)
    raise InputError(f"{repo}: no {name}/{stem}.safetensors", f"there is: {', '.join(names)[:300]}" if names else "")


def _no_index(repo: str, sizes: dict[str, Any]) -> tuple[str, str]:
    single = sorted(name for name in sizes if name.endswith(".safetensors") and "/" not in name)
    hint = f"it has the files {', '.join(single[:5])}: download one and give its path with -m" if single else ""
    return f"{repo} is not a diffusers model: it has no model_index.json", hint


def _licence(about: Any) -> str | None:
    tags = [tag.removeprefix("license:") for tag in about.tags or () if tag.startswith("license:")]
    return tags[0][:100] if tags else None


def _download(hub: Any, root: Path, repo: str, path: str, commit: str, counter: type | None = None) -> Path:
    endpoint = os.environ.get("HF_ENDPOINT")
    return Path(hub.hf_hub_download(repo, path, revision=commit, cache_dir=root, endpoint=endpoint, tqdm_class=counter))


def _counter(on_bytes: Callable[[int], None]) -> type:
    """A class that huggingface_hub uses as a progress bar."""
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            on_bytes(int(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return None

    return Counter


@contextlib.contextmanager
def _hub(repo: str) -> Iterator[Any]:
    """huggingface_hub, its errors turned into ours. Raises InputError if the user forbids the network."""
    if offline():
        raise InputError(
            f"{repo} cannot be fetched: the network is switched off (--offline or HF_HUB_OFFLINE)",
            "when it is on: diffgen models pull " + repo,
        )
    import huggingface_hub
    from huggingface_hub import errors

    url = f"{_endpoint()}/{repo}"
    try:
        yield huggingface_hub
    except errors.GatedRepoError:
        message = f"{repo} is gated: the hub gives it only to users who have accepted its terms"
        raise InputError(message, f"1. open {url} and accept  2. hf auth login (or set HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo} has no such revision", f"see {url}") from None
    except errors.RepositoryNotFoundError:
        if successor := known.SUCCESSORS.get(repo):
            message = f"{repo} was withdrawn: its model is {successor} now"
            raise InputError(message, f"diffgen models pull {successor}") from None
        hint = f"see {url}; a private one needs hf auth login (or HF_TOKEN)"
        raise InputError(f"the hub has no model {repo}", hint) from None
    except errors.HFValidationError as error:
        raise InputError(f"{repo}: {_scrub(str(error))}") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(f"{repo}: no connection to {_endpoint()}", "try again, or set HF_ENDPOINT") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            message = f"{repo}: the hub refuses it ({status})"
            raise InputError(message, f"see {url}; sign in with hf auth login (or HF_TOKEN)") from None
        raise InputError(f"{repo}: the hub answers {status or 'with an error'}", "try again later") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise CannotWrite(f"cannot write to {cache.cache_dir()}: {error.strerror}", "set HF_HOME") from None
        raise _no_connection(repo, error) from None
    except InputError:
        raise
    except Exception as error:  # of the HTTP library, which changes its names
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise _no_connection(repo, error) from None
        raise


def _no_connection(repo: str, error: Exception) -> InputError:
    reason = _scrub(" ".join(str(error).split()))[:200] or type(error).__name__
    return InputError(f"{repo}: no connection to {_endpoint()} ({reason})", "try again, or set HF_ENDPOINT")


def _endpoint() -> str:
    """The hub's address, without a user's name or password."""
    return re.sub(r"//[^/@]*@", "//", os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"))


def _scrub(text: str) -> str:
    """The text without any token."""
    from huggingface_hub import get_token

    with contextlib.suppress(Exception):
        if token := get_token():
            text = text.replace(token, "…")
    return re.sub(r"hf_\w{8,}", "…", re.sub(r"//[^/@\s]*@", "//", text))
