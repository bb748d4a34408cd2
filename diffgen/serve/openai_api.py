"""OpenAI's Images API: generations, edits, variations and models."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffgen.errors import DiffgenError, UsageError
from diffgen.generation.checks import parse_size
from diffgen.images.read import read_image, read_texts

from .answers import EventStream, events_of, finished, openai_error, refused
from .fields import Wanted, bad, decode, load_json, mask_of_alpha, picture, read_fields
from .gallery import Entry
from .jobs import Job
from .server import Server, random_seed
from .settings import Refused

THEIRS = ("gpt-image-", "dall-e-", "chatgpt-image")  # names of OpenAI's models that clients send unasked
IGNORED = ("quality", "style", "moderation", "user", "safety_identifier", "background", "input_fidelity", "markup")
KNOWN = (
    *IGNORED,
    *("image", "image[]", "mask", "stream", "partial_images", "response_format", "output_format"),
    "output_compression",
)
FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}
VARIATION = 0.6  # the strength of a variation
PROMPTLESS = "a picture"  # of a variation of a picture that carries no prompt
PARTIALS = 3


class OpenAiApi:
    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            Route("/v1/images/variations", self.variations, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
        ]

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.as_model(name) for name in self.server.facts.models]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self.as_model(self.server.model(request.path_params["name"]).name))

    def as_model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(self.server.started), "owned_by": "diffgen"}

    async def generations(self, request: Request) -> Response:
        fields = load_json(await request.body())
        wanted = self.wanted(fields)
        return await self.answer(request, fields, wanted, "image_generation")

    async def edits(self, request: Request) -> Response:
        fields = await read_form(request)
        if fields.get("prompt") in (None, ""):
            raise Refused(400, "missing_required_parameter", "there is no prompt", param="prompt")
        wanted = self.wanted(fields)
        await self.begin(wanted, fields)
        return await self.answer(request, fields, wanted, "image_edit")

    async def variations(self, request: Request) -> Response:
        fields = await read_form(request)
        data = first_picture(fields)
        wanted = self.wanted(fields)
        if not wanted.prompt:
            wanted.prompt = await asyncio.to_thread(_prompt_of, data) or PROMPTLESS
            wanted.warnings.append(f"the variation was made with the prompt {wanted.prompt!r}")
        wanted.options.setdefault("strength", VARIATION)
        await self.begin(wanted, fields)
        return await self.answer(request, fields, wanted, "image_variation")

    def wanted(self, fields: Mapping[str, Any]) -> Wanted:
        """What the fields ask for. Raises Refused for what would silently be something else."""
        size = fields.get("size")
        fields = {name: value for name, value in fields.items() if name != "size"}
        wanted = read_fields(random_seed(fields), self.server.settings, KNOWN)
        ignored = [name for name in IGNORED if fields.get(name) not in (None, "", "auto")]
        if fields.get("background") == "transparent":
            raise bad("background: this model makes no transparent pictures", "background")
        if ignored:
            wanted.warnings.append(f"{', '.join(ignored)} {'is' if len(ignored) == 1 else 'are'} ignored")
        if size not in (None, "", "auto"):
            try:
                wanted.options["size"] = parse_size(size)
            except UsageError as error:
                raise bad(error.message.replace("--size", "size"), "size") from error
        return wanted

    def chosen(self, name: Any, wanted: Wanted) -> Any:
        """The served model of that name; one of OpenAI's names means the default."""
        if isinstance(name, str) and name.startswith(THEIRS) and name not in self.server.facts.models:
            wanted.warnings.append(f"{name} is not here: {self.server.default.name} made the picture")
            name = None
        if name is not None and not isinstance(name, str):
            raise bad("model must be text", "model")
        return self.server.model(name or None)

    async def begin(self, wanted: Wanted, fields: Mapping[str, Any]) -> None:
        """Add the picture to begin with, and the mask, to what is wanted."""
        settings = self.server.settings
        data = first_picture(fields)
        wanted.options["image"] = await asyncio.to_thread(picture, "image", data, settings)
        size = wanted.options["image"].image.size
        source = fields.get("mask") or data
        alpha = await asyncio.to_thread(read_image, source, "RGBA", settings.max_pixels)
        if fields.get("mask") and min(alpha.getchannel("A").tobytes()) == 255:
            mask = alpha.convert("L")  # no transparency: white is made anew, as other tools have it
        else:
            mask = mask_of_alpha(alpha)
        if fields.get("mask") or any(mask.tobytes()):
            wanted.options["mask"] = mask.resize(size) if mask.size != size else mask

    async def answer(self, request: Request, fields: Mapping[str, Any], wanted: Wanted, kind: str) -> Response:
        form = output_format(fields)
        in_url = _choice(fields, "response_format", ("b64_json", "url")) == "url"
        stream = fields.get("stream") in (True, "true")
        partials = fields.get("partial_images") or 0
        if isinstance(partials, str) and partials.isdigit():
            partials = int(partials)
        if type(partials) is not int or not 0 <= partials <= PARTIALS:
            raise bad(f"partial_images must be from 0 to {PARTIALS}", "partial_images")
        model = self.chosen(fields.get("model"), wanted)
        if "image" in wanted.options:
            image = wanted.options["image"].image
            self.server.fit_picture(wanted, image.size, model)
        else:
            self.server.fit(wanted, wanted.options.pop("size", None), model)
        job = await self.server.submit(request, wanted, model, partials if stream else 0)
        if stream:
            return EventStream(self.stream(job, kind, form))
        await finished(request, self.server.dispatcher, job)
        data = [await self.datum(request, entry, form, in_url) for entry in job.entries]
        content = {"created": int(job.created), "data": data, **self.common(job, form), "warnings": job.warnings}
        return JSONResponse(content)

    def common(self, job: Job, form: tuple[str, int]) -> dict[str, Any]:
        width, height = job.plan.final_size
        return {
            "background": "opaque",
            "output_format": form[0],
            "quality": "auto",
            "size": f"{width}x{height}",
            "usage": {
                "input_tokens": 0,
                "output_tokens": 0,
                "total_tokens": 0,
                "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            },
        }

    async def datum(self, request: Request, entry: Entry, form: tuple[str, int], in_url: bool) -> dict[str, Any]:
        about = {"revised_prompt": entry.about["prompt"], "seed": entry.about["seed"], "id": entry.id}
        if in_url:
            return {"url": str(request.url_for("png", id=entry.id)), **about}
        return {"b64_json": await self.encoded(entry, form), **about}

    async def encoded(self, entry: Entry, form: tuple[str, int]) -> str:
        png = await asyncio.to_thread(self.server.gallery.read, entry)
        return base64.b64encode(await asyncio.to_thread(converted, png, form)).decode()

    async def stream(self, job: Job, kind: str, form: tuple[str, int]) -> AsyncIterator[Any]:
        """Partial pictures, then each finished one. When the client leaves, the job is cancelled."""
        common = self.common(job, form)
        usage = common.pop("usage")
        try:
            async for event in events_of(job):
                if event is None:
                    yield None
                elif event[0] == "preview" and event[1]["partial"] is not None:
                    name = f"{kind}.partial_image"
                    picture = await asyncio.to_thread(converted, event[1]["png"], form)
                    yield (
                        name,
                        {
                            "type": name,
                            "b64_json": base64.b64encode(picture).decode(),
                            "partial_image_index": event[1]["partial"],
                            "created_at": int(time.time()),
                            **common,
                        },
                    )
            if job.error is not None:
                yield "error", {"type": "error", **openai_error(refused(job.error))}
                return
            for entry in job.entries:
                name = f"{kind}.completed"
                yield (
                    name,
                    {
                        "type": name,
                        "b64_json": await self.encoded(entry, form),
                        "created_at": int(time.time()),
                        "seed": entry.about["seed"],
                        "revised_prompt": entry.about["prompt"],
                        "warnings": job.warnings,
                        **common,
                        "usage": usage,
                    },
                )
        finally:
            self.server.dispatcher.cancel(job)


async def read_form(request: Request) -> dict[str, Any]:
    """The fields of a form, files as bytes, with the names that end in [] without it. JSON bodies are read too."""
    if request.headers.get("content-type", "").startswith("application/json"):
        fields = load_json(await request.body())
        for name in ("image", "mask"):
            if isinstance(fields.get(name), str):
                fields[name] = decode(name, fields[name])
        return fields
    fields = {}
    try:
        async with request.form(max_files=16, max_fields=200, max_part_size=2**20) as form:
            for name, value in form.multi_items():
                content = await value.read() if isinstance(value, UploadFile) else value
                name = name.removesuffix("[]")
                if name == "image" and "image" in fields:
                    raise bad("this model begins from one picture, not from several", "image")
                fields[name] = content
    except HTTPException as error:
        raise Refused(400, "invalid_form", str(error.detail)) from error
    for name in ("image", "mask"):
        if isinstance(fields.get(name), str):
            fields[name] = decode(name, fields[name])
    return fields


def first_picture(fields: Mapping[str, Any]) -> bytes:
    """The bytes of the picture to begin with. Raises Refused."""
    data = fields.get("image")
    if not isinstance(data, bytes):
        raise Refused(400, "missing_required_parameter", "there is no image", param="image")
    return data


def output_format(fields: Mapping[str, Any]) -> tuple[str, int]:
    """(name of the format, quality)."""
    name = _choice(fields, "output_format", tuple(FORMATS))
    quality = fields.get("output_compression", 100)
    if isinstance(quality, str) and quality.isdigit():
        quality = int(quality)
    if quality is not None and (type(quality) is not int or not 0 <= quality <= 100):
        raise bad("output_compression must be from 0 to 100", "output_compression")
    return name, 95 if quality is None else quality


def _choice(fields: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = fields.get(name) or choices[0]
    if value not in choices:
        raise bad(f"{name} must be one of {', '.join(choices)} (got {value!r:.60})", name)
    return str(value)


def converted(png: bytes, form: tuple[str, int]) -> bytes:
    """A PNG in another format, with AUTOMATIC1111's text in its EXIF."""
    name, quality = form
    if FORMATS[name] == "PNG":
        return png
    image, file = read_image(png), io.BytesIO()
    exif = Image.Exif()
    if text := read_texts(png).get("parameters"):
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    image.save(file, FORMATS[name], quality=quality, exif=exif)
    return file.getvalue()


def _prompt_of(data: bytes) -> str:
    """The prompt that a picture carries; empty if it carries none."""
    from diffgen.generation.record import read_picture_info

    try:
        return read_picture_info(data).prompt or ""
    except DiffgenError:
        return ""
