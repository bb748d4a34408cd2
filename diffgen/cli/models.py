"""diffgen models: list, describe, fetch, verify, export and remove models."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffgen import environment
from diffgen.devices import dtype_name
from diffgen.errors import InputError, UsageError
from diffgen.generation import needs
from diffgen.images.publish import Exists, check_writable, publish
from diffgen.models import cache, find, gate, hub, known, listed
from diffgen.models.info import compositions_in_words, defaults_in_words, matching_names
from diffgen.models.info import info as about
from diffgen.training.job import JOBS
from diffgen.training.run import read_run

from .options import Dtype, Offline
from .output import Debug, Json, Output, Quiet, UnfinishedError, refuse_empty, table

NAME = "A bundled model, a folder, a .safetensors checkpoint, a name in your list, or the org/name of a hub."
COLUMNS = ("name", "family", "variant", "source", "bytes", "licence", "resolution", "folder")

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def list_models(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    say = Output("models list", json, quiet)
    entries = [_entry(model) for model in find.bundled_models()]
    for entry in listed.entries().values():
        try:
            entries.append(_entry(find.listed_model(entry)))
        except InputError as error:
            entries.append(_broken(entry.name, "list", str(entry.path or entry.hub), error))
    for place, model in find.models_by_hand():
        if isinstance(model, InputError):
            entries.append(_broken(place.name, "models", str(place), model))
        else:
            entries.append(_entry(model))
    for snapshot in cache.snapshots():
        name = snapshot.repo if "main" in snapshot.refs else f"{snapshot.repo}@{(*snapshot.refs, snapshot.commit)[0]}"
        try:
            entries.append({**_entry(find.cached_model(snapshot)), "name": name})
        except InputError as error:
            entries.append({**_broken(name, "cache", str(snapshot.folder), error), "bytes": snapshot.bytes})
    rows = [[_cell(key, row[key]) for key in COLUMNS] for row in entries]
    folder = cache.cache_dir()
    cached_bytes = sum({path.resolve(): path.stat().st_size for path in cache.files_of(folder)}.values())
    result = {
        "models": entries,
        "cache": {"folder": str(folder), "bytes": cached_bytes},
        "list": str(listed.list_file()),
        "folder": str(listed.models_folder()),
    }
    say.result(result, table([list(COLUMNS), *rows]))
    for row in entries:
        if row["problem"]:
            say.warn(f"{row['name']}: {row['problem']}")
    if cached_bytes:
        say.note(f"download cache: {hub.size_text(cached_bytes)} in {folder}")


def info(
    name: Annotated[str | None, typer.Argument(help=NAME + " \\[emoji]")] = None,
    names: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="List what it knows: apple, *car*, or '*' for everything.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    model = find.find(name)
    facts = about(model)
    if names is not None:
        matching = matching_names(facts, names)
        Output("models info", json, quiet).result({"name": model.name, "names": matching}, matching)
        return
    facts["memory"] = None if model.is_run else _memory(model, facts)
    shown = facts | {"defaults": defaults_in_words(facts), "compositions": compositions_in_words(facts)}
    if facts["memory"] is not None:
        switches = (f"{flag} {hub.size_text(size)}" for flag, size in facts["memory"]["with"].items())
        shown |= {"memory": needs.in_words(facts["memory"]), "memory_with": ", ".join(switches)}
    rows = [[key, _brief(value)] for key, value in shown.items() if value not in (None, [], {})]
    Output("models info", json, quiet).result(facts, table(rows))


def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME|ORG/NAME[@REVISION]", help="A name of models search, or a repository.")
    ],
    full: Annotated[bool, typer.Option("--full", help="Full-precision weights. \\[half, if there are any]")] = False,
    safety: Annotated[bool, typer.Option("--safety", help="Fetch the safety checker too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, fetch nothing.")] = False,
    yes: Yes = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    environment.prepare(offline)
    say = Output("models pull", json, quiet)
    repo, revision = cache.parse_id(known.repository(name))
    offer = hub.offer(repo, revision, full=full, safety=safety)
    result = _show(offer, say)
    if dry_run:
        files = (f"{hub.size_text(file.bytes):>9}  {file.path}" for file in offer.files if not file.cached)
        say.result(result | {"dry_run": True}, files)
        return
    if offer.bytes and not yes:
        _ask(say, f"Fetch {hub.size_text(offer.bytes)}?")
    folder = _fetch(offer, say)
    gate.check_folder(folder, repo)
    say.result(result | {"folder": str(folder)}, [str(folder)])


def search(
    words: Annotated[
        list[str] | None, typer.Argument(help="What its name, family, licence or use has.", show_default=False)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    say = Output("models search", json, quiet)
    results = known.search(words or [])
    if not results:
        raise InputError(f"no well-known model has {' '.join(words or [])!r}", f"there are: {', '.join(known.KNOWN)}")
    models = [
        {"name": name, **row._asdict(), "here": bool(cache.snapshots_of(row.repo))} for name, row in results.items()
    ]
    titles = ["name", "family", "GB", "licence", "good for", "here"]
    rows = [
        [m["name"], m["family"], f"{m['gigabytes']:.1f}", m["licence"], m["good_for"], "yes" * m["here"]]
        for m in models
    ]
    say.result({"models": models}, table([titles, *rows]))


def verify(
    name: Annotated[str | None, typer.Argument(help=NAME + " \\[emoji]")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    say = Output("models verify", json, quiet)
    model = find.find(name)
    files = _run_files(model) if model.is_run else _model_files(model)
    result = {"name": model.name, "folder": str(model.folder), "family": model.family, "files": files}
    wrong = [file["path"] for file in files if file["state"] == "wrong"]
    rows = list(table([[file["state"], file["sha256"], file["path"]] for file in files])) if files else []
    if wrong:
        for row in () if json else rows:
            say.line(row)
        both = f"diffgen models rm {model.name}, then diffgen models pull {model.name}"
        fix = both if model.source == "cache" else "install or copy it again"
        raise UnfinishedError(
            InputError(
                f"{model.name}: not as recorded: {', '.join(wrong)}", f"the files were changed or damaged: {fix}"
            ),
            result,
        )
    say.result(result, rows)
    unrecorded = sum(file["state"] == "not recorded" for file in files)
    if unrecorded:
        say.note(
            f"{unrecorded} of {len(files)} files have no recorded hash: their structure was checked, not their bytes"
        )


def export(
    name: Annotated[str, typer.Argument(help=NAME[:-1] + ", or a run of diffgen train.")],
    folder: Annotated[str | None, typer.Argument(help="A new folder to write; of a LoRA, a file.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", "--output", metavar="PATH", help="The same.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Names in a LoRA's file.", metavar="kohya|diffusers|original", show_default="diffusers"),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(help="Weights of a run: ema, model, or ema-<length>. \\[ema]", metavar="NAME", show_default=False),
    ] = "ema",
    dtype: Dtype = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    say = Output("models export", json, quiet)
    model = find.find(name)
    is_run = model.is_run
    refuse_empty({"FOLDER": folder, "out": out}, {"FOLDER": "FOLDER", "out": "-o"})
    if (folder is None) == (out is None):
        raise UsageError("models export needs the path to write, once", "diffgen models export RUN -o PATH")
    folder = folder or out or ""
    if layout is not None and not is_run:
        raise UsageError(f"--layout {layout} is only for runs of the job lora", "leave it out")
    if weights != "ema" and not is_run:
        raise UsageError(f"--weights {weights} is only for runs", "leave it out")
    options = {} if layout is None else {"layout": layout}
    if dtype_name(dtype) != "auto":
        options["dtype"] = dtype
    place = Path(folder)
    if os.path.lexists(place):
        raise Exists(place)
    check_writable(place)
    environment.prepare(offline=True)
    from diffgen.pipelines.generate import ImageGenerator
    from diffgen.pipelines.training.export import save_run

    if is_run:
        save_run(run := read_run(model.folder), place, weights, **options)
    else:
        ImageGenerator(model, device="cpu", dtype=dtype).save(place)
    if is_run and JOBS[run.job].product:
        files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
        family, size = run.base["family"], sum(file.stat().st_size for file in files)
    else:
        exported = find.find(os.path.join(folder, ""))
        family, size = exported.family, about(exported)["bytes"]
    result = {"name": model.name, "folder": folder, "family": family, "bytes": size}
    say.result(result, [folder])


def rm(
    name: Annotated[
        str, typer.Argument(metavar="ORG/NAME[@REVISION]|NAME", help="A model in the cache, or a name in your list.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be deleted, delete nothing.")] = False,
    yes: Yes = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    environment.prepare(offline=True)
    say = Output("models rm", json, quiet)
    if name in listed.entries():
        path, text = listed.without(name)
        what = f"the entry {name!r} of {path} (the model itself stays)"
        result: dict[str, Any] = {"removed": [name], "bytes": 0}
        if _confirm_delete(say, what, dry_run, yes):
            publish(path, text, overwrite=True)
        say.result(result | {"dry_run": dry_run}, [name])
        return
    if name in find.bundled_names():
        raise InputError(f"{name} comes with diffgen and stays")
    if cache.ID.fullmatch(name) is None or ".." in name:
        raise InputError(
            f"{name!r} is neither in the download cache nor in your list",
            "your own folders and files are yours to delete",
        )
    repo, revision = cache.parse_id(name)
    snapshots = cache.snapshots_of(repo)
    removed = [s for s in snapshots if revision is None or revision == s.commit or revision in s.refs]
    if not removed:
        cached = ", ".join(sorted({snapshot.repo for snapshot in cache.snapshots()})) or "nothing"
        raise InputError(f"{name!r} is neither in the download cache nor in your list", f"cached: {cached}")
    size = sum(s.bytes for s in removed)
    what = f"{repo} ({', '.join(s.commit[:8] for s in removed)}), up to {hub.size_text(size)}, from {cache.cache_dir()}"
    result = {"removed": [f"{repo}@{s.commit}" for s in removed], "bytes": size}
    if _confirm_delete(say, what, dry_run, yes):
        hub.remove(removed)
    say.result(result | {"dry_run": dry_run}, result["removed"])


def offer_pull(name: str | None, say: Output, offline: bool = False, family: str | None = None) -> find.Model:
    """The model of that name. On a terminal, offer to fetch a hub's model that is not in the cache.

    With `family`, only a model of that family is fetched. Raises NotCached without a terminal, if the network is
    forbidden, or if the answer is no. Raises InputError for another family.
    """
    try:
        return find.find(name)
    except find.NotCached as error:
        environment.prepare(offline)
        if hub.offline() or say.as_json or say.quiet or not _terminal():
            raise
        offer = hub.offer(*cache.parse_id(error.id))
        if family not in (None, offer.family):
            raise InputError(f"{offer.repo}: a model of the family {offer.family}, not {family}") from error
        _show(offer, say)
        if not typer.confirm(f"It is not on this machine. Fetch {hub.size_text(offer.bytes)}?", err=True):
            raise
        _fetch(offer, say)
        return find.find(name)


def _memory(model: find.Model, facts: dict[str, Any]) -> dict[str, Any] | None:
    """What a model needs at its own size; None for one whose files are not sound."""
    side = facts["resolution"] if isinstance(facts["resolution"], int) else 512
    try:
        return needs.report(find.check(model), (side, side), guided=facts["family_defaults"]["guidance"] != 1)
    except InputError:
        return None


def _entry(model: find.Model) -> dict[str, Any]:
    facts = about(model)
    return {**{key: facts[key] for key in COLUMNS}, "revision": model.revision, "problem": None}


def _broken(name: str, source: str, folder: str, error: InputError) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(COLUMNS)
    return {**empty, "name": name, "source": source, "folder": folder, "revision": None, "problem": error.message}


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    return hub.size_text(value) if key == "bytes" else str(value)


def _model_files(model: find.Model) -> list[dict[str, Any]]:
    """path, sha256, recorded hash and state ("right", "wrong", "not recorded") of each file of the model."""
    checked = find.check(model)
    card = {} if model.file else _card_hashes(model)
    files = []
    for path, digest in gate.file_hashes(checked).items():
        place = next(file for file in checked.files if gate.name_of(checked, file) == path)
        recorded = card.get(path) or (cache.recorded(place) if model.source in ("cache", "list") else None)
        ours = cache.git_hash(place) if recorded is not None and len(recorded) == 40 else digest
        state = "not recorded" if recorded is None else "right" if recorded == ours else "wrong"
        files.append({"path": path, "sha256": digest, "recorded": recorded, "state": state})
    return files


def _run_files(model: find.Model) -> list[dict[str, Any]]:
    """The same as `_model_files`, for the checkpoints of a run. Their state.json has the hashes."""
    files = []
    for checkpoint in read_run(model.folder).checkpoints():
        recorded = gate.read_json(checkpoint / "state.json").get("files")
        for name, entry in sorted(recorded.items() if isinstance(recorded, dict) else ()):
            digest = gate.sha256_of(checkpoint / Path(name).name)
            expected = entry.get("sha256") if isinstance(entry, dict) else None
            state = "right" if expected == digest else "wrong"
            path = f"checkpoints/{checkpoint.name}/{name}"
            files.append({"path": path, "sha256": digest, "recorded": expected, "state": state})
    return files


def _card_hashes(model: find.Model) -> dict[str, str]:
    """The hashes in the model's card: {path: SHA-256}, empty if it has none. Raises InputError."""
    card = model.folder / "card.json"
    hashes = gate.read_json(card).get("sha256", {}) if card.is_file() else {}
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        raise InputError(f"{card}: sha256 must be a table of paths and hashes")
    return hashes


