"""What the three APIs share: from the fields of a request to a job in the queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Mapping
from typing import Any

from starlette.requests import Request

from diffgen.errors import DiffgenError, UsageError
from diffgen.generation.plan import Plan
from diffgen.loading import make_plan
from diffgen.models.find import Model
from diffgen.models.info import info
from diffgen.pipelines import plan as pipeline_plan
from diffgen.pipelines import sizes

from .answers import refused
from .fields import Wanted, check_pixels
from .gallery import Gallery
from .jobs import Dispatcher, Job
from .settings import Refused, Settings
from .worker import Facts


class Server:
    """The served models, the queue and the gallery."""

    def __init__(self, settings: Settings, facts: Facts, gallery: Gallery, dispatcher: Dispatcher) -> None:
        self.settings, self.facts, self.gallery, self.dispatcher = settings, facts, gallery, dispatcher
        self.started = time.time()
        self.abouts = {name: self._about(model) for name, model in facts.models.items()}

    def _about(self, model: Model) -> dict[str, Any]:
        facts = self.facts.of.get(model.name)
        return facts.about if facts else info(model)

    @property
    def default(self) -> Model:
        return next(iter(self.facts.models.values()))

    def model(self, name: str | None) -> Model:
        """A served model by its name; None is the first. Raises Refused."""
        if name is None:
            return self.default
        if name not in self.facts.models:
            names = ", ".join(self.facts.models)
            raise Refused(
                404, "model_not_found", f"there is no model {name!r:.80} here", f"there is {names}", param="model"
            )
        return self.facts.models[name]

    def own_size(self, model: Model) -> tuple[int, int]:
        """The default size of a model's pictures. Raises InputError."""
        facts = self.facts.of.get(model.name)
        if facts is None:
            side = self.abouts[model.name]["resolution"] or 32
            return (side, side) if isinstance(side, int) else (side[1], side[0])
        return sizes.own_size(model, facts.about, facts.checked)

    def fitted(self, size: tuple[int, int], model: Model) -> tuple[int, int]:
        """The largest size of that aspect ratio with at most the pixels that the model makes by default."""
        own = self.own_size(model)
        scale = (own[0] * own[1] / (size[0] * size[1])) ** 0.5
        if scale >= 1:
            return size
        facts = self.facts.of.get(model.name)
        multiple = sizes.multiple(facts.checked) if facts else 1
        width, height = (max(multiple, int(side * scale + 1e-6) // multiple * multiple) for side in size)
        return width, height

    def fit(self, wanted: Wanted, size: tuple[int, int] | None, model: Model) -> None:
        """Set the size of a request whose client may have sent one that nobody chose; say so if it changes."""
        if size is None:
            return
        if self.settings.size_policy == "fit":
            smaller = self.fitted(size, model)
            if smaller != size:
                wanted.warnings.append(
                    f"{size[0]}x{size[1]} is larger than {model.name} is good at: made at {smaller[0]}x{smaller[1]}"
                )
            size = smaller
        check_pixels(*size, self.settings)
        wanted.options["size"] = size

    def fit_picture(self, wanted: Wanted, size: tuple[int, int], model: Model) -> None:
        """Set the size of a picture that begins from another of this size: what the request says, else the fitted."""
        wanted.options.setdefault("size", size)
        size = wanted.options["size"]
        if self.settings.size_policy == "fit":
            wanted.options["size"] = self.fitted(size, model)

    async def plan(self, wanted: Wanted, model: Model) -> Plan:
        """The checked plan of a request. Raises Refused."""
        plan = await asyncio.to_thread(self._plan, wanted, model)
        check_pixels(*plan.final_size, self.settings)
        if len(plan) > self.settings.max_count or plan.steps > self.settings.max_steps:
            raise Refused(400, "invalid_value", "the request is larger than this server allows")
        return plan

    def _plan(self, wanted: Wanted, model: Model) -> Plan:
        exact = wanted.exact or self.settings.exact
        options: dict[str, Any] = {key: value for key, value in wanted.options.items() if value not in (None, [])}
        options["batch_size"] = 1 if exact else self.settings.batch
        prompts = [wanted.prompt] if wanted.prompt else []
        try:
            if model.is_run:
                return make_plan(model, prompts, **options)
            options["wildcards"] = self.settings.wildcards
            return pipeline_plan.make_plan(self.facts.of[model.name], prompts, **options)
        except UsageError as error:
            refusal = refused(error)
            refusal.param = next((name for name in ("prompt", *options) if name in error.message), None)
            raise refusal from error
        except DiffgenError as error:
            raise refused(error) from error

    async def submit(
        self, request: Request, wanted: Wanted, model: Model, partials: int = 0, id: str | None = None
    ) -> Job:
        """Plan a request and queue it. Raises Refused."""
        plan = await self.plan(wanted, model)
        job = Job(plan, client_of(request), wanted.exact, partials, warnings=list(wanted.warnings))
        if id is not None:
            job.id = id
        return self.dispatcher.submit(job)


def client_of(request: Request) -> Hashable:
    """Whose turn in the queue a request takes: that of its tab or program if it names one, else of its address."""
    name = request.headers.get("x-diffgen-client", "")[:64]
    return (request.client.host if request.client else "", name)


def random_seed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without a seed below 0, which means "random" to many clients."""
    return {key: value for key, value in fields.items() if not (key == "seed" and _is_negative(value))}


def _is_negative(value: Any) -> bool:
    try:
        return float(value) < 0
    except (TypeError, ValueError):
        return False
