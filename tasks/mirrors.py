"""Points apt, pip, uv and conda at the mirror site that the settings name."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import deploy

from gpufleet import catalog
from gpufleet.managed import operations as managed
from gpufleet.mirrors.facts import MirrorFiles
from gpufleet.mirrors.plan import stale, wanted
from tasks import current


@deploy("mirrors")
def mirrors() -> None:
    """Write the site's files whole, or put back what an earlier site replaced."""
    settings, _ = current()
    site = settings.mirrors.site
    # The sources are read as they were before gpufleet, so they cannot change during this run.
    sources = host.get_fact(MirrorFiles)
    files = (
        []
        if site == "official"
        else wanted(catalog.site(site), settings.mirrors.apt_security, sources)
    )
    managed.restored(
        name="Put back the files that this choice does not write",
        paths=stale(files, sources),
    )
    managed.files(name=f"Write the configuration of {site}", wanted=files)
