"""The table of commands. A command's module is imported when the command is called, not for the help of `diffgen`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

SETTINGS: dict[str, Any] = {
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "add_completion": False,
    "pretty_exceptions_enable": False,
}


COMPLETING = "_DIFFGEN_COMPLETE"  # the variable by which a shell asks for completions


class Command(NamedTuple):
    """A row of the table: the first line of its help, and its function or, for a group, its own commands."""

    summary: str
    function: str = ""  # "module:function" in this package
    commands: Mapping[str, Command] = {}


COMMANDS: dict[str, Command] = {
    "generate": Command("Make pictures from prompts.", "generate:generate"),
    "train": Command("Train a diffusion model from scratch, on pixels or on latents with captions.", "train:train"),
    "finetune": Command("Change a model by a few pictures: a new subject, a style.", "finetune:finetune"),
    "evaluate": Command(
        "Measure a run against held-out pictures; each metric with its floor and ceiling.", "evaluate:evaluate"
    ),
    "compare": Command("Compare schedulers at equal noise and equal network evaluations.", "compare:compare"),
    "tune": Command(
        "Learn a grid for one model, solver and budget; write it if it beats the built-in ones.", "tune:tune"
    ),
    "inspect": Command("Show how a picture was made, and the command that does the same here.", "inspect:inspect"),
    "reproduce": Command(
        "Make a picture again and compare the pixels; exit code 5 if they differ.", "reproduce:reproduce"
    ),
    "serve": Command("Serve a page and APIs that other programs speak; the model stays loaded.", "serve:serve"),
    "batch": Command(
        "Make very many pictures, on one machine or on many, each exactly once.",
        commands={
            "plan": Command("Freeze prompts, choices, seeds and options; estimate time and size.", "batch:plan"),
            "run": Command("Make the missing pictures of a plan.", "batch:run_batch"),
            "status": Command("Show what is done, the rate, and the time left.", "batch:status"),
            "check": Command("Open every shard and compare it with the plan.", "batch:check"),
            "failures": Command("List the rows that failed, as prompts.", "batch:failures"),
        },
    ),
    "data": Command(
        "Prepare training data that are larger than memory.",
        commands={"index": Command("Index a set of shards, so that training can read any picture.", "data:index")},
    ),
    "shell": Command("Make pictures from lines of prompts and options; the model stays loaded.", "shell:shell"),
    "doctor": Command("Show what works on this machine, and what to run next.", "doctor:doctor"),
    "models": Command(
        "List, fetch, check, export and delete models.",
        commands={
            "list": Command(
                "List the models on this machine: bundled, in your list, in the download cache.", "models:list_models"
            ),
            "info": Command("Show a model's size, its licence and what it knows.", "models:info"),
            "pull": Command("Fetch a model from a hub; first show its size, licence and files.", "models:pull"),
            "search": Command("Search well-known models: name, size, licence, what each is good for.", "models:search"),
            "verify": Command(
                "Check a model's files and compare their hashes with the recorded ones.", "models:verify"
            ),
            "rm": Command(
                "Delete a model from the download cache, or a name from your list; nothing else.", "models:rm"
            ),
            "export": Command("Write a model, a single file or a run as a diffusers folder.", "models:export"),
        },
    ),
    "prompt": Command(
        "Show what models read of prompts.",
        commands={
            "explain": Command("Show a prompt's tokens, weights, choices, and what would be cut off.", "prompt:explain")
        },
    ),
    "schedulers": Command(
        "List, describe and draw the schedulers and grids.",
        commands={
            "list": Command(
                "List every scheduler: its names, its order, its cost per step; --grids: every grid.",
                "schedulers:list_schedulers",
            ),
            "show": Command(
                "Describe a scheduler or a grid: its formula, options, other names, when to use it.", "schedulers:show"
            ),
            "plot": Command(
                "Draw grids, and the error of schedulers on a model with a known answer.", "schedulers:plot"
            ),
        },
    ),
}


class UntypedFlags:
    """A parser whose help shows no type for flags: typer shows <bool>, a value that no flag takes.

    A flag is False by default, one with a --no- form is None: not given. For --help, which has no default, typer would
    import pydantic.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
                if not param.secondary_opts:
                    param.default = param.default or False
        return params


class Subcommand(UntypedFlags, TyperCommand):
    """A command."""


class Group(UntypedFlags, TyperGroup):
    """A command that has commands of its own."""


def parser(name: str, command: Command) -> LazyCommand | Group:
    """The parser of a row; that of a single command is a stand-in, which imports the command when it is called."""
    if not command.commands:
        return LazyCommand(name, command)
    return Group(name=name, help=command.summary, commands=[parser(*row) for row in command.commands.items()])


class LazyCommand(Subcommand):
    """A command that is not imported yet: its name and its summary, for the help of its group."""

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(name, help=command.summary)
        self.command = command

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return load_command(self.command).make_context(*args, **kwargs)


def load_command(command: Command) -> Any:
    """Import a command and return its parser.

    Its help is the summary, the docstring of its function, and the EXAMPLES of its module.
    """
    module_name, _, name = command.function.partition(":")
    module = import_module(f".{module_name}", __package__)
    function = getattr(module, name)
    text = "\n\n".join(filter(None, (command.summary, inspect.getdoc(function))))
    app = typer.Typer(**SETTINGS)
    app.command(cls=Subcommand, help=text, epilog=getattr(module, "EXAMPLES", None))(function)
    parser = typer.main.get_command(app)
    if COMPLETING in os.environ:
        from .completion import complete_values

        complete_values(parser, module_name)
    return parser
