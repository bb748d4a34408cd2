"""diffgen generate: pictures from prompts."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

import typer

from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import DiffgenError, UsageError
from diffgen.generation.checks import which_seeds
from diffgen.generation.options import OPTIONS, flag_of, json_types
from diffgen.generation.plan import Plan
from diffgen.images.metadata import LEVELS, base_name, encode_png
from diffgen.images.naming import Outputs
from diffgen.loading import make_plan
from diffgen.models.families import FAMILIES
from diffgen.models.find import Model, predicting
from diffgen.pipelines.inputs import check_switch, offload_name, quantize_name
from diffgen.pipelines.plan import check_text
from diffgen.prompts.files import Line, read_lines
from diffgen.prompts.wildcards import Wildcards

from . import loaded, models
from .observe import Seen, view_of
from .options import Device, Dtype, Offline
from .output import Debug, Json, Output, Quiet, UnfinishedError, refuse_empty
from .signals import uninterrupted

EXAMPLES = """
Examples:

  diffgen generate "a red apple" -n 4 --seed 7 -o apples/

  diffgen generate "a cat" --scheduler "DPM++ 2M Karras" --steps 30 -o cat.png

  diffgen generate "a green apple" --image apple.png --strength 0.6

  diffgen generate --prompt-file prompts.jsonl -o "{prompt}-{seed}.png"

  echo "a blue circle" | diffgen generate - -m some/diffusers/folder
