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

    `Any` stands for what torch defines, which this room does not import: a device, a dtype, tensors.
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
        self, plan: Any, on_step: OnStep | None = None, on_denoised: Callable[[Any, int, Any], None] | None = None
    ) -> Iterator[Picture]:
        """The pictures of a plan that `diffgen.loading.make_plan` returned for this model, one by one."""

    def generate(
        self,
        prompt: str | Sequence[str] = (),
        *,
        metadata: str = "full",
        on_step: OnStep | None = None,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Make pictures, with their metadata in `.info`."""
