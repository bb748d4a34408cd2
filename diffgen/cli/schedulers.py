"""diffgen schedulers: what there is to choose from."""

from __future__ import annotations

import schedulers

from .output import Debug, Json, Output, Quiet, table


def list_schedulers(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Every scheduler: its names, its order, what a step costs."""
    found = [schedulers.info(name) for name in schedulers.names()]
    entries = [
        {
            "name": solver.name,
            "aliases": list(solver.aliases),
            "order": solver.order,
            "evaluations_per_step": solver.evaluations_per_step,
            "stochastic": solver.stochastic,
            "native_only": solver.native_only,
            "reference": solver.reference,
            "options": solver.options,
        }
        for solver in found
    ]
    rows = [["name", "order", "evaluations", "", "also known as"]]
    for solver in found:
        kind = "stochastic" if solver.stochastic else ""
        rows.append([solver.name, str(solver.order), str(solver.evaluations_per_step), kind, ", ".join(solver.aliases)])
    lines = [*table(rows), "", f"grids: {', '.join(schedulers.grid_names())}"]
    Output("schedulers list", json, quiet).result({"schedulers": entries, "grids": schedulers.grid_names()}, lines)
