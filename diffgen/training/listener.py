"""Who is told how a training or an evaluation goes."""

from __future__ import annotations

from typing import Any


class Listener:
    """Ignores everything; a subclass overrides what it wants to show. Only rank 0 reports steps and losses."""

    def note(self, text: str) -> None:
        """Something the user may want to know."""

    def warn(self, text: str) -> None:
        """Something is wrong, and the training goes on."""

    def progress(self, done: int, total: int, text: str) -> None:
        """`done` of `total` pictures are read, encoded or evaluated: `text` names the stage."""

    def step(self, step: int, steps: int) -> None:
        """`step` of `steps` steps are done."""

    def losses(self, line: dict[str, Any]) -> None:
        """Means since the last call (step, steps, loss, gradient_norm, images_per_second), or held-out losses (step,
        steps, held_out_raw, held_out_ema)."""
