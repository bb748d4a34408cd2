"""Write the tables of docs/schedulers.md, docs/which-scheduler.md and docs/models.md: python docs/tables.py

They come from the registry of schedulers, from the families' rows and from the bundled configurations. Networks that
parameters.json lacks are built without memory and counted; delete an entry to have it counted again.

A test compares the pages with them, so that they stay up to date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import schedulers
from diffgen.generation.needs import ACTIVATIONS, BITS, decoder_values, widest
from diffgen.models.families import FAMILIES
from diffgen.models.gate import read_json
from diffgen.models.single_file import CONFIGS
from schedulers.grids import GRIDS, describe
from schedulers.recommend import KINDS, advice
from schedulers.registry import special_names
from schedulers.solver import SOLVERS

COUNTS = Path(__file__).parent / "parameters.json"  # of the networks, counted without memory
PAGES = [Path(__file__).parent / name for name in ("schedulers.md", "which-scheduler.md", "models.md")]


def solvers() -> str:
    """The table of the built-in solvers. Solvers of installed plug-ins are left out."""
    rows = [
        ["name", "also called", "order", "evaluations a step", "stochastic", "the same algorithm", "when to use it"]
    ]
    for name, s in sorted(SOLVERS.items()):
        if s.is_plugin:
            continue
        others = [*([s.a1111] if s.a1111.lower() != name else []), *s.aliases, *special_names(name)]
        cost = f"{s.evaluations_per_step}{', native only' * s.native_only}"
        use = s.when + (f" Recommended for {where}." if (where := advice(name)) else "")
        rows.append([f"`{name}`", ", ".join(others), str(s.order), cost, "yes" * s.stochastic, s.same, use])
    return table(rows)


def recommended() -> str:
    """The table of what `schedulers.recommend` takes, by number of evaluations and kind of noise schedule."""
    rows = [["evaluations", *(kind.name for kind in KINDS)]]
    for nfe in (4, 5, 6, 8, 10, 12, 16, 20, 40):
        chosen = (next(row for row in kind.rows if nfe <= row[0]) for kind in KINDS)
        rows.append([str(nfe), *(f"`{name}`{_given(options)}, `{grid}`" for _, name, options, grid in chosen)])
    return table(rows)


def _given(options: dict[str, Any]) -> str:
    """The options of a solver, in words."""
    return "".join(f", {key} {value}" for key, value in options.items())


def grids() -> str:
    """The table of the built-in grids. Grids of installed plug-ins are left out."""
    rows = [["name", "also called", "points", "formula", "source"]]
    for name in sorted(name for name, function in GRIDS.items() if function.__module__.startswith("schedulers.")):
        about = describe(name)
        rows.append([f"`{name}`", ", ".join(about.aliases), about.about, about.formula, about.reference])
    return table(rows)


def defaults() -> str:
    """The table of the families' defaults, a line for each variant."""
    rows = [["family", "variant", "steps", "guidance", "scheduler", "grid"]]
    for name, family in FAMILIES.items():
        for variant, d in {None: family.defaults, **family.variants}.items():
            rows.append([name, variant or "", str(d.steps), f"{d.guidance:g}", d.scheduler, d.grid or ""])
    return table(rows)


def families() -> str:
    """The table of what the models of each family can do."""
    rows = [
        ["family", "models", "text", "picture, mask", "references", "ControlNet", "negative prompt", "file", "licence"]
    ]
    for name, family in FAMILIES.items():
        files = "" if not family.in_files else "whole" if family.marks and _whole(name) else "transformer"
        can = ["text" in family.tasks, "image" in family.tasks]
        last = ["control" in family.tasks, family.reads_negative_prompts]
        marks = [*("yes" * one for one in can), str(family.references or ""), *("yes" * one for one in last)]
        rows.append([name, family.title, *marks, files, family.licence])
    return table(rows)


def memory() -> str:
    """The table of what the weights of each family's model take, and one evaluation and the decoder beside them."""
    rows = [["family", "billions of parameters", "bfloat16", "8 bits", "4 bits", "evaluation, decoding"]]
    for name, family in FAMILIES.items():
        config_of = next((other for other in FAMILIES if family.parts == FAMILIES[other].parts and _has(other)), None)
        if config_of is None:
            continue
        parts = counts()[config_of]
        vae = parts["vae"][0]
        total, linear = (sum(part[i] for key, part in parts.items() if key != "vae") for i in (0, 1))
        sizes = [2 * (total + vae), *(2 * (total + vae - linear) + linear * BITS[kind] / 8 for kind in ("int8", "nf4"))]
        configs = {part: read_json(CONFIGS / config_of / part / "config.json") for part in (family.denoiser, "vae")}
        side = family.defaults.size or 8 * configs[family.denoiser]["sample_size"]
        width, positions = widest(family, configs[family.denoiser], side**2 // 64)
        beside = 2 * ACTIVATIONS * width * positions, 2 * decoder_values(configs["vae"], (side, side))
        listed = f"{' and '.join(f'{size / 1e9:.1f}' for size in beside)} GB at {side}x{side}"
        billions = ", ".join(f"{key} {part[0] / 1e9:.2f}" for key, part in parts.items())
        rows.append([name, billions, *(f"{size / 1e9:.1f} GB" for size in sizes), listed])
    return table(rows)


def _has(family: str) -> bool:
    return (CONFIGS / family).is_dir()


def counts() -> dict[str, dict[str, list[int]]]:
    """{family: {network: [its parameters, those of linear layers]}}, of the bundled configurations."""
    return json.loads(COUNTS.read_text("utf-8"))


def count(family: str) -> dict[str, list[int]]:
    """Build the networks of a family without memory, and count their parameters."""
    import torch

    from diffgen.pipelines.weights.network import make_network

    row, result = FAMILIES[family], {}
    for name, part in row.parts.items():
        if part.kind == "network" and (CONFIGS / family / name).is_dir():
            config = read_json(CONFIGS / family / name / "config.json")
            with torch.device("meta"):
                network = make_network(part.loads or config.get("_class_name") or sorted(part.classes)[0][1], config)
            linear = [m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Linear)]
            result[name] = [sum(x.numel() for x in network.parameters()), sum(linear)]
    return result


def _whole(name: str) -> bool:
    """Whether a single file can hold all that a model of the family needs, with the vocabularies of diffgen."""
    parts = FAMILIES[name].parts.values()
    networks = all(part.file for part in parts if part.kind == "network")
    return networks and all(part.vocabulary for part in parts if part.kind == "tokenizer")


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def written(page: str) -> str:
    """The page with its tables up to date."""
    functions = (solvers, grids, recommended, defaults, families, memory)
    for name, content in {function.__name__: function() for function in functions}.items():
        block = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page = block.sub(lambda match, content=content: match[1] + content + match[2], page)
    return page


if __name__ == "__main__":
    schedulers.names()
    known = counts()
    every = {name: known.get(name) or count(name) for name in FAMILIES if _has(name)}
    COUNTS.write_text(json.dumps(every, indent=1) + "\n", "utf-8")
    for page in PAGES:
        page.write_text(written(page.read_text("utf-8")), "utf-8")
