"""diffgen data: index training data in shards."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Debug, Json, Output, Quiet, refuse_empty

EXAMPLES = """
Examples:

  diffgen data index out

  diffgen train out -o runs/large --steps 2000
"""


def index(
    data: Annotated[
        str, typer.Argument(metavar="SET", help="A folder of shards, here or s3://…, gs://…", show_default=False)
    ],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """A set is a folder of tar files (webdataset), parquet files, or what `diffgen batch` writes. The index lies in it;
    `diffgen train SET` makes one if there is none. Write it again after the shards have changed."""
    say = Output("data index", json, quiet)
    refuse_empty({"SET": data}, {"SET": "SET"})
    from diffgen.storage import Storage
    from diffgen.training.data.index import FILE, write_index

    store = Storage(data)
    with say.progress("indexing shards") as on_step:
        about = write_index(store, on_step)
    result = {name: about[name] for name in ("kind", "count", "sizes", "captioned", "fingerprint")}
    captions = "with captions" if about["captioned"] else "without captions"
    text = f"{store.place.rstrip('/')}/{FILE}: {about['count']} pictures in {len(about['shards'])} shards, {captions}"
    say.result({**result, "shards": len(about["shards"]), "index": FILE}, [text])
