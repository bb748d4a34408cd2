"""Make a picture again from its record: find the model by its hash, run the same plan, compare the pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffgen import devices
from diffgen.errors import InputError, InvalidOutput, UsageError
from diffgen.generation.options import read_options
from diffgen.generation.plan import Plan
from diffgen.generation.record import of_run, read_record
from diffgen.generation.recorded import Record
from diffgen.images.metadata import label_of
from diffgen.images.pixels import pixels_sha256
from diffgen.images.read import read_image, read_kind
from diffgen.loading import load, make_plan
from diffgen.models import gate
from diffgen.models.by_hash import find_by_hash, known_models, network_hash
from diffgen.models.families import FAMILIES, REFINERS
from diffgen.models.find import Model, as_recorded, find, with_components
from diffgen.pipelines import inputs
from diffgen.training.run import read_run, read_state
from schedulers.explicit import is_grid_file

MAX_THREADS = 4 * (os.cpu_count() or 1)
MAX_COPIES = 64
SMALL = 2**20  # pixels that a record may ask for, however few the file has
PICTURES = {"image": "the picture to begin with", "mask": "the mask", "reference": "the reference", "map": "the map"}
COMPARED = ("diffgen", "torch", "diffusers", "transformers")  # of the versions


@dataclass(frozen=True)
class Reproduction:
    """The picture made again, its record, and how it differs from the one in the file."""

    image: Image.Image
    record: dict[str, Any]
    max_difference: int | None  # of a value 0 … 255; None for pictures of different sizes
    differing_pixels: int | None
    reason: str | None  # None if they are identical

    @property
    def identical(self) -> bool:
        return self.reason is None


class Files:
    """Finds the files that a picture was made from by their hashes: among those of the user, then among those of the
    recorded name beside the picture and in the current folder. All methods raise InputError if there is none."""

    def __init__(self, candidates: Iterable[str | os.PathLike[str]], picture: Path, model: Path) -> None:
        self.candidates = [Path(candidate) for candidate in candidates]
        self.folders = list(dict.fromkeys((picture.parent, Path())))
        self.model = model  # its folder
        self._hashes: dict[Path, str] = {}
        for path in self.candidates:
            if not path.exists():
                raise InputError(f"there is no file {path}")

    def file(self, what: str, entry: Record, *more: Path) -> Path:
        """The file of {name, sha256}, perhaps one of `more`."""
        name, sha256 = entry["name"], entry["sha256"]
        others = []
        for path in [*self._paths(name), *more]:
            if path.is_file():
                if self._hash(path) == sha256:
                    return path
                others.append(path)
        raise _missing(what, name, sha256, others)

    def picture(self, what: str, entry: Record, mode: str) -> Path:
        """The picture of {name, sha256}: the hash is of its pixels if it was no file."""
        what = PICTURES[what]
        if entry.get("name") is not None:
            return self.file(what, entry)
        for path in self.candidates:
            if path.is_file() and pixels_sha256(read_image(path, mode)) == entry["sha256"]:
                return path
        raise _missing(what, None, entry["sha256"], [])

    def control_model(self, entry: Record) -> Path:
        """The ControlNet, a folder or a file; the hash is of its weights."""
        others = []
        for path in [
            *self._paths(entry["model"]),
            self.model / "controlnet" / entry["kind"],
            self.model / "transformer",
        ]:
            try:
                if path.exists() and inputs.weights_sha256(path) == entry["model_sha256"]:
                    return path
            except InputError:  # no weights
                continue
            if path.exists():
                others.append(path)
        raise _missing(f"the ControlNet for {entry['kind']}", entry["model"], str(entry.get("model_sha256")), others)

    def refiner(self, record: Record) -> str:
        """The path or name of the refiner; models that have a name here are searched too."""
        sha256 = record.get("refiner_hash", "")
        for path in map(str, self.candidates):
            try:
                if (candidate := find(path)).family in REFINERS and network_hash(candidate) == sha256:
                    return path
            except InputError:  # no model
                continue
        model = next(filter(None, (find_by_hash(sha256, family) for family in REFINERS)), None)
        if model is None:
            raise InputError(
                f"the refiner {record['refiner']!r} (SHA-256 {sha256[:10]}…) is not among the listed and cached models",
                "give it with --file PATH",
            )
        return f"{model.name}@{model.revision}" if model.source == "cache" else model.name

    def _paths(self, name: str | None) -> list[Path]:
        beside = [folder / name for folder in self.folders] if name and name not in (".", "..") else []
        return [*self.candidates, *beside]

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = gate.sha256_of(path)
        return self._hashes[path]


def reproduce(
    path: str | os.PathLike[str],
    model: str | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    device: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Reproduction:
    """Make the picture in a file again, from the record that it carries.

    model   a name as `find` takes it, where the model is not among the bundled, listed and cached ones
    files   what the picture was made from, if it is neither beside it nor in the current folder
    device  None: the recorded one if it is here
    Raises InputError: no record, or one that is cut; a model or file that is not here, or another one than it was.
    InvalidOutput where the picture comes out wrong, OutOfMemory.
    """
    path = Path(path)
    record = read_record(path)
    if cut := sorted({*record.get("cut", ())} - {"warnings", "model_files", "versions", "template"}):
        raise InputError(f"the record in {path} was too long for the file: {', '.join(map(str, cut))} is not complete")
    missing = [key for key in ("prompt", "seed", "steps", "guidance", "scheduler", "grid", "width", "height",
                               "model_hash", "pixels_sha256") if record.get(key) is None]  # fmt: skip
    if missing:
        raise InputError(f"the record in {path} does not say its {', '.join(missing)}")
    _check_size(path, (record["width"], record["height"]))
    loadable, checkpoint = _model(record, model, path)
    places = Files(files, path, loadable.folder)
    parts = [f"{part['part']}={places.file(part['part'], part)}" for part in record.get("components") or ()]
    loadable = with_components(loadable, parts)
    plan = _plan(record, loadable, places)
    _check_size(path, (plan.width, plan.height))  # of the first pass
    _check_size(path, plan.final_size)
    generator = _load(record, loadable, checkpoint, device)
    if generator.model_hash != record["model_hash"]:
        raise _other_model(loadable, generator.model_hash, record)
    picture = next(iter(generator.pictures(plan, on_step, fill=True)))
    if picture.image is None:
        raise picture.error or InvalidOutput("no picture")
    return _compared(path, record, picture.image, picture.record)


def _check_size(path: Path, size: tuple[int, int]) -> None:
    """Raise InputError if a picture's record asks for more pixels than the picture has, which costs time and memory."""
    width, height, _ = read_kind(path)
    if size[0] * size[1] > max(width * height, SMALL):
        recorded = f"{size[0]}x{size[1]}"
        raise InputError(f"{path} has {width}x{height} pixels, its record says {recorded}: it was changed since")


