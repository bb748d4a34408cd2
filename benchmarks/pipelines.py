"""Run every image and video pipeline of diffusers with a scheduler of this package, and compare with diffusers' own.

    git clone --depth 1 https://github.com/huggingface/diffusers
    pip install accelerate parameterized requests-mock
    python benchmarks/pipelines.py diffusers -o pipelines.jsonl     # a line for each pipeline; resumes
    python docs/pipelines.py pipelines.jsonl                        # writes docs/pipelines.md

The checkout's tests give each pipeline its small random networks and its arguments. Tokenizers and text encoders that
they download are replaced by small random ones, so nothing is fetched. For each pipeline:

1. it runs with diffusers' first-order scheduler of its kind of noise;
2. with `euler` of this package at the same times: the last states must be equal, the greatest difference is relative;
3. with `dpmpp_2m` on the karras grid: the evaluations must be those of the grid, and the result finite.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
import transformers

import schedulers
from schedulers import Scheduler, explicit, from_diffusers_config
from schedulers.diffusers_config import limits_of
from schedulers.noise import RESOLUTION_SHIFT

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny  # type: ignore[import-not-found]

SECONDS = 100  # for one pipeline
SOUND = ("audio", "music", "stable_audio", "ace_step", "dance", "longcat_audio", "rfd4", "gemma", "llada", "shap_e")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-o", type=Path, default=Path("pipelines.jsonl"), dest="out")
    parser.add_argument("--only", default="", help="a part of the pipelines' names")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th pipeline, from number I")
    arguments = parser.parse_args()
    offline()
    sys.path.insert(0, str(arguments.checkout))
    done = {json.loads(line)["pipeline"] for line in arguments.out.open()} if arguments.out.exists() else set()
    part, parts = map(int, arguments.part.split("/"))
    for i, path in enumerate(sorted((arguments.checkout / "tests" / "pipelines").rglob("test_*.py"))):
        if i % parts != part or any(word in str(path.relative_to(arguments.checkout)) for word in SOUND):
            continue
        for name, case in cases(path.relative_to(arguments.checkout)):
            if name in done or arguments.only not in name:
                continue
            done.add(name)
            row = {"pipeline": name} | result(case)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*row.values(), sep="\t", flush=True)


def cases(path: Path) -> Iterator[tuple[str, Any]]:
    """(name of the pipeline, test case) of a test file; a file that cannot be imported gives none."""
    try:
        module = importlib.import_module(".".join(path.with_suffix("").parts))
    except BaseException as error:
        print(path, type(error).__name__, str(error)[:100], file=sys.stderr)
        return
    for case in vars(module).values():
        if isinstance(case, type) and case.__module__ == module.__name__ and hasattr(case, "get_dummy_components"):
            pipeline = getattr(case, "pipeline_class", None)
            if isinstance(pipeline, type) and not pipeline.__module__.startswith("diffusers.pipelines.deprecated"):
                yield pipeline.__name__, case


def result(case: Any) -> dict[str, Any]:
    """{"result": works | differs | refused | not tried, "words": …, "difference": …}."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        return compared(case)
    except BaseException as error:
        return {"result": "not tried", "words": words(error)}
    finally:
        signal.alarm(0)


