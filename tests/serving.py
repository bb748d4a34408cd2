"""Start `diffgen serve` as a process of its own and speak HTTP with it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

ROOT = Path(__file__).parent.parent
KEY = "a-key-for-tests"
SITE = "https://friend.example"  # whose pages may use the server of the tests


class Served:
    """A running server: its URL, its process, and the folder of its pictures. Requests to it carry its key."""

    def __init__(self, folder: Path, *options: str, key: str | None = None) -> None:
        self.folder, self.key = folder, key
        self.log = folder.parent / f"{folder.name}.log"
        command = [sys.executable, "-m", "diffgen", "serve", "--port", "0", "-o", str(folder), *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder.parent,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | ({"DIFFGEN_API_KEY": key} if key else {}),
            )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line.startswith("http://"), self.log.read_text()
        self.url = self.line.split()[0]
        self.host = urlsplit(self.url).netloc
        self.port = int(self.host.rpartition(":")[2])

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def stop(self) -> int:
        """End the server as a service manager does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPConnection:
        """A connection on which a request has been sent; a body that is no bytes is sent as JSON."""
        sent = self.authorization | (headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, sent)
        return connection

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of the response to a request."""
        with contextlib.closing(self.send(method, path, body, headers)) as connection:
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()

    def json(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The JSON of a response that succeeded."""
        status, _, content = self.request(method, path, body, headers)
        assert status < 300, content
        return json.loads(content)

    def job(self, **fields: Any) -> dict[str, Any]:
        """Make a job and wait for its end; its last state."""
        job = self.json("POST", "/api/jobs", fields)
        return list(self.events(job["id"]))[-1][1]

    def events(self, id: str, previews: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a job, each as it arrives."""
        with contextlib.closing(self.send("GET", f"/api/jobs/{id}/events?previews={int(previews)}")) as connection:
            yield from read_events(connection.getresponse())

    def workers(self) -> list[int]:
        """The process ids of the workers, which hold a model: children of the process that they are forked from."""
        return [pid for child in children(self.process.pid) for pid in children(child)]

    def wait_for(self, path: str, key: str, value: Any, seconds: float = 30) -> dict[str, Any]:
        """Wait until a key of a JSON document has a value."""
        end = time.monotonic() + seconds
        content: dict[str, Any] = {}
        while time.monotonic() < end:
            content = json.loads(self.request("GET", path)[2])
            if content[key] == value:
                return content
            time.sleep(0.05)
        raise AssertionError(f"{path}: {key} is not {value}: {content}")


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def read_events(response: HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a text/event-stream."""
    assert response.status == 200, response.read()
    name = ""
    for line in response:
        if line.startswith(b"event: "):
            name = line[7:].strip().decode()
        elif line.startswith(b"data: "):
            yield name, json.loads(line[6:])


def png_of(text: str) -> Image.Image:
    """The picture in a base64 text."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def encoded(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def half_mask(size: int = 64, transparent: bool = False) -> Image.Image:
    """A mask whose right half is made anew: white, or transparent as OpenAI has it."""
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (size // 2, 0, size, size))
    if not transparent:
        return mask
    image = Image.new("RGBA", (size, size), "black")
    image.putalpha(mask.point(lambda value: 255 - value))
    return image


def raw(port: int, data: bytes, seconds: float = 5) -> bytes:
    """What a server answers to bytes that are sent as they are."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(65536):
                received += part
        return received
