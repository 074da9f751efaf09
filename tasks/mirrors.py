"""Points apt, pip, uv and conda at the mirror sites that were chosen for the host."""

from __future__ import annotations

from pyinfra.api import deploy

from gpufleet.managed import operations as managed
from gpufleet.mirrors.facts import MirrorFiles
from gpufleet.mirrors.plan import stale, wanted
from gpufleet.seen import fresh
from tasks import current, mirror_choice


@deploy("mirrors")
def mirrors() -> None:
    """Write the sites' files whole, or put back what earlier sites replaced."""
    settings, _ = current()
    # The sources are read as they were before gpufleet, so they cannot change during this run.
    sources = fresh(MirrorFiles)
    files = wanted(mirror_choice(), settings.mirrors.apt_security, sources)
    managed.restored(
        name="Put back the files that this choice does not write",
        paths=stale(files, sources),
    )
    managed.files(name=f"Write the configuration of {settings.mirrors.site}", wanted=files)
