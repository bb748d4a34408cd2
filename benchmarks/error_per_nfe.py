"""Error per function evaluation on Gaussian mixtures, which have an exact solution: this package and diffusers.

    python benchmarks/error_per_nfe.py                  # the comparison; about five minutes on one core
    python benchmarks/error_per_nfe.py --quick          # fewer mixtures, starts and budgets: one minute
    python benchmarks/error_per_nfe.py --search edm     # the search behind schedulers.recommend, on a noise schedule

The data are mixtures in four dimensions: six components with deviation 0.6, and means from N(0, 1). The noise schedule
is Stable Diffusion's. The network is the exact E[ε|x]. All runs start from the same standard normal states at the last
time and compute in float32. The solution follows the probability-flow ODE to the schedule's least noise (t = 0) and
takes the network's x0 there, because no model of this schedule was trained below it; in the column "to 0" the ODE
continues to σ = 0 instead. An error is the median over the starts of the root-mean-square distance to the solution, and
over several mixtures the geometric mean.

diffusers' schedulers run through their own protocol (set_timesteps, scale_model_input, step): every deterministic class
that reads Stable Diffusion's noise schedule, with its orders, spacings, ramps and ends. Each has as many steps as the
budget allows by the length of its `timesteps`. A class that starts from σ·z instead of the exact √(σ² + 1)·z gets the
exact state. The best configuration at a budget is chosen on the mixtures 0 to 7, and compared with
`schedulers.recommend(nfe)` on the mixtures 100 to 107, which neither choice used: the search for `recommend` uses the
mixtures 1000 to 1003, each with three spreads of the means and two deviations of the components.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import diffusers
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

import schedulers
from schedulers import NoiseSchedule
from schedulers.exact import Exam, Mixture

CHOICE, HELD_OUT, SEARCH = range(8), range(100, 108), range(1000, 1004)
WIDTHS, DEVIATIONS = (
    (0.7, 1.0, 1.5),
    (0.6, 0.3),
)  # of means and components, so that the choice does not depend on one of them
AIMS = (5, 8, 10, 16)  # the budgets with a target
FAR = (40, 80)

Network = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[Network, Tensor], Tensor]


def errors(exam: Exam, run: Run, budget: int) -> tuple[list[float], list[float]]:
    """The error for each mixture, at the least noise and to σ = 0."""
    exam.evaluations = 0
    with torch.inference_mode():
        result = run(exam.network, exam.x.clone())
    assert exam.evaluations <= budget, f"{exam.evaluations} evaluations in a budget of {budget}"
    return exam.errors(result), exam.errors(result, to_zero=True)


def mean(errors: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(math.log(e) if e > 0 else -math.inf for e in errors) / len(errors))


# diffusers

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS: list[dict[str, Any]] = [{"timestep_spacing": name} for name in ("leading", "trailing", "linspace")]
RAMPS: list[dict[str, Any]] = [{f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")]
ENDS = ("zero", "sigma_min")


def theirs() -> Iterator[tuple[str, dict[str, Any]]]:
    """(class, its options). Order 1 of the exponential integrators is DDIM; lu_lambdas are exponential."""
    for spacing in SPACINGS:
        yield "DDIMScheduler", {"clip_sample": False, **spacing}
        for skip in (True, False):
            yield "PNDMScheduler", {"skip_prk_steps": skip, **spacing}
        for name in ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete"):
            for ramp in ({}, *RAMPS):
                yield f"{name}Scheduler", {**spacing, **ramp}
        yield "DPMSolverMultistepScheduler", {"euler_at_final": True, **spacing}
    for grid in (*SPACINGS, *RAMPS):
        for order, kind in ((2, "midpoint"), (2, "heun"), (3, "midpoint")):
            for of, end in (("dpmsolver++", "zero"), ("dpmsolver++", "sigma_min"), ("dpmsolver", "sigma_min")):
                options = {"algorithm_type": of, "solver_order": order, "solver_type": kind, "final_sigmas_type": end}
                options |= grid
                yield "DPMSolverMultistepScheduler", options
                if "timestep_spacing" not in grid:
                    yield "DPMSolverSinglestepScheduler", options
        for order in (2, 3):
            yield "DEISMultistepScheduler", {"solver_order": order, **grid}
        for order in (1, 2, 3):
            for kind in ("bh1", "bh2"):
                for of_x0 in (True, False):
                    for end in ENDS:
                        options = {"solver_order": order, "solver_type": kind, "predict_x0": of_x0}
                        yield "UniPCMultistepScheduler", {**options, "final_sigmas_type": end, **grid}
            orders = {"predictor_order": order, "corrector_order": order}
            yield "SASolverScheduler", {**orders, "tau_func": _no_noise, **grid}
    for name in ("EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep"):
        yield f"{name}Scheduler", {"timesteps": AysSchedules["StableDiffusionTimesteps"]}


def _no_noise(t: Any) -> float:
    return 0.0


def label(name: str, options: dict[str, Any]) -> str:
    """The class and its options in a few words: "UniPCMultistep 3 bh2 eps zero karras"."""
    words = [name.removesuffix("Scheduler")]
    for key, value in options.items():
        if key == "predict_x0":
            words.append("x0" if value else "eps")
        elif key == "timesteps":
            words.append("AYS")
        elif key in ("euler_at_final", "skip_prk_steps"):
            words.append(key if value else f"no {key}")
        elif key.startswith("use_"):
            words.append(key.split("_")[1])
        elif key not in ("clip_sample", "tau_func"):
            words.append(str(value))
    return " ".join(words)


def make_theirs(name: str, options: dict[str, Any], steps: int) -> Any:
    """The scheduler with its steps set. Raises diffusers' own errors."""
    options = dict(options)
    times = options.pop("timesteps", None)
    scheduler = getattr(diffusers, name)(**TABLE, **options)
    scheduler.set_timesteps(steps) if times is None else scheduler.set_timesteps(timesteps=times)
    return scheduler


