"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Inventory = Annotated[
    Path,
    typer.Option(
        "-i", "--inventory", metavar="FILE", help="pyinfra inventory, such as inventory/lab.py."
    ),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(metavar="HOSTS", help="Only these hosts or groups; commas, or repeat it."),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONCERN", help="Only these concerns (and preflight); commas, or repeat it."
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME]...",
        help="Models or weight sets of the catalogue, or a set's own .yaml file.",
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the weights; default: the store in your home."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show pyinfra's own output.")]