def _show(offer: hub.Offer, say: Output) -> dict[str, Any]:
    """Print what would be downloaded, and return it as a JSON result."""
    cached_bytes = sum(file.bytes for file in offer.files) - offer.bytes
    say.note(f"{offer.repo}@{offer.commit[:12]}: {offer.family}, weights in {offer.precision}")
    say.note(f"licence: {offer.licence or 'not stated'}{'; gated' if offer.gated else ''}")
    say.note(
        f"to fetch: {hub.size_text(offer.bytes)} in {sum(not file.cached for file in offer.files)} files"
        + (f" ({hub.size_text(cached_bytes)} are already here)" if cached_bytes else "")
    )
    return {
        "repo": offer.repo,
        "revision": offer.revision,
        "commit": offer.commit,
        "family": offer.family,
        "licence": offer.licence,
        "gated": offer.gated,
        "precision": offer.precision,
        "bytes": offer.bytes,
        "files": [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256, "cached": f.cached} for f in offer.files],
    }


def _fetch(offer: hub.Offer, say: Output) -> Any:
    done = 0
    with say.progress(offer.repo) as on_step:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if on_step:
                on_step(min(done, offer.bytes) // 2**20, max(offer.bytes // 2**20, 1))

        return hub.pull(offer, on_bytes)


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _ask(say: Output, question: str) -> None:
    """Ask for confirmation. Raises UsageError without a terminal, or if the answer is no."""
    if say.as_json or not _terminal():
        raise UsageError("cannot ask for confirmation without a terminal", "add --yes")
    if not typer.confirm(question, err=True):
        raise UsageError("nothing was done")


def _confirm_delete(say: Output, what: str, dry_run: bool, yes: bool) -> bool:
    """Print what would be deleted, and return whether to delete it."""
    say.note(f"{'would delete' if dry_run else 'delete'} {what}")
    if dry_run:
        return False
    if not yes:
        _ask(say, "Delete it?")
    return True


def _item(value: object) -> str:
    """An item of a list as text: a grid, or any other value."""
    if isinstance(value, dict):
        return f"{value['file']} ({value['scheduler']}, {value['steps']} steps, guidance {value['guidance']})"
    return str(value)


def _brief(value: object) -> str:
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)}: {_brief(value[:12])}, … (all of them: --json)"
    if isinstance(value, list):
        return ", ".join(" ".join(map(str, item)) if isinstance(item, list) else _item(item) for item in value)
    if isinstance(value, dict):
        named = {key: f"({_brief(item)})" if isinstance(item, dict) else item for key, item in value.items()}
        return ", ".join(f"{key} {item}" for key, item in named.items() if item is not None)
    return str(value)
