"""Points apt, pip, uv and conda at the mirror sites that were chosen for the host."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet.errors import FleetError
from gpufleet.managed import operations as managed
from gpufleet.mirrors import verify
from gpufleet.mirrors.choice import unmet
from gpufleet.mirrors.overrides import overrides
from gpufleet.mirrors.plan import stale, wanted
from gpufleet.python_env.plan import lock_for
from tasks import current, mirror_choice, mirror_files, warn


@deploy("mirrors")
def mirrors() -> None:
    """Write the sites' files whole, or put back what earlier sites replaced.

    Where a client does not work with them, what was in force before stays in force.
    """
    settings, _ = current()
    # The sources are read as they were before gpufleet, so they cannot change during this run.
    sources = mirror_files()
    choice = mirror_choice()
    files = wanted(choice, settings.mirrors.apt_security, sources)
    gone = stale(files, sources)
    try:
        requirement = verify.requirement(lock_for("cpu").text)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    for line in unmet(choice):
        warn("mirrors", line)
    for override in overrides(sources, {file.path: file.content for file in files}):
        if override.severity == "warning":
            warn("mirrors", str(override))
    managed.switched(
        name=f"Switch to {settings.mirrors.site} and check it",
        wanted=files,
        gone=gone,
        check=verify.script(str(settings.root), requirement, choice, files, gone, sources),
    )
