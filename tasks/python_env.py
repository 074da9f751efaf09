"""Makes the environments of a host: the demo's, exactly as its lock says, and another on demand."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet import catalog
from gpufleet.driver.sources import repository_host
from gpufleet.errors import FleetError
from gpufleet.managed import operations as managed
from gpufleet.managed.plan import ManagedFile
from gpufleet.mirrors.choice import Choice
from gpufleet.python_env import operations as environments
from gpufleet.python_env.conda import installer, profile_files, recipes, torch_options
from gpufleet.python_env.facts import EnvironmentsOnHost
from gpufleet.python_env.plan import each_downloads, lock_for
from gpufleet.seen import fresh
from gpufleet.settings import Settings
from tasks import current, mirror_choice


@deploy("python_env")
def python_env() -> None:
    """Bring conda where it is asked for, then the wheels, or only uv, and make the environments."""
    settings, _ = current()
    chosen, root = settings.python_env, str(settings.root)
    choice = mirror_choice()
    try:
        if chosen.manager == "uv":
            lock, made, conda = lock_for(settings.accelerator), recipes(settings), None
        else:
            lock, made = None, recipes(settings)
            conda = installer(chosen, choice, catalog.mirrors())
        wanted, unwanted = profile_files(settings)
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    from_index = each_downloads(settings)
    torch_index = _torch_index(settings, choice)
    if lock is not None:
        environments.environment(
            name=f"Make the environment {lock.digest}",
            root=root,
            lock=lock,
            from_index=from_index,
            torch_index=torch_index,
        )
    if conda is not None:
        environments.conda(name=f"Install {conda.kind}", root=root, installer=conda)
    for recipe in made:
        tag = f"cu{recipe.cuda.replace('.', '')}" if recipe.cuda else "cpu"
        environments.conda_environment(
            name=f"Make the environment {recipe.name} {recipe.digest}",
            root=root,
            recipe=recipe,
            from_index=from_index,
            torch_index=torch_index,
            torch=torch_options(chosen, choice, tag),
        )
    _shell(settings, choice, wanted, unwanted)


def _torch_index(settings: Settings, choice: Choice) -> str:
    """The index of torch's builds without CUDA: the chosen site's, or the setting's."""
    option, url = torch_options(settings.python_env, choice, "cpu")
    return url if option == "--index-url" else settings.python_env.torch_index


def _shell(
    settings: Settings, choice: Choice, wanted: list[ManagedFile], unwanted: list[str]
) -> None:
    """What login shells get of it, and the CUDA toolkit that old packages are compiled with."""
    root = str(settings.root)
    managed.restored(
        name="Remove what login shells do not get",
        paths=unwanted,
        _if=lambda: fresh(EnvironmentsOnHost, root=root).records(unwanted),
    )
    if wanted:
        managed.files(name="Write what login shells get", wanted=wanted)
    version = settings.python_env.cuda_toolkit
    if version is None:
        return
    site = choice.site("cuda_apt")
    address = f"https://{repository_host('nvidia')}/compute/cuda/repos"
    if site is not None and site.services.cuda_apt is not None:
        address = site.url(site.services.cuda_apt.url)
    environments.cuda_toolkit(
        name=f"Install the CUDA toolkit {version}", version=version, address=address
    )
