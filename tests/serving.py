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


class Served:
    """A running server: its URL, its process, and the folder of its pictures."""

    def __init__(self, folder: Path, *options: str, environ: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        command = [sys.executable, "-m", "diffgen", "serve", "--port", "0", "-o", str(folder), *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder.parent,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | (environ or {}),
            )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line.startswith("http://"), self.log.read_text()
        self.url = self.line.split()[0]
        self.host = urlsplit(self.url).netloc
        self.port = int(self.host.rpartition(":")[2])

    def stop(self) -> int:
        """End the server as a service manager does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def connect(self, timeout: float = 120) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); a body that is no bytes is sent as JSON."""
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, sent)
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
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", f"/api/jobs/{id}/events?previews={int(previews)}")
            yield from read_events(connection.getresponse())

    def children(self) -> list[int]:
        """The process ids of the server's children that hold a model."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in listed if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

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
        connection.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(65536):
                received += part
        return received