"""

Text: TypeAlias = str | None
Texts: TypeAlias = list[str] | None
Whole: TypeAlias = int | None
Real: TypeAlias = float | None


def _option(panel: str, help: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel, show_default=False)


PROMPT, PICTURE, SAMPLING = "Prompt", "Picture", "Sampling"
BEGIN, MODEL, MEMORY, OUTPUT = "From a picture", "Model", "Device and memory", "Output"
LOOK = "Look inside"


def generate(
    prompt: Annotated[
        Texts, typer.Argument(help="What to show; - reads stdin, a prompt a line.", show_default=False)
    ] = None,
    prompt_file: Annotated[Text, _option(PROMPT, "A prompt a line, or JSON lines.", metavar="FILE")] = None,
    negative: Annotated[str, _option(PROMPT, "What not to show.", metavar="TEXT")] = "",
    style: Annotated[Texts, _option(PROMPT, "Of styles.toml; may be repeated.", metavar="NAME")] = None,
    prompt_syntax: Annotated[
        str, _option(PROMPT, "Weights and choices, or none. \\[a1111]", metavar="a1111|plain")
    ] = "a1111",
    wildcards: Annotated[Texts, _option(PROMPT, "Files for __name__. \\[./wildcards]", metavar="FOLDER")] = None,
    clip_skip: Annotated[int, _option(PROMPT, "Read the N-th last layer. \\[1]", metavar="N")] = 1,
    count: Annotated[
        int, _option(PICTURE, "Per prompt; the i-th has seed + i. \\[1]", "--count", "-n", metavar="N")
    ] = 1,
    size: Annotated[Text, _option(PICTURE, "In pixels. \\[the model's own]", "--size", "-s", metavar="WxH")] = None,
    seed: Annotated[Whole, _option(PICTURE, "0 to 4294967295. \\[random]", metavar="N")] = None,
    seeds: Annotated[Text, _option(PICTURE, "A list instead: 0-7 or 1,5,9.", metavar="LIST")] = None,
    variation_seed: Annotated[Whole, _option(PICTURE, "Mix in the noise of this seed.", metavar="N")] = None,
    variation_strength: Annotated[Real, _option(PICTURE, "How much of it.", metavar="0…1")] = None,
    tile: Annotated[bool, _option(PICTURE, "Edges that meet when it is repeated.", "--tile")] = False,
    steps: Annotated[Whole, _option(SAMPLING, "Of the solver. \\[the model's]", metavar="N")] = None,
    guidance: Annotated[Real, _option(SAMPLING, "1 is off. \\[the model's]", metavar="X")] = None,
    guidance_rescale: Annotated[float, _option(SAMPLING, "Against too much contrast. \\[0]", metavar="0…1")] = 0.0,
    guidance_interval: Annotated[Text, _option(SAMPLING, "Only in this part of the steps.", metavar="A,B")] = None,
    scheduler: Annotated[Text, _option(SAMPLING, "See diffgen schedulers list.", metavar="NAME")] = None,
    grid: Annotated[Text, _option(SAMPLING, "At which times the model is asked.", metavar="NAME|FILE")] = None,
    image: Annotated[Text, _option(BEGIN, "Begin with this picture.", metavar="FILE")] = None,
    strength: Annotated[Real, _option(BEGIN, "Of change. \\[0.75; with mask 1]", metavar="0…1")] = None,
    mask: Annotated[Text, _option(BEGIN, "White is made anew, black kept.", metavar="FILE")] = None,
    outpaint: Annotated[Text, _option(BEGIN, "Pixels to add at each side.", metavar="L,T,R,B")] = None,
    controls: Annotated[
        Texts, _option(BEGIN, "canny, scribble, or any map.", "--control", metavar="TYPE=FILE[:SCALE]")
    ] = None,
    control_models: Annotated[
        Texts, _option(BEGIN, "Its ControlNet: folder or file.", "--control-model", metavar="[TYPE=]PATH")
    ] = None,
    upscale: Annotated[Real, _option(BEGIN, "A second pass, X times larger.", metavar="X")] = None,
    upscale_mode: Annotated[Text, _option(BEGIN, "What is enlarged. \\[lanczos]", metavar="lanczos|latent")] = None,
    upscale_strength: Annotated[Real, _option(BEGIN, "Of change. \\[0.5]", metavar="0…1")] = None,
    model: Annotated[
        Text, _option(MODEL, "Bundled, path, hub's. \\[emoji]", "--model", "-m", metavar="NAME|PATH|ID")
    ] = None,
    prediction: Annotated[Text, _option(MODEL, "Of a file that does not say.", metavar="epsilon|v_prediction")] = None,
    refiner: Annotated[Text, _option(MODEL, "SDXL's, for the last fifth.", metavar="NAME|PATH|ID")] = None,
    loras: Annotated[Texts, _option(MODEL, "May be repeated.", "--lora", metavar="PATH[:SCALE]")] = None,
    embeddings: Annotated[Texts, _option(MODEL, "A textual inversion.", "--embedding", metavar="WORD=FILE")] = None,
    safety: Annotated[str, _option(MODEL, "The model's checker. \\[on]", metavar="on|off")] = "on",
    offline: Offline = False,
    preview: Annotated[bool, _option(LOOK, "In the terminal, while it is made.", "--preview")] = False,
    save_steps: Annotated[
        Text, _option(LOOK, "What each evaluation predicts: strip, GIF.", "--save-steps", metavar="FOLDER")
    ] = None,
    attention: Annotated[Texts, _option(LOOK, "Where this word is seen; repeatable.", metavar="WORD")] = None,
    attention_out: Annotated[Text, _option(LOOK, "Of these maps. \\[attention]", metavar="FOLDER")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int, _option(MEMORY, "At once; last bits may differ. \\[1]", metavar="N")] = 1,
    vae_tiling: Annotated[bool, _option(MEMORY, "Decode in tiles.", "--vae-tiling")] = False,
    offload: Annotated[str, _option(MEMORY, "model or sequential spare a GPU. \\[none]", metavar="NAME")] = "none",
    quantize: Annotated[str, _option(MEMORY, "int8: in eight bits, by torchao. \\[none]", metavar="NAME")] = "none",
    out: Annotated[
        Text,
        _option(
            OUTPUT,
            "Or a template. \\[outputs/{index:06}-{seed}-{prompt}.png]",
            "--out",
            "-o",
            "--output",
            metavar="FILE|DIR/",
        ),
    ] = None,
    overwrite: Annotated[bool, _option(OUTPUT, "Replace files that exist.", "--overwrite")] = False,
    metadata: Annotated[str, _option(OUTPUT, "Or params, none: what is told. \\[full]", metavar="full|…")] = "full",
    dry_run: Annotated[bool, _option(OUTPUT, "Check everything, make nothing.", "--dry-run")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    cfg_scale: Annotated[Real, typer.Option("--cfg-scale", "--guidance-scale", hidden=True)] = None,
    sampler: Annotated[Text, typer.Option("--sampler", hidden=True)] = None,
) -> None:
    given = {name: value for name, value in locals().items() if value is not None}
    started = time.perf_counter()
    say = Output("generate", json, quiet)
    if metadata not in LEVELS:
        raise UsageError(f"--metadata must be one of {', '.join(LEVELS)} (got {metadata!r})")
    device, dtype, offload = device_name(device), dtype_name(dtype), offload_name(offload)
    quantize_name(quantize)
    flags = {name: flag_of(name) for name in OPTIONS}
    refuse_empty({name: value for name, value in given.items() if name not in ("prompt", "negative")}, flags)
    options: Any = {name: given[name] for name in OPTIONS if name in given}
    options["safety"] = check_switch("--safety", safety)
    options["keep_steps"] = save_steps is not None
    if attention_out is not None and not attention:
        raise UsageError("--attention-out is for the maps of words", "name one: --attention WORD")
    if guidance is None and cfg_scale is not None:
        options["guidance"] = cfg_scale
    if scheduler is None and sampler is not None:
        options["scheduler"] = sampler
    lines = _lines(prompt or [], prompt_file)
    outputs = Outputs(out, _count(lines, options), overwrite)  # what cannot be written is said before any download
    seen = Seen(outputs, save_steps, bool(attention), attention_out, overwrite)
    found = models.offer_pull(model, say, offline)
    if prediction is not None:
        found = predicting(found, prediction)
    if refiner is not None and not found.is_run and (family := FAMILIES[found.family].refiner):
        models.offer_pull(refiner, say, offline, family)
    plans = _plans(found, lines, options)
    for plan in plans:
        say.note(_summary(plan))
        for text in plan.prompts:
            for warning in plan.warnings(text):
                say.warn(warning)
    if dry_run:
        pictures = [{"path": None, **_entry(plan, shot.prompt, shot.seed)} for plan in plans for shot in plan.shots()]
        say.result(_result(plans, pictures) | {"dry_run": True}, (f"{p['seed']}\t{p['prompt']}" for p in pictures))
        return

    environment.prepare(offline)
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries; ours are printed
    with _no_collection():
        generator = loaded.load(plans[0].model, device, dtype, offload, quantize)
    made: list[dict[str, Any]] = []
    failed: list[tuple[dict[str, Any], DiffgenError]] = []
    inside: list[dict[str, Any]] = []  # the files about pictures
    told: set[str] = set()
    nfe = None
    view = view_of(quiet) if preview else None
    on_denoised = view.watch(generator) if view is not None else None
    if view is not None:
        say.note(f"preview: {generator.sketched}")
    try:
        with say.progress(plans[0].model.name, view) as on_step:
            for plan, picture in (
                (one, shown) for one in plans for shown in generator.pictures(one, on_step, on_denoised)
            ):
                nfe = nfe or picture.record["nfe"]
                for fit in generator.fits:
                    if fit not in told:
                        say.note(fit)
                        told.add(fit)
                for warning in picture.record["warnings"]:
                    say.warn(warning)
                entry = _entry(plan, picture.prompt, picture.seed)
                if picture.image is None:
                    assert picture.error is not None
                    failed.append((entry, picture.error))
                    continue
                png = encode_png(picture.image, picture.record, metadata)
                with uninterrupted():
                    path = outputs.write(
                        png,
                        seed=picture.seed,
                        prompt=picture.prompt,
                        model=plan.model.name,
                        scheduler=plan.scheduler,
                        steps=plan.steps,
                    )
                    made.append({"path": str(path), **entry, "pixels_sha256": picture.record["pixels_sha256"]})
                    if view is not None:
                        view.finished(picture)
                    say.line(str(path))
                    if files := seen.write(picture, path):
                        inside.append({"picture": str(path), **files})
        if failed:
            raise _all_that_failed(failed, sum(map(len, plans)))
    except BaseException as error:
        result = _result(plans, made, nfe, started) | {"failed": [entry for entry, _ in failed], "inside": inside}
        raise UnfinishedError(error, result) from error
    say.result(_result(plans, made, nfe, started) | {"adapters": generator.fits, "inside": inside})


def _lines(given: list[str], file: str | None) -> list[Line]:
    """The prompts on the command line, "-" replaced by those from stdin, and those of the file."""
    lines = [line for text in given for line in (read_lines("-", json_types()) if text == "-" else [Line(text)])]
    return lines + (read_lines(file, json_types()) if file is not None else [])


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Inside, an error is one of that line of a file, "" for none."""
    try:
        yield
    except DiffgenError as error:
        error.message = f"{where}: {error.message}" if where else error.message
        raise


