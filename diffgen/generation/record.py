"""The record that every picture carries as JSON: all that is needed to make the picture again.

    prompt, negative        as the model read them: styles applied, choices made
    seed, index             of the picture; its number among those of its prompt
    steps, nfe              of the grid; evaluations of the network, counted
    guidance, scheduler, scheduler_options, grid
    width, height           of the picture, after a second pass if there was one
    model, model_hash, model_files {name: SHA-256}, family, prediction
    device, dtype, threads, batch_size, rng, versions {package: version}
    pixels_sha256           of the RGB bytes
    warnings                about the picture

and, where they apply:

    grid_sha256                   of a grid that is a file
    grid_from                     "model": the tuned grid that the model selects automatically
    template, negative_template   the prompts before their choices were made
    styles                        [name], already applied to the prompts
    refiner_hash                  as model_hash
    components                    [{part, name, sha256}] of parts that were files of their own
    quantize                      int8, fp8, nf4, fp8-storage: the weights have eight or four bits
    memory                        what was done to fit: {batch_size, vae_tiling, vae_dtype, offload}, or {}
    training_step, training_data  of a run
    cut                           the keys that did not fit into the file
    …                             each option of `options.OPTIONS` that is not neutral, at its row's key

No path goes in, only base names.
"""

from __future__ import annotations

import functools
import json
import platform
from typing import TYPE_CHECKING, Any

from diffgen.errors import InputError
from diffgen.images.metadata import MAX_CHUNK, SCHEMA, label_of
from diffgen.images.read import Source, read_carried, read_texts
from diffgen.images.readers import read_tool_metadata
from diffgen.images.readers.picture_info import PictureInfo
from diffgen.version import __version__

from . import recorded
from .grid_files import grid_file
from .model import Loaded
from .options import OPTIONS, read_options, words_of
from .plan import Shot
from .recorded import Fits, Record, number, whole

if TYPE_CHECKING:
    from schedulers.scheduler import Scheduler

CHECKS: dict[str, Fits] = {
    "prompt": recorded.text,
    "negative": recorded.text,
    "seed": whole(0, 2**64 - 1),
    "index": whole(0, 10**9),
    "steps": whole(1, 10_000),
    "nfe": whole(1, 1_000_000),
    "guidance": number(-1000, 1000),
    "scheduler": recorded.name,
    "scheduler_options": lambda value: isinstance(value, dict),
    "grid": recorded.name,
    "grid_sha256": recorded.sha256,
    "grid_from": lambda value: value == "model",
    "width": whole(1, 8192),
    "height": whole(1, 8192),
    "model": recorded.name,
    "model_hash": recorded.sha256,
    "pixels_sha256": recorded.sha256,
    "batch_size": whole(1, 4096),
    "threads": whole(1, 100_000),
    "versions": lambda value: isinstance(value, dict),
    "model_files": lambda value: isinstance(value, dict),
    "prediction": recorded.name,
    "warnings": lambda value: isinstance(value, list),
    "template": recorded.text,
    "negative_template": recorded.text,
    "styles": recorded.texts,
    "refiner_hash": recorded.sha256,
    "quantize": recorded.name,
    "components": recorded.files({"part": recorded.name}),
    "memory": lambda value: isinstance(value, dict),
    "cut": recorded.texts,
    **{option.record: option.possible for option in OPTIONS.values() if option.record},
}


@functools.cache
def installed_version(package: str) -> str:
    """The version of an installed package. Reading it takes longer than an evaluation of a small network."""
    from importlib.metadata import version  # imports the package email

    return version(package)