def run_theirs(name: str, options: dict[str, Any], budget: int) -> Run | None:
    """A run with as many steps as the budget allows; None for none, or if diffusers refuses the combination."""
    for steps in range(budget, 0, -1):
        try:
            scheduler = make_theirs(name, options, steps)
        except (ValueError, IndexError, RuntimeError, AssertionError, NotImplementedError):
            return None
        if len(scheduler.timesteps) <= budget:
            return lambda network, x: _drive(scheduler, network, x)
    return None


def _drive(scheduler: Any, network: Network, x: Tensor) -> Tensor:
    if scheduler.init_noise_sigma != 1:  # the frame x/α: begin with the same state there
        x = x * math.hypot(1.0, float(scheduler.sigmas[0]))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # some classes fail if two times are rounded to the same integer
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


# This package


def run_ours(s: schedulers.Scheduler, budget: int) -> Run | None:
    """A run with as many steps as the budget allows; None for none."""
    try:
        steps = s.steps_for(budget)
    except ValueError:
        return None
    return lambda network, x: s.sample(network, x, steps)


CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("euler", {}),
    ("heun", {}),
    ("dpm2", {}),
    ("dpmpp_2s", {}),
    ("dpmpp_2m", {}),
    ("res_multistep", {}),
    ("dpmpp_3m", {}),
    *(("deis", {"order": order}) for order in (2, 3, 4)),
    *(("lms", {"order": order}) for order in (2, 3, 4)),
    *(("ipndm", {"order": order}) for order in (2, 3, 4)),
    ("pndm", {}),
    ("dpm_solver", {"order": 2}),
    *(("dpm_solver", {"order": o, "of": of, "method": "singlestep"}) for o in (2, 3) for of in ("eps", "x0")),
    *(("unipc", {"order": order, "variant": b}) for order in (1, 2) for b in ("bh1", "bh2")),
    ("unipc", {"order": 3}),
    ("sa_solver", {"tau": 0.0, "predictor_order": 3, "corrector_order": 3}),
)
SHAPES = (*(f"karras:{rho}" for rho in (4, 5, 9, 12)), *(f"polyexponential:{rho}" for rho in (0.65, 0.7, 0.75, 0.8)))


def search(noise: str, quick: bool) -> None:
    """Print the best solvers, options and grids at each budget, and the error of `recommend` beside them."""
    prediction = {"flow": "flow_prediction", "cosine": "v_prediction"}.get(noise, "epsilon")
    schedule, starts = NoiseSchedule.named(noise), 16 if quick else 48
    exams = [
        Exam([Mixture.random(i, spread=w, deviation=d) for i in SEARCH for w in WIDTHS], schedule, prediction, starts)
        for d in DEVIATIONS
    ]
    grids = [name for name in schedulers.grid_names() if name != "leading"]  # leading starts from less noise
    candidates = [
        schedulers.get(name, noise=schedule, prediction=prediction, grid=grid, **options)
        for name, options in CANDIDATES
        for grid in (*grids, *SHAPES)
    ]
    print(f"{noise}: {len(CANDIDATES)} solvers on {len(grids) + len(SHAPES)} grids; geometric means,")
    print(f"    of all; for components of deviation {DEVIATIONS[0]}, the same to 0; for {DEVIATIONS[1]}, the same to 0")

    def scores_of(s: schedulers.Scheduler, budget: int) -> tuple[float, ...] | None:
        """(the geometric mean of all; for each deviation the error, and the error to σ = 0)"""
        run = run_ours(s, budget)
        scores = [] if run is None else [mean(e) for exam in exams for e in errors(exam, run, budget)]
        return (mean(scores), *scores) if scores else None

    for budget in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 40):
        ranked = sorted((row, s.grid_name, spelled(s)) for s in candidates if (row := scores_of(s, budget)) is not None)
        chosen = schedulers.recommend(budget, noise=schedule, prediction=prediction)
        own = scores_of(chosen, budget)
        assert own is not None
        print(f"{budget} evaluations; recommended is {own[0] / ranked[0][0][0]:.2f} times the best")
        for scores, grid, name in [(own, chosen.grid_name, spelled(chosen)), *ranked[: 3 if quick else 8]]:
            print("   ", " ".join(f"{e:.2e}" for e in scores), f" {name} on {grid}")


