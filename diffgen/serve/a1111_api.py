"""AUTOMATIC1111's /sdapi/v1: what the programs that speak it send and read."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Mapping
from typing import Any

from PIL import ImageOps
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import schedulers
from diffgen.errors import InputError
from diffgen.images.metadata import SCHEDULE_TYPES, parameters_text
from diffgen.images.read import read_texts
from diffgen.version import __version__

from .answers import finished
from .fields import bad, decode, load_json, picture, read_fields
from .gallery import Entry
from .jobs import FINISHED, Job
from .server import Server, random_seed
from .settings import Refused

# Their name: ours. Everything else that clients send is read below, or ignored.
NAMES = {
    "prompt": "prompt",
    "negative_prompt": "negative",
    "seed": "seed",
    "steps": "steps",
    "cfg_scale": "guidance",
    "denoising_strength": "strength",
    "tiling": "tile",
    "clip_skip": "clip_skip",
    "styles": "style",
    "exact": "exact",
}
AUTOMATIC = ("automatic", "use same scheduler", "")
GRIDS = {label.lower(): grid for grid, label in reversed(SCHEDULE_TYPES.items())}
UPSCALERS = {"latent": "latent", "lanczos": "lanczos"}
EMPTY_LISTS = (
    *("sd-vae", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "extensions"),
    "sd-modules",
)
DONE = ("skip", "refresh-checkpoints", "refresh-loras", "refresh-vae", "unload-checkpoint", "reload-checkpoint")
MISSING = ("extra-single-image", "extra-batch-images", "interrogate")


class A1111Api:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.chosen = server.default.name  # by POST options, as in AUTOMATIC1111 for everybody
        self.tasks: dict[str, Job] = {}

    def routes(self) -> list[Route]:
        def get(path: str, content: Any) -> Route:
            async def endpoint(request: Request) -> Response:
                return JSONResponse(content() if callable(content) else content)

            return Route(f"/sdapi/v1/{path}", endpoint)

        async def nothing(request: Request) -> Response:
            return JSONResponse({})

        async def missing(request: Request) -> Response:
            raise Refused(501, "not_implemented", "this server does not do that")

        return [
            Route("/sdapi/v1/txt2img", self.txt2img, methods=["POST"]),
            Route("/sdapi/v1/img2img", self.img2img, methods=["POST"]),
            Route("/sdapi/v1/progress", self.progress),
            Route("/sdapi/v1/interrupt", self.interrupt, methods=["POST"]),
            Route("/sdapi/v1/options", self.set_options, methods=["POST"]),
            Route("/sdapi/v1/png-info", self.png_info, methods=["POST"]),
            get("options", self.options),
            get("sd-models", self.models),
            get("samplers", samplers),
            get("schedulers", grids),
            get("loras", self.loras),
            get("embeddings", self.embeddings),
            get("upscalers", [_upscaler("None"), _upscaler("Lanczos")]),
            get("latent-upscale-modes", [{"name": "Latent"}]),
            get("scripts", {"txt2img": [], "img2img": []}),
            get("script-info", []),
            get("cmd-flags", {"api": True}),
            get("memory", {"ram": {}, "cuda": {}}),
            *(get(name, []) for name in EMPTY_LISTS),
            *(Route(f"/sdapi/v1/{name}", nothing, methods=["POST"]) for name in DONE),
            *(Route(f"/sdapi/v1/{name}", missing, methods=["POST"]) for name in MISSING),
        ]

    # --- Pictures ---

    async def txt2img(self, request: Request) -> Response:
        return await self.make(request, load_json(await request.body()), ())

    async def img2img(self, request: Request) -> Response:
        fields = load_json(await request.body())
        images = fields.get("init_images")
        if not isinstance(images, list) or not images:
            raise Refused(404, "HTTPException", "Init image not found")
        return await self.make(request, fields, tuple(images))

    async def make(self, request: Request, fields: dict[str, Any], images: tuple[Any, ...]) -> Response:
        fields = {name: value for name, value in random_seed(fields).items() if value is not None}
        overrides = fields.get("override_settings")
        overrides = overrides if isinstance(overrides, dict) else {}
        model = self.server.model(self.model_name(overrides.get("sd_model_checkpoint", self.chosen)))
        settings = self.server.settings
        ours = {NAMES[name]: value for name, value in fields.items() if name in NAMES and value not in ("", [])}
        if not images and not fields.get("enable_hr"):
            ours.pop("strength", None)
        ours |= scheduler_of(fields)
        ours["count"] = _times(fields)
        if "clip_skip" not in ours and overrides.get("CLIP_stop_at_last_layers") is not None:
            ours["clip_skip"] = overrides["CLIP_stop_at_last_layers"]
        if ours.get("clip_skip") in (0, "0"):
            del ours["clip_skip"]
        if fields.get("subseed_strength") and isinstance(fields.get("subseed"), int) and fields["subseed"] >= 0:
            ours |= {"variation_seed": fields["subseed"], "variation_strength": fields["subseed_strength"]}
        if fields.get("enable_hr") and not images:
            ours |= _second_pass(fields)
            ours.pop("strength", None)
        wanted = read_fields(ours, settings)
        size = (fields.get("width"), fields.get("height"))
        if all(type(side) is int and 1 <= side <= 8192 for side in size):
            wanted.options["size"] = size
        elif size != (None, None):
            raise bad("width and height must be whole numbers from 1 to 8192", "width")
        if images:
            await self.begin(wanted, fields, images[0])
            self.server.fit_picture(wanted, wanted.options["image"].image.size, model)
        else:
            self.server.fit(wanted, wanted.options.pop("size", None), model)
        task = fields.get("force_task_id")
        job = await self.server.submit(request, wanted, model)
        if isinstance(task, str):
            self.tasks = {name: job for name, job in self.tasks.items() if job.status not in FINISHED}
            self.tasks[task] = job
        await finished(request, self.server.dispatcher, job)
        return JSONResponse(await self.answer(job, fields))

    async def begin(self, wanted: Any, fields: Mapping[str, Any], image: Any) -> None:
        """Add the picture to begin with, and the mask, to what is wanted."""
        settings = self.server.settings
        try:
            data = decode("init_images", image)
            wanted.options["image"] = await asyncio.to_thread(picture, "image", data, settings)
            if isinstance(fields.get("mask"), str):
                data = decode("mask", fields["mask"])
                sent = await asyncio.to_thread(picture, "mask", data, settings, "L")
                mask = sent.image.resize(wanted.options["image"].image.size)
                wanted.options["mask"] = ImageOps.invert(mask) if fields.get("inpainting_mask_invert") else mask
        except InputError as error:
            raise Refused(500, "HTTPException", f"Invalid encoded image: {error.message}") from error

    async def answer(self, job: Job, fields: Mapping[str, Any]) -> dict[str, Any]:
        pngs = [await asyncio.to_thread(self.server.gallery.read, entry) for entry in job.entries]
        records = [await asyncio.to_thread(self.server.gallery.record, entry) for entry in job.entries]
        sent = [base64.b64encode(png).decode() for png in pngs] if fields.get("send_images", True) else []
        parameters = {name: value for name, value in fields.items() if name not in ("init_images", "mask")}
        return {"images": sent, "parameters": parameters, "info": json.dumps(self.info(job, job.entries, records))}

    def info(self, job: Job, entries: list[Entry], records: list[dict[str, Any]]) -> dict[str, Any]:
        """The keys of AUTOMATIC1111's `info`, which it sends as a string."""
        plan = job.plan
        first = records[0] if records else {}
        seeds = [entry.about["seed"] for entry in entries]
        variation = first.get("variation") or {}
        width, height = plan.final_size
        return {
            "prompt": first.get("prompt", ""),
            "all_prompts": [record["prompt"] for record in records],
            "negative_prompt": first.get("negative", ""),
            "all_negative_prompts": [record.get("negative", "") for record in records],
            "seed": seeds[0] if seeds else -1,
            "all_seeds": seeds,
            "subseed": variation.get("seed", -1),
            "all_subseeds": [variation.get("seed", -1)] * len(seeds),
            "subseed_strength": variation.get("strength", 0),
            "width": width,
            "height": height,
            "sampler_name": schedulers.info(plan.scheduler).a1111 or plan.scheduler,
            "cfg_scale": plan.guidance,
            "steps": plan.steps,
            "batch_size": len(entries),
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": plan.model.name,
            "sd_model_hash": self.server.dispatcher.hashes.get(plan.model.name, "")[:10],
            "denoising_strength": first.get("strength"),
            "extra_generation_params": {},
            "index_of_first_image": 0,
            "infotexts": [parameters_text(record) for record in records],
            "styles": first.get("styles") or [],
            "job_timestamp": _timestamp(job.created),
            "clip_skip": first.get("clip_skip", 1),
            "is_using_inpainting_conditioning": False,
            "version": f"diffgen {__version__}",
            "warnings": job.warnings,
        }

    async def progress(self, request: Request) -> Response:
        """The progress of the task `id_task`, else of what is running; exactly 0 if nothing is."""
        task = request.query_params.get("id_task")
        running = self.server.dispatcher.running
        job = self.tasks.get(task) if task is not None else running[0] if running else None
        if job is not None and job.status in FINISHED:
            job = None
        skip = request.query_params.get("skip_current_image", "").lower() in ("true", "1")
        if job is not None and not skip:
            self.server.dispatcher.watch(job)
        step, steps = (job.step, job.steps) if job is not None else (0, 0)
        share = step / steps if steps else 0.0
        seconds = time.time() - job.begun if job is not None and job.begun else 0.0
        preview = job.preview if job is not None and not skip else None
        state = {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": "" if job is None else task or job.id,
            "job_count": 0 if job is None else 1,
            "job_timestamp": "0" if job is None else _timestamp(job.created),
            "job_no": 0,
            "sampling_step": step,
            "sampling_steps": steps,
        }
        content = {
            "progress": round(min(share, 0.99), 4),
            "eta_relative": round(seconds / share - seconds, 2) if share else 0.0,
            "state": state,
            "current_image": None if preview is None else base64.b64encode(preview).decode(),
            "textinfo": "Waiting..." if job is not None and job.status == "queued" else None,
            "current_task": None if job is None else task or job.id,
        }
        return JSONResponse(content)

    async def interrupt(self, request: Request) -> Response:
        """Cancel the task `id_task`, else what is running for this client's address."""
        task = request.query_params.get("id_task")
        address = request.client.host if request.client else ""
        for job in self.server.dispatcher.running:
            own = self.tasks.get(task) is job if task is not None else job.client[0] == address  # type: ignore[index]
            if own:
                self.server.dispatcher.cancel(job)
        return JSONResponse({})

    async def png_info(self, request: Request) -> Response:
        image = load_json(await request.body()).get("image")
        try:
            texts = await asyncio.to_thread(read_texts, decode("image", image))
        except InputError as error:
            raise Refused(500, "HTTPException", f"Invalid encoded image: {error.message}") from error
        return JSONResponse({"info": texts.get("parameters", ""), "items": texts, "parameters": _pairs(texts)})

    # --- Lists ---

    def model_name(self, title: Any) -> str:
        """The name in a title, which may end in the hash, [1234abcd]."""
        return re.sub(r"\s*\[\w+\]$", "", str(title))

    def title(self, name: str) -> str:
        digest = self.server.dispatcher.hashes.get(name, "")[:10]
        return f"{name} [{digest}]" if digest else name

    def options(self) -> dict[str, Any]:
        checkpoint = self.title(self.chosen)
        return {
            "sd_model_checkpoint": checkpoint,
            "sd_checkpoint_hash": self.server.dispatcher.hashes.get(self.chosen, ""),
            "sd_vae": "Automatic",
            "samples_format": "png",
            "samples_save": True,
            "CLIP_stop_at_last_layers": 1,
            "live_previews_enable": True,
            "show_progress_every_n_steps": 1,
        }

    async def set_options(self, request: Request) -> Response:
        title = load_json(await request.body()).get("sd_model_checkpoint")
        if title is not None:
            self.chosen = self.server.model(self.model_name(title)).name
        return JSONResponse(None)

    def models(self) -> list[dict[str, Any]]:
        hashes = self.server.dispatcher.hashes
        return [
            {
                "title": self.title(name),
                "model_name": name,
                "hash": hashes.get(name, "")[:10] or None,
                "sha256": hashes.get(name),
                "filename": f"{name}.safetensors",
                "config": None,
            }
            for name in self.server.facts.models
        ]

    def loras(self) -> list[dict[str, Any]]:
        names = self.server.settings.loras
        return [{"name": name, "alias": name, "path": names[name].name, "metadata": {}} for name in names]

    def embeddings(self) -> dict[str, Any]:
        empty = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 0, "vectors": 0}
        return {"loaded": dict.fromkeys(self.server.settings.embeddings, empty), "skipped": {}}


