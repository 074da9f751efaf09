"""fleet plan: say what apply would change."""

from __future__ import annotations

from gpufleet.cli import deploying, options


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
    from gpufleet.run import pyinfra

    deploying.run(pyinfra.plan, inventory, limit, only, as_json, verbose)
