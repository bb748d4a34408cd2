"""diffgen shell: pictures line by line, the model kept loaded."""

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

from .commands import COMMANDS
from .commands import load as load_command
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

HELP = """a red apple --steps 10 -n 2   a prompt up to the first option, then options of diffgen generate
"a red apple" "a cat" -n 2    or the words as in a shell, if the line begins with a quote
:set steps 10                 an option for all lines that follow; :set alone shows them
:unset steps                  not any more
:model NAME                   the same as :set model NAME
:help  :quit                  (or Ctrl-D); Ctrl-C stops the picture that is being made"""


def shell(
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME|PATH|ID", help="As in generate. \\[emoji]")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(metavar="epsilon|v_prediction", help="What a single file predicts.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", "--output", metavar="FOLDER/|TEMPLATE", help="Where pictures go. \\[outputs/]"),
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
        load(chosen, device_name(device), dtype_name(dtype), "none", "none")  # as generate asks, unless told otherwise
        session.say.note(f"{chosen.name} is loaded; a prompt and its options a line, :help, :quit")
        for line in _lines(session):
            session.obey(line)
    if json:
        failed = session.error
        result = {"lines": session.results}
        error = {} if failed is None else {"error": failed}
        document("shell", ok=failed is None, **error, result=result)
    return session.code


class Session:
    """What was set, and how it went so far."""

    def __init__(self, say: Output, always: list[str]) -> None:
        self.say, self.always = say, always
        self.options: dict[str, list[str]] = {}  # name: the words of the option
        self.known = _options()
        self.code = int(ExitCode.DONE)
        self.error: dict[str, Any] | None = None
        self.results: list[dict[str, Any]] = []

    def obey(self, line: str) -> None:
        """One line; what goes wrong is told, and the next line may come. A SIGTERM is obeyed."""
        words, code = ["shell", *self.always, *["--json"] * self.say.as_json], int(ExitCode.DONE)
        written = io.StringIO()
        try:
            with contextlib.redirect_stdout(written) if self.say.as_json else contextlib.nullcontext():
                if line.startswith(":"):
                    self.command(*line[1:].split(None, 1))
                else:
                    words = self.words(line)
                    code = _generate(words)
        except BaseException as caught:
            if first_signal() == signal.SIGTERM:
                raise
            with contextlib.redirect_stdout(written) if self.say.as_json else contextlib.nullcontext():
                code = report(caught, words)
            forget_signals()
        output = written.getvalue()
        entry: dict[str, Any] = json_.loads(output) if output.startswith("{") else {"ok": code == ExitCode.DONE}
        self.results.append({"line": line} | {key: entry[key] for key in ("ok", "result", "error") if key in entry})
        if code:
            self.code = code
            self.error = entry.get("error")

    def words(self, line: str) -> list[str]:
        """The words of `diffgen generate` that a line stands for. Raises UsageError."""
        try:
            if line[0] in "\"'":
                arguments = shlex.split(line)
            else:  # an apostrophe in the prompt is no quote
                prompt, options = re.fullmatch(r"(.*?)((?:(?<!\S)--?[A-Za-z].*)?)", line, re.DOTALL).groups()  # type: ignore[union-attr]
                arguments = [prompt.strip()] * bool(prompt.strip()) + shlex.split(options)
        except ValueError as error:
            raise UsageError(f"cannot read the line: {error}", "quotes come in pairs") from error
        if "-" in arguments:
            raise UsageError(
                "- reads prompts from stdin, and there the shell reads its lines", "use --prompt-file FILE"
            )
        settled = [word for words in self.options.values() for word in words]
        return ["generate", *settled, *self.always, *["--json"] * self.say.as_json, *arguments]

    def command(self, name: str = "", rest: str = "") -> None:
        """A line that begins with a colon. Raises UsageError, InputError."""
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
            raise UsageError(f"there is no :{name}", ":help shows what there is")

    def name(self, key: str) -> str:
        """The option's name. Raises UsageError for one that generate does not have."""
        name = key.lstrip("-").replace("-", "_")
        spellings = {key, f"-{key}", f"--{key}"}
        name = next((known for known, (words, _) in self.known.items() if spellings & set(words)), name)
        if name not in self.known:
            raise UsageError(f"generate has no option {key!r}", "see: diffgen generate --help")
        return name

    def set(self, key: str, value: str) -> None:
        """An option for all lines that follow. Raises UsageError."""
        name = self.name(key)
        words, is_flag = self.known[name]
        option = max(words, key=len)
        if is_flag:
            if value not in ("", "on", "off"):
                raise UsageError(f":set {key} takes on or off (got {value!r})")
            self.options[name] = [option]
            if value == "off":
                del self.options[name]
        elif not value:
            raise UsageError(f":set {key} needs a value", f":unset {key} takes it back")
        else:
            self.options[name] = [option, value]


def _generate(words: list[str]) -> int:
    """`diffgen generate …` in this process."""
    code = GENERATE.main(words[1:], prog_name="diffgen generate", standalone_mode=False)
    raise_if_stopped()
    return int(code or ExitCode.DONE)


def _options() -> dict[str, tuple[list[str], bool]]:
    """{name: (its words, is it a flag)} of the options of generate."""
    left_out = ("json", "quiet", "debug", "prompt", "help")
    return {
        str(one.name): (list(one.opts), bool(getattr(one, "is_flag", False)))
        for one in GENERATE.params
        if one.name not in left_out
    }


def _lines(session: Session) -> Iterator[str]:
    """The lines that there are to obey; without blank ones and comments. On a terminal they are asked for."""
    terminal = sys.stdin is not None and sys.stdin.isatty()
    ask = _asker(terminal)
    while True:
        try:
            line = ask()
        except EOFError:
            return
        except Stopped:
            if not terminal or first_signal() == signal.SIGTERM:
                raise
            forget_signals()  # Ctrl-C at the prompt drops the line
            print(file=sys.stderr)
            continue
        if (line := line.strip()) in (":quit", ":q", ":exit"):
            return
        if line and not line.startswith("#"):
            yield line


def _asker(terminal: bool) -> Callable[[], str]:
    """What reads the next line; raises EOFError at the end."""
    if terminal and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (remembers the lines, in memory only)
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
