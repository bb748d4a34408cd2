"""Options that several commands share, in the panel "Model"."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]|mps|xpu", rich_help_panel="Model")]
Dtype = Annotated[str, typer.Option(metavar="auto|float32|float16|bfloat16", rich_help_panel="Model")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel="Model")]
