"""Runs the demo as a systemd service, and restarts it when anything it depends on changed."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet import ROOT
from gpufleet.config.plan import files
from gpufleet.demo import operations
from gpufleet.demo.plan import pack, unit
from gpufleet.errors import FleetError
from gpufleet.managed import operations as managed
from gpufleet.python_env import operations as environments
from gpufleet.python_env.conda import digests
from gpufleet.upstream import operations as checkouts
from gpufleet.upstream import plan as upstream
from gpufleet.weights.plan import folder, version
from tasks import current, weight_files
from tasks.upstream import head


@deploy("demo")
def demo() -> None:
    """Put the application on the host, write its unit, run it, remove what it replaced."""
    settings, model = current()
    root = str(settings.root)
    weights = version(settings.model_id, weight_files(settings, model)[0])
    app = pack(ROOT / "files" / "demo" / "modeldemo")
    try:
        kept = digests(settings)
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
            )
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    operations.application(name=f"Install the application {app.digest}", root=root, app=app)
    managed.files(name="Write the service's unit", wanted=[file])
    operations.running(
        name="Run the service",
        root=root,
        weights=str(folder(root, weights)),
        revision=revision,
    )
    # Only now: until the restart, the service ran on them.
    if settings.runtime == "upstream":
        checkouts.prune(
            name="Remove older checkouts", root=root, keep=upstream.code(settings).commit
        )
    operations.prune(name="Remove older applications", root=root, keep=app.digest)
    environments.prune(name="Remove older environments", root=root, keep=kept)