def samplers() -> list[dict[str, Any]]:
    """The solvers that run in a pipeline, by AUTOMATIC1111's labels where it has one."""
    solvers = [schedulers.info(name) for name in schedulers.names()]
    return [
        {"name": solver.a1111 or solver.name, "aliases": [solver.name, *solver.aliases], "options": {}}
        for solver in solvers
        if not solver.native_only and not solver.upwards
    ]


def grids() -> list[dict[str, Any]]:
    """The grids, by AUTOMATIC1111's labels where it has one."""
    common = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
    named = [{"name": name, "label": SCHEDULE_TYPES.get(name, name), **common} for name in schedulers.grid_names()]
    return [{"name": "automatic", "label": "Automatic", **common}, *named]


def scheduler_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our scheduler and grid from theirs: "DPM++ 2M" and "Karras", or "DPM++ 2M Karras". Raises Refused."""
    ours: dict[str, Any] = {}
    sampler = fields.get("sampler_name") or fields.get("sampler_index")
    if sampler:
        try:
            schedulers.resolve(str(sampler))
        except ValueError as error:
            raise Refused(404, "HTTPException", f"Sampler not found: {error}") from error
        ours["scheduler"] = str(sampler)
    grid = str(fields.get("scheduler") or "").strip()
    if grid.lower() not in AUTOMATIC:
        name = GRIDS.get(grid.lower(), grid)
        if name not in schedulers.grid_names():
            try:
                name = schedulers.check_grid(name) if re.fullmatch(r"[\w ]+", name) else ""
            except ValueError:
                name = ""
        if not name:
            raise Refused(404, "HTTPException", f"Scheduler not found: {grid!r:.60}")
        ours["grid"] = name
    return ours


def _times(fields: Mapping[str, Any]) -> int:
    count = 1
    for name in ("batch_size", "n_iter"):
        value = fields.get(name, 1)
        if type(value) is not int or not 1 <= value <= 10**6:
            raise bad(f"{name} must be a whole number above 0", name)
        count *= value
    return count


def _second_pass(fields: Mapping[str, Any]) -> dict[str, Any]:
    mode = str(fields.get("hr_upscaler") or "Lanczos").partition(" ")[0].lower()
    ours = {"upscale": fields.get("hr_scale") or 2, "upscale_mode": UPSCALERS.get(mode, "lanczos")}
    if fields.get("denoising_strength"):
        ours["upscale_strength"] = fields["denoising_strength"]
    return ours


def _pairs(texts: Mapping[str, str]) -> dict[str, str]:
    """The key: value pairs in the last line of AUTOMATIC1111's text."""
    last = texts.get("parameters", "").rpartition("\n")[2]
    return dict(re.findall(r'([\w ]+): ("(?:\\.|[^"])*"|[^,]*)(?:, |$)', last))


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))


def _upscaler(name: str) -> dict[str, Any]:
    return {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}