def spelled(s: schedulers.Scheduler) -> str:
    return s.name + (f"({', '.join(f'{k}={v}' for k, v in s.options.items())})" if s.options else "")


# The comparison


def compare(quick: bool, path: str | None) -> None:
    noise, starts, count = NoiseSchedule.scaled_linear(), 32 if quick else 128, 3 if quick else 8
    seeds = [*list(CHOICE)[:count], *list(HELD_OUT)[:count]]
    exam = Exam([Mixture.random(seed) for seed in seeds], noise, starts=starts)
    configurations = [(label(name, options), name, options) for name, options in theirs()]
    print(f"diffusers {diffusers.__version__}, {len(configurations)} configurations; {count} mixtures, {starts} starts")

    def scores_of(run: Run, budget: int) -> tuple[float, float, float]:
        """The error on the mixtures for the choice, on the held-out ones, and on the held-out ones to σ = 0."""
        at_least_noise, to_zero = errors(exam, run, budget)
        return mean(at_least_noise[:count]), mean(at_least_noise[count:]), mean(to_zero[count:])

    rows = []
    for budget in AIMS + (() if quick else FAR):
        ours = schedulers.recommend(budget)
        named = f"{spelled(ours)} on {ours.grid_name}"
        _, mine, mine_to_zero = scores_of(_certain(run_ours(ours, budget)), budget)
        scores = {}
        for name, cls, options in configurations:
            if (run := run_theirs(cls, options, budget)) is not None:
                scores[name] = scores_of(run, budget)
        best = min(scores, key=lambda name: scores[name][0])
        _, their, their_to_zero = scores[best]
        luckiest = min(error for _, error, _ in scores.values())
        head = f"{budget} evaluations, {len(scores)} configurations"
        print(f"\n{head:<76}    error      to 0")
        print(f"   ours       {named:<61} {mine:9.2e} {mine_to_zero:9.2e}")
        print(f"   diffusers  {best:<61} {their:9.2e} {their_to_zero:9.2e}")
        print(f"   diffusers  {PLAIN + ' (DPM++ 2M Karras)':<61} {scores[PLAIN][1]:9.2e} {scores[PLAIN][2]:9.2e}")
        ratio, to_zero = mine / their, mine_to_zero / their_to_zero
        print(f"   ratio {ratio:.2f}, to 0 {to_zero:.2f}; to the best on the same mixtures {mine / luckiest:.2f}")
        rows.append({"nfe": budget, "ours": named, "theirs": best, "error": mine, "their_error": their, "ratio": ratio})
    ratios = [row["ratio"] for row in rows[: len(AIMS)]]
    print(f"\nratios at {', '.join(map(str, AIMS))}: {', '.join(f'{r:.2f}' for r in ratios)} (aim: each at most 1.1)")
    print(f"geometric mean of the ratios: {mean(ratios):.2f} (aim: at most 0.9)")
    orders(exam, count)
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


PLAIN = "DPMSolverMultistep dpmsolver++ 2 midpoint zero karras"


def _certain(run: Run | None) -> Run:
    assert run is not None
    return run


def orders(exam: Exam, count: int) -> None:
    """Print how the error falls with more evaluations."""
    karras = {"use_karras_sigmas": True}
    lines: list[tuple[str, Callable[[int], Run | None]]] = [
        ("recommend(nfe)", lambda n: run_ours(schedulers.recommend(n), n)),
        *(
            (f"{name} on karras", lambda n, name=name: run_ours(schedulers.get(name, grid="karras"), n))
            for name in ("dpmpp_2m", "dpmpp_3m", "deis", "unipc")
        ),
        *(
            (f"diffusers: {label(name, options)}", lambda n, name=name, options=options: run_theirs(name, options, n))
            for name, options in (
                ("DPMSolverMultistepScheduler", karras),
                ("DPMSolverMultistepScheduler", {"solver_order": 3, **karras}),
                ("DEISMultistepScheduler", {"solver_order": 3, **karras}),
                ("UniPCMultistepScheduler", {"solver_order": 3, **karras}),
            )
        ),
    ]
    budgets = (20, 40, 80, 160)
    print("\n" + f"{'beyond':<52}" + "".join(f"{n:>10}" for n in budgets) + "     order")
    for name, make in lines:
        means = [mean(errors(exam, run, n)[0][count:]) for n in budgets if (run := make(n)) is not None]
        rates = [math.log2(a / b) for a, b in itertools.pairwise(means)]
        print(f"{name:<52}" + "".join(f"{e:10.1e}" for e in means) + "    " + " ".join(f"{rate:.1f}" for rate in rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer mixtures, starts and budgets")
    parser.add_argument(
        "--search", metavar="NOISE", choices=NoiseSchedule.NAMES, help="search for recommend on this noise schedule"
    )
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    started = time.perf_counter()
    if arguments.search:
        search(arguments.search, arguments.quick)
    else:
        compare(arguments.quick, arguments.json)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
