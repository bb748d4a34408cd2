"""Make the pictures of plans, write them, and write what was kept of their making: steps and maps of attention."""

from __future__ import annotations

import contextlib
import io
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffgen.errors import DiffgenError
from diffgen.images.metadata import base_name, encode_png
from diffgen.images.naming import Beside, Outputs, slug
from diffgen.images.strip import animation, strip

from .model import Generator, OnStep
from .plan import Picture, Plan, Shot

WAITING = 4  # pictures that are encoded, or wait for it, while others are made
ATTENTION = "attention"  # the default folder of the maps


class Inside:
    """The files about each picture, in folders of their own. A folder that cannot be written is refused at once."""

    def __init__(
        self, outputs: Outputs, steps: str | None, attention: bool, attention_out: str | None, overwrite: bool
    ) -> None:
        self.steps = None if steps is None else Beside(steps, outputs, "--save-steps", overwrite)
        self.attention: Beside | None = None
        if attention:
            self.attention = Beside(attention_out or ATTENTION, outputs, "--attention-out", overwrite)

    def write(self, picture: Picture, path: Path) -> dict[str, Any]:
        """Write the files about the picture at `path`; return their paths. Raises CannotWrite."""
        paths: dict[str, Any] = {}
        if self.steps is not None:
            files = {"steps.png": _png(strip(picture.steps)), "steps.gif": animation(picture.steps)}
            paths["steps"] = [str(file) for file in self.steps.write(path, files)]
        if self.attention is not None and picture.image is not None:
            from diffgen.images.heat import overlay  # imports numpy

            paths["attention"] = {}
            for word, heat in picture.attention.items():
                name = f"{slug(word, 40)}.png"
                (file,) = self.attention.write(path, {name: _png(overlay(picture.image, heat, word))})
                paths["attention"][word] = str(file)
        return paths


class Listener:
    """Receives the progress of `write_pictures`. Ignores everything; a subclass overrides what it shows."""

    def note(self, text: str) -> None:
        """How an adapter fits the model."""

    def warn(self, text: str) -> None:
        """Something to know before looking at a picture."""

    def written(self, picture: Picture, path: Path) -> None:
        """A picture is in its place."""

    def kept(self, files: Sequence[str]) -> None:
        """What was kept of the making of the last picture is in these files."""

    def uninterrupted(self) -> AbstractContextManager[None]:
        """Runs around the writing and the report of each picture."""
        return contextlib.nullcontext()


@dataclass
class Result:
    """What became of the pictures of some plans, also where the work ended early."""

    plans: Sequence[Plan]
    images: list[dict[str, Any]] = field(default_factory=list)  # path, prompt, seed, width, height, pixels_sha256
    inside: list[dict[str, Any]] = field(default_factory=list)  # the files about pictures
    failed: list[tuple[dict[str, Any], DiffgenError]] = field(default_factory=list)
    nfe: int | None = None  # evaluations of the network, counted for the first picture
    started: float | None = None  # time.perf_counter() then

    def as_json(self) -> dict[str, Any]:
        """The keys that the command prints, besides `adapters`, `failed` and `inside`."""
        first = self.plans[0]
        warnings = [warning for plan in self.plans for text in plan.prompts for warning in plan.warnings(text)]
        return {
            "images": self.images,
            "model": first.model.name,
            "scheduler": first.scheduler,
            "grid": base_name(first.grid),
            "steps": first.steps,
            "nfe": self.nfe,
            "guidance": first.guidance,
            "seconds": None if self.started is None else round(time.perf_counter() - self.started, 3),
            "warnings": list(dict.fromkeys(warnings)),
        }

    def raise_failures(self) -> None:
        """Raise one error for all pictures that failed; that of a single one as it is."""
        if not self.failed:
            return
        first = self.failed[0][1]
        if len(self.failed) == 1:
            raise first
        named = ", ".join(f"{entry['prompt']!r} (seed {entry['seed']})" for entry, _ in self.failed)
        count = f"{len(self.failed)} of {sum(map(len, self.plans))}"
        raise type(first)(f"{count} pictures came out wrong, nothing saved for them: {named}", first.hint)


def planned(plans: Sequence[Plan]) -> Result:
    """What `write_pictures` would make; the paths are None."""
    entries = [_entry(shot) for plan in plans for shot in plan.shots()]
    return Result(plans, [{"path": None, **entry} for entry in entries])


def write_pictures(
    generator: Generator,
    plans: Sequence[Plan],
    outputs: Outputs,
    *,
    metadata: str = "full",
    inside: Inside | None = None,
    on_step: OnStep | None = None,
    on_denoised: Callable[[Any, int, Any], None] | None = None,
    listener: Listener | None = None,
    result: Result | None = None,
) -> Result:
    """Make the pictures of the plans and write each as soon as it is done, in their order.

    Where an accelerator makes them, a thread encodes up to WAITING pictures while the next ones are made.
    `metadata` is full, params or none; `on_step` and `on_denoised` are those of `Generator.pictures`. An
    invalid picture is listed in the result's `failed`, and the others continue. `result` is filled during the work,
    so that the caller has it where an error ends the work. Raises CannotWrite, and what the generator raises.
    """
    result = result or Result(plans, started=time.perf_counter())
    listener = listener or Listener()
    noted: set[str] = set()
    waiting: deque[tuple[Picture, Future[bytes]]] = deque()

    def write(most: int) -> None:
        """Write the pictures that are encoded, and wait for the first ones until at most `most` are left."""
        while waiting and (len(waiting) > most or waiting[0][1].done()):
            picture, png = waiting.popleft()
            _write(picture, png.result(), outputs, inside, listener, result)

    with ThreadPoolExecutor(1) as encoding:
        try:
            for picture in generator.pictures(plans, on_step, on_denoised, fill=True):
                result.nfe = result.nfe or picture.record["nfe"]
                for fit in generator.fits:
                    if fit not in noted:
                        listener.note(fit)
                        noted.add(fit)
                for warning in picture.record["warnings"]:
                    listener.warn(warning)
                if picture.image is None:
                    assert picture.error is not None
                    result.failed.append((_entry(picture.shot), picture.error))
                    continue
                png = encoding.submit(encode_png, picture.image, picture.record, metadata)
                waiting.append((picture, png))
                write(0 if generator.device.type == "cpu" else WAITING)
        finally:  # finished pictures are kept where an error ends the work
            write(0)
    return result


def _write(
    picture: Picture, png: bytes, outputs: Outputs, inside: Inside | None, listener: Listener, result: Result
) -> None:
    plan = picture.shot.plan
    with listener.uninterrupted():
        path = outputs.write(
            png,
            seed=picture.seed,
            prompt=picture.prompt,
            model=plan.model.name,
            scheduler=plan.scheduler,
            steps=plan.steps,
        )
        digest = picture.record["pixels_sha256"]
        result.images.append({"path": str(path), **_entry(picture.shot), "pixels_sha256": digest})
        listener.written(picture, path)
        if inside is not None and (files := inside.write(picture, path)):
            result.inside.append({"picture": str(path), **files})
            listener.kept([*files.get("steps", ()), *files.get("attention", {}).values()])


def _entry(shot: Shot) -> dict[str, Any]:
    width, height = shot.plan.final_size
    return {"prompt": shot.prompt, "seed": shot.seed, "width": width, "height": height}


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
