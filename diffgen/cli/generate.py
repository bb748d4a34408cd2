"""diffgen generate: pictures from prompts."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer

import diffgen
from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import DiffgenError, UsageError
from diffgen.images.metadata import LEVELS, encode_png
from diffgen.images.naming import Outputs
from diffgen.models.find import find
from diffgen.stable_diffusion import prompts
from diffgen.stable_diffusion.plan import Plan, make_plan

from . import whole
from .output import Debug, Json, Output, Quiet, UnfinishedError

EXAMPLES = """
Examples:

  diffgen generate "a red apple"

  diffgen generate "a red apple" -n 4 --seed 7 -o apples/

  diffgen generate "a cat" --scheduler "DPM++ 2M Karras" --steps 30 -o cat.png

  diffgen generate --prompt-file prompts.txt -o "{prompt}-{seed}.png"

  echo "a blue circle" | diffgen generate - -m some/diffusers/folder
"""

PICTURE, SAMPLING, MODEL, OUTPUT = "Picture", "Sampling", "Model", "Output"


def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to show; - reads prompts from stdin, one a line.")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Prompts from a file, one a line; # begins a comment.", rich_help_panel=PICTURE
        ),
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What not to show.", rich_help_panel=PICTURE)] = "",
    count: Annotated[
        int,
        typer.Option(
            "--count", "-n", help="Pictures for each prompt; picture i has seed + i.", rich_help_panel=PICTURE
        ),
    ] = 1,
    size: Annotated[
        str | None,
        typer.Option("--size", "-s", metavar="WxH", help="In pixels. \\[the model's own]", rich_help_panel=PICTURE),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="0 to 4294967295. \\[random, printed and recorded]", rich_help_panel=SAMPLING)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the solver. \\[the model's]", rich_help_panel=SAMPLING)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How closely to follow the prompt; 1 is off. \\[the model's]", rich_help_panel=SAMPLING),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="See `diffgen schedulers list`. \\[the model's]", rich_help_panel=SAMPLING),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="At which times the model is asked. \\[the scheduler's]", rich_help_panel=SAMPLING
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Pictures made at once; above 1, last bits may differ.", rich_help_panel=SAMPLING)
    ] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FOLDER",
            help="A bundled model or a diffusers folder. \\[emoji]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda[:N]|mps|xpu", help="Where to compute.", rich_help_panel=MODEL)
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|float16|bfloat16", help="In which precision.", rich_help_panel=MODEL)
    ] = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=MODEL)] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            "--output",
            metavar="FILE|FOLDER/|TEMPLATE",
            help="Where to write. \\[outputs/{index:06}-{seed}-{prompt}.png]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.", rich_help_panel=OUTPUT)
    ] = False,
    metadata: Annotated[
        str,
        typer.Option(metavar="full|params|none", help="What pictures say about themselves.", rich_help_panel=OUTPUT),
    ] = "full",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, make nothing.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    cfg_scale: Annotated[float | None, typer.Option("--cfg-scale", "--guidance-scale", hidden=True)] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", hidden=True)] = None,
) -> None:
    """Make pictures from prompts."""
    started = time.perf_counter()
    say = Output("generate", json, quiet)
    if metadata not in LEVELS:
        raise UsageError(f"--metadata must be one of {', '.join(LEVELS)} (got {metadata!r})")
    device, dtype = device_name(device), dtype_name(dtype)
    plan = make_plan(
        find(model),
        _prompts(prompt or [], prompt_file),
        negative=negative,
        count=count,
        seed=seed,
        steps=steps,
        guidance=cfg_scale if guidance is None else guidance,
        scheduler=scheduler or sampler,
        grid=grid,
        size=size,
        batch_size=batch_size,
    )
    outputs = Outputs(out, len(plan), overwrite)
    say.note(
        f"{plan.model.name}: {plan.scheduler} on {plan.grid}, {plan.steps} steps, guidance {plan.guidance:g}, "
        f"{plan.width}x{plan.height}, seed {plan.seed}"
    )
    for text in plan.prompts:
        for warning in plan.warnings(text):
            say.warn(warning)
    if dry_run:
        pictures = [
            {"path": None, **_entry(plan, text, plan.seed + i)} for text in plan.prompts for i in range(plan.count)
        ]
        say.result(_result(plan, pictures) | {"dry_run": True}, (f"{p['seed']}\t{p['prompt']}" for p in pictures))
        return

    environment.prepare(offline)
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries; ours are printed
    with _no_collection():
        generator = diffgen.load(plan.model, device, dtype)
    made: list[dict[str, Any]] = []
    failed: list[tuple[dict[str, Any], DiffgenError]] = []
    nfe = None
    try:
        with say.progress(plan.model.name) as on_step:
            for picture in generator.pictures(plan, on_step):
                nfe = picture.record["nfe"]
                for warning in picture.record["warnings"]:
                    say.warn(warning)
                entry = _entry(plan, picture.prompt, picture.seed)
                if picture.image is None:
                    assert picture.error is not None
                    failed.append((entry, picture.error))
                    continue
                png = encode_png(picture.image, picture.record, metadata)
                with whole():
                    path = outputs.write(
                        png,
                        seed=picture.seed,
                        prompt=picture.prompt,
                        model=plan.model.name,
                        scheduler=plan.scheduler,
                        steps=plan.steps,
                    )
                    made.append({"path": str(path), **entry, "pixels_sha256": picture.record["pixels_sha256"]})
                    say.line(str(path))
        if failed:
            raise _all_that_failed(failed, len(plan))
    except BaseException as error:
        result = _result(plan, made, nfe, started) | {"failed": [entry for entry, _ in failed]}
        raise UnfinishedError(error, result) from error
    say.result(_result(plan, made, nfe, started))


def _prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts on the command line, "-" replaced by those from stdin, and those of the file."""
    texts = [text for item in given for text in (prompts.read("-") if item == "-" else [item])]
    return texts + (prompts.read(file) if file is not None else [])


def _entry(plan: Plan, prompt: str, seed: int) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, "width": plan.width, "height": plan.height}


def _result(
    plan: Plan, pictures: list[dict[str, Any]], nfe: int | None = None, started: float | None = None
) -> dict[str, Any]:
    return {
        "images": pictures,
        "model": plan.model.name,
        "scheduler": plan.scheduler,
        "grid": plan.grid,
        "steps": plan.steps,
        "nfe": nfe,
        "guidance": plan.guidance,
        "seconds": None if started is None else round(time.perf_counter() - started, 3),
        "warnings": list(dict.fromkeys(warning for text in plan.prompts for warning in plan.warnings(text))),
    }


def _all_that_failed(failed: list[tuple[dict[str, Any], DiffgenError]], total: int) -> DiffgenError:
    """One error for all pictures that came out wrong; a single one speaks for itself."""
    first = failed[0][1]
    if len(failed) == 1:
        return first
    named = ", ".join(f"{entry['prompt']!r} (seed {entry['seed']})" for entry, _ in failed)
    return type(first)(f"{len(failed)} of {total} pictures came out wrong, nothing saved for them: {named}", first.hint)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: imports make a million objects, and looking through them again and again takes a
    sixth of the start-up time. Afterwards they are set aside for good."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
