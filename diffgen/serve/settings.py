"""The settings of a server, and its errors."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffgen.errors import DiffgenError, InputError, UsageError

SIZE_POLICIES = ("fit", "exact")
KEEP_JOBS = 600  # seconds that a finished job can be looked up
STOP = 8.0  # seconds that running work may take after SIGTERM


class Refused(DiffgenError):  # noqa: N818
    """An error with an HTTP status. `retry_after` is in seconds; without it, the same request fails again."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        hint: str = "",
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.status, self.kind, self.param, self.retry_after = status, kind, param, retry_after


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows."""

    host: str = "127.0.0.1"
    allow_hosts: tuple[str, ...] = ()  # NAME or NAME:PORT, besides the loopback's names
    allow_origins: tuple[str, ...] = ()  # of other sites' pages
    key: str | None = None
    batch: int = 8  # pictures at once, of any clients
    queue: int = 64  # jobs that wait
    max_pixels: int = 4 * 2**20  # of a picture that is made or sent
    max_steps: int = 150
    max_count: int = 10  # pictures of one request
    max_body: int = 32 * 2**20  # bytes
    job_timeout: float = 600.0  # seconds in the worker
    exact: bool = False  # make each picture alone
    size_policy: str = "fit"  # of the protocols whose clients send sizes that nobody chose
    loras: Mapping[str, Path] = field(default_factory=dict)
    embeddings: Mapping[str, Path] = field(default_factory=dict)
    wildcards: tuple[str, ...] = ()


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to the address or name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, key: str | None, insecure: bool) -> None:
    """Raise UsageError for a server that others can reach without a key."""
    if not (is_loopback(host) or key or insecure):
        raise UsageError(
            f"--host {host} lets other machines connect, and there is no key",
            "add --api-key KEY, or --insecure to serve without one",
        )


def read_key(text: str | None) -> str | None:
    """The key of --api-key: the text, or the first line of the file after @. Raises UsageError, InputError."""
    if text is None:
        return None
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the key file {text[1:]}: {error}") from error
    if not text or not text.isascii() or not text.isprintable():
        raise UsageError("--api-key must be printable ASCII characters, and not empty")
    return text


def weights_in(folder: str | None, option: str) -> dict[str, Path]:
    """The .safetensors files below a folder by their stems, which clients may name. Raises InputError."""
    if folder is None:
        return {}
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{option} {folder}: there is no such folder")
    files = (path for path in sorted(root.rglob("*.safetensors")) if path.is_file())
    return {path.stem: path for path in files if path.resolve().is_relative_to(root.resolve())}
