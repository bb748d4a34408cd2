"""diffgen batch: many pictures, by any number of workers, each exactly once."""

from __future__ import annotations

import inspect
import json as json_format
from typing import Annotated, Any, get_type_hints

import typer

from diffgen import environment
from diffgen.batch import check as checks
from diffgen.batch import prepare, run
from diffgen.batch.formats import FORMATS
from diffgen.batch.shards import Shards
from diffgen.devices import device_name, dtype_name
from diffgen.errors import DiffgenError
from diffgen.generation.options import OPTIONS, flag_of
from diffgen.images.publish import publish
from diffgen.pipelines.inputs import check_switch

from . import models
from .generate import generate
from .options import Device, Dtype, Offline, option
from .output import Debug, Json, Output, Quiet, UnfinishedError, refuse_empty, time_text

EXAMPLES = """
Examples:

  diffgen batch plan prompts.jsonl -o out --steps 8 --shard-size 500 --format webdataset

  diffgen batch run out --workers 2

  diffgen batch status out

  diffgen batch check out --repair
"""

PLAN, ENGINE, OUTPUT = "Batch", "Engine", "Output"
# Options of generate that say how one run is observed, or where it writes; a plan has none of them.
LEFT_OUT = {"keep_steps", "attention"}
Folder = Annotated[str, typer.Argument(metavar="OUT", help="The folder of the batch.", show_default=False)]


def _plan(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="Text, JSON lines, CSV or parquet.", show_default=False)
    ],
    out: Annotated[str, option(PLAN, "The folder of the batch.", "--out", "-o", "--output", metavar="OUT")],
    shard_size: Annotated[
        int, option(PLAN, "Pictures in a shard; a killed worker loses one.", metavar="N", default=True)
    ] = 1000,
    format: Annotated[str, option(PLAN, "How shards are written.", metavar="|".join(FORMATS), default=True)] = "files",
    **options: Any,
) -> None:
    json, quiet, offline = options.pop("json"), options.pop("quiet"), options.pop("offline")
    options.pop("debug")
    say = Output("batch plan", json, quiet)
    device, dtype = device_name(options.pop("device")), dtype_name(options.pop("dtype"))
    values = {name: value for name, value in options.items() if value is not None}
    flags = {name: flag_of(name) for name in OPTIONS} | {"PROMPTS": "PROMPTS"}
    filled = {name: value for name, value in values.items() if name != "negative"}
    refuse_empty({"PROMPTS": prompts, "out": out, **filled}, flags)
    own = {name: values[name] for name in OPTIONS if name in values and str(values[name]) != str(OPTIONS[name].neutral)}
    if not check_switch("--safety", options["safety"]):
        own["safety"] = False
    else:
        own.pop("safety", None)
    models.offer_pull(options["model"], say, offline)
    environment.prepare(offline)
    batch, estimate = prepare.plan(
        prompts,
        out,
        options["model"],
        prediction=options["prediction"],
        shard_size=shard_size,
        format=format,
        metadata=options["metadata"],
        device=device,
        dtype=dtype,
        offline=offline,
        dry_run=options["dry_run"],
        **own,
    )
    if batch is None:
        say.result(estimate.as_json() | {"dry_run": True}, [f"{estimate.rows} pictures in {estimate.shards} shards"])
        return
    assert estimate.seconds is not None
    assert estimate.bytes is not None
    costs = f"about {time_text(estimate.seconds)} with one worker here, {estimate.bytes / 1e9:.2g} GB"
    text = f"{estimate.rows} pictures in {estimate.shards} shards: {costs}"
    state = run.status(out).as_json()
    state["seconds_left"] = estimate.seconds if state["seconds_left"] is None else state["seconds_left"]
    say.result({**state, "seconds": estimate.seconds, "bytes": estimate.bytes}, [text])


