"""Read a run folder: its description, its newest checkpoint, its network. No torch at import.

    run.json           configuration, data, network, versions; written once, and again where a finished run continues
    metrics.jsonl      losses by step; no clock in it. Times are in timing.jsonl
    checkpoints/<step> complete ones only: model, ema, optimizer .safetensors and state.json, which has all hashes
    samples/<step>.png samples of the weights above, of their average below

A run is untrusted: its files are checked as those of a model, and nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgen.diffusion.names import VARIANCES
from diffgen.errors import InputError
from diffgen.models import gate
from schedulers.noise import NoiseSchedule
from schedulers.prediction import PLAIN

from .job import JOBS

if TYPE_CHECKING:
    import torch

    from diffgen.diffusion import GaussianDiffusion

SCHEMA = "diffgen.run/1"
STATE_SCHEMA = "diffgen.checkpoint/1"
WEIGHTS = re.compile(r"model|ema(-0\.\d{1,8})?")
MAX_STEP = 10**9
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class Run:
    """The content of run.json. Jobs other than "pixels" define network, data and noise themselves."""

    folder: Path
    job: str
    config: dict[str, Any]  # tables, as in a configuration file
    network: dict[str, Any]  # for networks.build
    data: dict[str, Any]  # name, channels, size [H, W], classes (names or None), levels, count, fingerprint
    noise: dict[str, Any]  # name, T
    prediction: str
    variance: str
    versions: dict[str, Any]
    segments: tuple[int, ...] = ()  # where earlier segments ended; the last one ends at config.train.steps

    base: dict[str, Any] = field(default_factory=dict)  # of a fine-tuning: name, family and sha256 of the model

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, newest first; `read_state` checks them."""
        try:
            names = os.listdir(self.folder / "checkpoints")
        except OSError:
            return []
        steps = sorted((int(name) for name in names if re.fullmatch(r"0|[1-9]\d{0,9}", name)), reverse=True)
        return [self.folder / "checkpoints" / str(step) for step in steps]

    def latest(self, warn: Callable[[str], None] | None = None) -> Path | None:
        """The newest checkpoint with all its files and the right hashes; None if there is none.

        `warn` is called for each newer one that is damaged.
        """
        for folder in self.checkpoints():
            try:
                read_state(folder)
            except InputError as error:
                if warn is not None:
                    warn(f"the checkpoint {folder} is damaged and ignored: {error.message}")
            else:
                return folder
        return None


def is_run(folder: str | Path) -> bool:
    return os.path.isfile(os.path.join(folder, "run.json"))


def read_run(folder: str | Path) -> Run:
    """Read the run in a folder. Raises InputError for a missing or foreign run.json, and for an invalid value."""
    path = Path(folder) / "run.json"
    if not is_run(folder):
        raise InputError(
            f"{folder} is not a run: it has no run.json", "a run is what `diffgen train DATA -o RUN` makes"
        )
    content = gate.read_json(path, 16 * gate.MAX_JSON)
    if content.get("schema") != SCHEMA:
        raise InputError(f"{path}: its schema is {content.get('schema')!r}, not {SCHEMA}")
    parts = {
        key: _is(content.get(key, {}), dict, f"{path}: {key}")
        for key in ("config", "network", "data", "noise", "versions", "base")
    }
    job, prediction, variance = (
        _is(content.get(key, ""), str, f"{path}: {key}") for key in ("job", "prediction", "variance")
    )
    if job == "pixels":
        _check_pixels(path, parts, prediction, variance)
    segments = _segments(content.get("segments", []), f"{path}: segments")
    return Run(Path(folder), job, prediction=prediction, variance=variance, segments=segments, **parts)


def _segments(ends: Any, what: str) -> tuple[int, ...]:
    """The ends of the earlier segments of a run. Raises InputError unless they are ascending steps."""
    ends = _is(ends, list, what)
    if not all(type(end) is int and 0 < end <= MAX_STEP for end in ends) or ends != sorted(set(ends)):
        raise InputError(f"{what} is {str(ends)[:80]}, not a list of ascending steps")
    return tuple(ends)


def product_of(path: str | Path, job: str) -> Path:
    """What a run of that job made for other commands, if the path is a run; else the path.

    Raises InputError for a run of another job, and for one that has made nothing yet.
    """
    if not is_run(path):
        return Path(path)
    run = read_run(path)
    if run.job != job:
        raise InputError(f"{path} is a run of the job {run.job!r}, not of {job!r}")
    product = Path(path) / JOBS[job].product
    if not product.exists():
        raise InputError(f"{path} has no checkpoint yet", "resume its training: the same command with --resume")
    return product


def _check_pixels(path: Path, parts: dict[str, dict[str, Any]], prediction: str, variance: str) -> None:
    data, noise = parts["data"], parts["noise"]
    _is(data.get("name"), str, f"{path}: data.name")
    if data.get("channels") not in (1, 3, 4):
        raise InputError(f"{path}: data.channels is {data.get('channels')!r}, not 1, 3 or 4")
    size = data.get("size")
    if not (isinstance(size, list) and len(size) == 2):
        raise InputError(f"{path}: data.size is {size!r}, not [height, width]")
    for what, value, low, high in (
        ("data.size", size[0], 1, 1024),
        ("data.size", size[1], 1, 1024),
        ("data.levels", data.get("levels"), 2, 256),
        ("data.count", data.get("count"), 1, 2**40),
        ("noise.T", noise.get("T"), 1, 100_000),
    ):
        if type(value) is not int or not low <= value <= high:
            raise InputError(f"{path}: {what} is {value!r}, not a whole number from {low} to {high}")
    classes = data.get("classes")
    if classes is not None:
        _is(classes, list, f"{path}: data.classes")
        if not 0 < len(classes) <= MAX_CLASSES or not all(isinstance(name, str) for name in classes):
            raise InputError(f"{path}: data.classes is not a list of names")
    if not re.fullmatch(r"[0-9a-f]{64}", str(data.get("fingerprint"))):
        raise InputError(f"{path}: data.fingerprint is not a SHA-256")
    for what, value, names in (
        ("noise.name", noise.get("name"), NoiseSchedule.TABLES),
        ("prediction", prediction, PLAIN),
        ("variance", variance, VARIANCES),
    ):
        if value not in names:
            raise InputError(f"{path}: {what} is {value!r}", f"this version knows {', '.join(names)}")


