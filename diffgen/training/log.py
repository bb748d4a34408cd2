"""What a run logs: metrics.jsonl, timing.jsonl, curve.png, samples/, TensorBoard; and the reports to a listener.

metrics.jsonl has no clock in it, and a resume cuts it back to the checkpoint, so that it ends in the same bytes. Times
are in timing.jsonl, to which every start appends.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from diffgen.errors import InputError
from diffgen.images.metadata import encode_png
from diffgen.images.publish import cannot_write, publish
from diffgen.images.sheet import labelled_sheet
from diffgen.models.gate import open_file

from .board import Board
from .config import Train
from .curve import curve
from .listener import Listener

COLUMNS = 8
MOST_COLUMNS = 12


class Log:
    """Writes the log of a run on rank 0; on other ranks, where `folder` is None, it writes nothing.

    Raises CannotWrite.
    """

    def __init__(self, folder: Path | None, listener: Listener, config: Train, start: int, metrics_bytes: int) -> None:
        self.folder, self.listener, self.config = folder, listener, config
        self.began = self.last_time = time.perf_counter()
        self.last_step = start
        self.latest: dict[str, Any] = {}  # the last value of each key
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        self._remember(path, metrics_bytes)
        try:
            self.metrics = open(path, "ab", buffering=0)  # noqa: SIM115
            if os.fstat(self.metrics.fileno()).st_size < metrics_bytes:
                listener.warn(f"{path} is shorter than when the checkpoint was written")
            else:
                self.metrics.truncate(metrics_bytes)
            self.timing = open(folder / "timing.jsonl", "ab", buffering=0)  # noqa: SIM115
            (folder / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self.board = Board(folder / "tensorboard", start)

    def _remember(self, path: Path, size: int) -> None:
        """Read the values that earlier starts logged, up to the checkpoint. Raises InputError for a damaged file."""
        content = b""
        if path.exists():
            with open_file(path) as file:
                content = file.read(size)
        hint = "move it away: the training then goes on without the earlier figures"
        if content and not content.endswith(b"\n"):
            raise InputError(f"{path} is damaged: the checkpoint ends within a line", hint)
        for number, line in enumerate(content.splitlines(), 1):
            try:
                values = json.loads(line)
                if type(values["step"]) is not int:
                    raise ValueError("no step")
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}, line {number} is damaged", hint) from error
            self.latest |= values

    def step(self, step: int) -> None:
        self.listener.step(step, self.config.steps)

    def losses(self, step: int, values: dict[str, list[float]], learning_rate: float) -> None:
        """Log the means of these values, and the rate since the last call."""
        line = {key: fmean(numbers) for key, numbers in values.items()}
        self._write({"step": step, **line, "learning_rate": learning_rate})
        now = time.perf_counter()
        rate = (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        times = {
            "step": step,
            "seconds": round(now - self.began, 3),
            "images_per_second": rate * self.config.batch_size,
        }
        self._append("timing", times | {"time": round(time.time(), 3)})
        self.listener.losses({**times, **line, "steps": self.config.steps})

    def held_out(self, step: int, quartiles: dict[str, list[float]]) -> None:
        """Log held-out losses of the weights ("raw") and of their average ("ema"): means, and by quartile of t, small t
        first."""
        if quartiles["raw"]:
            means = {f"held_out_{name}": fmean(values) for name, values in quartiles.items()}
            self._write({"step": step, **means, **{f"held_out_{name}_quartiles": v for name, v in quartiles.items()}})
            self.listener.losses({"step": step, "steps": self.config.steps, **means})

    def samples(self, step: int, groups: list[list[Image.Image]], names: Sequence[str] = ()) -> None:
        """Write one sheet: pictures of the weights above, of their average below, each with its name.

        If the names come in turn, such as classes, each has a column of its own.
        """
        if self.folder is None or not groups[0]:
            return
        different = len(set(names))
        columns = different if 1 < different <= MOST_COLUMNS else COLUMNS
        headings = ("weights", f"average of the weights, length {self.config.ema[0]:g}")
        picture = labelled_sheet(f"step {step:,}", dict(zip(headings, groups, strict=True)), names, columns)
        publish(self.folder / "samples" / f"{step}.png", encode_png(picture, {}, "params"), overwrite=True)
        self.board.image("samples", np.asarray(picture), step)

    def draw_curve(self, segments: Sequence[int]) -> None:
        """Write curve.png anew, from metrics.jsonl. `segments` are the ends of the run's earlier ones."""
        if self.folder is None:
            return
        lines = (self.folder / "metrics.jsonl").read_bytes().splitlines()
        picture = curve(lines, segments)
        if picture is not None:
            publish(self.folder / "curve.png", encode_png(picture, {}, "params"), overwrite=True)

    def sync(self) -> int:
        """Flush metrics.jsonl to the disk; returns its length in bytes."""
        if self.folder is None:
            return 0
        try:
            os.fsync(self.metrics.fileno())
        except OSError as error:
            raise cannot_write(self.folder / "metrics.jsonl", error) from error
        return os.fstat(self.metrics.fileno()).st_size

    def _write(self, line: dict[str, Any]) -> None:
        self.latest |= line
        self._append("metrics", line)
        if self.folder is not None:
            for key, value in line.items():
                if key != "step" and not isinstance(value, list):
                    self.board.scalar(key, value, line["step"])

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if self.folder is None:
            return
        try:
            getattr(self, name).write((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise cannot_write(self.folder / f"{name}.jsonl", error) from error

    def close(self) -> None:
        if self.folder is not None:
            self.metrics.close()
            self.timing.close()
            self.board.close()