def compared(case: Any) -> dict[str, Any]:
    runs = Runs(case)
    own = runs.pipeline.scheduler
    try:
        theirs = first_order(own)
        noise, prediction = from_diffusers_config({**own.config, "_class_name": type(own).__name__})
    except (ValueError, TypeError) as error:
        return {"result": "refused", "words": words(error)}
    expected = runs.run(theirs)
    try:
        name, options = solver(theirs)
        ours = schedulers.get(
            name, noise=exact(noise, theirs), prediction=prediction, grid=explicit_points(theirs), **options
        )
        difference = float((runs.run(ours) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    except Exception as error:
        return {"result": "refused", "words": words(error), "where": where(error)}
    return {"result": "works" if difference < 1e-5 else "differs", "words": "", "difference": difference} | {
        "scheduler": type(theirs).__name__,
        "grid": chosen_grid(runs, noise, prediction),
    }


def chosen_grid(runs: Runs, noise: schedulers.NoiseSchedule, prediction: str) -> str:
    """Whether the pipeline walks dpmpp_2m's karras grid, with finite states."""
    s = schedulers.get("dpmpp_2m", noise=noise, prediction=prediction, grid="karras")
    try:
        if not runs.run(s).isfinite().all():
            return "not finite"
    except Exception as error:
        return words(error)
    return "walked" if is_ramp(s) else "the pipeline's list"


def solver(theirs: Any) -> tuple[str, dict[str, Any]]:
    """Our solver for their class, with its options."""
    limits = limits_of(theirs.config)
    if type(theirs).__name__ == "LCMScheduler":
        return "lcm", limits
    if type(theirs).__name__ in ("DDPMScheduler", "UnCLIPScheduler"):
        learned = "learned" in str(theirs.config.variance_type)
        return "ddpm", limits | ({"variance": "learned"} if learned else {})
    return "euler", limits


class Runs:
    """A pipeline of a test case, to be run with one scheduler after another."""

    def __init__(self, case: Any) -> None:
        self.case = case()
        for name in ("setUp", "setup_method"):
            if hasattr(self.case, name) and not inspect.signature(getattr(self.case, name)).parameters:
                getattr(self.case, name)()
        torch.manual_seed(0)
        components = self.case.get_dummy_components
        needs_kind = "adapter_type" in inspect.signature(components).parameters
        self.pipeline = case.pipeline_class(**(components("full_adapter") if needs_kind else components()))
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        self.pipeline.set_progress_bar_config(disable=True)

    def run(self, scheduler: Any) -> torch.Tensor:
        """The last state that the scheduler's `step` returned."""
        states: list[torch.Tensor] = []
        step = scheduler.step

        @functools.wraps(step)
        def noted(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            states.append(output[0].detach().float().clone())
            return output

        scheduler.step = noted
        inner = [getattr(self.pipeline, name, None) for name in ("decoder_pipe", "generation_pipe", "upsampling_pipe")]
        for pipeline in (self.pipeline, *inner):
            if pipeline is not None:
                pipeline.scheduler = scheduler
        taken = inspect.signature(self.case.get_dummy_inputs).parameters
        inputs = self.case.get_dummy_inputs(**{k: v for k, v in {"device": "cpu", "seed": 0}.items() if k in taken})
        torch.manual_seed(0)
        with torch.no_grad():
            self.pipeline(**inputs)
        del scheduler.step
        if not states:
            raise RuntimeError("the pipeline did not call step of its scheduler")
        return states[-1]


def first_order(own: Any) -> Any:
    """diffusers' first-order scheduler of the same kind of noise."""
    name = type(own).__name__
    if name.startswith(("FlowMatchEuler", "EDMEuler", "CogVideoXDDIM", "UnCLIP", "LCM", "DDPMWuerstchen")):
        return own
    if name == "CogVideoXDPMScheduler":
        return diffusers.CogVideoXDDIMScheduler.from_config({**own.config, "_use_default_values": []})
    if own.config.get("variance_type") in ("learned", "learned_range") or own.config.get("prediction_type") == "sample":
        return own
    changes = {
        "_use_default_values": [],
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
    }
    config = {**own.config, **changes}
    if own.config.get("use_flow_sigmas"):
        kept = {key: own.config[key] for key in ("use_dynamic_shifting", *RESOLUTION_SHIFT) if key in own.config}
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=own.config.get("flow_shift", 1.0), **kept)
    if name == "EulerDiscreteScheduler" and own.config.get("timestep_type") == "continuous":
        return own
    return diffusers.DDIMScheduler.from_config(config)


def explicit_points(theirs: Any) -> Any:
    """The grid that their scheduler walked."""
    times = theirs.timesteps.tolist()
    if type(theirs).__name__.startswith(("Flow", "EDM", "EulerDiscrete")):
        sigmas = theirs.sigmas.tolist()
        return explicit(sigmas=sigmas[:-1], model_times=times if type(theirs).__name__.startswith("Flow") else None)
    return explicit(times=times)


def exact(noise: schedulers.NoiseSchedule, theirs: Any) -> schedulers.NoiseSchedule:
    """Their float32 table, so that only the algorithms are compared."""
    if noise.alphas_cumprod and hasattr(theirs, "alphas_cumprod"):
        return schedulers.NoiseSchedule.from_alphas_cumprod(theirs.alphas_cumprod.double().tolist())
    return noise


def is_ramp(s: Scheduler) -> bool:
    """Whether the run's times are those of the karras grid."""
    assert s._grid is not None
    grid = schedulers.grids.build("karras", s._grid.noise, len(s._grid) - 1)
    return all(abs(p.t - q.t) < 1e-6 for p, q in zip(grid.points, s._grid.points, strict=True))


def words(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def clip_tokenizer() -> Any:
    tokenizer = tiny.clip_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def t5_tokenizer() -> Any:
    tokenizer = tiny.t5_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def offline() -> None:
    """Replace what the tests download by small random parts."""

    def tokenizer(make: Callable[[], Any]) -> Any:
        return classmethod(lambda cls, *a, **k: make())

    for name in ("CLIPTokenizer", "CLIPTokenizerFast"):
        getattr(transformers, name).from_pretrained = tokenizer(clip_tokenizer)
    for name in ("AutoTokenizer", "T5Tokenizer", "T5TokenizerFast", "GemmaTokenizer", "LlamaTokenizer",
                 "LlamaTokenizerFast", "Qwen2Tokenizer", "XLMRobertaTokenizerFast"):  # fmt: skip
        getattr(transformers, name).from_pretrained = tokenizer(t5_tokenizer)
    t5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 4}

    def config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return transformers.T5Config(**t5)

    transformers.AutoConfig.from_pretrained = classmethod(config)
    for name, kind in (("T5EncoderModel", "T5Config"), ("UMT5EncoderModel", "UMT5Config")):
        model = getattr(transformers, name)
        make = functools.partial(lambda m, c: m(c), model, getattr(transformers, kind)(**t5))
        model.from_pretrained = classmethod(lambda cls, *a, make=make, **k: make())
    if importlib.util.find_spec("requests_mock") is None:
        sys.modules["requests_mock"] = types.ModuleType("requests_mock")


if __name__ == "__main__":
    main()
