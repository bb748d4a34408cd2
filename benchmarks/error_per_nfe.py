"""Error per function evaluation on Gaussian mixtures, which have an exact solution: this package and diffusers.

    python benchmarks/error_per_nfe.py                     # the comparison on four noise schedules: ten minutes
    python benchmarks/error_per_nfe.py --noise flow:3      # on one: scaled_linear, flow:SHIFT, or another by its name
    python benchmarks/error_per_nfe.py --same-name         # solvers of the same name, on the same grid
    python benchmarks/error_per_nfe.py --search flow:3     # the search behind schedulers.recommend

The data are mixtures in 2, 4, 9 and 16 dimensions, as many of each: 3 to 24 components with unequal weights, deviations
from 0.2 to 0.7 and means from N(0, s²), s from 0.7 to 1.3. The network is their exact E[ε|x]. All runs start from the
same standard normal states at the noisiest time. The solution follows the probability-flow ODE to the schedule's least
noise and takes the network's x0 there, because no model was trained below it; in the column "to 0" the ODE continues
to σ = 0 instead. An error is the median over the starts of the root-mean-square distance to the solution, and over
several mixtures the geometric mean. States, network and solutions are in float64.

diffusers' schedulers run through their own protocol (set_timesteps, scale_model_input, step): every deterministic class
that reads the noise schedule, with its orders, spacings, ramps and ends. Each has as many steps as the budget allows by
the length of its `timesteps`. A class that starts from σ·z instead of the exact √(σ² + 1)·z gets the exact state. The
best configuration at a budget is chosen on the mixtures with the seeds CHOICE, from which `--search` and the rows of
`recommend` take theirs. Both are compared on the mixtures with the seeds HELD_OUT: a new list of seeds whenever a row
of `recommend` changed after a look at their ratios.
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
from schedulers import NoiseSchedule, Point
from schedulers.exact import Exam, Mixture
from schedulers.prediction import Denoised
from schedulers.solver import run as run_solver

NOISES = ("scaled_linear", "flow:1", "flow:3", "flow:6")
PREDICTIONS = {"flow": "flow_prediction", "cosine": "v_prediction"}  # epsilon elsewhere
CHOICE, HELD_OUT = range(64), range(2000, 2032)
SHAPES = ((2, 3), (4, 6), (9, 7), (16, 24))  # dimensions, components
BUDGETS = (4, 5, 6, 8, 10, 16, 20, 40)

Network = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[Network, Tensor], Tensor]


def mixture(seed: int) -> Mixture:
    """One of the mixtures; the number of dimensions goes through `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    elements, components = SHAPES[seed % len(SHAPES)]
    spread, *shares = torch.rand(1 + 2 * components, generator=generator, dtype=torch.float64).tolist()
    means = torch.randn(components, elements, generator=generator, dtype=torch.float64) * (0.7 + 0.6 * spread)
    deviations = [0.2 + 0.5 * share for share in shares[:components]]
    return Mixture(means, deviations, [0.5 + share for share in shares[components:]])


def schedule(name: str) -> tuple[NoiseSchedule, str]:
    """The noise schedule of a name, such as "flow:3", and the prediction of its network."""
    name, _, shift = name.partition(":")
    noise = NoiseSchedule.flow(float(shift)) if shift else NoiseSchedule.named(name)
    return noise, PREDICTIONS.get(name, "epsilon")


def exam_of(name: str, seeds: Sequence[int], starts: int) -> Exam:
    """The exam with these mixtures, in float64."""
    noise, prediction = schedule(name)
    return Exam([mixture(seed) for seed in seeds], noise, prediction, starts, torch.float64)


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

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
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


def theirs_on_flow(shift: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(class, its options) on a flow with this shift."""
    for ramp in ({}, *RAMPS, {"even": True}):  # even: the levels that flow pipelines hand over
        yield "FlowMatchEulerDiscreteScheduler", {"shift": shift, **ramp}
    yield "FlowMatchHeunDiscreteScheduler", {"shift": shift}
    flow = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    for end in ENDS:
        for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")):
            options = {"solver_order": order, "solver_type": kind, "final_sigmas_type": end, **flow}
            yield "DPMSolverMultistepScheduler", options
            yield "DPMSolverSinglestepScheduler", options
        for order, kind in itertools.product((1, 2, 3), ("bh1", "bh2")):
            options = {"solver_order": order, "solver_type": kind, "final_sigmas_type": end}
            yield "UniPCMultistepScheduler", {**options, **flow}
    for order in (2, 3):
        yield "DEISMultistepScheduler", {"solver_order": order, **flow}
        orders = {"predictor_order": order, "corrector_order": order}
        yield "SASolverScheduler", {**orders, "tau_func": _no_noise, **flow}


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
        elif key.startswith("use_") and key != "use_flow_sigmas":
            words.append(key.split("_")[1])
        elif key == "even":
            words.append("sigmas")
        elif key not in ("clip_sample", "tau_func", "use_flow_sigmas", "flow_shift", "shift", "prediction_type"):
            words.append(str(value))
    return " ".join(words)


def make_theirs(name: str, options: dict[str, Any], steps: int) -> Any:
    """The scheduler with its steps set. Raises diffusers' own errors."""
    options = dict(options)
    times = options.pop("timesteps", None)
    even = options.pop("even", False)
    table = {} if name.startswith("FlowMatch") else TABLE
    scheduler = getattr(diffusers, name)(**table | options)
    if even:
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    elif times is not None:
        scheduler.set_timesteps(timesteps=times)
    else:
        scheduler.set_timesteps(steps)
    return scheduler


def run_theirs(name: str, options: dict[str, Any], budget: int) -> Run | None:
    """A run with as many steps as the budget allows; None for none, or if diffusers refuses the combination."""
    steps = budget
    while steps > 0:
        try:
            scheduler = make_theirs(name, options, steps)
        except (ValueError, IndexError, RuntimeError, AssertionError, NotImplementedError):
            return None
        if (count := len(scheduler.timesteps)) <= budget:
            return lambda network, x: _drive(scheduler, network, x)
        steps = min(steps - 1, budget * steps // count + 1)  # never too few: count is a·steps + b with b ≥ −1
    return None


def _drive(scheduler: Any, network: Network, x: Tensor) -> Tensor:
    if getattr(scheduler, "init_noise_sigma", 1) != 1:  # the frame x/α: begin with the same state there
        x = x * math.hypot(1.0, float(scheduler.sigmas[0]))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # some classes fail if two times are rounded to the same integer
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        output = network(scaled(x, t), t)
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


def errors_of(s: schedulers.Scheduler, exam: Exam, budget: int) -> tuple[list[float], list[float]] | None:
    """As `errors`, for one of our schedulers in float64; None if one step takes more evaluations."""
    try:
        grid = s.grid(s.steps_for(budget))
    except ValueError:
        return None

    def denoise(x: Tensor, p: Point) -> Denoised:
        return Denoised(x, exam.output(x, p), p, exam.prediction)

    return errors(exam, lambda network, x: run_solver(s.solve(x, grid, None), denoise)[0], budget)


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
    ("gradient_estimation", {}),
    *(("unipc", {"order": order, "variant": b}) for order in (1, 2) for b in ("bh1", "bh2")),
    *(("unipc", {"order": 3, "end": end}) for end in ("full", "lowered")),
    ("sa_solver", {"tau": 0.0, "predictor_order": 3, "corrector_order": 3}),
)
RAMPS_WITH_NUMBERS = (
    *(f"karras:{rho}" for rho in (1, 2, 3, 4, 5, 9, 12)),
    *(f"polyexponential:{rho}" for rho in (0.65, 0.7, 0.75, 0.8)),
    *(f"laplace:{beta}" for beta in (0.7, 1.0, 1.5)),
    *(f"beta57:{a}" for a in (0.4, 0.6, 0.7, 1.0)),
    *(f"beta_t:{a}" for a in (0.4, 0.5)),
    *(f"trailing:{shift}" for shift in (0.4, 0.45, 0.5, 0.6)),
)
OTHER_GRIDS = {"leading", "ays_svd"}  # less noise at the start; for another range


def search(name: str, starts: int) -> None:
    """Print the best solvers, options and grids at each budget, and the error of `recommend` beside them.

    All candidates run on a quarter of the mixtures, the best fifty on all.
    """
    noise, prediction = schedule(name)
    small, exam = exam_of(name, CHOICE[:4], 12), exam_of(name, CHOICE, starts)
    grids = [grid for grid in schedulers.grid_names() if grid not in OTHER_GRIDS]
    candidates = [
        schedulers.get(solver, noise=noise, prediction=prediction, grid=grid, **options)
        for solver, options in CANDIDATES
        for grid in (*grids, *RAMPS_WITH_NUMBERS)
    ]
    print(f"{name}: {len(CANDIDATES)} solvers on {len(grids) + len(RAMPS_WITH_NUMBERS)} grids; error, error to 0")

    def score(s: schedulers.Scheduler, exam: Exam, budget: int) -> float:
        row = errors_of(s, exam, budget)
        return math.inf if row is None else mean(row[0])

    for budget in (1, 2, 3, *BUDGETS):
        best = sorted(candidates, key=lambda s: score(s, small, budget))[:50]
        ranked = sorted(best, key=lambda s: score(s, exam, budget))[:8]
        chosen = schedulers.recommend(budget, noise=noise, prediction=prediction)
        print(
            f"{budget}; recommended is {score(chosen, exam, budget) / score(ranked[0], exam, budget):.2f} of the best"
        )
        for s in (chosen, *ranked):
            row = errors_of(s, exam, budget)
            assert row is not None
            print(f"    {mean(row[0]):.2e} {mean(row[1]):.2e}  {spelled(s)}", flush=True)


def spelled(s: schedulers.Scheduler) -> str:
    """A scheduler in a few words."""
    return (
        s.name + (f"({', '.join(f'{k}={v}' for k, v in s.options.items())})" if s.options else "") + f" {s.grid_name}"
    )


# The comparison


def compare(name: str, starts: int) -> list[dict[str, Any]]:
    """Print `recommend` beside diffusers' best at each budget, and return the figures."""
    noise, prediction = schedule(name)
    count = len(CHOICE)
    exam = exam_of(name, [*CHOICE, *HELD_OUT], starts)
    configurations = list(theirs_on_flow(noise.shift) if noise.is_flow else theirs())
    print(f"\n{name}: diffusers {diffusers.__version__}, {len(configurations)} configurations")
    print(" " * 78 + "error      to 0")
    rows = []
    for budget in BUDGETS:
        ours = schedulers.recommend(budget, noise=noise, prediction=prediction)
        own = errors_of(ours, exam, budget)
        assert own is not None
        scores = {}
        for cls, options in configurations:
            if (run := run_theirs(cls, options, budget)) is not None:
                scores[label(cls, options)] = errors(exam, run, budget)
        best = min(scores, key=lambda label: mean(scores[label][0][:count]))
        mine, their = ([mean(part[count:]) for part in both] for both in (own, scores[best]))
        luckiest = min(mean(at_least_noise[count:]) for at_least_noise, _ in scores.values())
        ratio = mine[0] / their[0]
        print(f"{budget:>4}  ours       {spelled(ours):<57} {mine[0]:9.2e} {mine[1]:9.2e}")
        print(f"      diffusers  {best:<57} {their[0]:9.2e} {their[1]:9.2e}")
        print(
            f"      ratio {ratio:.2f}, to 0 {mine[1] / their[1]:.2f}; to the best on these {mine[0] / luckiest:.2f}",
            flush=True,
        )
        row = {"noise": name, "nfe": budget, "ours": spelled(ours), "theirs": best}
        rows.append({**row, "error": mine[0], "their_error": their[0], "ratio": ratio})
    ratios = [row["ratio"] for row in rows]
    print(f"{name}: largest ratio {max(ratios):.2f} (aim: 1.0), geometric mean {mean(ratios):.2f} (aim: 0.6)")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The error of `recommend` and its ratio to diffusers' best, in Markdown: a column for each noise schedule."""
    names = list(dict.fromkeys(row["noise"] for row in rows))
    cells = {(row["noise"], row["nfe"]): f"{row['error']:.1e}, {row['ratio']:.2f}" for row in rows}
    lines = [["evaluations", *names], ["---"] * (len(names) + 1)]
    lines += [[str(nfe), *(cells[name, nfe] for name in names)] for nfe in BUDGETS]
    ratios = [[row["ratio"] for row in rows if row["noise"] == name] for name in names]
    lines.append(["largest ratio", *(f"{max(column):.2f}" for column in ratios)])
    lines.append(["geometric mean of the ratios", *(f"{mean(column):.2f}" for column in ratios)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SAME_NAME: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    # name, their class, their options, ours
    ("dpmpp_2m", "DPMSolverMultistep", {}, {}),
    ("dpmpp_3m", "DPMSolverMultistep", {"solver_order": 3}, {}),
    ("deis", "DEISMultistep", {"solver_order": 2}, {"order": 2}),
    ("deis", "DEISMultistep", {"solver_order": 3}, {}),
    ("unipc", "UniPCMultistep", {}, {}),
    ("unipc", "UniPCMultistep", {"solver_order": 3}, {"order": 3}),
    ("lms", "LMSDiscrete", {}, {}),
    ("heun", "HeunDiscrete", {}, {}),
)


def same_name(starts: int) -> None:
    """Print the errors of solvers of the same name on Karras grids of scaled_linear: ours/theirs."""
    exam, budgets = exam_of("scaled_linear", range(100, 116), starts), (5, 8, 10, 16, 20, 40, 80)
    print("\nsame name, karras: ours/diffusers".ljust(39) + "".join(f"{n:>18}" for n in budgets))
    lines = [
        (name, schedulers.get(name, grid="karras", **mine), f"{cls}Scheduler", {**options, "use_karras_sigmas": True})
        for name, cls, options, mine in SAME_NAME
    ]
    for skip in (True, False):
        options = {"skip_prk_steps": skip, "timestep_spacing": "trailing"}
        lines.append((f"pndm (trailing), skip_prk_steps={skip}", schedulers.get("pndm"), "PNDMScheduler", options))
    for name, s, cls, options in lines:
        print(f"{name} {' '.join(f'{k}={v}' for k, v in s.options.items())}".ljust(38), end="")
        for budget in budgets:
            own, run = errors_of(s, exam, budget), run_theirs(cls, options, budget)
            pair = ["-" if own is None else f"{mean(own[0]):.1e}"]
            pair.append("-" if run is None else f"{mean(errors(exam, run, budget)[0]):.1e}")
            print("/".join(pair).rjust(18), end="", flush=True)
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", action="append", help="compare on this noise schedule [four]")
    parser.add_argument("--starts", type=int, default=16, help="starts for each mixture")
    parser.add_argument("--same-name", action="store_true", help="compare solvers of the same name")
    parser.add_argument("--search", metavar="NOISE", help="search for recommend on this noise schedule")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    if arguments.search:
        search(arguments.search, arguments.starts)
    elif arguments.same_name:
        same_name(arguments.starts)
    else:
        rows = [row for name in arguments.noise or NOISES for row in compare(name, arguments.starts)]
        print(f"\n{table(rows)}")
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(rows, file, indent=1)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