def _count(lines: list[Line], options: Any) -> int:
    """How many pictures are asked for. Raises UsageError."""
    total = 0
    for line in lines or [Line("")]:
        asked = options | line.options
        with _at(line.where if line.options else ""):
            total += which_seeds(asked.get("count", 1), asked.get("seed"), asked.get("seeds"))["count"]
    return total


def _plans(model: Model, lines: list[Line], options: Any) -> list[Plan]:
    """A plan for all neighbouring prompts with the same options. A seed that is random is so once, for all."""
    wildcards = Wildcards(options.get("wildcards"))
    for line in lines if not model.is_run else ():
        with _at(line.where):
            check_text(line.prompt, line.options.get("prompt_syntax", options["prompt_syntax"]), wildcards)
    if not lines:
        return [make_plan(model, (), **options)]
    plans: list[Plan] = []
    for said, group in itertools.groupby(lines, lambda line: line.options):
        texts = list(group)
        with _at(texts[0].where if said else ""):
            plans.append(make_plan(model, [line.prompt for line in texts], **(options | said)))
        if not {"seed", "seeds"} & {*options, *said}:  # the random one: what a line names is its own
            options = options | {"seed": plans[-1].seed}
    return plans


def _summary(plan: Plan) -> str:
    """What will be made, in a line; "(model default)" stands beside what was not said."""

    def own(*names: str) -> str:
        return "" if plan.given & set(names) else " (model default)"

    seeds = f"seed {plan.seed}" if not plan.seeds else f"{len(plan.seeds)} seeds"
    width, height = plan.final_size
    parts = [
        f"{plan.scheduler} on {base_name(plan.grid)}{own('scheduler', 'grid')}",
        f"{plan.steps} step{'s' * (plan.steps > 1)}{own('steps')}",
        f"guidance {plan.guidance:g}{own('guidance')}",
        f"{width}x{height}{own('size', 'image', 'controls', 'upscale')}",
        seeds,
        *plan.details,
    ]
    return f"{plan.model.name}: {', '.join(parts)}"


def _entry(plan: Plan, prompt: str, seed: int) -> dict[str, Any]:
    width, height = plan.final_size
    return {"prompt": prompt, "seed": seed, "width": width, "height": height}


def _result(
    plans: list[Plan], pictures: list[dict[str, Any]], nfe: int | None = None, started: float | None = None
) -> dict[str, Any]:
    first = plans[0]
    noted = [warning for plan in plans for text in plan.prompts for warning in plan.warnings(text)]
    return {
        "images": pictures,
        "model": first.model.name,
        "scheduler": first.scheduler,
        "grid": base_name(first.grid),
        "steps": first.steps,
        "nfe": nfe,
        "guidance": first.guidance,
        "seconds": None if started is None else round(time.perf_counter() - started, 3),
        "warnings": list(dict.fromkeys(noted)),
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
