"""The throwaway fleet that `fleet lab up` started: $GPUFLEET_LAB, by default the lab named lab."""

import os

from pyinfra.api.exceptions import InventoryError

from gpufleet.errors import FleetError
from gpufleet.lab import load

try:
    _lab = load(os.environ.get("GPUFLEET_LAB", "lab"))
except FleetError as error:
    raise InventoryError(str(error)) from None

hosts = [
    (
        host.name,
        {
            "ssh_hostname": host.address,
            "ssh_user": "root",
            "ssh_key": str(_lab.key),
            "ssh_known_hosts_file": str(_lab.known_hosts),
            "ssh_strict_host_key_checking": "yes",
            # Its hosts have the python that the environment is locked for.
            "python_env": {"manager": "uv"},
            # A walled lab's hosts take everything from its mirror host.
            **_lab.settings,
        },
    )
    for host in _lab.hosts
]
