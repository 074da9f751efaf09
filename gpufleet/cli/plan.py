"""fleet plan: say what apply would change."""

from __future__ import annotations

import sys

import typer

from gpufleet.cli import options


def plan(
    inventory: options.Inventory,
    limit: options.Limit = None,
    only: options.Only = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what apply would change, changing nothing.

    Also in which order, where hosts are applied to in batches (setting rolling). Exit code 3 if
    it would change anything.
    """
    from gpufleet.cli import output
    from gpufleet.run import pyinfra

    with output.watching(as_json, verbose) as watch:
        result = pyinfra.plan(
            inventory,
            limit=limit or (),
            only=only or (),
            watch=watch,
            output=sys.stderr if verbose else None,
        )
    raise typer.Exit(output.finish(result, as_json))
