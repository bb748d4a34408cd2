"""Find a model by its name: one function for every command."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffgen.errors import InputError, UsageError

from . import cache, gate, known, listed, single_file
from .families import FAMILIES

BUNDLED = Path(__file__).parent / "bundled"
DEFAULT = "emoji"
CHECKPOINTS = (".safetensors", ".gguf")
OTHERS = (".onnx",)  # files of other tools


@dataclass(frozen=True)
class Model:
    """A model on this machine. Its files are not checked yet: `check(model)` does that."""

    name: str  # a base name; org/name of a cached one
    folder: Path  # of a single file, the folder it is in
    family: str
    bundled: bool
    source: str  # "bundled", "folder", "file", "list", "models" or "cache"
    variant: str | None = None  # see families.variant_of
    file: Path | None = None  # the single-file checkpoint
    base: Path | None = None  # the diffusers folder for what a single file lacks
    prediction: str | None = None  # of a single file, as the user or a record says
    components: tuple[tuple[str, Path], ...] = ()  # files of single parts: (name, file)
    revision: str | None = None  # the commit of a cached one
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)  # from the user's list

    @property
    def may_predict_either(self) -> bool:
        """Whether files of this kind may predict the noise or v, and the user may have to say which."""
        return self.file is not None and not FAMILIES[self.family].is_flow

    @property
    def is_run(self) -> bool:
        """Whether it is a run of `diffgen train` and not a pipeline."""
        return self.family == "run"


class NotCached(InputError):  # noqa: N818
    """A model of a hub that is not on this machine. A command on a terminal can offer to download it."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.id = f"{repo}@{revision}" if revision else repo
        message = f"there is no folder {self.id!r}, and no such model in the download cache"
        wanted = known.SUCCESSORS.get(repo, self.id)
        super().__init__(message, f"get it: diffgen models pull {wanted}; here: {_here()}")


def find(name: str | None = None) -> Model:
    """Find the model that a name means; None is the default, `emoji`. Never opens a connection.

    In this order: a diffusers folder or a run of that path; a single-file checkpoint of that path, by its content; a
    bundled model; a name in the user's list (models.toml); a file or folder in the models folder; a short name of a
    well-known model, a hub's org/name or org/name@revision, from the download cache.
    Raises NotCached for a hub's id that is not in the cache, and InputError for an unknown name (with the nearest name
    and all models here) or a kind of file that is not read.
    """
    if name is None:
        return _bundled(DEFAULT)
    if model := _at(Path(name)):
        return model
    if name in bundled_names():
        return _bundled(name)
    if (entry := _entry(name)) is not None:
        return listed_model(entry)
    if (model := _by_hand(name)) is not None:
        return model
    name = known.repository(name)
    if _is_id(name):
        return _cached(*cache.parse_id(name))
    raise InputError(*_why_not(name))


def check(model: Model) -> gate.Checked:
    """Check the files of a model of any kind except a run, whose loader checks it. Raises InputError."""
    if model.file is not None:
        return single_file.check_file(model.file, model.base, model.prediction, dict(model.components))
    checked = replace(gate.check_folder(model.folder), variant=model.variant)
    return single_file.with_parts(checked, dict(model.components))


def with_components(model: Model, texts: Sequence[str]) -> Model:
    """Use files of single parts, each NAME=FILE, beside a model. Raises UsageError, and InputError for no such file."""
    components = dict(model.components)
    for text in texts:
        name, _, file = text.partition("=")
        if not name or not file:
            raise UsageError(f"--component must be NAME=FILE (got {text!r})", "for example vae=ae.safetensors")
        if model.is_run:
            raise UsageError(f"--component is not for runs: {model.name} has no parts", "leave it out")
        if not os.path.isfile(file):
            raise InputError(f"--component {name}: there is no file {file!r}")
        components[name] = Path(file)
    return replace(model, components=tuple(components.items()))


def predicting(model: Model, prediction: str) -> Model:
    """Set what the network of a single file predicts: epsilon or v_prediction, whatever its file says.

    Raises UsageError for another word, and for a model with a configuration that says it.
    """
    if prediction not in listed.PREDICTIONS:
        raise UsageError(f"--prediction must be {' or '.join(listed.PREDICTIONS)} (got {prediction!r})")
    if not model.may_predict_either:
        kind = "folder" if model.file is None else f"file of the family {model.family}"
        raise UsageError(
            f"--prediction is for single files of families that predict either: {model.name} is a {kind}",
            "leave it out",
        )
    return replace(model, prediction=prediction)


def as_recorded(model: Model, prediction: Any) -> Model:
    """Set what the network of a single file predicts, as a picture's record says it; other models stay as they are."""
    if prediction in listed.PREDICTIONS and model.may_predict_either:
        return replace(model, prediction=prediction)
    return model


def bundled_names() -> list[str]:
    """The models that come with diffgen."""
    return sorted(path.name for path in BUNDLED.iterdir() if _is_model(path)) if BUNDLED.is_dir() else []


def bundled_models() -> list[Model]:
    return [_bundled(name) for name in bundled_names()]


