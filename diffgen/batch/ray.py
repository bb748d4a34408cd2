"""The engine "ray": Ray Data, on this machine or on a cluster. Each actor loads the model once and makes whole shards.

The data set has one row for each shard, in a block of its own, so that an actor pulls one shard at a time and returns
its statistics. Pictures never pass through Ray. A dead actor is restarted by Ray, and its shard is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffgen
from diffgen.errors import DiffgenError, ExitCode, InputError
from diffgen.storage import Storage

from .extras import need

START_SECONDS = 90.0
OBJECT_STORE = 200 * 2**20  # bytes: statistics are small
HINT = "is `ray start` running there, on the same version of Ray and as the same user? See docs/batch.md"


class ShardActor:
    """An actor: the model of a plan, loaded once."""

    def __init__(self, out: str, options: Mapping[str, Any], threads: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        from .maker import PictureMaker
        from .plan import check_versions, read_plan, versions

        self.error: DiffgenError | None = None
        try:
            self.plan = read_plan(Storage(out))
            check_versions(self.plan.about, versions(), "a worker of the cluster")
            self.maker = PictureMaker(self.plan.about, **options)
            import torch

            torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS itself
        except DiffgenError as error:
            self.error = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the shards of a batch; returns their statistics, or an error, as JSON."""
        from .shards import make_shard

        answers = []
        for shard in batch["shard"].tolist():
            try:
                if self.error is not None:
                    raise self.error
                answers.append(json.dumps(make_shard(self.plan, shard, self.maker)))
            except DiffgenError as error:
                described = {"code": int(error.code), "message": error.message, "hint": error.hint}
                answers.append(json.dumps({"error": described}))
        return {"answer": answers}


def run_shards(
    out: str,
    options: Mapping[str, Any],
    shards: Sequence[int],
    report: Callable[[dict[str, Any]], None],
    *,
    workers: tuple[int, int],
    gpus: float = 0.0,
    cpus: float = 1.0,
    threads: int = 1,
    address: str | None = None,
    retries: int = 3,
) -> None:
    """Make the shards with (smallest, largest) numbers of actors.

    Raises UsageError without Ray, InputError for a cluster that cannot be reached, and what the actors raise.
    """
    ray, data = need("ray", "the engine ray", "ray"), need("ray.data", "the engine ray", "ray")
    with _connected(ray, address):
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # shards of actors that died too often; the run reports them
        rows = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        least, most = min(workers[0], len(shards)), min(workers[1], len(shards))
        answers = rows.map_batches(
            ShardActor,
            fn_constructor_args=(out, dict(options), threads),
            batch_size=1,
            compute=data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus or None,
            max_restarts=retries,
            max_task_retries=retries,
        )
        for row in answers.iter_rows():
            answer = json.loads(row["answer"])
            if "error" in answer:
                error = DiffgenError(answer["error"]["message"], answer["error"]["hint"])
                error.code = ExitCode(answer["error"]["code"])
                raise error
            report(answer)


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start Ray on this machine. Raises InputError after START_SECONDS."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    source = str(Path(diffgen.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address is None:
        settings |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        settings["runtime_env"] = {"env_vars": {"PYTHONPATH": paths}}
    where = "Ray" if address is None else f"the Ray cluster at {address}"
    failure: list[BaseException] = []

    def connect() -> None:
        try:
            ray.init(address=address, **settings)
        except BaseException as error:
            failure.append(error)

    starting = threading.Thread(target=connect, daemon=True)
    starting.start()
    starting.join(START_SECONDS)
    if starting.is_alive():
        raise InputError(f"{where} does not answer within {START_SECONDS:.0f} s", HINT)
    if failure:
        reason = (str(failure[0]).strip() or type(failure[0]).__name__).splitlines()[0]
        raise InputError(f"cannot connect to {where}: {reason}", HINT)
    try:
        yield
    finally:
        ray.shutdown()
