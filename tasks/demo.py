"""Runs the demo as systemd services, and restarts them when anything they depend on changed."""

from __future__ import annotations

from pathlib import Path

from pyinfra import host, inventory
from pyinfra.api import DeployError, deploy

from gpufleet import ROOT
from gpufleet.config.plan import files
from gpufleet.demo import operations
from gpufleet.demo.plan import beside, front, pack, processes, secret, unit, users
from gpufleet.errors import FleetError
from gpufleet.gateway import operations as gateway
from gpufleet.gateway.plan import digest
from gpufleet.gateway.plan import files as balancer_files
from gpufleet.managed import operations as managed
from gpufleet.python_env import operations as environments
from gpufleet.python_env.conda import digests
from gpufleet.settings import Settings, parse
from gpufleet.shell import Hidden
from gpufleet.upstream import operations as checkouts
from gpufleet.upstream import plan as upstream
from gpufleet.weights.plan import folder, version
from tasks import current, gpus, weight_files
from tasks.upstream import head


@deploy("demo")
def demo() -> None:
    """Put the application on the host, write its units, run them, remove what they replaced."""
    settings, model = current()
    root = str(settings.root)
    weights = version(settings.model_id, weight_files(settings, model)[0])
    app = pack(ROOT / "files" / "demo" / "modeldemo")
    try:
        kept = digests(settings)
        count = processes(settings, gpus(settings))
        config = files(settings, model, folder(root, weights))
        if settings.runtime == "upstream":
            file, revision = upstream.unit(
                settings, environment=kept[0], head=head(settings), weights=weights, config=config
            )
        else:
            file, revision = unit(
                settings,
                model,
                environment=kept[0],
                application=app.digest,
                weights=weights,
                config=config,
                several=count > 1,
                behind=_behind_a_gateway(settings),
            )
        allowed = _users(settings)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    operations.application(name=f"Install the application {app.digest}", root=root, app=app)
    operations.kept(
        name="Keep users and passwords" if allowed else "Keep no users and passwords",
        path=secret(settings),
        content=allowed,
    )
    reads = str(folder(root, weights))
    if count == 1:
        managed.files(name="Write the service's unit", wanted=[file])
        operations.running(
            name="Run the service",
            root=root,
            weights=reads,
            revision=revision,
            front=front(settings, 1),
        )
    else:
        balancer = front(settings, count)
        before = balancer_files(balancer)
        gateway.nginx(name="Install nginx")
        managed.files(
            name=f"Write the units of {count} processes and of nginx before them",
            wanted=[file, *beside(settings, count, gpus(settings)), *before],
        )
        operations.rolled(
            name="Run the processes, one after the other",
            root=root,
            weights=reads,
            revision=revision,
            front=balancer,
        )
        gateway.balancing(
            name="Run nginx before them", balancer=balancer, configuration=digest(before)
        )
    # Only now: until the restart, the service ran on them.
    if settings.runtime == "upstream":
        checkouts.prune(
            name="Remove older checkouts", root=root, keep=upstream.code(settings).commit
        )
    operations.prune(name="Remove older applications", root=root, keep=app.digest)
    environments.prune(name="Remove older environments", root=root, keep=kept)


def _behind_a_gateway(settings: Settings) -> bool:
    """Whether a host of the inventory is the gateway of this one's model."""
    fleet = ((one.name, one.data.dict()) for one in inventory)
    return any(
        parse(data, name).model == settings.model
        for name, data in fleet
        if (data.get("gateway") or {}).get("enabled")
    )


def _users(settings: Settings) -> Hidden | None:
    """What the file with users and passwords on this machine says, None without one.

    Raises FleetError where it cannot be read or says nothing.
    """
    path = settings.demo.auth_file
    if path is None:
        return None
    try:
        return Hidden(users(Path(path).expanduser().read_text("utf-8"), path))
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise FleetError(
            f"demo.auth_file {path}: {what}; name a file with USER:PASSWORD lines"
        ) from None
