"""Find a model on this machine by the hash in a picture's record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffgen.errors import InputError

from . import cache, gate, listed
from .find import Model, as_recorded, bundled_models, cached_models, check, listed_model, models_by_hand


def find_by_hash(digest: str, family: str | None = None, prediction: Any = None) -> Model | None:
    """The bundled, listed or cached model with this `gate.model_hash`; None if there is none.

    With `family`, models of other families are not hashed; `prediction` is what a single file predicts. Files in the
    download cache whose names are their hashes are not hashed here, but when the model is loaded.
    """
    for model in known_models():
        if family in (None, model.family) and not model.is_run:
            model = as_recorded(model, prediction)
            try:
                if network_hash(model) == digest:
                    return model
            except InputError:  # broken: it did not make the picture
                continue
    return None


def known_models() -> Iterator[Model]:
    """The models that have a name on this machine: bundled, in the user's list and folder, in the download cache."""
    yield from bundled_models()
    for entry in listed.entries().values():
        try:
            yield listed_model(entry)
        except InputError:  # its file is gone
            continue
    yield from (model for _, model in models_by_hand() if isinstance(model, Model))
    yield from cached_models()


def network_hash(model: Model) -> str:
    """The `gate.model_hash` of a model that is not a run. Raises InputError."""
    checked = check(model)
    hashes = {}
    for path in checked.network.weights:
        recorded = cache.recorded(path) if model.source == "cache" else None
        hashes[gate.name_of(checked, path)] = (
            recorded if recorded and cache.SHA256.fullmatch(recorded) else gate.sha256_of(path)
        )
    return gate.model_hash(checked, hashes)