def _model(record: Record, name: str | None, path: Path) -> tuple[Model, Path | None]:
    """(the model that made the picture, the checkpoint of a run)."""
    from_run = of_run(record)
    if name is not None:
        model = as_recorded(find(name), record.get("prediction"))
        if model.is_run != from_run:
            raise InputError(f"-m {name} is of the family {model.family}, the picture of {record.get('family')}")
        return model, _checkpoint(model, record) if model.is_run else None
    if from_run:
        for model in _runs(record, path):
            try:
                if (checkpoint := _checkpoint(model, record, strict=False)) is not None:
                    return model, checkpoint
            except InputError:
                continue
    elif there := find_by_hash(record["model_hash"], record.get("family"), record.get("prediction")):
        return there, None
    raise InputError(
        f"the model {record.get('model')!r} (SHA-256 {record['model_hash'][:10]}…) that made the picture is not among "
        "the bundled, listed and cached ones",
        "say where it is: -m MODEL",
    )


def _runs(record: Record, path: Path) -> Iterable[Model]:
    """Runs that may have made the picture: in the user's list, and of its name beside the picture or here."""
    yield from (model for model in known_models() if model.is_run)
    name = record.get("model")
    if name and name not in (".", ".."):
        for folder in dict.fromkeys((path.parent, Path(), Path("runs"), path.parent / "runs")):
            if (folder / name / "run.json").is_file():
                yield find(str(folder / name))


def _checkpoint(model: Model, record: Record, strict: bool = True) -> Path | None:
    """The checkpoint of a run whose averaged weights have the recorded hash. Raises InputError if `strict`."""
    for folder in read_run(model.folder).checkpoints():
        try:
            state = read_state(folder)
        except InputError:  # damaged
            continue
        if state["files"].get("ema.safetensors", {}).get("sha256") == record["model_hash"]:
            return folder
    if strict:
        step = record.get("training_step")
        raise InputError(
            f"{model.folder} has no checkpoint with the weights that made the picture (step {step})",
            "was it trained further, or anew?",
        )
    return None


