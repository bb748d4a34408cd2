"""The interface through which a training or an evaluation reports its progress."""

from __future__ import annotations

from typing import Any


class Listener:
    """Ignores all reports; a subclass overrides those that it shows."""

    def note(self, text: str) -> None:
        """Report a fact to the user."""

    def warn(self, text: str) -> None:
        """Report a problem that does not stop the work."""

    def begin(self, facts: dict[str, Any]) -> None:
        """Report what is about to be trained, before the first step: run, job, data, network, parameters, device,
        precision, processes, batch_size, start, steps, segments, schedule, warmup."""

    def progress(self, done: int, total: int, text: str) -> None:
        """Report that `done` of `total` pictures are read, encoded or evaluated; `text` names the stage."""

    def step(self, step: int, steps: int) -> None:
        """Report that `step` of `steps` steps are done."""

    def losses(self, line: dict[str, Any]) -> None:
        """Report means since the last call (loss, gradient_norm, images_per_second), or held-out losses (held_out_raw,
        held_out_ema); both with step and steps."""
