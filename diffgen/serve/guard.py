"""What stands before every request: its Host, its Origin, its key, its content type, and how much of it may arrive.

A page of another site can make a browser send requests to a server on the user's own machine, and DNS rebinding lets
it read the answers. So the Host must be one of ours, and an Origin that a browser names must be ours or an allowed one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
from collections.abc import Mapping
from typing import Any

from .settings import Refused, Settings

BODY_SECONDS = 60.0  # in which a body must arrive
HEADER_SECONDS = 10.0  # in which the head of a request must arrive
CONNECTIONS = 512  # at once
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
BODIES = ("application/json", "multipart/form-data")

HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
        "frame-ancestors 'none'; form-action 'self'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """ASGI middleware. What it refuses goes to `answer`, which makes the response that the path's protocol has."""

    def __init__(self, app: Any, settings: Settings, answer: Any) -> None:
        self.app, self.settings, self.answer = app, settings, answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        allowed = headers.get("origin") in self.settings.allow_origins

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = dict(HEADERS)
                if allowed:
                    more |= _cors(headers["origin"])
                own = [(key.encode(), value.encode()) for key, value in more.items()]
                message = message | {"headers": [*message["headers"], *own]}
            await send(message)

        try:
            self.check(scope, headers, allowed)
        except Refused as error:
            await self.answer(error, scope["path"])(scope, receive, send_guarded)
            return
        if allowed and scope["method"] == "OPTIONS":
            await send_guarded({"type": "http.response.start", "status": 204, "headers": []})
            await send_guarded({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, Body(receive, self.settings.max_body), send_guarded)

    def check(self, scope: Mapping[str, Any], headers: Mapping[str, str], allowed: bool) -> None:
        """Raise Refused for a request that must not be answered."""
        host = headers.get("host", "")
        if not self.is_own(host, scope["server"]):
            raise Refused(403, "forbidden_host", f"the Host {host!r:.100} is not this server", "see --allow-host")
        origin = headers.get("origin")
        if origin is not None and not allowed and origin.lower() != f"{scope['scheme']}://{host}".lower():
            raise Refused(403, "forbidden_origin", f"the Origin {origin!r:.100} is not allowed", "see --allow-origin")
        site = headers.get("sec-fetch-site")
        visit = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site in ("cross-site", "same-site") and not allowed and not visit:
            raise Refused(403, "forbidden_origin", "another site's page sent this request", "see --allow-origin")
        if allowed and scope["method"] == "OPTIONS":
            return  # a browser sends no key with it
        if scope["path"] != "/health":
            self.check_key(headers.get("authorization", ""))
        _check_body(scope["method"], headers, self.settings.max_body)

    def is_own(self, host: str, server: tuple[str, int | None] | None) -> bool:
        """Whether a Host header names this server: the loopback, an allowed name, or the address of the connection."""
        name, _, port = host.rpartition(":") if host.rpartition(":")[2].isdigit() else (host, "", "")
        name = name.lower()
        for own in self.settings.allow_hosts:
            if own.lower() in (host.lower(), name):
                return True
        if server is None or (port or "80") != str(server[1]):
            return False
        try:
            return name in LOOPBACK or ipaddress.ip_address(name.strip("[]")) == ipaddress.ip_address(server[0])
        except ValueError:
            return False

    def check_key(self, authorization: str) -> None:
        """Raise Refused unless the header has the key, as a bearer token or as the password of Basic."""
        if self.settings.key is None:
            return
        kind, _, value = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                value = ""
        elif kind.lower() != "bearer":
            value = ""
        if not hmac.compare_digest(value.strip().encode("utf-8", "replace"), self.settings.key.encode()):
            raise Refused(401, "invalid_api_key", "the key is missing or wrong", "send Authorization: Bearer KEY")


def _check_body(method: str, headers: Mapping[str, str], max_body: int) -> None:
    """Raise Refused for a body that is announced as too large, or that a form of another site could send."""
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > max_body:
        raise too_large(max_body)
    empty = length in ("", "0") and "transfer-encoding" not in headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method not in ("GET", "HEAD", "OPTIONS", "DELETE") and kind not in BODIES and not (empty and not kind):
        raise Refused(415, "unsupported_media_type", f"the content type is {kind!r:.60}", f"send {BODIES[0]}")


def too_large(max_body: int) -> Refused:
    return Refused(413, "too_large", f"the body has more than {max_body} bytes")


def _cors(origin: str) -> dict[str, str]:
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-allow-headers": "authorization, content-type",
        "cross-origin-resource-policy": "cross-origin",
        "vary": "origin",
    }


class Body:
    """Receives a body, counted while it arrives, within a limit of time; then waits for the client to leave."""

    def __init__(self, receive: Any, max_body: int) -> None:
        self.receive, self.max_body = receive, max_body
        self.size, self.complete = 0, False
        self.deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def __call__(self) -> Any:
        if self.complete:
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError:
            raise Refused(408, "too_slow", f"the body did not arrive within {BODY_SECONDS:g} s") from None
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self.size > self.max_body:
                raise too_large(self.max_body)
        return message
