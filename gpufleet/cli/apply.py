"""fleet apply: bring hosts to what their settings say."""

from __future__ import annotations

import sys

import typer

from gpufleet.cli import options


def apply(
    inventory: options.Inventory,
    limit: options.Limit = None,
    only: options.Only = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Bring hosts to what their settings say.

    What is right already stays untouched. A host that fails does not stop the others, unless
    they are applied to in batches (setting rolling): then those whose turn has not come stay as
    they are.
    """
    from gpufleet.cli import output
    from gpufleet.run import pyinfra

    with output.watching(as_json, verbose) as watch:
        result = pyinfra.apply(
            inventory,
            limit=limit or (),
            only=only or (),
            watch=watch,
            output=sys.stderr if verbose else None,
        )
    raise typer.Exit(output.finish(result, as_json))