def record_of(
    loaded: Loaded, shot: Shot, scheduler: Scheduler, nfe: int, batch_size: int, **more: Any
) -> dict[str, Any]:
    """The record of any picture, except the hash of its pixels; `more` is what this kind of model adds.

    `nfe` evaluations of the network, counted, made it in a batch of `batch_size` pictures.
    """
    plan = shot.plan
    versions = {"diffgen": __version__, "python": platform.python_version(), "torch": installed_version("torch")}
    record = {
        "schema": SCHEMA,
        "prompt": shot.prompt,
        "negative": "",
        "seed": shot.seed,
        "index": shot.index,
        "steps": plan.steps,
        "nfe": nfe,
        "guidance": plan.guidance,
        "scheduler": scheduler.name,
        "scheduler_options": scheduler.options,
        "grid": scheduler.grid_name,
        **grid_file(plan.grid),
        "width": plan.width,
        "height": plan.height,
        "model": loaded.model.name,
        "model_hash": loaded.model_hash,
        "prediction": loaded.prediction,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "rng": "CPU",
        "warnings": plan.warnings(shot.prompt),
    }
    return record | more | {"versions": versions | more.get("versions", {})}


def read_record(path: Source) -> dict[str, Any]:
    """Read the record in a picture's file and check that its values are possible; only that is promised.

    Raises InputError: no picture, no record, not our schema, a value out of range.
    """
    name = "the picture" if isinstance(path, bytes) else path
    text = read_texts(path).get("diffgen")
    if text is None:
        hint = "only PNG files that diffgen wrote with --metadata full do"
        raise InputError(f"{name} has no record of how it was made", hint)
    if len(text) > MAX_CHUNK:
        raise InputError(f"the record in {name} is too long: {len(text)} bytes, at most {MAX_CHUNK}")
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair could not even be printed
    except (ValueError, RecursionError) as error:
        raise InputError(f"the record in {name} is broken: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InputError(f"the record in {name} is not of the schema {SCHEMA}")
    for key, fits in CHECKS.items():
        if record.get(key) is not None and not fits(record[key]):
            raise InputError(f"the record in {name} has an impossible {key}: {str(record[key])[:80]!r}")
    return record


def read_picture_info(path: Source) -> PictureInfo:
    """How the picture in a file was made: by our own record, else by another tool's metadata.

    Raises InputError: no picture, nothing in it about that, or broken.
    """
    carried = read_carried(path)
    return of_record(read_record(path)) if "diffgen" in carried.texts else read_tool_metadata(path, carried)


def of_record(record: Record) -> PictureInfo:
    """A checked record (`read_record`) as what `inspect` prints, with every option of the command."""
    upscale = record.get("upscale")
    info = PictureInfo(
        "diffgen",
        prompt=record.get("prompt"),
        negative=record.get("negative"),
        seed=record.get("seed"),
        steps=record.get("steps"),
        guidance=record.get("guidance"),
        scheduler=record.get("scheduler"),
        grid=record.get("grid"),
        width=record.get("width"),
        height=record.get("height"),
        first_size=tuple(upscale["from"]) if upscale else None,
        model=record.get("model"),
        label=label_of(record.get("scheduler") or "", record.get("scheduler_options") or {}) or None,
        given_grid=None if record.get("grid_from") == "model" else record.get("grid"),
        syntax="ours",
        cpu_noise=True,
    )
    if not of_run(record):
        info.more = words_of(read_options(record, "prompts", Names()))
        of_file = any(":" not in name for name in record.get("model_files") or ())  # folders' are part:name
        unclear = of_file and (record.get("family") == "sd2" or record.get("prediction") == "v_prediction")
        for key in ("prediction", "quantize"):
            if record.get(key) and (unclear or key == "quantize"):
                info.more += [f"--{key}", record[key]]
    if record.get("cut"):
        info.notes.append("the record was too long for the file, and is not complete")
    return info


def of_run(record: Record) -> bool:
    """Whether a run of `diffgen train` made the picture, not a pipeline."""
    return bool(record.get("family") == "run")


class Names:
    """`recorded.Files` for a command that is only printed: names in place of paths."""

    def picture(self, what: str, entry: Record, mode: str) -> str:
        return entry["name"] or f"{what.upper()}.png"

    def file(self, what: str, entry: Record) -> str:
        return str(entry["name"])

    def control_model(self, entry: Record) -> str:
        return str(entry["model"])

    def refiner(self, record: Record) -> str:
        return str(record["refiner"])
