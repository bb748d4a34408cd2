"""The whole server: the routes behind the guard, run by uvicorn, from the first request to an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from diffgen.errors import CannotWrite, DiffgenError
from diffgen.models.find import Model

from .a1111_api import A1111Api
from .answers import error_response
from .gallery import Gallery
from .guard import CONNECTIONS, HEADER_SECONDS, Guard
from .jobs import Dispatcher
from .openai_api import OpenAiApi
from .own_api import OwnApi
from .server import Server
from .settings import STOP, Refused, Settings
from .worker import Facts

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/words.js": ("words.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def app_of(server: Server) -> Any:
    """The ASGI application."""

    async def on_error(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
            error = Refused(error.status_code, kind, f"{request.method} {request.url.path}: {error.detail}")
        elif not isinstance(error, DiffgenError):
            traceback.print_exception(error, file=sys.stderr)
        return error_response(error, request.url.path)

    async def page(request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        return Response(files(__package__).joinpath("page", name).read_bytes(), media_type=kind, headers=FRESH)

    routes = [Route(path, page) for path in PAGE]
    for api in (OwnApi(server), OpenAiApi(server), A1111Api(server)):
        routes += api.routes()
    handlers: dict[Any, Any] = {HTTPException: on_error, DiffgenError: on_error, Exception: on_error}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), server.settings, error_response)


FRESH = {"cache-control": "no-cache"}


class Protocol(H11Protocol):
    """HTTP that does not wait for a client which sends the head of a request too slowly."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._head is not None:
            self._head.cancel()

    def _watch(self) -> None:
        """Give a head that has begun some seconds to be complete."""
        incomplete = self.conn.their_state is h11.IDLE
        if incomplete and self._head is None:
            self._head = self.loop.call_later(HEADER_SECONDS, self._give_up)
        elif not incomplete and self._head is not None:
            self._head.cancel()
            self._head = None

    def _give_up(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class Uvicorn(uvicorn.Server):
    """uvicorn whose signals are handled by `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises CannotWrite if the port is in use or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if sys.platform != "win32":  # where it would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise CannotWrite(f"cannot listen on {host}:{port}: {error.strerror}", "choose another --port") from error
    listener.set_inheritable(False)
    return listener


def serve(
    models: Sequence[Model],
    settings: Settings,
    listener: socket.socket,
    out: str | None,
    devices: list[str],
    dtype: str,
    options: dict[str, str],
    on_ready: Callable[[Server], None],
) -> None:
    """Serve until SIGTERM or SIGINT. Raises the error of a model that cannot be loaded, and of a broken folder.

    `on_ready` is called when the first model is loaded. `out` None: pictures are not kept.
    """
    gallery = Gallery(out)
    try:
        asyncio.run(_serve(models, settings, listener, gallery, devices, dtype, options, on_ready))
    finally:
        gallery.close()


async def _serve(
    models: Sequence[Model],
    settings: Settings,
    listener: socket.socket,
    gallery: Gallery,
    devices: list[str],
    dtype: str,
    options: dict[str, str],
    on_ready: Callable[[Server], None],
) -> None:
    facts = Facts(models)
    dispatcher = Dispatcher(settings, facts, gallery, devices, dtype, options)
    dispatcher.start()
    server = await asyncio.to_thread(Server, settings, facts, gallery, dispatcher)
    config = uvicorn.Config(
        app_of(server),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    http = Uvicorn(config)
    dispatcher.connections = lambda: len(http.server_state.connections)
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():  # the second signal
            for slot in dispatcher.slots:
                slot.worker.stop()
            http.force_exit = True
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    waiting = asyncio.ensure_future(stopping.wait())
    tasks: set[asyncio.Future[Any]] = {waiting, dispatcher.loaded, serving}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if dispatcher.loaded.done():
            dispatcher.loaded.result()
            on_ready(server)
        await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await dispatcher.close(STOP if stopping.is_set() else 0)
        http.should_exit = True
        await serving
