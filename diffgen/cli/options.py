"""Options that several commands share, in the panel "Machine" of their help."""

from __future__ import annotations

from typing import Annotated, Any

import typer

MACHINE = "Machine"


def option(panel: str, help: str, *names: str, metavar: str | None = None, default: bool | str = False) -> Any:
    """An option in a panel of the help. `default`: whether the help shows the default, or what it shows instead."""
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel, show_default=default)


_DEVICE = "auto|cpu|cuda[:N]|mps|xpu"
Device = Annotated[str, option(MACHINE, "Where to compute. \\[auto]", metavar=_DEVICE)]
RecordedDevice = Annotated[
    str | None,
    option(MACHINE, "Where to compute.", metavar=_DEVICE, default="the recorded device, if this machine has it"),
]
Dtype = Annotated[str, option(MACHINE, "float32, float16, …. \\[auto]", metavar="FORMAT")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait while another process works there.", rich_help_panel="Output")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=MACHINE)]
