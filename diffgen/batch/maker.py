"""Make the pictures of rows with a loaded model; a row that fails is returned with its error, and the others go on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from diffgen import environment
from diffgen.errors import DiffgenError, InputError
from diffgen.images.metadata import encode_png

from .rows import Row, canonical

if TYPE_CHECKING:
    from diffgen.generation.model import Generator
    from diffgen.generation.options import Options
    from diffgen.generation.plan import Plan


@dataclass(frozen=True)
class Made:
    """What became of a row: a picture with its description, or an error."""

    row: Row
    png: bytes = b""
    about: Mapping[str, Any] | None = None  # width, height, pixels_sha256
    error: DiffgenError | None = None


Maker = Callable[[Sequence[Row]], Iterator[Made]]  # yields each row once, in any order


class PictureMaker:
    """A loaded model that makes rows."""

    def __init__(
        self,
        about: Mapping[str, Any],
        device: str = "auto",
        dtype: str = "auto",
        offline: bool = False,
        model: str | None = None,
    ) -> None:
        """Load the model of a plan, from where `model` says. Raises InputError for other weights than planned."""
        environment.prepare(offline)
        warnings.simplefilter("ignore")  # of the libraries
        from diffgen.loading import load
        from diffgen.models.find import find, predicting

        chosen = find(model or about["model"])
        if about.get("prediction"):
            chosen = predicting(chosen, about["prediction"])
        self.generator: Generator = load(chosen, device, dtype)
        self.options, self.metadata = dict(about["options"]), about["metadata"]
        if self.generator.model_hash != about.get("model_hash", self.generator.model_hash):
            raise InputError(
                f"the model {about['model']} has other weights here than when the batch was planned",
                "copy the planned model to every machine, or plan again into an empty folder",
            )

    @property
    def where(self) -> dict[str, str]:
        """Device and number format, for the statistics of a shard."""
        generator = self.generator
        return {"device": str(generator.device.type), "dtype": str(generator.dtype).removeprefix("torch.")}

    def __call__(self, rows: Sequence[Row]) -> Iterator[Made]:
        """Make the rows; those with the same options follow one another, so that they can share batches."""
        by_options = sorted(rows, key=lambda row: canonical(row.options))  # stable: in the order of the rows
        for _, same in itertools.groupby(by_options, key=lambda row: canonical(row.options)):
            yield from self._made(list(same))

    def _made(self, rows: list[Row]) -> Iterator[Made]:
        """The rows of equal options. What stops all of them is tried again with each row alone."""
        done = 0
        try:
            plans = self._plans(rows)
            for row, picture in zip(rows, self.generator.pictures(plans, fill=True), strict=True):
                done += 1
                if picture.image is None:
                    yield Made(row, error=picture.error)
                    continue
                size = {"width": picture.image.width, "height": picture.image.height}
                png = encode_png(picture.image, picture.record, self.metadata)
                yield Made(row, png, {**size, "pixels_sha256": picture.record["pixels_sha256"]})
            return
        except Exception as error:
            failure = error if isinstance(error, DiffgenError) else DiffgenError(f"{type(error).__name__}: {error}")
        left = rows[done:]
        if len(left) == 1:
            yield Made(left[0], error=failure)
        else:
            for row in left:
                yield from self._made([row])

    def _plans(self, rows: list[Row]) -> list[Plan]:
        """A plan for each row; the options are checked once for all of them."""
        from diffgen.loading import make_plan

        options = cast("Options", {**self.options, **rows[0].options, "seed": 0})
        common = make_plan(self.generator.model, [row.prompt for row in rows], **options)
        return [
            replace(common, prompts=(prompt,), seed=row.seed, seeds=(), count=1)
            for row, prompt in zip(rows, common.prompts, strict=True)
        ]
