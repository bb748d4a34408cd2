"""TensorBoard's event file of a run. Its name holds no name of a machine, as that of torch's SummaryWriter does."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from diffgen.images.publish import cannot_write

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard.summary import image, scalar


class Board:
    """Appends scalars and pictures to a new event file in `folder`. Every method raises CannotWrite."""

    def __init__(self, folder: Path, start: int) -> None:
        """Open the file; TensorBoard then hides what earlier files hold after step `start`."""
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        try:
            folder.mkdir(exist_ok=True)
            self._file = self.path.open("xb", buffering=0)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, key: str, value: float, step: int) -> None:
        self._add(step=step, summary=scalar(key, value))

    def image(self, key: str, picture: np.ndarray, step: int) -> None:
        """Add a picture, uint8 [H, W, 3]."""
        self._add(step=step, summary=image(key, picture, dataformats="HWC"))

    def _add(self, **content: Any) -> None:
        try:
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        except OSError as error:
            raise cannot_write(self.path.parent, error) from error

    def close(self) -> None:
        self._file.close()
