"""What a model needs in memory, before it is loaded: compared with what it takes when it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import CPU, F32
from test_quantized_files import with_nf4, write_gguf

from diffgen.generation import needs
from diffgen.models import gate, single_file
from diffgen.pipelines.weights import quantize
from diffgen.pipelines.weights.load import load_pipeline

Command = Callable[..., tuple[int, str, str]]


def loaded_bytes(checked: gate.Checked, dtype: torch.dtype = F32) -> dict[str, int]:
    pipe = load_pipeline(checked, CPU, dtype, dtype)
    return {
        name: quantize.weight_bytes(pipe.components[name]) for name, part in checked.components.items() if part.tensors
    }


@pytest.mark.parametrize("family", ["sd1", "flux", "z-image"])
def test_the_weights_of_a_folder(family: str, family_folder: Callable[[str], Path]) -> None:
    checked = gate.check_folder(family_folder(family))
    for name, dtype in (("float32", F32), ("bfloat16", torch.bfloat16)):
        assert needs.needs(checked, (32, 32), name).parts == loaded_bytes(checked, dtype)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "nf4"])
def test_weights_of_few_bits(kind: str, family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder("z-image")
    if kind == "nf4":
        checked = gate.check_folder(with_nf4(folder, tmp_path / "m", nested=True))
    else:
        checked = single_file.check_file(write_gguf(folder, tmp_path / "z.gguf", kind), folder)
    expected, estimated = loaded_bytes(checked), needs.needs(checked, (32, 32), "float32").parts
    # A matrix with rows of half a block is decoded, which the estimate does not know
    assert estimated["transformer"] == pytest.approx(expected["transformer"], rel=0 if kind != "nf4" else 0.5)
    assert estimated["vae"] == expected["vae"]
    assert (
        estimated["transformer"]
        < 0.8 * needs.needs(gate.check_folder(folder), (32, 32), "float32").parts["transformer"]
    )


def test_what_does_not_fit_is_said_with_what_would(family_folder: Callable[[str], Path]) -> None:
    memory = needs.report(gate.check_folder(family_folder("z-image")), (1024, 1024))
    assert memory["total"] == sum(memory["weights"].values()) + max(memory["activations"], memory["decoder"])
    assert memory["with"]["--quantize nf4"] < memory["with"]["--quantize int8"] < memory["total"]
    assert memory["with"]["--vae-tiling"] < memory["total"]
    assert needs.advice(memory | {"free": memory["total"]}) is None
    tight: Any = memory | {"free": memory["with"]["--vae-tiling"]}
    assert "it fits with" in needs.advice(tight)
    assert "--vae-tiling" in needs.advice(tight)
    assert "no single switch" in (needs.advice(memory | {"free": 1}) or "")


def test_the_commands_say_it(tiny: Path, diffgen_: Command) -> None:
    code, out, err = diffgen_("models", "info", tiny, "--json")
    assert code == 0, err
    info = json.loads(out)["result"]["memory"]
    code, out, err = diffgen_("generate", "a red apple", "-m", tiny, "--dry-run", "--json", "-s", "64x64")
    assert code == 0, err
    plan = json.loads(out)["result"]["memory"]
    assert (info["size"], plan["size"]) == ([32, 32], [64, 64])
    assert plan["weights"] == info["weights"]
    assert (plan["activations"], plan["decoder"]) == (4 * info["activations"], 4 * info["decoder"])
    assert info["free"] > 0
    assert "--offload model" in diffgen_("models", "info", tiny)[1]
