"""The server's own API: jobs with events, the gallery, the model, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import schedulers
from diffgen.models.info import defaults_in_words
from diffgen.version import __version__

from .answers import EventStream, events_of
from .fields import Wanted, bad, decode, load_json, picture, read_fields
from .gallery import Entry
from .jobs import FINISHED, Job
from .server import Server, random_seed
from .settings import Refused

KNOWN = ("image", "image_name", "mask", "mask_name", "mask_invert")
WORDS = 4000  # of a model's vocabulary that the page suggests


class OwnApi:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.started = time.time()

    def routes(self) -> list[Route]:
        return [
            Route("/api/jobs", self.create, methods=["POST"]),
            Route("/api/jobs", self.list_jobs),
            Route("/api/jobs/{id}", self.show),
            Route("/api/jobs/{id}", self.cancel, methods=["DELETE"]),
            Route("/api/jobs/{id}/events", self.events),
            Route("/api/pictures", self.pictures),
            Route("/api/pictures/{id}.png", self.png),
            Route("/api/pictures/{id}/thumbnail", self.thumbnail),
            Route("/api/pictures/{id}/record", self.record),
            Route("/api/pictures/{id}", self.delete, methods=["DELETE"]),
            Route("/api/model", self.model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]

    # --- Jobs ---

    async def create(self, request: Request) -> Response:
        wanted, model = await self.wanted(load_json(await request.body()))
        job = await self.server.submit(request, wanted, model)
        return JSONResponse(self.as_json(job), 202, {"location": f"/api/jobs/{job.id}"})

    async def wanted(self, fields: Mapping[str, Any]) -> tuple[Wanted, Any]:
        """What the fields ask for, and of which model."""
        fields = random_seed(fields)
        model = self.server.model(fields.get("model"))
        wanted = read_fields(fields, self.server.settings, KNOWN)
        for name, mode in (("image", "RGB"), ("mask", "L")):
            if fields.get(name) is not None:
                data, file_name = decode(name, fields[name]), fields.get(f"{name}_name")
                if file_name is not None and not isinstance(file_name, str):
                    raise bad(f"{name}_name must be text", f"{name}_name")
                wanted.options[name] = await asyncio.to_thread(
                    picture, name, data, self.server.settings, mode, file_name
                )
        return wanted, model

    def job(self, request: Request) -> Job:
        job = self.server.dispatcher.jobs.get(request.path_params["id"])
        if job is None:
            raise Refused(404, "no_job", "there is no such job, or it ended long ago")
        return job

    def as_json(self, job: Job) -> dict[str, Any]:
        """A job as the API shows it. `step` and `steps` count evaluations of the network."""
        content: dict[str, Any] = {
            "id": job.id,
            "status": job.status,
            "position": self.server.dispatcher.position(job) if job.status == "queued" else None,
            "step": job.step,
            "steps": job.steps,
            "model": job.plan.model.name,
            "prompt": job.plan.prompts[0] if job.plan.prompts else "",
            "seed": job.plan.seed,
            "count": len(job.plan),
            "pictures": [entry.as_json() for entry in job.entries],
            "warnings": job.warnings,
            "seconds": None if job.begun is None else round((job.ended or time.time()) - job.begun, 3),
        }
        if job.error is not None:
            content["error"] = {"code": int(job.error.code), "message": job.error.message, "hint": job.error.hint}
        return content

    async def list_jobs(self, request: Request) -> Response:
        jobs = list(self.server.dispatcher.jobs.values())[-100:]
        return JSONResponse({"jobs": [self.as_json(job) for job in reversed(jobs)]})

    async def show(self, request: Request) -> Response:
        return JSONResponse(self.as_json(self.job(request)))

    async def cancel(self, request: Request) -> Response:
        job = self.job(request)
        self.server.dispatcher.cancel(job)
        return JSONResponse(self.as_json(job))

    async def events(self, request: Request) -> Response:
        job = self.job(request)
        return EventStream(self.stream(job, request.query_params.get("previews", "1") != "0"))

    async def stream(self, job: Job, previews: bool) -> AsyncIterator[tuple[str, dict[str, Any]] | None]:
        """The state of a job, then its events; the last one is its state at the end."""
        if job.status not in FINISHED:
            yield "state", self.as_json(job)
            if previews:
                self.server.dispatcher.watch(job)
            async for event in events_of(job):
                if event is None:
                    yield None
                    continue
                kind, data = event
                if kind == "started" and previews:
                    self.server.dispatcher.watch(job)
                if kind == "preview":
                    if previews and data["partial"] is None:
                        yield kind, {"png": base64.b64encode(data["png"]).decode()}
                elif kind not in FINISHED:
                    yield kind, data
        yield job.status, self.as_json(job)

    # --- Pictures ---

    async def pictures(self, request: Request) -> Response:
        query = request.query_params
        limit = query.get("limit", "60")
        if not limit.isdigit() or not 1 <= int(limit) <= 500:
            raise bad("limit must be from 1 to 500", "limit")
        entries, total = await asyncio.to_thread(
            self.server.gallery.listed, query.get("q", "")[:1000], query.get("after"), int(limit)
        )
        return JSONResponse({"pictures": [entry.as_json() for entry in entries], "total": total})

    async def entry(self, request: Request) -> Entry:
        entry = await asyncio.to_thread(self.server.gallery.get, request.path_params["id"])
        if entry is None:
            raise Refused(404, "no_picture", "there is no such picture in the gallery")
        return entry

    async def png(self, request: Request) -> Response:
        entry = await self.entry(request)
        try:
            data = await asyncio.to_thread(self.server.gallery.read, entry)
        except OSError:
            raise Refused(404, "no_picture", "the picture's file is gone") from None
        return Response(data, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    async def thumbnail(self, request: Request) -> Response:
        data = await asyncio.to_thread(self.server.gallery.thumbnail, await self.entry(request))
        return Response(data, media_type="image/webp", headers={"cache-control": "private, max-age=3600"})

    async def record(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self.server.gallery.record, await self.entry(request)))

    async def delete(self, request: Request) -> Response:
        entry = await self.entry(request)
        await asyncio.to_thread(self.server.gallery.delete, entry)
        return JSONResponse({"deleted": entry.id})

    # --- The server ---

    async def model(self, request: Request) -> Response:
        server = self.server
        model = server.model(request.query_params.get("name"))
        about, settings = server.abouts[model.name], server.settings
        plain = defaults_in_words(about) or {}
        width, height = server.own_size(model)
        facts = server.facts.of.get(model.name)
        reads = facts is None or facts.checked.row.reads_prompts
        return JSONResponse(
            {
                "name": model.name,
                "models": list(server.facts.models),
                "family": model.family,
                "licence": about["licence"],
                "reads_prompts": reads and not model.is_run,
                "pictures": reads and not model.is_run,  # begins from pictures
                "classes": about["concepts"] if model.is_run else None,
                "concepts": None if model.is_run else (about["concepts"] or [])[:WORDS],
                "styles": about["styles"] or [],
                "compositions": _suggested(about["compositions"]),
                "defaults": {**about["family_defaults"], **plain, "size": [width, height]},
                "schedulers": _schedulers(),
                "grids": schedulers.grid_names(),
                "loras": list(settings.loras),
                "embeddings": list(settings.embeddings),
                "limits": {
                    "count": settings.max_count,
                    "steps": settings.max_steps,
                    "pixels": settings.max_pixels,
                    "body": settings.max_body,
                },
                "version": __version__,
            }
        )

    async def health(self, request: Request) -> Response:
        dispatcher = self.server.dispatcher
        content = {
            "status": dispatcher.status,
            "model": self.server.default.name,
            "queue": dispatcher.queued,
            "running": len(dispatcher.running),
        }
        return JSONResponse(content, 200 if dispatcher.status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """The numbers of the server in Prometheus's text format."""
        dispatcher = self.server.dispatcher
        rows: list[tuple[str, str, str, Any]] = [
            ("diffgen_queue_jobs", "gauge", "Jobs that wait.", dispatcher.queued),
            ("diffgen_running_jobs", "gauge", "Jobs of the batches that run.", len(dispatcher.running)),
            ("diffgen_jobs_total", "counter", "Jobs that ended, by their status.", dispatcher.counts),
            ("diffgen_pictures_total", "counter", "Pictures that were made.", dispatcher.pictures),
            ("diffgen_batches_total", "counter", "Batches that began.", dispatcher.batches),
            ("diffgen_step_seconds", "gauge", "Time of a step of the last batch.", dispatcher.step_seconds),
            ("diffgen_worker_restarts_total", "counter", "Worker processes that were replaced.", dispatcher.restarts),
            ("diffgen_worker_ready", "gauge", "Workers with a loaded model.", sum(s.ready for s in dispatcher.slots)),
            ("diffgen_start_time_seconds", "gauge", "When the server started.", round(self.started, 3)),
        ]
        lines = []
        for name, kind, text, value in rows:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            if isinstance(value, dict):
                lines += [f'{name}{{status="{label}"}} {number}' for label, number in value.items()]
            else:
                lines.append(f"{name} {value}")
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _suggested(compositions: Mapping[str, Any] | None) -> dict[str, Any] | None:
    keys = ("colours", "counts", "relations", "backgrounds", "sizes")
    return {key: compositions.get(key, []) for key in keys} if compositions else None


def _schedulers() -> list[dict[str, str]]:
    """The schedulers that run in a pipeline."""
    solvers = [schedulers.info(name) for name in schedulers.names()]
    return [{"name": s.name, "label": s.a1111 or s.name} for s in solvers if not s.native_only and not s.upwards]
