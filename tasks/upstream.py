"""Brings Vision-CAIR's own code, as it was committed, where runtime says so."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet.errors import FleetError
from gpufleet.managed import operations as managed
from gpufleet.settings import Settings
from gpufleet.upstream import operations
from gpufleet.upstream.plan import code, kept, links
from gpufleet.upstream.relay import relayed
from gpufleet.weights.plan import folder, version
from tasks import current, mirror_choice, weight_files


def head(settings: Settings) -> str:
    """What git checks out on the host at hand. Raises FleetError where the copy here lacks it."""
    commit, source = code(settings).commit, settings.upstream.source
    return commit if source is None else relayed(source, commit, settings.upstream.sha256).head


@deploy("upstream")
def upstream() -> None:
    """Check the code out, and put what it would download where it looks for it."""
    settings, model = current()
    if settings.runtime != "upstream":
        return
    root = settings.root
    weights = folder(root, version(settings.model_id, weight_files(settings, model)[0]))
    try:
        wanted, commit = code(settings), head(settings)
        written, linked = kept(root), links(root, model, weights)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    operations.checked_out(
        name=f"Check out {wanted.commit[:7]}",
        root=str(root),
        commit=wanted.commit,
        head=commit,
        address=wanted.address,
        options=mirror_choice().git_options(wanted.address),
        source=settings.upstream.source,
        sha256=settings.upstream.sha256,
    )
    managed.files(name="Write the launcher and what it would download", wanted=written)
    operations.links(name="Link the vision tower", root=str(root), wanted=linked)
