"""Errors and events as each protocol writes them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diffgen.errors import DiffgenError, ExitCode

from .jobs import FINISHED, Dispatcher, Job
from .settings import Refused

ALIVE = 15.0  # seconds after which an event stream sends a comment
STATUSES = {ExitCode.USAGE: 400, ExitCode.INPUT: 400, ExitCode.MEMORY: 500, ExitCode.OUTPUT: 500}
KINDS = {
    ExitCode.USAGE: "invalid_value",
    ExitCode.INPUT: "invalid_input",
    ExitCode.MEMORY: "out_of_memory",
    ExitCode.OUTPUT: "invalid_output",
    ExitCode.WRITE: "cannot_write",
}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def refused(error: BaseException) -> Refused:
    """Any error with the status that it has over HTTP."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, DiffgenError):
        message = error.message.replace("--", "")  # flags of the command are fields here
        return Refused(STATUSES.get(error.code, 500), KINDS.get(error.code, "failed"), message, error.hint)
    return Refused(500, "failed", f"{type(error).__name__}: {error}")


def openai_error(error: Refused) -> dict[str, Any]:
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": _text(error), "type": kind, "param": error.param, "code": error.kind}}


def a1111_error(error: Refused) -> dict[str, Any]:
    return {"error": error.kind, "detail": _text(error), "body": "", "errors": _text(error)}


def own_error(error: Refused) -> dict[str, Any]:
    return {"error": {"code": error.kind, "message": error.message, "hint": error.hint, "param": error.param}}


SHAPES: dict[str, Callable[[Refused], dict[str, Any]]] = {"/v1/": openai_error, "/sdapi/": a1111_error}


def error_response(error: BaseException, path: str) -> Response:
    """The response to a request that failed, in the shape of the path's protocol."""
    error = refused(error)
    shape = next((shape for prefix, shape in SHAPES.items() if path.startswith(prefix)), own_error)
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    else:  # OpenAI's client repeats 408, 409, 429 and 5xx unless it is told not to
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = 'Basic realm="diffgen"'
    if error.status in (408, 413):
        headers["connection"] = "close"  # what else arrives of that body is nobody's
    return JSONResponse(shape(error), error.status, headers)


def _text(error: Refused) -> str:
    return f"{error.message.rstrip('.')}; {error.hint}" if error.hint else error.message


async def finished(request: Request, dispatcher: Dispatcher, job: Job) -> None:
    """Wait for a job. If the client leaves first, cancel it. Raises the job's error."""
    done = asyncio.ensure_future(job.finished.wait())
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({done, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        done.cancel()
        left.cancel()
        if job.status not in FINISHED:
            dispatcher.cancel(job)
    if job.error is not None:
        raise job.error


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `events` yields (name, data); when the client leaves, it is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[tuple[str, dict[str, Any]] | None]) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send(send))
        left = asyncio.ensure_future(_left(Request(scope, receive)))
        try:
            await asyncio.wait({sending, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not sending.done():
                sending.cancel()
                await asyncio.wait({sending})
            await self.events.aclose()  # type: ignore[attr-defined]

    async def _send(self, send: Any) -> None:
        async for event in self.events:
            text = ": alive\n\n" if event is None else f"event: {event[0]}\ndata: {json.dumps(event[1])}\n\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def events_of(job: Job) -> AsyncIterator[tuple[str, dict[str, Any]] | None]:
    """The events of a job from now on, up to its end; None when nothing happened for a while."""
    with job.listening() as listener:
        while job.status not in FINISHED or not listener.empty():
            try:
                async with asyncio.timeout(ALIVE):
                    kind, data = await listener.get()
            except TimeoutError:
                yield None
                continue
            yield kind, data
            if kind in FINISHED:
                return
