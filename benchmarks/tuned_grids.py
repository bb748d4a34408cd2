"""Tuned grids against the best schedulers without tuning, on noises that tuning did not use.

    python benchmarks/tuned_grids.py -m mixture --grids mixture-5.json mixture-8.json
    python benchmarks/tuned_grids.py -m emoji --guidance 3 --grids emoji-5.json emoji-8.json

The budget is that of each grid file. Without tuning are every deterministic solver of this package on every built-in
grid, and every deterministic configuration of diffusers' schedulers (the lists of error_per_nfe.py). All start from the
same noises, run the same guided network, and are compared with the same solution: the exact one for `mixture`, else
dpmpp_3m with 128 evaluations. A few seeds from 800 on choose the best twelve; other seeds judge these and the tuned
grid. The error is the root-mean-square distance to the solution, its mean over seeds. `same solver` is the best
built-in grid with the tuned grid's own solver.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from error_per_nfe import CANDIDATES, label, run_ours, run_theirs, theirs
from torch import Tensor

import schedulers
from diffgen import environment
from diffgen.comparison.search import SolverOnModel, Starts
from diffgen.comparison.subjects import Subject, subject_of

SHORTLIST = 12
Run = Callable[[Any, Tensor], Tensor]


def candidates(subject: Subject, budget: int) -> dict[str, Run]:
    """The runs without tuning, by name, that fit the budget."""
    runs: dict[str, Run] = {}
    for name, options in CANDIDATES:
        for grid in schedulers.grid_names():
            try:
                scheduler = schedulers.get(
                    name, noise=subject.noise, prediction=subject.prediction, grid=grid, **options, **subject.options
                )
            except ValueError:
                continue
            if (run := run_ours(scheduler, budget)) is not None:
                words = " ".join(f"{key}={value}" for key, value in options.items())
                runs[f"{name} {words} {grid}".replace("  ", " ")] = run
    for name, options in theirs():
        run = run_theirs(name, {"prediction_type": subject.prediction, **options}, budget)
        if run is not None:
            runs[f"diffusers {label(name, options)}"] = run
    return runs


def errors(solver: SolverOnModel, run: Run, starts: Starts) -> float:
    """The mean error over the seeds; inf if the run fails or is not finite."""
    network = solver.network(tuple(starts.prompts))
    x = starts.x.to(solver.subject.device) * solver.subject.noise.noisiest.norm
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(lambda x, t: network(x, torch.as_tensor(t).float().expand(len(x))), x)
    except (ArithmeticError, ValueError, IndexError, RuntimeError):
        return math.inf
    value = float(starts.errors(result.cpu()).mean())
    return value if math.isfinite(value) else math.inf


def main(model: str, guidance: float, grids: list[str], choose: int, judge: int) -> None:
    environment.prepare(offline=True)
    warnings.simplefilter("ignore", FutureWarning)  # diffusers warns about its older algorithms
    scales = () if model == "mixture" else (guidance,)
    subject, prompts, (scale, *_) = subject_of(model, (), scales, "auto", "auto", drawn=2000)
    for file in grids:
        with open(file) as opened:
            content = json.load(opened)
        budget, solver = content["nfe"], SolverOnModel(subject, content["solver"], scale)
        few, many = (
            solver.starts(range(first, first + count), lambda seed: prompts[seed % len(prompts)])
            for first, count in ((800, choose), (900, judge))
        )
        for starts in (few, many):
            with torch.inference_mode():
                starts.solution = solver.teacher(starts, 128)
        runs = candidates(subject, budget)
        first = {name: errors(solver, run, few) for name, run in runs.items()}
        best = sorted(first, key=lambda name: first[name])
        own = [name for name in best if name.startswith(f"{content['solver']} ") and "=" not in name]
        judged = {name: errors(solver, runs[name], many) for name in [*best[:SHORTLIST], *own[:3]]}
        tuned = solver.scheduler(file)
        result = errors(solver, lambda network, x, s=tuned: s.sample(network, x), many)
        any_kind, same = min(judged.values()), min(judged[name] for name in own[:3])
        print(f"{file}: {content['solver']}, {budget} evaluations, guidance {scale:g}, {judge} seeds from 900")
        print(f"  tuned {result:.4g}; of any kind {any_kind:.4g} (ratio {result / any_kind:.2f}); ", end="")
        print(f"same solver {same:.4g} (ratio {result / same:.2f}); {len(runs)} untuned were tried")
        for name in sorted(judged, key=lambda name: judged[name]):
            print(f"  {judged[name]:9.4g}  {name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="emoji")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--grids", nargs="+", required=True)
    parser.add_argument("--choose", type=int, default=4, help="seeds that choose the shortlist")
    parser.add_argument("--judge", type=int, default=32, help="seeds that judge")
    a = parser.parse_args()
    main(a.model, a.guidance, a.grids, a.choose, a.judge)
