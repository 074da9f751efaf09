"""fleet weights push: bring a model's files to the hosts, and do nothing else there."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from gpufleet.cli import deploying, options

Via = Literal["auto", "rsync", "swarm"]


def push(
    inventory: options.Inventory,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Of the catalogue; default: each host's own."),
    ] = None,
    via: Annotated[
        Via | None, typer.Option(help="How files travel; default: setting weights.via.")
    ] = None,
    bandwidth: Annotated[
        int | None,
        typer.Option(min=0, metavar="KIB", help="Upload limit, KiB/s: setting bandwidth_kib."),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read all files on the hosts again, on all cores.")
    ] = False,
    store: options.Store = None,
    limit: options.Limit = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Bring a model's files to the hosts, and do nothing else there.

    Works before anything else was deployed. What a host has under any name is not sent; what was
    cut off goes on. The demo takes up new files with the next apply.
    """
    from gpufleet import catalog
    from gpufleet.run import pyinfra
    from gpufleet.run.override import Override

    if model is not None:
        catalog.model(model)
    given = Override(
        model=model,
        source=str(store.absolute()) if store else None,
        via=via,
        bandwidth_kib=bandwidth,
        deep=deep,
        together=True,
    )
    deploy = partial(pyinfra.push_weights, override=given)
    deploying.run(deploy, inventory, limit, None, as_json, verbose)
