"""What plan and apply have in common: one run of the deploy, watched and told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from gpufleet.run.pyinfra import Result


def run(
    deploy: Callable[..., Result],
    inventory: Path,
    limit: Sequence[str] | None,
    only: Sequence[str] | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Run `deploy`, which is run.pyinfra's plan or apply, and exit with its status."""
    from gpufleet.cli import output

    with output.watching(as_json, verbose) as watch:
        result = deploy(
            inventory,
            limit=limit or (),
            only=only or (),
            watch=watch,
            output=sys.stderr if verbose else None,
        )
    raise typer.Exit(output.finish(result, as_json))
