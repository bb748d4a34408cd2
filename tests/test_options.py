"""The table of generate's options: what is derived from its rows."""

from __future__ import annotations

from typing import Any, cast

import pytest
import typer

from diffgen.cli.generate import generate
from diffgen.errors import UsageError
from diffgen.generation.options import OPTIONS, Options, checked_values, flag_of, json_types, unsupported, words_of

PIPELINES_ONLY = {
    *("negative", "style", "clip_skip", "guidance_rescale", "guidance_interval", "variation_seed"),
    *(
        "variation_strength",
        "tile",
        "image",
        "strength",
        "mask",
        "outpaint",
        "references",
        "controls",
        "control_models",
    ),
    *("upscale", "upscale_mode", "upscale_strength", "refiner", "loras", "embeddings", "attention", "compile"),
    "attention_backend",
}


def test_every_option_is_a_flag_of_the_command() -> None:
    app = typer.Typer()
    app.command()(generate)
    flags = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
    assert {flag_of(name) for name in OPTIONS} - flags == {"--keep-steps"}  # which is --save-steps FOLDER


def test_the_keys_of_prompt_files_and_their_types() -> None:
    assert json_types() == {
        "negative": (str,),
        "style": (str, list),
        "prompt_syntax": (str,),
        "clip_skip": (int,),
        "count": (int,),
        "seed": (int,),
        "size": (str, int, list),
        "steps": (int,),
        "guidance": (int, float),
        "scheduler": (str,),
        "grid": (str,),
        "image": (str,),
        "strength": (int, float),
        "mask": (str,),
        "variation_seed": (int,),
        "variation_strength": (int, float),
    }


def test_each_kind_of_model_accepts_its_options() -> None:
    takes = {
        kind: {name for name, row in OPTIONS.items() if kind in row.models} for kind in ("prompts", "noise", "run")
    }
    assert takes["prompts"] == set(OPTIONS)
    assert takes["run"] == set(OPTIONS) - PIPELINES_ONLY
    assert takes["noise"] == set(OPTIONS) - PIPELINES_ONLY - {"guidance", "vae_tiling"}


@pytest.mark.parametrize("name", sorted(PIPELINES_ONLY))
def test_every_model_accepts_neutral_values(name: str) -> None:
    for value in (OPTIONS[name].neutral, None, "", [], 0):
        assert unsupported(cast(Options, {name: value}), "run") is None
    assert unsupported(cast(Options, {"seed": 7, name: "x"}), "run") == name


def test_checked_values_fill_in_the_neutral_ones() -> None:
    values = checked_values({"clip_skip": 2, "tile": True, "seed": 7})
    assert values == {
        "clip_skip": 2,
        "guidance_rescale": 0.0,
        "guidance_interval": (0.0, 1.0),
        "tile": True,
        "safety": True,
        "compile": False,
        "attention_backend": "native",
        "vae_tiling": False,
    }
    wrongs: list[Any] = [{"clip_skip": 0}, {"clip_skip": 2.0}, {"guidance_rescale": 1.1}, {"tile": "yes"}]
    for wrong in wrongs:
        with pytest.raises(UsageError, match=flag_of(*wrong)):
            checked_values(wrong)


def test_options_as_words_of_the_command() -> None:
    options: Any = {
        "clip_skip": 1,
        "loras": ["a.safetensors:0.5", "b.safetensors:1"],
        "guidance_interval": [0.25, 1],
        "strength": 1e-5,
        "tile": True,
        "safety": False,
        "vae_tiling": False,
    }
    assert words_of(options) == [
        *("--lora", "a.safetensors:0.5", "--lora", "b.safetensors:1", "--guidance-interval", "0.25,1"),
        *("--strength", "0.00001", "--tile", "--safety", "off"),
    ]


def test_clients_of_a_server_set_no_option_that_names_its_files() -> None:
    served = {name for name, option in OPTIONS.items() if option.served}
    files = {"image", "mask", "references", "controls", "control_models", "refiner", "wildcards"}
    assert files <= OPTIONS.keys()
    assert not served & files
    assert {"steps", "guidance", "seed", "size", "scheduler"} <= served
