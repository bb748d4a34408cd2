"""diffgen generate: make pictures from prompts."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from .options import Device, Dtype, Offline, option
from .output import Debug, Json, Quiet

EXAMPLES = """
Examples:

  diffgen generate "a red apple" -n 4 --seed 7 -o apples/

  diffgen generate "a cat" --scheduler "DPM++ 2M Karras" --steps 30 -o cat.png

  diffgen generate "a green apple" --image apple.png --strength 0.6

  echo "a blue circle" | diffgen generate - -m some/diffusers/folder
"""

Text: TypeAlias = str | None
Texts: TypeAlias = list[str] | None
Whole: TypeAlias = int | None
Real: TypeAlias = float | None


PROMPT, PICTURE, SAMPLING = "Prompt", "Picture", "Sampling"
BEGIN, MODEL, MEMORY, OUTPUT = "From a picture", "Model", "Device and memory", "Output"
LOOK = "Look inside"


def generate(
    prompt: Annotated[
        Texts, typer.Argument(help="Prompts; - reads one per line from stdin.", show_default=False)
    ] = None,
    prompt_file: Annotated[Text, option(PROMPT, "One prompt per line, or JSON lines.", metavar="FILE")] = None,
    negative: Annotated[str, option(PROMPT, "Negative prompt: what not to show.", metavar="TEXT")] = "",
    style: Annotated[Texts, option(PROMPT, "Style in styles.toml; may be repeated.", metavar="NAME")] = None,
    prompt_syntax: Annotated[
        str, option(PROMPT, "Syntax of weights and choices. \\[a1111]", metavar="a1111|plain")
    ] = "a1111",
    wildcards: Annotated[Texts, option(PROMPT, "Folder of wildcard files. \\[./wildcards]", metavar="FOLDER")] = None,
    clip_skip: Annotated[int, option(PROMPT, "Use the encoder's N-th last layer. \\[1]", metavar="N")] = 1,
    count: Annotated[
        int, option(PICTURE, "Pictures per prompt; seeds count up. \\[1]", "--count", "-n", metavar="N")
    ] = 1,
    size: Annotated[Text, option(PICTURE, "Size in pixels. \\[the model's]", "--size", "-s", metavar="WxH")] = None,
    seed: Annotated[Whole, option(PICTURE, "Seed, from 0 to 4294967295. \\[random]", metavar="N")] = None,
    seeds: Annotated[Text, option(PICTURE, "Seeds instead of --seed: 0-7 or 1,5,9.", metavar="LIST")] = None,
    variation_seed: Annotated[Whole, option(PICTURE, "Mix in the noise of this second seed.", metavar="N")] = None,
    variation_strength: Annotated[Real, option(PICTURE, "Share of the variation seed's noise.", metavar="0…1")] = None,
    tile: Annotated[bool, option(PICTURE, "Make pictures that repeat seamlessly.", "--tile")] = False,
    steps: Annotated[Whole, option(SAMPLING, "Number of solver steps. \\[the model's]", metavar="N")] = None,
    guidance: Annotated[Real, option(SAMPLING, "Guidance scale; 1: off. \\[the model's]", metavar="X")] = None,
    guidance_rescale: Annotated[float, option(SAMPLING, "Reduce the contrast of guidance. \\[0]", metavar="0…1")] = 0.0,
    guidance_interval: Annotated[
        Text, option(SAMPLING, "Part of the steps with guidance. \\[0,1]", metavar="A,B")
    ] = None,
    scheduler: Annotated[Text, option(SAMPLING, "Name of a scheduler. \\[the model's]", metavar="NAME")] = None,
    grid: Annotated[Text, option(SAMPLING, "Grid of noise levels. \\[automatic]", metavar="NAME|FILE")] = None,
    image: Annotated[Text, option(BEGIN, "Start from this picture.", metavar="FILE")] = None,
    strength: Annotated[Real, option(BEGIN, "Amount of change. \\[0.75, mask 1]", metavar="0…1")] = None,
    mask: Annotated[Text, option(BEGIN, "Repaint the mask's white areas.", metavar="FILE")] = None,
    references: Annotated[Texts, option(BEGIN, "Picture to edit; some models.", "--reference", metavar="FILE")] = None,
    outpaint: Annotated[Text, option(BEGIN, "Pixels to add at each side.", metavar="L,T,R,B")] = None,
    controls: Annotated[
        Texts,
        option(BEGIN, "Picture that guides the layout.", "--control", metavar="TYPE=FILE[:SCALE]"),
    ] = None,
    control_models: Annotated[
        Texts, option(BEGIN, "ControlNet: a folder or a file.", "--control-model", metavar="[TYPE=]PATH")
    ] = None,
    upscale: Annotated[Real, option(BEGIN, "Add a pass at X times the size.", metavar="X")] = None,
    upscale_mode: Annotated[Text, option(BEGIN, "Way to enlarge. \\[lanczos]", metavar="lanczos|latent")] = None,
    upscale_strength: Annotated[Real, option(BEGIN, "Amount of change there. \\[0.5]", metavar="0…1")] = None,
    model: Annotated[
        Text, option(MODEL, "Name, path, or hub id. \\[emoji]", "--model", "-m", metavar="NAME|PATH|ID")
    ] = None,
    component: Annotated[Texts, option(MODEL, "File of a part (vae, …).", metavar="NAME=FILE")] = None,
    prediction: Annotated[
        Text, option(MODEL, "Prediction type, if unrecorded.", metavar="epsilon|v_prediction")
    ] = None,
    refiner: Annotated[Text, option(MODEL, "SDXL refiner for the last fifth.", metavar="NAME|PATH|ID")] = None,
    loras: Annotated[Texts, option(MODEL, "LoRA; may be repeated.", "--lora", metavar="PATH[:SCALE]")] = None,
    embeddings: Annotated[
        Texts, option(MODEL, "Textual inversion of a word.", "--embedding", metavar="WORD=FILE")
    ] = None,
    safety: Annotated[str, option(MODEL, "Run the safety checker. \\[on]", metavar="on|off")] = "on",
    offline: Offline = False,
    server: Annotated[
        Text,
        typer.Option(
            envvar="DIFFGEN_SERVER",
            show_envvar=False,
            metavar="URL",
            help="Use this diffgen serve.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    preview: Annotated[bool, option(LOOK, "Show pictures in the terminal as they form.", "--preview")] = False,
    save_steps: Annotated[
        Text, option(LOOK, "Save all predictions as a strip and a GIF.", "--save-steps", metavar="FOLDER")
    ] = None,
    attention: Annotated[Texts, option(LOOK, "Save a map of this word; may be repeated.", metavar="WORD")] = None,
    attention_out: Annotated[
        Text, option(LOOK, "Folder of the attention maps. \\[attention]", metavar="FOLDER")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[str, option(MEMORY, "Pictures at once; last bits change. \\[1]", metavar="N|auto")] = "1",
    vae_tiling: Annotated[bool, option(MEMORY, "Decode in tiles to save memory.", "--vae-tiling")] = False,
    offload: Annotated[str, option(MEMORY, "model, group or sequential. \\[none]", metavar="NAME")] = "none",
    quantize: Annotated[str, option(MEMORY, "int8, fp8, nf4 or fp8-storage. \\[none]", metavar="NAME")] = "none",
    compile: Annotated[bool, option(MEMORY, "Compile the network's repeated blocks.", "--compile")] = False,
    attention_backend: Annotated[str, option(MEMORY, "cudnn, flash, sage, …. \\[native]", metavar="NAME")] = "native",
    out: Annotated[
        Text,
        option(
            OUTPUT,
            "Image file, folder/, or a template. \\[outputs/{index:06}-{seed}-{prompt}.png]",
            "--out",
            "-o",
            "--output",
            metavar="FILE|DIR/",
        ),
    ] = None,
    overwrite: Annotated[bool, option(OUTPUT, "Replace files that exist.", "--overwrite")] = False,
    metadata: Annotated[str, option(OUTPUT, "Write full, params or none. \\[full]", metavar="LEVEL")] = "full",
    dry_run: Annotated[bool, option(OUTPUT, "Check everything, make nothing.", "--dry-run")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    cfg_scale: Annotated[Real, typer.Option("--cfg-scale", "--guidance-scale", hidden=True)] = None,
    sampler: Annotated[Text, typer.Option("--sampler", hidden=True)] = None,
) -> None:
    arguments = dict(locals())
    from .pictures import make_pictures as run  # not before the command line is parsed: an error there comes at once

    run(arguments)
