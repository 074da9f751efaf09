"""Packages, account and folders that everything after it stands on."""

from __future__ import annotations

from pyinfra.api import deploy
from pyinfra.operations import files, server

from gpufleet.base import operations as apt
from gpufleet.base.plan import PACKAGES
from tasks import current


@deploy("base")
def base() -> None:
    """Install the packages, make the service account and the deploy's folder."""
    settings, _ = current()
    apt.installed(
        name="Install distribution packages",
        packages=(*PACKAGES, *settings.base.packages),
    )
    server.user(
        name=f"Create the service account {settings.user}",
        user=settings.user,
        system=True,
        home=str(settings.root),
        ensure_home=False,
        shell="/usr/sbin/nologin",
    )
    # Root's, not the service's: a demo that is broken into cannot change what it runs.
    files.directory(
        name=f"Create {settings.root}",
        path=str(settings.root),
        user="root",
        group="root",
        mode="755",
    )