def _plan_signature() -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The parameters of `batch plan`: its own, then those of generate that a plan has."""
    kept = [*OPTIONS.keys() - LEFT_OUT, "model", "prediction", "offline", "device", "dtype", "metadata", "dry_run"]
    kept += ["json", "quiet", "debug"]
    hints = get_type_hints(generate, include_extras=True)
    taken = [p for name, p in inspect.signature(generate).parameters.items() if name in kept]
    own = [p for p in inspect.signature(_plan).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own, *(p.replace(annotation=hints[p.name]) for p in taken)]
    annotations = get_type_hints(_plan, include_extras=True) | hints
    return parameters, {p.name: annotations[p.name] for p in parameters}


def plan(**values: Any) -> None:
    _plan(**values)


_parameters, plan.__annotations__ = _plan_signature()
plan.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [p.replace(annotation=plan.__annotations__[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in _parameters]
)


def run_batch(
    out: Folder,
    engine: Annotated[
        str, option(ENGINE, "Who makes the shards.", metavar="|".join(run.ENGINES), default=True)
    ] = "local",
    workers: Annotated[
        str | None, option(ENGINE, "Processes; MIN-MAX with Ray. \\[one a GPU, or one]", metavar="N|MIN-MAX")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, option(ENGINE, "With Ray. \\[1 where there are GPUs]", metavar="X")
    ] = None,
    part: Annotated[
        str | None,
        option(ENGINE, "Make part I of N, in this process; auto: Slurm's or Kubernetes' index.", metavar="I/N|auto"),
    ] = None,
    address: Annotated[
        str | None, option(ENGINE, "Ray cluster: auto or HOST:PORT. \\[start Ray here]", metavar="ADDRESS")
    ] = None,
    model: Annotated[
        str | None,
        option(ENGINE, "Where the model is here. \\[where the plan says]", "--model", "-m", metavar="NAME|PATH|ID"),
    ] = None,
    retries: Annotated[int, option(ENGINE, "Tries after workers died over a shard.", metavar="N", default=True)] = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """A finished plan is left as it is. Run the same command again after anything ended it."""
    say = Output("batch run", json, quiet)
    values = {"OUT": out, "workers": workers, "part": part, "address": address, "model": model}
    refuse_empty(values, {"OUT": "OUT"})
    device, dtype = device_name(device), dtype_name(dtype)
    environment.prepare(offline)
    own = None if part is None else run.parse_part(part)
    latest = run.status(out)
    with say.progress("making pictures") as on_step:

        def report(shards: Shards) -> None:
            nonlocal latest
            latest = shards
            state = shards.as_json()
            if on_step is not None:
                on_step(state["done"] + state["failed"], state["rows"])
            else:
                say.note(_line(shards))

        try:
            latest = run.run(
                out,
                engine=engine,
                workers=None if workers is None else run.parse_workers(workers),
                gpus_per_worker=gpus_per_worker,
                part=own,
                address=address,
                retries=retries,
                model=model,
                device=device,
                dtype=dtype,
                offline=offline,
                report=report,
            )
        except BaseException as error:
            raise UnfinishedError(error, latest.as_json()) from error
    state = latest.as_json()
    if latest.failed:
        hint = f"list them as prompts: diffgen batch failures {out}"
        raise UnfinishedError(DiffgenError(f"{len(latest.failed)} of {state['rows']} rows failed", hint), state)
    say.result(state, [_line(latest)])


def status(out: Folder, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """It reads only the folder: any machine that sees it can ask."""
    say = Output("batch status", json, quiet)
    refuse_empty({"OUT": out}, {"OUT": "OUT"})
    shards = run.status(out)
    lines = [_line(shards)]
    lines += [f"shard {n}: {len(s['failed'])} rows failed" for n, s in sorted(shards.stats.items()) if s["failed"]]
    say.result(shards.as_json(), lines)


def _line(shards: Shards) -> str:
    """The state of a batch in one line."""
    state, rate = shards.as_json(), shards.rate()
    parts = [f"{state['done']} of {state['rows']} pictures", f"{state['done_shards']} of {state['shards']} shards"]
    if state["failed"]:
        parts.append(f"{state['failed']} failed")
    if state["missing"] and rate is not None:
        parts += [f"{rate:.2g} pictures/s", f"{time_text(state['seconds_left'])} left"]
    return ", ".join(parts)


def check(
    out: Folder,
    repair: Annotated[bool, typer.Option("--repair", metavar="", help="Make wrong shards again, here.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Every key of the plan, every picture decoded, every recorded hash compared with the pixels."""
    say = Output("batch check", json, quiet)
    refuse_empty({"OUT": out}, {"OUT": "OUT"})
    device, dtype = device_name(device), dtype_name(dtype)
    findings = _checked(say, out)
    if repair and findings.wrong:
        environment.prepare(offline)
        checks.forget_bad(out, findings)
        say.note(f"making {len(findings.shards)} shards again")
        run.run(out, device=device, dtype=dtype, offline=offline)
        findings = _checked(say, out)
    if findings.wrong:
        listed = [f"{len(keys)} {what}: {', '.join(keys[:5])}" for what, keys in findings.as_json().items() if keys]
        hint = f"make these shards again: diffgen batch check {out} --repair"
        raise UnfinishedError(DiffgenError("; ".join(listed), hint), findings.as_json())
    say.result(findings.as_json(), ["every picture of the plan is there, once, with its recorded pixels"])


def _checked(say: Output, out: str) -> checks.Findings:
    with say.progress("checking shards") as on_step:
        findings = checks.check(out, on_step or (lambda done, total: None))
    for note in findings.notes:
        say.warn(note)
    return findings


def failures(
    out: Folder,
    output: Annotated[
        str | None, option(OUTPUT, "Write there. \\[stdout]", "--out", "-o", "--output", metavar="FILE")
    ] = None,
    overwrite: Annotated[bool, option(OUTPUT, "Replace a file.", "--overwrite", metavar="", default=True)] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """They are written as JSON lines: a prompt file for the next plan. The reasons go to stderr."""
    from pathlib import Path

    say = Output("batch failures", json, quiet)
    refuse_empty({"OUT": out, "out": output}, {"OUT": "OUT"})
    failed = run.status(out).failed
    lines = [json_format.dumps(row["prompt"], ensure_ascii=False) for row in failed]
    for row in failed:
        say.note(f"{row['key']}: {row['error']['message']}")
    if output is not None:
        publish(Path(output), "".join(f"{line}\n" for line in lines).encode(), overwrite)
        lines = []
    elif not failed:
        say.note("no row failed")
    say.result({"failures": failed}, lines)
