"""The training loop: steps, and at intervals losses, held-out losses, a sheet of samples, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from diffgen.images.publish import publish

from . import checkpoint
from .log import Log
from .run import Run
from .trainer import Trainer


def run_steps(trainer: Trainer, run: Run, log: Log, start: int, sample_every: int, stopping: Callable[[], bool]) -> int:
    """Train from step `start` and write what is due; returns the last step.

    Once `stopping()` is true on any rank, the loop finishes its step, saves it and ends.
    Raises InvalidOutput if training diverges, and CannotWrite.
    """
    config, ranks = trainer.config, trainer.ranks
    ends = {*trainer.segments, config.steps}

    def due(step: int, every: int) -> bool:
        return step % every == 0 or step in ends

    step = start
    while step < config.steps:
        trainer.step(step)
        step += 1
        stop = bool(ranks.agree(int(stopping())))
        log.step(step)
        if due(step, config.log_every):
            log.losses(step, trainer.take_losses(step), trainer.learning_rate(step - 1))
        if due(step, config.held_out_every):
            trainer.check(step)
            log.held_out(step, held_out(trainer))
        if due(step, sample_every):
            trainer.check(step)
            log.samples(step, samples(trainer), trainer.job.sample_names())
        if due(step, config.checkpoint_every) or stop:
            save(trainer, run, log, step)
            log.draw_curve(trainer.segments)
        if stop:
            break
    return step


def held_out(trainer: Trainer) -> dict[str, list[float]]:
    """Held-out losses by quartile of t: of the weights, and of their first average."""
    with trainer.evaluating() as networks:
        raw = trainer.job.held_out(networks)
    with trainer.evaluating(trainer.averages[0]) as networks:
        return {"raw": raw, "ema": trainer.job.held_out(networks)}


def samples(trainer: Trainer) -> list[list[Image.Image]]:
    """Pictures from fixed noise: of the weights, and of their first average."""
    rows = []
    for average in (None, trainer.averages[0]):
        with trainer.evaluating(average) as networks:
            rows.append(trainer.job.samples(networks))
    return rows


def save(trainer: Trainer, run: Run, log: Log, step: int) -> None:
    """Write a checkpoint, after everything logged up to this step is on the disk."""
    pending, files = trainer.check(step), trainer.files()
    if trainer.ranks.main:
        state = {"images": step * trainer.config.batch_size, "pending": pending, "metrics_bytes": log.sync()}
        checkpoint.write(run.folder, step, files, state)
        for name, data in trainer.job.products(files["ema"]).items():
            (path := run.folder / name).parent.mkdir(parents=True, exist_ok=True)
            publish(path, data, overwrite=True)
        checkpoint.prune(run, step, trainer.config.keep, trainer.config.checkpoint_every)
