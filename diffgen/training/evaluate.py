"""`diffgen.evaluate`: how good a run is. No torch at import.

    result = diffgen.evaluate("runs/digits", "digits")
    result.metrics["nearest_neighbour_accuracy"]            # Figures(value=0.53, floor=0.52, ceiling=1.0)

Options are checked first, before torch is imported; `evaluation.py` has the rest.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgen import environment
from diffgen.devices import device_name
from diffgen.errors import UsageError, checked_arguments
from diffgen.generation.checks import MAX_PICTURES, check_int
from diffgen.images.publish import Exists, cannot_write, publish

from .evaluate_plan import OPTIONS, make_evaluation_plan
from .job import JOBS
from .listener import Listener
from .run import is_run, read_run

if TYPE_CHECKING:
    from .data.dataset import DataSet
    from .evaluation import EvaluationResult, Figures


@dataclass(frozen=True)
class FineTuneMeasures:
    """What `evaluate` measures of a run of `diffgen finetune`."""

    run: str
    job: str
    step: int
    samples: int
    seed: int
    metrics: dict[str, Figures]
    better: dict[str, str]
    left_out: dict[str, str]  # why metrics are missing


@checked_arguments(*OPTIONS)
def evaluate(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | DataSet,
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str = "auto",
    listener: Listener | None = None,
    **options: Any,
) -> EvaluationResult | FineTuneMeasures:
    """Measure samples of a run, and its losses, on pictures that were held out of its training.

    data      what the run was trained on: `digits`, a folder, or an open data set
    out       a .png file for samples beside their nearest training pictures, or a folder for it and evaluation.json
    overwrite whether files that exist are replaced
    device    auto, cpu, cuda, cuda:N, mps or xpu
    listener  gets reports of progress
    options   samples   how many; 1000 with classes, in the proportions of the data, else 500
              seed      sample i has seed + i (0)
              steps, guidance, scheduler, grid  how they are made; unless given, as `generate` makes them
              batch_size
              any_data  whether other data of the same size, channels, levels and classes are accepted (False)
              bits, ode whether to find bits per dimension by the variational bound (True), and by the ODE (False)

    Raises, from `diffgen.errors`: UsageError for an invalid option, InputError for an invalid run or data that do not
    match it, CannotWrite, OutOfMemory, InvalidOutput if a sample is not finite.
    """
    device, listener = device_name(device), listener or Listener()
    if measured := _measured(run, data, options, device, listener):
        return measured
    picture_file, figures_file = _files(out, overwrite)
    plan = make_evaluation_plan(run, **options)

    environment.prepare()
    from .evaluation import Evaluation, data_of
    from .neighbours import neighbours

    pictures = data_of(plan, data, lambda done, total: listener.progress(done, total, "reading pictures"))
    for note in pictures.notes:
        listener.note(note)
    evaluation = Evaluation(plan, pictures, device)
    listener.note(
        f"{plan.run.name}: {len(plan)} samples, {plan.scheduler} on {plan.grid}, {plan.steps} steps, guidance "
        f"{plan.guidance:g}, seed {plan.seed}; {len(evaluation.real.test)} held-out pictures"
    )
    result = evaluation.result(listener.progress)
    for note in result.notes:
        listener.warn(note)
    result = replace(result, files=[str(file) for file in (picture_file, figures_file) if file is not None])
    if picture_file is not None:
        image = BytesIO()
        neighbours(evaluation.real, evaluation.samples).save(image, "PNG")
        _write(picture_file, image.getvalue(), overwrite)
    if figures_file is not None:
        _write(figures_file, (json.dumps(asdict(result), indent=1) + "\n").encode(), overwrite)
    return result


def _measured(
    run: str | os.PathLike[str], data: Any, options: dict[str, Any], device: str, listener: Listener
) -> FineTuneMeasures | None:
    """The measures of a run of `diffgen finetune`; None for another run. Raises UsageError for other options."""
    folder = Path(run)
    if not is_run(folder) or not (kind := JOBS.get(read_run(folder).job)) or not kind.measure:
        return None
    neutral = {"seed": 0, "any_data": False, "bits": True, "ode": False}
    given = {name: value for name, value in options.items() if value is not None and value != neutral.get(name)}
    samples, seed = given.pop("samples", 16), given.pop("seed", 0)
    if given:
        raise UsageError(f"{sorted(given)[0]} is not for a run of `diffgen finetune`", "leave it out")
    check_int("--samples", samples, 2, MAX_PICTURES)
    environment.prepare()
    progress = partial(_report, listener)
    measures: FineTuneMeasures = kind.load("measure")(
        folder, os.fspath(data), samples=samples, seed=seed, device=device, progress=progress
    )
    return measures


def _report(listener: Listener, done: int, total: int) -> None:
    listener.progress(done, total, "measuring base and tuned model")


def _files(out: str | os.PathLike[str] | None, overwrite: bool) -> tuple[Path | None, Path | None]:
    """(the picture, the figures). Raises UsageError, and CannotWrite before any work is done."""
    if out is None:
        return None, None
    path = Path(out)
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".json"):
        raise UsageError(f"-o must be a .png file or a folder (got {os.fspath(out)!r})", "for example -o evaluation/")
    single = path.suffix.lower() == ".png"
    picture, figures = (path, None) if single else (path / "neighbours.png", path / "evaluation.json")
    for file in (picture, figures):
        if file is not None and file.exists() and (file.is_dir() or not overwrite):
            raise Exists(file)
    if single and not path.parent.is_dir():
        raise cannot_write(path, FileNotFoundError(2, "no such folder"))
    if not single and path.exists() and not path.is_dir():
        raise cannot_write(picture, NotADirectoryError(20, "not a folder"))
    return picture, figures


def _write(path: Path, data: bytes, overwrite: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    publish(path, data, overwrite)
