"""Options that several commands share, in the panel "Machine" of their help."""

from __future__ import annotations

from typing import Annotated, Any

import typer

MACHINE = "Machine"


def _device(show_default: bool | str = True) -> Any:
    return typer.Option(
        metavar="auto|cpu|cuda[:N]|mps|xpu",
        help="Where to compute.",
        rich_help_panel=MACHINE,
        show_default=show_default,
    )


Device = Annotated[str, _device()]
RecordedDevice = Annotated[str | None, _device("the recorded device, if this machine has it")]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="float32, float16 or bfloat16.",
        rich_help_panel=MACHINE,
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=MACHINE)]
