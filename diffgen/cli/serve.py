"""diffgen serve: make pictures over HTTP, on a page and for other programs."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import UsageError
from diffgen.pipelines.inputs import offload_name, quantize_name

from . import models as models_
from .options import MACHINE, Dtype, Offline, option
from .output import Debug, Json, Output, Quiet, refuse_empty

EXAMPLES = """
Examples:

  diffgen serve

  diffgen serve -m emoji -o gallery/ --port 8000 --open

  diffgen serve --host 0.0.0.0 --api-key @key.txt --allow-host pictures.example.org
"""

SERVER, LIMITS, MODELS = "Server", "Limits", "Models"
Texts = list[str] | None


def serve(
    model: Annotated[
        Texts,
        option(MODELS, "Name, path, or hub id; may be repeated. \\[emoji]", "--model", "-m", metavar="NAME|PATH|ID"),
    ] = None,
    loras: Annotated[str | None, option(MODELS, "Folder of LoRAs that clients may name.", metavar="FOLDER")] = None,
    embeddings: Annotated[str | None, option(MODELS, "Folder of embeddings, likewise.", metavar="FOLDER")] = None,
    wildcards: Annotated[str | None, option(MODELS, "Folder of wildcard files.", metavar="FOLDER")] = None,
    host: Annotated[
        str, option(SERVER, "Address to listen on; others than this machine's need a key.", metavar="IP", default=True)
    ] = "127.0.0.1",
    port: Annotated[int, option(SERVER, "Port; 0: any that is free.", metavar="N", default=True)] = 7860,
    out: Annotated[
        str | None,
        option(SERVER, "Folder of the pictures. \\[outputs]", "--out", "-o", "--output", metavar="FOLDER"),
    ] = None,
    gallery: Annotated[
        bool, option(SERVER, "Keep no pictures after the server ends.", "--gallery/--no-gallery", metavar="")
    ] = True,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY|@FILE",
            help="Key that every request must bring.",
            envvar="DIFFGEN_API_KEY",
            show_envvar=False,
            rich_help_panel=SERVER,
        ),
    ] = None,
    allow_host: Annotated[
        Texts, option(SERVER, "Another name of this server; may be repeated.", metavar="NAME[:PORT]")
    ] = None,
    allow_origin: Annotated[
        Texts, option(SERVER, "Site that may use this server; may be repeated.", metavar="URL")
    ] = None,
    insecure: Annotated[bool, option(SERVER, "Serve other machines without a key.", "--insecure", metavar="")] = False,
    open_page: Annotated[bool, option(SERVER, "Open the page in a browser.", "--open", metavar="")] = False,
    batch: Annotated[int, option(LIMITS, "Pictures at once, of all clients.", metavar="N", default=True)] = 8,
    exact: Annotated[
        bool, option(LIMITS, "Make every picture alone: the same bits as generate.", "--exact", metavar="")
    ] = False,
    queue: Annotated[int, option(LIMITS, "Jobs that may wait.", metavar="N", default=True)] = 64,
    max_pixels: Annotated[int, option(LIMITS, "Pixels of a picture.", metavar="N", default=True)] = 4 * 2**20,
    max_steps: Annotated[int, option(LIMITS, "Steps of a picture.", metavar="N", default=True)] = 150,
    max_count: Annotated[int, option(LIMITS, "Pictures of a request.", metavar="N", default=True)] = 10,
    max_body: Annotated[str, option(LIMITS, "Size of a request.", metavar="BYTES", default=True)] = "32M",
    job_timeout: Annotated[
        float, option(LIMITS, "Longest time of a request in the model.", metavar="SECONDS", default=True)
    ] = 600.0,
    size_policy: Annotated[
        str,
        option(
            LIMITS,
            "fit: make pictures that OpenAI's and A1111's clients ask for too large at a size that suits the model.",
            metavar="fit|exact",
            default=True,
        ),
    ] = "fit",
    device: Annotated[
        Texts,
        option(
            MACHINE,
            "Where to compute; repeated: a worker on each. \\[auto]",
            metavar="auto|cpu|cuda[:N]|mps|xpu",
        ),
    ] = None,
    dtype: Dtype = "auto",
    offload: Annotated[str, option(MACHINE, "model or sequential saves GPU memory. \\[none]", metavar="NAME")] = "none",
    quantize: Annotated[
        str, option(MACHINE, "In 8 or 4 bits: int8, fp8, nf4, fp8-storage. \\[none]", metavar="NAME")
    ] = "none",
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """A page for people at /, OpenAI's Images API at /v1, AUTOMATIC1111's API at /sdapi/v1, and an API of its own.

    Only this machine can connect unless --host and a key say otherwise. SIGTERM and Ctrl-C end the server.
    """
    say = Output("serve", json, quiet)
    refuse_empty({"model": model, "out": out, "loras": loras, "embeddings": embeddings, "wildcards": wildcards}, {})
    missing = [name for name in ("starlette", "uvicorn", "python_multipart") if find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}", "pip install 'diffgen[serve]'")
    from diffgen.serve.settings import SIZE_POLICIES, Settings, check_exposure, is_loopback, read_key, weights_in

    key = read_key(api_key)
    check_exposure(host, key, insecure)
    for name, value, least in (
        ("--batch", batch, 1),
        ("--queue", queue, 1),
        ("--max-pixels", max_pixels, 64),
        ("--max-steps", max_steps, 1),
        ("--max-count", max_count, 1),
        ("--job-timeout", job_timeout, 1),
    ):
        if value < least:
            raise UsageError(f"{name} must be at least {least} (got {value:g})")
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535 (got {port})")
    if size_policy not in SIZE_POLICIES:
        raise UsageError(f"--size-policy must be one of {', '.join(SIZE_POLICIES)} (got {size_policy!r})")
    devices = [device_name(name) for name in device or ["auto"]]
    settings = Settings(
        host=host,
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(origin.rstrip("/") for origin in allow_origin or ()),
        key=key,
        batch=batch,
        queue=queue,
        max_pixels=max_pixels,
        max_steps=max_steps,
        max_count=max_count,
        max_body=_bytes(max_body),
        job_timeout=job_timeout,
        exact=exact,
        size_policy=size_policy,
        loras=weights_in(loras, "--loras"),
        embeddings=weights_in(embeddings, "--embeddings"),
        wildcards=(wildcards,) if wildcards is not None else (),
    )
    environment.prepare(offline)
    sources = [models_.offer_pull(name, say, offline) for name in (model or (None,))]
    if len({source.name for source in sources}) < len(sources):
        raise UsageError("two models have one name", "give them names in the list of models")
    from diffgen.serve import app

    listener = app.listen(host, port)
    number = listener.getsockname()[1]
    shown = "localhost" if is_loopback(host) and host != "::1" else f"[{host}]" if ":" in host else host
    url = f"http://{'127.0.0.1' if shown == 'localhost' else shown}:{number}"
    folder = (out or "outputs").rstrip("/\\") if gallery else None

    def ready(server: Any) -> None:
        names = ", ".join(server.facts.models)
        where = f"{folder}{os.sep}" if folder else "memory until the server ends"
        result = {"url": url, "model": server.default.name, "models": list(server.facts.models), "out": folder}
        say.result(result, [f"{url}  model {names}  pictures in {where}"])
        if open_page:
            import webbrowser

            webbrowser.open(url)

    app.serve(
        sources,
        settings,
        listener,
        folder,
        devices,
        dtype_name(dtype),
        {"offload": offload_name(offload), "quantize": quantize_name(quantize)},
        ready,
    )


def _bytes(text: str) -> int:
    """A number of bytes: 4096, 512K, 32M, 1G. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,12})([KMG]?)", text.strip().upper())
    if match is None or not int(match[1]):
        raise UsageError(f"--max-body must be a number of bytes, such as 32M (got {text!r})")
    return int(match[1]) * 1024 ** " KMG".index(match[2] or " ")
