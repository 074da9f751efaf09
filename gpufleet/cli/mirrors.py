"""fleet mirrors: which mirror sites the hosts use, and back to what was there before.

The document of `fleet mirrors restore --json` is that of `fleet apply --json` with "command":
"mirrors restore".
"""

from __future__ import annotations

import sys

import typer

from gpufleet.cli import options

app = typer.Typer(
    help="Which mirror sites the hosts use, and back to what was there before.",
    no_args_is_help=True,
)


@app.command("restore")
def restore(
    inventory: options.Inventory,
    limit: options.Limit = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Put back, byte for byte, the package sources that mirrors replaced.

    Files that were not there before are removed. A host where somebody edited one since is left
    alone, and the file is named.
    """
    from gpufleet.cli import output
    from gpufleet.run import pyinfra

    with output.watching(as_json, verbose) as watch:
        result = pyinfra.restore_mirrors(
            inventory,
            limit=limit or (),
            watch=watch,
            output=sys.stderr if verbose else None,
        )
    raise typer.Exit(output.finish(result, as_json))
