"""Checkpoints: safetensors and JSON in a folder that is either complete or absent.

The files are written into a folder with a temporary name and synced, then the folder is renamed, then older checkpoints
are removed. So a kill at any moment leaves the newest complete checkpoint, and a full disk leaves the previous one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from diffgen.errors import CannotWrite, InputError, InvalidOutput
from diffgen.images.publish import TEMPORARY, cannot_write, publish, sync_folder, temporary_in
from diffgen.models.gate import read_header

from .run import STATE_SCHEMA, Run, state_hash


def write(run: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Publish checkpoints/<step> with these files ({"model": {name: tensor}}) and state.json; returns its folder.

    Raises InvalidOutput if a tensor is not finite, and CannotWrite; then it writes nothing.
    """
    final = run / "checkpoints" / str(step)
    temporary = temporary_in(run)
    try:
        temporary.mkdir()
        sums = {}
        for name, tensors in files.items():
            bad = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
            if bad:
                raise InvalidOutput(f"training diverged: {bad[0]} in {name} is not finite after step {step}")
            data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
            publish(temporary / f"{name}.safetensors", data)
            sums[f"{name}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        about = {"schema": STATE_SCHEMA, "step": step, "files": sums, **state}
        about["sha256"] = state_hash(about)
        publish(temporary / "state.json", (json.dumps(about, indent=1) + "\n").encode())
        final.parent.mkdir(exist_ok=True)
        if final.exists():  # a damaged one, which this run replaces
            shutil.rmtree(final)
        os.rename(temporary, final)
    except CannotWrite as error:  # it names a file in the temporary folder
        raise cannot_write(final, error.__cause__) if isinstance(error.__cause__, OSError) else error from error
    except OSError as error:
        raise cannot_write(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(final.parent)
    sync_folder(run)
    return final


def prune(run: Run, step: int, keep: int, every: int) -> None:
    """Remove checkpoints before `step`, except the newest `keep` − 1 at multiples of `every`.

    So an interrupted run ends with the same checkpoints as an uninterrupted one. Later checkpoints are damaged, or the
    run would have started there: they do not count, and the run replaces them when it reaches their step.
    """
    older = [folder for folder in run.checkpoints() if int(folder.name) < step]
    regular = [folder for folder in older if int(folder.name) % every == 0]
    for folder in older:
        if folder not in regular[: keep - 1]:
            temporary = temporary_in(run.folder)
            with contextlib.suppress(OSError):  # the training does not fail because of an old checkpoint
                os.rename(folder, temporary)  # atomic: no other process sees half of a checkpoint
                shutil.rmtree(temporary)


def sweep(run: Path) -> None:
    """Remove temporary files that a kill left behind. Call it only with the lock of the run."""
    for leftover in [*run.glob(f"{TEMPORARY}*"), *run.glob(f"samples/{TEMPORARY}*")]:
        shutil.rmtree(leftover, ignore_errors=True)
        with contextlib.suppress(OSError):
            leftover.unlink()


def read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a weights file to the CPU; raises InputError unless names and shapes are those expected."""
    shapes = {key: tensor.shape for key, tensor in read_header(path).items()}
    for key in sorted(shapes.keys() ^ expected.keys()):
        kind = "holds an unknown" if key in shapes else "lacks the"
        raise InputError(f"{path}: {kind} tensor {key!r}", "these are weights of another network")
    for key, tensor in expected.items():
        if shapes[key] != tuple(tensor.shape):
            raise InputError(f"{path}: {key} has the shape {list(shapes[key])}, not {list(tensor.shape)}")
    return load_file(path)
