"""How apt-get is called on hosts: without questions, waiting for another apt to finish."""

from __future__ import annotations

#: Waits for another apt (unattended-upgrades, an apply that was killed) instead of failing.
APT = "DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600"

#: Keeps configuration files that somebody edited.
INSTALL = f"{APT} install -y --no-install-recommends -o Dpkg::Options::=--force-confold"
