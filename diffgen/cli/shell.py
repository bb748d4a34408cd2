"""diffgen shell: make pictures line by line with one loaded model."""

from __future__ import annotations

import contextlib
import io
import json as json_
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import ExitCode, UsageError
from diffgen.models.find import find, predicting

from .commands import COMMANDS, load_command
from .failure import report
from .loaded import keeping, load
from .options import Device, Dtype, Offline
from .output import Debug, Json, Output, Quiet, document, refuse_empty
from .signals import Stopped, first_signal, forget_signals, raise_if_stopped

GENERATE = load_command(COMMANDS["generate"])

EXAMPLES = """
Examples:

  diffgen shell

  printf 'a red apple\\na green apple --steps 10\\n' | diffgen shell -o apples/
"""

HELP = """a red apple --steps 10 -n 2   a prompt, then options of diffgen generate
"a red apple" "a cat" -n 2    a line that begins with a quote is split as a shell does
:set steps 10                 set an option for all following lines; :set alone lists them
:unset steps                  remove the option
:model NAME                   the same as :set model NAME
:help  :quit                  (or Ctrl-D); Ctrl-C stops the current picture"""


def shell(
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME|PATH|ID", help="Name, path, or hub id. \\[emoji]")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(metavar="epsilon|v_prediction", help="What a single file predicts.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", "--output", metavar="FOLDER/|TEMPLATE", help="Folder, or a template. \\[outputs/]"),
    ] = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """The exit code is that of the last line that failed. With --json, one document at the end has every result."""
    options = {"model": model, "prediction": prediction, "device": device, "dtype": dtype, "out": out}
    refuse_empty(options, {})
    environment.prepare(offline)
    session = Session(Output("shell", json, quiet), ["--debug"] * debug + ["--quiet"] * quiet + ["--offline"] * offline)
    for key, value in options.items():
        if value not in (None, "auto"):
            session.set(key, str(value))
    chosen = find(model)
    if prediction is not None:
        chosen = predicting(chosen, prediction)
    with keeping():
        load(chosen, device_name(device), dtype_name(dtype), "none", "none")  # the defaults of generate
        session.say.note(f"{chosen.name} is loaded; write one prompt and its options per line; :help, :quit")
        for line in _lines(session):
            session.obey(line)
    if json:
        failed = session.error
        result = {"lines": session.results}
        error = {} if failed is None else {"error": failed}
        document("shell", ok=failed is None, **error, result=result)
    return session.code