def listed_model(entry: listed.Entry) -> Model:
    """The model that an entry of the user's list names. Raises InputError, NotCached."""
    if entry.hub is not None:
        model: Model | None = _cached(*cache.parse_id(entry.hub))
    else:
        assert entry.path is not None
        model = _at(entry.path)
    if model is None:
        raise InputError(f"{listed.list_file()}: {entry.name!r} is {str(entry.path)!r}, where there is no model")
    base = _base(entry) if entry.base else None
    return Model(
        entry.name,
        model.folder,
        model.family,
        False,
        "list",
        model.variant,
        model.file,
        base,
        entry.prediction,
        tuple(entry.components.items()),
        model.revision,
        entry.defaults,
    )


def _base(entry: listed.Entry) -> Path:
    """The diffusers folder that supplies what an entry's file lacks: a path or a hub's id."""
    name = entry.base or ""
    path = listed.list_file().parent / os.path.expanduser(name)
    if not _is_model(path) and _is_id(name):
        path = _cached(*cache.parse_id(name)).folder
    if not _is_model(path):
        raise InputError(f"{listed.list_file()}: the base of {entry.name!r} is not a diffusers folder: {name!r}")
    return path


def cached_models() -> list[Model]:
    """The models in the download cache that can be read, judged by their model_index.json."""
    models = []
    for snapshot in cache.snapshots():
        try:
            models.append(cached_model(snapshot))
        except InputError:  # another kind of pipeline
            continue
    return models


def cached_model(snapshot: cache.Snapshot) -> Model:
    """The model in a snapshot of the download cache. Raises InputError for a pipeline that is not read."""
    index = gate.read_index(snapshot.folder, snapshot.repo)
    return Model(snapshot.repo, snapshot.folder, index.family, False, "cache", index.variant, revision=snapshot.commit)


def _at(path: Path) -> Model | None:
    """The model at a path, by its content."""
    if _is_model(path):
        index = gate.read_index(path)
        return Model(gate.called(path), path, index.family, False, "folder", index.variant)
    if os.path.isfile(path / "run.json"):
        if _is_model(path / "model"):  # what a full fine-tuning makes
            index = gate.read_index(path / "model")
            return Model(gate.called(path), path / "model", index.family, False, "folder", index.variant)
        return Model(gate.called(path), path, "run", False, "folder")
    if os.path.isfile(path) and path.suffix.lower() not in (*gate.PICKLES, *OTHERS):
        contents = single_file.recognise(path)
        if contents.kind != "checkpoint" or contents.family is None:
            raise InputError(*single_file.not_a_checkpoint(path, contents))
        return Model(path.stem, path.parent, contents.family, False, "file", contents.variant, path)
    return None


def _by_hand(name: str) -> Model | None:
    """The model of that name in the models folder, with or without the ending of its file."""
    if not listed.NAME.fullmatch(name):
        return None
    places = (listed.models_folder() / f"{name}{ending}" for ending in ("", *CHECKPOINTS))
    model = next((model for place in places if (model := _at(place))), None)
    return None if model is None else replace(model, source="models")


def models_by_hand() -> Iterator[tuple[Path, Model | InputError]]:
    """(path, its model or why it is none) of what lies in the models folder: folders and checkpoints."""
    folder = listed.models_folder()
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if place.suffix.lower() in CHECKPOINTS or _is_model(place) or os.path.isfile(place / "run.json"):
            try:
                if model := _at(place):
                    yield place, replace(model, source="models")
            except InputError as error:
                yield place, error


def _cached(repo: str, revision: str | None) -> Model:
    snapshot = cache.look_up(repo, revision)
    if snapshot is None or not _is_model(snapshot.folder):
        raise NotCached(repo, revision)
    return cached_model(snapshot)


def _bundled(name: str) -> Model:
    folder = BUNDLED / name
    if not _is_model(folder):
        raise InputError(f"the bundled model {name!r} is not in this installation", "install diffgen again")
    index = gate.read_index(folder)
    return Model(name, folder, index.family, True, "bundled", index.variant)


def _entry(name: str) -> listed.Entry | None:
    return listed.entries().get(name) if listed.NAME.fullmatch(name) else None


def _is_id(name: str) -> bool:
    is_file = Path(name).suffix.lower() in (*CHECKPOINTS, *gate.PICKLES, *OTHERS) or os.path.lexists(name)
    return not is_file and ".." not in name and cache.ID.fullmatch(name) is not None


def _is_model(folder: Path) -> bool:
    return os.path.isfile(folder / "model_index.json")


def _here() -> str:
    return ", ".join([*(f"{name} (bundled)" for name in bundled_names()), *listed.entries()])


def _why_not(name: str) -> tuple[str, str]:
    """(why a name is not a model, what to do)."""
    kinds = "bundled models, diffusers folders, runs, .safetensors and .gguf checkpoints, a hub's org/name"
    reads = f"read here: {kinds}. Here: {_here()}"
    suffix = Path(name).suffix.lower()
    if suffix in gate.PICKLES:
        return f"{name!r} has the name of a pickle", gate.CONVERT
    if suffix in OTHERS:
        return f"{name!r} is an {suffix[1:].upper()} file, which is not read", gate.CONVERT
    if suffix in CHECKPOINTS:
        return f"there is no file {name!r}", reads
    if os.path.isdir(name):
        return f"{name!r} is not a diffusers model: it has no model_index.json", reads
    if os.path.lexists(name):
        return f"{name!r} is not a model folder", reads
    near = difflib.get_close_matches(name.lower(), [*bundled_names(), *listed.entries(), *known.KNOWN], n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no model {name!r}", guess + reads
