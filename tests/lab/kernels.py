"""What tests of kernel and driver share: a host with two kernels, and what an archive has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fleets import Fleet, Host

META = "linux-image-cloud-amd64"
APT = "DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends"
#: How apt is made to forget the pin.
PAST_THE_PIN = "-o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null"


@dataclass
class TwoKernels:
    """A host with a GPU: its lab, its older kernel and the newer one, a folder for inventories."""

    fleet: Fleet
    old: str
    new: str
    folder: Path

    @property
    def host(self) -> Host:
        return self.fleet.hosts[0]


def modinfo(host: Host, release: str, name: str) -> dict[str, str]:
    """What modinfo says of a kernel's module, and when its file was made; nothing without one."""
    said = host.try_(f"modinfo -k {release} {name}").stdout
    found = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
    module = {key: value.strip() for key, value in found.items()}
    if module:
        module["made"] = host.sh(f"stat -c %Y {module['filename']}")
    return module


def archive(host: Host) -> list[tuple[str, str]]:
    """(version of the meta-package, release of its kernel) that the host's lists have, newest
    first."""
    table = host.sh(f"apt-cache madison {META}").splitlines()
    found = []
    for version in dict.fromkeys(line.split("|")[1].strip() for line in table):
        shown = host.sh(f"apt-cache show {META}={version}")
        depends = re.search(r"^Depends: linux-image-(\S+)", shown, re.M)
        assert depends is not None, shown
        found.append((version, depends[1]))
    return found
