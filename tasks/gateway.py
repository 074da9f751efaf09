"""Runs nginx before the demos of the whole fleet, on the hosts that are to be its gateway."""

from __future__ import annotations

from pyinfra import host, inventory
from pyinfra.api import DeployError, deploy

from gpufleet.errors import FleetError
from gpufleet.gateway import operations
from gpufleet.gateway.plan import GATEWAY, Member, digest, files
from gpufleet.gateway.plan import gateway as planned
from gpufleet.managed import operations as managed
from gpufleet.settings import parse
from tasks import current


@deploy("gateway")
def gateway() -> None:
    """Render who is behind it from the inventory, and run it; elsewhere there is none."""
    settings, _ = current()
    if not settings.gateway.enabled:
        operations.removed(name="Have no gateway here", balancer=GATEWAY)
        return
    try:
        fleet = [
            Member(
                one.name,
                str(one.data.dict().get("ssh_hostname") or one.name),
                parse(one.data.dict(), one.name),
            )
            for one in inventory
        ]
        (own,) = (member for member in fleet if member.name == host.name)
        balancer = planned(own, fleet)
    except FleetError as error:
        raise DeployError(str(error)) from None
    wanted = files(balancer)
    operations.nginx(name="Install nginx")
    managed.files(name="Write the gateway's configuration and units", wanted=wanted)
    operations.balancing(name="Run the gateway", balancer=balancer, configuration=digest(wanted))
