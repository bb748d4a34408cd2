"""`diffgen generate --server`: send the command to a running server, and write the files that it would write here.

Imports neither torch nor the extra `serve`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from diffgen.errors import DiffgenError, ExitCode, InputError, InvalidOutput, OutOfMemory, UsageError
from diffgen.generation.checks import MAX_SEED
from diffgen.generation.options import OPTIONS
from diffgen.images.naming import Outputs
from diffgen.models.gate import open_file
from diffgen.prompts.files import Line

ERRORS = {cls.code: cls for cls in (UsageError, InputError, OutOfMemory, InvalidOutput)}

# What a server has no field for is refused before anything is sent.
SENT = tuple(name for name, row in OPTIONS.items() if row.served)
PICTURES = ("image", "mask")
HERE = ("batch_size",)  # 1 means: made alone

OnStep = Callable[..., None]


class Client:
    """A server. Raises InputError if nothing answers at its URL."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.parts = urlsplit(self.url if "://" in url else f"http://{self.url}")
        if self.parts.scheme not in ("http", "https") or not self.parts.hostname:
            raise UsageError(f"--server must be a URL (got {url!r})", "for example http://127.0.0.1:7860")
        self.key = key

    @contextlib.contextmanager
    def request(self, method: str, path: str, body: Any = None) -> Iterator[Any]:
        """The response to a request. Raises the server's error as the command would."""
        kind = HTTPSConnection if self.parts.scheme == "https" else HTTPConnection
        connection = kind(self.parts.hostname or "", self.parts.port, timeout=660)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None
        if body is not None:
            headers["Content-Type"], data = "application/json", json.dumps(body).encode()
        try:
            connection.request(method, self.parts.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise _error(response.status, response.read(), response.getheader("Retry-After"))
            yield response
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error)
            hint = "start one: diffgen serve; or leave --server out"
            raise InputError(f"the server {self.url} does not answer: {reason}", hint) from error
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        with self.request(method, path, body) as response:
            return json.loads(response.read())

    def submit(self, fields: Mapping[str, Any]) -> str:
        """Queue a job and return its id; while the queue is full, wait as long as the server says."""
        while True:
            try:
                return str(self.json("POST", "/api/jobs", fields)["id"])
            except _BusyError as busy:
                time.sleep(busy.seconds)

    def wait(self, id: str, on_step: Callable[[int, int], None] | None) -> dict[str, Any]:
        """Follow a job to its end and return its last state. Raises its error."""
        name, state = "", {}
        with self.request("GET", f"/api/jobs/{id}/events?previews=0") as response:
            for line in response:
                if line.startswith(b"event: "):
                    name = line[7:].strip().decode()
                elif line.startswith(b"data: "):
                    state = json.loads(line[6:])
                    if name == "step" and on_step is not None:
                        on_step(state["done"], state["total"])
        if name != "done":
            error = state.get(
                "error", {"code": 1, "message": "the server ended while it made the pictures", "hint": ""}
            )
            raise ERRORS.get(ExitCode(error["code"]), DiffgenError)(error["message"], error["hint"])
        return state


class _BusyError(Exception):
    def __init__(self, seconds: int) -> None:
        self.seconds = seconds


def _error(status: int, body: bytes, retry_after: str | None) -> Exception:
    if status == 429:
        return _BusyError(int(retry_after or 1))
    try:
        error = json.loads(body)["error"]
        message, hint = str(error["message"]), str(error["hint"])
    except (ValueError, KeyError, TypeError):
        message, hint = f"the server answered {status}", "is it diffgen serve?"
    kind = UsageError if status == 400 else InputError if status in (401, 403, 404, 413) else DiffgenError
    if status == 401:
        hint = "set DIFFGEN_API_KEY"
    return kind(message, hint)


def jobs_of(lines: Sequence[Line], options: Mapping[str, Any], model: str | None) -> list[dict[str, Any]]:
    """The fields of a job for each line; a random seed is drawn once for all. Raises UsageError, InputError."""
    jobs = []
    seed = secrets.randbelow(MAX_SEED - 10**5)
    for line in lines or [Line("")]:
        values = {"seed": seed, **options, **line.options}
        fields: dict[str, Any] = {name: values[name] for name in SENT if values.get(name) is not None}
        for name in PICTURES:
            if values.get(name) is not None:
                path = Path(values[name])
                try:
                    with open_file(path) as file:
                        fields[name] = base64.b64encode(file.read()).decode()
                except OSError as error:
                    raise InputError(f"cannot read the picture {path}: {error.strerror}") from error
                fields[f"{name}_name"] = path.name
        if isinstance(fields.get("size"), tuple | list):
            fields["size"] = "x".join(map(str, fields["size"]))
        fields |= {"prompt": line.prompt, "exact": str(values.get("batch_size", 1)) == "1"}
        jobs.append(fields | ({"model": model} if model else {}))
    return jobs


def unsent(options: Mapping[str, Any], neutral: Mapping[str, Any]) -> str | None:
    """The first option that is set and that a server has no field for."""
    known = (*SENT, *PICTURES, *HERE)
    return next((name for name, value in options.items() if name not in known and value != neutral.get(name)), None)


def generate(
    url: str,
    jobs: Sequence[Mapping[str, Any]],
    outputs: Outputs,
    metadata: str,
    on_step: Callable[[int, int], None] | None,
    on_written: Callable[[Path], None],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Have a server make the pictures of jobs, write each, and return what `generate --json` prints.

    If the work ends early, what the server still has of it is cancelled.
    """
    client = Client(url, os.environ.get("DIFFGEN_API_KEY") or None)
    started = time.perf_counter()
    images: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    warnings: list[str] = []
    pending: list[str] = []
    try:
        for fields in jobs:
            pending.append(client.submit(fields))
        while pending:
            state = client.wait(pending[0], on_step)
            pending.pop(0)
            warnings += [text for text in state["warnings"] if text not in warnings]
            for text in state["warnings"]:
                warn(text)
            for picture in state["pictures"]:
                with client.request("GET", f"/api/pictures/{quote(picture['id'])}.png") as response:
                    png = response.read()
                record = record or client.json("GET", f"/api/pictures/{quote(picture['id'])}/record")
                about = {key: picture[key] for key in ("prompt", "seed", "width", "height", "pixels_sha256")}
                path = outputs.write(
                    _with_metadata(png, metadata, client, picture["id"]),
                    seed=picture["seed"],
                    prompt=picture["prompt"],
                    model=picture["model"],
                    scheduler=picture["scheduler"],
                    steps=picture["steps"],
                )
                images.append({"path": str(path), **about})
                on_written(path)
    finally:
        for id in pending:
            with contextlib.suppress(DiffgenError, _BusyError):
                client.json("DELETE", f"/api/jobs/{id}")
    kept = ("model", "scheduler", "grid", "steps", "nfe", "guidance")
    seconds = round(time.perf_counter() - started, 3)
    rest = {"seconds": seconds, "warnings": warnings, "adapters": [], "inside": [], "server": client.url}
    return {"images": images, **{key: record.get(key) for key in kept}, **rest}


def _with_metadata(png: bytes, level: str, client: Client, id: str) -> bytes:
    """The picture with less metadata, where that is wanted."""
    if level == "full":
        return png
    from diffgen.images.metadata import encode_png
    from diffgen.images.read import read_image

    return encode_png(read_image(png), client.json("GET", f"/api/pictures/{quote(id)}/record"), level)
