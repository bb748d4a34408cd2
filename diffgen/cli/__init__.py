"""The command `diffgen`: parse, call one function, print. No torch at import."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn

from diffgen.errors import ExitCode


def main() -> NoReturn:
    """The console script. It exits without tearing torch down, which would take up to a second."""
    from . import signals

    signals.install()
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding == "utf-8" else "backslashreplace")
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the output is closed
            code = code or ExitCode.FAILED
    os._exit(code)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are printed as one line, or as one JSON document."""
    from . import signals

    options = list(args[: args.index("--")]) if "--" in args else list(args)
    if not sys.stdout.isatty():
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # no colour in a file, even where a CI system forces it
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # typer uses pydantic, which would search for plugins
    try:
        from .app import app

        code = app.main(list(args) or ["--help"], prog_name="diffgen", standalone_mode=False)
        signals.raise_if_stopped()
        return code or ExitCode.DONE
    except BaseException as error:
        if isinstance(error, SystemExit) and "_DIFFGEN_COMPLETE" in os.environ:  # a shell asked for completions
            return ExitCode.DONE
        from .failure import report

        signals.ignore()
        return report(error, options)