def _plan(record: Record, model: Model, files: Files) -> Plan:
    """The plan of the one picture that the record is of."""
    grid = record["grid"]
    if is_grid_file(grid):
        entry = {"name": grid, "sha256": record.get("grid_sha256", "")}
        grid = str(files.file("the grid", entry, model.folder / "grids" / grid))
    upscale = record.get("upscale") or {}
    options: dict[str, Any] = {
        "seed": record["seed"],
        "size": tuple(upscale.get("from") or (record["width"], record["height"])),
        "steps": record["steps"],
        "guidance": record["guidance"],
        "scheduler": label_of(record["scheduler"], record.get("scheduler_options") or {}),
        "grid": grid,
        "batch_size": _batch_size(record),
    }
    try:
        inputs.quantize_name(record.get("quantize", "none"))
        if model.is_run:
            reads_prompts = bool(record["prompt"])
        else:
            reads_prompts = FAMILIES[model.family].reads_prompts
            options["negative"] = record.get("negative") or ""
            options["vae_tiling"] = (record.get("memory") or {}).get("vae_tiling") is True
            options |= read_options(record, "prompts" if reads_prompts else "noise", files)
        return make_plan(model, [record["prompt"]] if reads_prompts else (), **options)
    except UsageError as error:  # of the record, not of the command line
        raise InputError(f"the record cannot be reproduced: {error.message}", error.hint) from error


def _batch_size(record: Record) -> int:
    """The pictures that were made at once, at most MAX_COPIES: they are made again as copies of one."""
    size = (record.get("memory") or {}).get("batch_size") or record.get("batch_size") or 1
    return min(size, MAX_COPIES) if type(size) is int and size > 0 else 1


def _load(record: Record, model: Model, checkpoint: Path | None, device: str | None) -> Any:
    """The model on the recorded device, in its dtype, with as many threads, if this machine has them."""
    from diffgen import environment

    environment.prepare()
    import torch

    threads = record.get("threads")
    if isinstance(threads, int):
        torch.set_num_threads(min(threads, MAX_THREADS))
    if device is None:
        device = str(record.get("device"))
        try:
            devices.choose_device(devices.device_name(device))
        except UsageError:
            device = "auto"
    try:
        dtype = devices.dtype_name(str(record.get("dtype")))
    except UsageError:
        dtype = "auto"
    if checkpoint is not None:
        from diffgen.training.generate import RunGenerator

        return RunGenerator(model, device=device, dtype=dtype, checkpoint=checkpoint)
    return load(model, device, dtype, quantize=record.get("quantize", "none"))


def _compared(path: Path, record: Record, image: Image.Image, new: dict[str, Any]) -> Reproduction:
    there = read_image(path, read_kind(path)[2])
    mode = "RGBA" if "RGBA" in (there.mode, image.mode) else "RGB"
    a, b = (np.asarray(one.convert(mode)).astype(int) for one in (there, image))
    if a.shape != b.shape:
        sizes = " and ".join(f"{one.width}x{one.height}" for one in (there, image))
        return Reproduction(image, new, None, None, f"the sizes differ: {sizes}, of the file and of the new picture")
    apart = np.abs(a - b).max(2)
    if not apart.any():
        return Reproduction(image, new, 0, 0, None)
    return Reproduction(image, new, int(apart.max()), int((apart > 0).sum()), _why(record, new, pixels_sha256(there)))


def _why(record: Record, new: Record, there: str) -> str:
    """Why two pictures differ, by their records."""
    if new["pixels_sha256"] == record["pixels_sha256"]:
        return "the file's pixels were changed after the picture was made: made again, it has the recorded ones"
    reasons = []
    if there != record["pixels_sha256"]:
        reasons.append("the file's pixels were changed after the picture was made")
    before, now = (table if isinstance(table := one.get("versions"), dict) else {} for one in (record, new))
    for key in COMPARED:
        if before.get(key) != now.get(key) and (key in before or key in now):
            reasons.append(f"{key} {before.get(key, 'none')} → {now.get(key, 'none')}")
    for key in ("device", "dtype", "threads", "batch_size", "prediction", "memory", "scheduler_options", "nfe"):
        if key in record and record[key] != new.get(key):
            reasons.append(f"{key} {record[key]} → {new.get(key)}")
    hashes = new.get("model_files", {})
    for name, digest in (record.get("model_files") or {}).items():
        if hashes.get(name) != digest:
            reasons.append(f"{name} of the model is another file")
    return ", ".join(reasons) or "nothing that is recorded differs: another processor or another build of torch?"


def _missing(what: str, name: str | None, sha256: str, others: Sequence[Path]) -> InputError:
    called = f" {name!r}" if name else ""
    file = f"{what}{called} (SHA-256 {sha256[:10]}…)"
    if others:
        return InputError(
            f"{file} is not what it was: {', '.join(map(str, others))} has another content", "look for it"
        )
    return InputError(f"{file} is not here", "give it with --image FILE (--file FILE, if it is no picture)")


def _other_model(model: Model, digest: str, record: Record) -> InputError:
    return InputError(
        f"{model.name} is another model than the one that made the picture: SHA-256 {digest[:10]}…, "
        f"not {record['model_hash'][:10]}…",
        "for a picture like it: diffgen inspect shows the command",
    )
