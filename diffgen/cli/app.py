"""All commands of `diffgen`, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from diffgen.version import __version__

from . import compare, doctor, evaluate, generate, inspect, models, prompt, reproduce, schedulers, shell, train, tune

app = typer.Typer(
    help="Pictures from prompts, on this machine, offline.",
    epilog='Try: diffgen generate "a red apple"',
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("evaluate", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("reproduce", epilog=reproduce.EXAMPLES)(reproduce.reproduce)
app.command("shell", epilog=shell.EXAMPLES)(shell.shell)
app.command("doctor")(doctor.doctor)
models_app = typer.Typer(help="The models on this machine.")
models_app.command("list")(models.list_models)
models_app.command("info")(models.info)
models_app.command("pull")(models.pull)
models_app.command("verify")(models.verify)
models_app.command("rm")(models.rm)
models_app.command("export")(models.export)
prompt_app = typer.Typer(help="What models read of prompts.")
prompt_app.command("explain", epilog=prompt.EXAMPLES)(prompt.explain)
schedulers_app = typer.Typer(help="The schedulers there are.")
schedulers_app.command("list")(schedulers.list_schedulers)
schedulers_app.command("show")(schedulers.show)
schedulers_app.command("plot")(schedulers.plot)
app.add_typer(models_app, name="models")
app.add_typer(prompt_app, name="prompt")
app.add_typer(schedulers_app, name="schedulers")


def _version(asked: bool) -> None:
    if asked:
        print(f"diffgen {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
