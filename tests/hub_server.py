"""A hub on this machine: real HTTP, the part of the API that a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "Secret" * 5


class Hub:
    """Repositories by name, each a list of commits (newest last) of {path: bytes}."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.licence = "creativeml-openrail-m"
        self.damaged: set[str] = set()  # paths that are served with other bytes
        self.status: int | None = None  # what every request gets
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, Authorization)
        self.on_info = lambda repo: None  # called after the API has answered
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, repo: str, folder: Path | dict[str, bytes]) -> str:
        """Add a commit with the files of a folder to a repository."""
        if isinstance(folder, Path):
            files = (path for path in folder.rglob("*") if path.is_file())
            folder = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        self.repos.setdefault(repo, []).append(folder)
        return commit_of(repo, len(self.repos[repo]) - 1)

    def fetched(self) -> list[str]:
        """The paths of the downloaded files."""
        return [path.split("/", 5)[5] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def commit_of(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo}{number}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        words = path.strip("/").split("/")
        if self.hub.status:
            return self.send(self.hub.status, b"")
        if words[:2] == ["api", "models"]:
            repo, revision = "/".join(words[2:4]), "/".join(words[5:]) or "main"
        else:
            repo, revision = "/".join(words[:2]), words[3]
        commits = self.hub.repos.get(repo)
        if commits is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        names = {commit_of(repo, i): i for i in range(len(commits))} | {"main": len(commits) - 1, "v1.0": 0}
        if revision not in names:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files, commit = commits[names[revision]], commit_of(repo, names[revision])
        if words[0] == "api":
            self.send(200, json.dumps(self.info(repo, commit, files)).encode())
            self.hub.on_info(repo)
            return None
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, b"", {"X-Error-Code": "GatedRepo"})
        data = files.get(name := "/".join(words[4:]))
        if data is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        large = name.endswith(".safetensors")
        etag = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if name in self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        return self.send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def info(self, repo: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": "0" * 40,
                **(
                    {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}}
                    if name.endswith(".safetensors")
                    else {}
                ),
            }
            for name, data in files.items()
        ]
        return {
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "gated": "auto" if repo in self.hub.gated else False,
            "tags": ["diffusers", f"license:{self.hub.licence}"],
            "siblings": siblings,
        }

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
