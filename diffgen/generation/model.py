"""What a loaded model offers, whatever kind of model it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Unpack

from schedulers import NoiseSchedule

from .options import Options
from .plan import Picture

if TYPE_CHECKING:
    from PIL import Image

    from diffgen.models.find import Model

OnStep = Callable[[int, int], None]  # on_step(done, total), after each evaluation of the network


class Loaded(Protocol):
    """A model in memory.

    `Any` is a type of torch (a device, a dtype, tensors), which this room does not import.
    """

    @property
    def model(self) -> Model: ...

    @property
    def model_hash(self) -> str:
        """SHA-256 of the weights."""

    @property
    def noise(self) -> NoiseSchedule: ...

    @property
    def prediction(self) -> str: ...

    @property
    def device(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def fits(self) -> Sequence[str]:
        """How each adapter of the last plan fits the model, in words."""

    @property
    def sketched(self) -> str:
        """What `sketch` shows, in words."""

    def sketch(self, latent: Any, /) -> Image.Image:
        """A quick picture of what an evaluation predicted, [C, h, w]."""


class Generator(Loaded, Protocol):
    """A loaded model that makes pictures. `diffgen.load` returns one."""

    def pictures(
        self,
        plans: Any,
        on_step: OnStep | None = None,
        on_denoised: Callable[[Any, int, Any], None] | None = None,
        *,
        fill: bool = False,
    ) -> Iterator[Picture]:
        """The pictures of one plan or of several that `make_plan` returned for this model, in their order, one by one.

        Pictures of plans with equal `Plan.batch_key` are made together, whatever their prompts and seeds, up to the
        plan's batch size; `picture.shot.plan` is the plan of each. `on_step(done, total)` is called after each
        evaluation of the network, `on_denoised(shots, i, x0)` with what evaluation i predicts for a batch. With `fill`,
        copies of its last picture fill an incomplete batch, if the plan names a batch size: then pixels do not depend
        on how many pictures there are, nor on their order.
        """

    def generate(
        self,
        prompt: str | Sequence[str] = (),
        *,
        metadata: str = "full",
        on_step: OnStep | None = None,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Make pictures, with their metadata in `.info`."""
