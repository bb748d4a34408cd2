"""Check the command line of `diffgen generate`, make the pictures, print the result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import UsageError
from diffgen.generation import needs
from diffgen.generation.options import OPTIONS, flag_of
from diffgen.generation.plan import Picture, Plan
from diffgen.generation.write import Inside, Listener, Result, planned, write_pictures
from diffgen.images.metadata import LEVELS, base_name
from diffgen.images.naming import Outputs
from diffgen.loading import count_pictures, make_plans, read_prompts
from diffgen.models.families import FAMILIES
from diffgen.models.find import predicting, with_components
from diffgen.pipelines.inputs import check_switch, offload_name, quantize_name
from diffgen.prompts.files import Line

from . import loaded, models
from .observe import View, view_of
from .output import Output, UnfinishedError, refuse_empty
from .signals import first_signal, uninterrupted


def make_pictures(arguments: Mapping[str, Any]) -> None:
    """Make the pictures of a command line; `arguments` are those of `diffgen.cli.generate.generate`."""
    line = SimpleNamespace(**arguments)
    values = {name: value for name, value in arguments.items() if value is not None}
    started = time.perf_counter()
    say = Output("generate", line.json, line.quiet)
    if line.metadata not in LEVELS:
        raise UsageError(f"--metadata must be one of {', '.join(LEVELS)} (got {line.metadata!r})")
    device, dtype, offload = device_name(line.device), dtype_name(line.dtype), offload_name(line.offload)
    quantize_name(line.quantize)
    flags = {name: flag_of(name) for name in OPTIONS}
    refuse_empty({name: value for name, value in values.items() if name not in ("prompt", "negative")}, flags)
    options: Any = {name: values[name] for name in OPTIONS if name in values}
    options["safety"] = check_switch("--safety", line.safety)
    options["keep_steps"] = line.save_steps is not None
    if line.attention_out is not None and not line.attention:
        raise UsageError("--attention-out needs a word to map", "add --attention WORD")
    if line.guidance is None and line.cfg_scale is not None:
        options["guidance"] = line.cfg_scale
    if line.scheduler is None and line.sampler is not None:
        options["scheduler"] = line.sampler
    lines = read_prompts(line.prompt or (), line.prompt_file)
    outputs = Outputs(
        line.out, count_pictures(lines, options), line.overwrite
    )  # an unusable path fails before any download
    if line.server is not None:
        _generate_there(say, line, lines, options, outputs)
        return
    inside = Inside(outputs, line.save_steps, bool(line.attention), line.attention_out, line.overwrite)
    source = models.offer_pull(line.model, say, line.offline)
    source = with_components(source, line.component or ())
    if line.prediction is not None:
        source = predicting(source, line.prediction)
    if line.refiner is not None and not source.is_run and (family := FAMILIES[source.family].refiner):
        models.offer_pull(line.refiner, say, line.offline, family)
    plans = make_plans(source, lines, options)
    for plan in plans:
        say.note(_summary(plan))
        for text in plan.prompts:
            for warning in plan.warnings(text):
                say.warn(warning)
    memory = _memory(plans[0], dtype)
    if memory is not None and line.quantize == "none" == offload and (advice := needs.advice(memory)):
        say.warn(advice)
    if line.dry_run:
        result = planned(plans).as_json() | {"memory": memory}
        if memory is not None:
            say.note(f"memory: {needs.in_words(memory)}")
        say.result(result | {"dry_run": True}, (f"{one['seed']}\t{one['prompt']}" for one in result["images"]))
        return
    environment.prepare(line.offline)
    if not line.debug:
        warnings.simplefilter("ignore")  # warnings of the libraries; our own are printed
    with say.waiting(f"loading {plans[0].model.name} …"):
        generator = loaded.load(plans[0].model, device, dtype, offload, line.quantize)
    view = view_of(line.quiet) if line.preview else None
    if view is not None:
        say.note(f"preview: {generator.sketched}")
    written = Result(plans, started=started)
    try:
        with say.progress(plans[0].model.name, view) as on_step:
            write_pictures(
                generator,
                plans,
                outputs,
                metadata=line.metadata,
                inside=inside,
                on_step=on_step,
                on_denoised=view.watch(generator) if view is not None else None,
                listener=Reporter(say, view),
                result=written,
            )
        written.raise_failures()
    except BaseException as error:
        failed = [entry for entry, _ in written.failed]
        if first_signal() is not None and written.images:
            say.note(_rest(plans, len(written.images)))
        raise UnfinishedError(error, written.as_json() | {"failed": failed, "inside": written.inside}) from error
    say.result(written.as_json() | {"adapters": generator.fits, "inside": written.inside})


def _memory(plan: Any, dtype: str) -> dict[str, Any] | None:
    """What the pictures of a plan need, one at a time; None for a run of `diffgen train`."""
    if plan.model.is_run:
        return None
    return needs.report(plan.checked, plan.final_size, dtype, guided=plan.guidance != 1)


# Options that only this process can follow, with the values that ask for nothing.
LOCAL = {
    "component": None,
    "prediction": None,
    "refiner": None,
    "preview": False,
    "save_steps": None,
    "attention": None,
    "attention_out": None,
    "dry_run": False,
    "device": "auto",
    "dtype": "auto",
    "offload": "none",
    "quantize": "none",
}


def _generate_there(
    say: Output, line: SimpleNamespace, lines: Sequence[Line], options: Mapping[str, Any], outputs: Outputs
) -> None:
    """Have a server make the pictures. Raises UsageError for an option that it cannot follow."""
    from diffgen.serve import client

    neutral = {name: option.neutral for name, option in OPTIONS.items()}
    own = next((name for name, value in LOCAL.items() if getattr(line, name) not in (value, [])), None)
    own = own or client.unsent(options, neutral)
    if own is not None:
        flag = flag_of(own) if own in OPTIONS else f"--{own.replace('_', '-')}"
        raise UsageError(f"{flag} and --server exclude each other", "leave one of them out")
    jobs = client.jobs_of(lines, options, line.model)
    with say.progress(line.server) as on_step:
        result = client.generate(
            line.server, jobs, outputs, line.metadata, on_step, lambda path: say.line(str(path)), say.warn
        )
    say.result(result)


class Reporter(Listener):
    """Prints the path of each picture on stdout, notes and warnings on stderr."""

    def __init__(self, say: Output, view: View | None) -> None:
        self.say, self.view = say, view

    def note(self, text: str) -> None:
        self.say.note(text)

    def warn(self, text: str) -> None:
        self.say.warn(text)

    def written(self, picture: Picture, path: Path) -> None:
        if self.view is not None:
            self.view.finished(picture)
        self.say.line(str(path))

    def kept(self, files: Sequence[str]) -> None:
        self.say.note(f"also written: {', '.join(files)}")

    def uninterrupted(self) -> AbstractContextManager[None]:
        return uninterrupted()


def _rest(plans: Sequence[Plan], done: int) -> str:
    """Where an interrupted command is, and how to make the other pictures."""
    total = sum(map(len, plans))
    text = f"{done} of {total} pictures are written"
    plan = plans[0]
    if len(plan) < total or len(plan.prompts) > 1 or plan.seeds or done == total:
        return text
    return f"{text}; for the others: --seed {plan.seed + done} --count {total - done}"


def _summary(plan: Plan) -> str:
    """The plan in one line, with "(model default)" after what the user did not set."""

    def source(*names: str) -> str:
        return "" if plan.given & set(names) else " (model default)"

    seeds = f"seed {plan.seed}" if not plan.seeds else f"{len(plan.seeds)} seeds"
    width, height = plan.final_size
    parts = [
        f"{plan.scheduler} on {base_name(plan.grid)}{source('scheduler', 'grid')}",
        f"{plan.steps} step{'s' * (plan.steps > 1)}{source('steps')}",
        f"guidance {plan.guidance:g}{source('guidance')}",
        f"{width}x{height}{source('size', 'image', 'controls', 'upscale')}",
        seeds,
        *plan.details,
    ]
    return f"{plan.model.name}: {', '.join(parts)}"