def _is(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        words = {"dict": "a table", "str": "a string", "list": "a list"}
        raise InputError(f"{what} is {str(value)[:80]!r}, not {words[kind.__name__]}")
    return value


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint, and check size and SHA-256 of every file that it names.

    Raises InputError, naming the file that is missing or damaged.
    """
    path = folder / "state.json"
    state = gate.read_json(path)
    files = state.get("files")
    if state.get("schema") != STATE_SCHEMA or not isinstance(files, dict) or "model.safetensors" not in files:
        raise InputError(f"{path}: not the state of a checkpoint ({STATE_SCHEMA})")
    step = state.get("step")
    if type(step) is not int or not 0 <= step <= MAX_STEP or str(step) != folder.name:
        raise InputError(f"{path}: its step is {step!r}")
    for name, record in files.items():
        if not re.fullmatch(r"[a-z][a-z0-9.-]{0,60}\.safetensors", name) or not isinstance(record, dict):
            raise InputError(f"{path}: invalid file name {name[:80]!r}")
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file}: the file is missing", "use an older checkpoint")
        with gate.open_file(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            digest = hashlib.file_digest(opened, "sha256").hexdigest() if size == record.get("bytes") else ""
        if digest != record.get("sha256"):
            raise InputError(f"{file}: its content has changed since it was written", "use an older checkpoint")
    if (expected := state_hash(state)) != state.get("sha256", expected):
        raise InputError(f"{path}: its content has changed since it was written", "use an older checkpoint")
    return state


def state_hash(state: dict[str, Any]) -> str:
    """SHA-256 in hex of the content of a state.json without this hash."""
    content = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weights_file(checkpoint: Path, which: str) -> Path:
    """The file of the weights "model", "ema" or "ema-<length>" in a checkpoint. Raises InputError."""
    if not WEIGHTS.fullmatch(which):
        raise InputError(f"no weights are called {which!r}", 'there are "model", "ema" and "ema-<length>"')
    path = checkpoint / f"{which}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in checkpoint.glob("*.safetensors") if WEIGHTS.fullmatch(p.stem)))
        raise InputError(f"{checkpoint} has no weights {which!r}", f"it has {there}")
    return path


def load_network(
    run: Run, which: str = "ema", *, device: torch.device | str = "cpu", checkpoint: Path | None = None
) -> tuple[torch.nn.Module, int]:
    """Load (network, step): the network in evaluation mode, with the weights of the newest or the given checkpoint.

    which  "ema", "model" (the raw weights) or "ema-<length>"
    Raises InputError for a missing checkpoint, missing weights, or weights that do not fit the network.
    """
    import torch

    folder = checkpoint or run.latest()
    if folder is None:
        hint = f"diffgen train {run.data.get('name', 'DATA')} -o {run.folder} --resume"
        raise InputError(f"{run.folder} has no checkpoint to read", f"train it first: {hint}")
    path = weights_file(folder, which)
    tensors = gate.read_header(path)
    if strange := sorted({t.dtype for t in tensors.values()} - {"F32", "F16", "BF16"}):
        raise InputError(f"{path}: weights of the type {strange[0]}", "those of a run are F32")
    with torch.device("meta"):
        network = build_network(run.network, f"{run.folder / 'run.json'}: network")
    check_fit(path, {name: t.shape for name, t in tensors.items()}, network)
    network.load_state_dict(_read(path, device), assign=True)
    network.requires_grad_(False).eval()
    return network, int(folder.name)


def build_network(config: dict[str, Any], where: str) -> torch.nn.Module:
    """Build the network of a configuration. Raises InputError for an invalid configuration."""
    from diffgen import networks

    try:
        return networks.build(config)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error


def check_fit(path: Path, shapes: dict[str, tuple[int, ...]], network: torch.nn.Module) -> None:
    """Raise InputError unless names and shapes in a weights file are exactly those of the network."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for kind, names in (("lacks", own.keys() - shapes.keys()), ("holds an unknown", shapes.keys() - own.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path}: {kind} tensor {min(names)!r}{more}", "these are weights of another network")
    for name, shape in own.items():
        if shapes[name] != shape:
            raise InputError(f"{path}: {name} has the shape {list(shapes[name])}, the network's has {list(shape)}")


def _read(path: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path, str(device))
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise InputError(f"{path}: {bad[0]} is not finite")
    return tensors


def diffusion_of(run: Run) -> GaussianDiffusion:
    """The diffusion process of a run. Raises InputError for an invalid combination."""
    import schedulers
    from diffgen.diffusion import GaussianDiffusion

    try:
        noise = schedulers.NoiseSchedule.named(run.noise["name"], T=run.noise["T"])
        return GaussianDiffusion(noise, run.prediction, run.variance, levels=run.data["levels"])
    except ValueError as error:
        raise InputError(f"{run.folder / 'run.json'}: {error}") from error
