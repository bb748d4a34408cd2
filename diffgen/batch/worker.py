"""A worker process of the engine "local": shard numbers on stdin, one line of JSON on stdout for each."""

from __future__ import annotations

import json
import os
import sys
import threading
from queue import Queue
from typing import Any

from diffgen.errors import DiffgenError
from diffgen.storage import Storage

from .maker import PictureMaker
from .plan import check_versions, read_plan, versions
from .shards import make_shard


def main(out: str, options: dict[str, Any]) -> None:
    """Make shards until stdin ends. Then exit at once, also in the middle of a shard."""
    numbers: Queue[int] = Queue()
    threading.Thread(target=_read, args=(numbers,), daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not disturb the answers

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        plan = read_plan(Storage(out))
        check_versions(plan.about, versions(), "this worker")
        maker = PictureMaker(plan.about, **options)
        answer({"ready": os.getpid()})
        while True:
            answer(make_shard(plan, numbers.get(), maker))
    except DiffgenError as error:
        answer({"error": {"code": int(error.code), "message": error.message, "hint": error.hint}})
    except BrokenPipeError:  # the driver has ended
        os._exit(0)


def _read(numbers: Queue[int]) -> None:
    """Queue the numbers. When stdin ends, exit."""
    for line in sys.stdin:
        numbers.put(int(line))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
