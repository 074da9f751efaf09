"""Makes the environment that the demo runs in, exactly as its lock says."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet.errors import FleetError
from gpufleet.python_env import operations as environments
from gpufleet.python_env.plan import lock_for
from tasks import current


@deploy("python_env")
def python_env() -> None:
    """Bring the wheels, or only uv, to the host and make the environment there."""
    settings, _ = current()
    chosen = settings.python_env
    try:
        lock = lock_for(settings.accelerator)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    environments.environment(
        name=f"Make the environment {lock.digest}",
        root=str(settings.root),
        lock=lock,
        from_index=chosen.source == "index",
        torch_index=chosen.torch_index,
    )
