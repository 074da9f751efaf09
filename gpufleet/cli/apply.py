"""fleet apply: bring hosts to what their settings say."""

from __future__ import annotations

from gpufleet.cli import deploying, options


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
    from gpufleet.run import pyinfra

    deploying.run(pyinfra.apply, inventory, limit, only, as_json, verbose)