class Session:
    """The options that are set, and the results so far."""

    def __init__(self, say: Output, always: list[str]) -> None:
        self.say, self.always = say, always
        self.options: dict[str, list[str]] = {}  # name: the words of the option
        self.flags = _options()
        self.code = int(ExitCode.DONE)
        self.error: dict[str, Any] | None = None
        self.results: list[dict[str, Any]] = []

    def obey(self, line: str) -> None:
        """Run one line and report its error, if any, so that the next line can follow. SIGTERM ends the shell."""
        words, code = ["shell", *self.always, *["--json"] * self.say.as_json], int(ExitCode.DONE)
        written = io.StringIO()
        try:
            with contextlib.redirect_stdout(written) if self.say.as_json else contextlib.nullcontext():
                if line.startswith(":"):
                    self.command(*line[1:].split(None, 1))
                else:
                    words = self.words(line)
                    code = _generate(words)
        except BaseException as error:
            if first_signal() not in (None, signal.SIGINT):
                raise
            with contextlib.redirect_stdout(written) if self.say.as_json else contextlib.nullcontext():
                code = report(error, words)
            forget_signals()
        output = written.getvalue()
        entry: dict[str, Any] = json_.loads(output) if output.startswith("{") else {"ok": code == ExitCode.DONE}
        self.results.append({"line": line} | {key: entry[key] for key in ("ok", "result", "error") if key in entry})
        if code:
            self.code = code
            self.error = entry.get("error")

    def words(self, line: str) -> list[str]:
        """The command words of a line, from "generate" on. Raises UsageError."""
        try:
            if line[0] in "\"'":
                arguments = shlex.split(line)
            else:  # an apostrophe in the prompt does not quote
                prompt, options = re.fullmatch(r"(.*?)((?:(?<!\S)--?[A-Za-z].*)?)", line, re.DOTALL).groups()  # type: ignore[union-attr]
                arguments = [prompt.strip()] * bool(prompt.strip()) + shlex.split(options)
        except ValueError as error:
            raise UsageError(f"cannot read the line: {error}", "quotes come in pairs") from error
        if "-" in arguments:
            raise UsageError(
                "- would read prompts from stdin, from which the shell reads its lines", "use --prompt-file FILE"
            )
        set_words = [word for words in self.options.values() for word in words]
        return ["generate", *set_words, *self.always, *["--json"] * self.say.as_json, *arguments]

    def command(self, name: str = "", rest: str = "") -> None:
        """Run a line that begins with a colon. Raises UsageError and InputError."""
        rest = rest.strip()
        if name == "help":
            self.say.note(HELP)
        elif name == "set" and not rest:
            self.say.note("\n".join(shlex.join(words) for words in self.options.values()) or "nothing is set")
        elif name == "set":
            self.set(*[*rest.split(None, 1), ""][:2])
        elif name == "unset":
            self.options.pop(self.name(rest), None)
        elif name == "model":
            if rest:
                find(rest)
                self.set("model", rest)
            self.say.note(f"model {' '.join(self.options.get('model', ['', find().name])[1:])}")
        else:
            raise UsageError(f"there is no :{name}", ":help lists the commands")

    def name(self, key: str) -> str:
        """The name of an option, from its name or its flag. Raises UsageError for an unknown one."""
        name = key.lstrip("-").replace("-", "_")
        spellings = {key, f"-{key}", f"--{key}"}
        name = next((option for option, (words, _) in self.flags.items() if spellings & set(words)), name)
        if name not in self.flags:
            raise UsageError(f"generate has no option {key!r}", "see: diffgen generate --help")
        return name

    def set(self, key: str, value: str) -> None:
        """Set an option for all following lines. Raises UsageError."""
        name = self.name(key)
        words, is_flag = self.flags[name]
        option = max(words, key=len)
        if is_flag:
            if value not in ("", "on", "off"):
                raise UsageError(f":set {key} takes on or off (got {value!r})")
            self.options[name] = [option]
            if value == "off":
                del self.options[name]
        elif not value:
            raise UsageError(f":set {key} needs a value", f":unset {key} removes it")
        else:
            self.options[name] = [option, value]


def _generate(words: list[str]) -> int:
    """Run `diffgen generate …` in this process and return its exit code."""
    code = GENERATE.main(words[1:], prog_name="diffgen generate", standalone_mode=False)
    raise_if_stopped()
    return int(code or ExitCode.DONE)


def _options() -> dict[str, tuple[list[str], bool]]:
    """The options of generate: {name: (its flags, whether it takes no value)}."""
    excluded = ("json", "quiet", "debug", "prompt", "help")
    return {
        str(option.name): (list(option.opts), bool(getattr(option, "is_flag", False)))
        for option in GENERATE.params
        if option.name not in excluded
    }


def _lines(session: Session) -> Iterator[str]:
    """The lines to run, up to :quit or the end, without blank lines and comments. A terminal shows a prompt."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    read_line = _line_reader(terminal)
    while True:
        try:
            line = read_line()
        except EOFError:
            return
        except Stopped:
            if not terminal or first_signal() != signal.SIGINT:
                raise
            forget_signals()  # Ctrl-C at the prompt drops the line
            print(file=sys.stderr)
            continue
        if (line := line.strip()) in (":quit", ":q", ":exit"):
            return
        if line and not line.startswith("#"):
            yield line


def _line_reader(terminal: bool) -> Callable[[], str]:
    """The function that returns the next line, or raises EOFError at the end."""
    if terminal and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (keeps a history of the lines, in memory only)
        return lambda: input("diffgen> ")

    def read() -> str:
        if terminal:
            print("diffgen> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            raise EOFError
        return line

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return read
