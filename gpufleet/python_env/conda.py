"""Decides what conda makes on a host: its installer, the environment's files, and whether they fit
that host's driver and are such as a mirror can serve."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from gpufleet import catalog, render
from gpufleet.catalog import CondaInstaller, Drivers, Mirrors, Site
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.mirrors.choice import Choice
from gpufleet.python_env.plan import Lock, lock_for
from gpufleet.settings import PythonEnv, Settings
from gpufleet.upstream.plan import code

#: The environment that the demo application runs on.
DEMO = "modern"

#: What replaces the .condarc that Miniconda's installer ships, which says `channels: [defaults]`:
#: that would be appended to every environment's channels, and be the official host.
CONDARC = """\
# Written by gpufleet in place of the installer's, which names `defaults`. Where channels come from
# is said in /etc/conda/.condarc.
channels: [conda-forge]
"""


@dataclass(frozen=True)
class Installer:
    """Conda's installer: its checksum, and a file on this machine or addresses to try in turn."""

    kind: str
    sha256: str
    path: Path | None
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """What an environment is made of."""

    name: str
    python: str
    channels: tuple[str, ...]
    conda: tuple[str, ...]
    pip: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    """Installed without their dependencies."""
    lock: Lock | None = None
    """Instead of `pip`: exact versions with hashes."""
    cuda: str | None = None
    driver: str | None = None
    gpus_without_code: tuple[str, ...] = ()
    own: bool = False
    """A user's own file, not the catalogue's."""

    @property
    def environment_yml(self) -> str:
        """The text of the file that conda gets. Raises FleetError if it does not survive YAML."""
        dependencies = [f"python={self.python}", *self.conda]
        text, back = render.checked_yaml(
            "environment.yml.j2",
            title=self.name,
            channels=list(self.channels),
            dependencies=dependencies,
        )
        if back != {"channels": list(self.channels), "dependencies": dependencies}:
            raise FleetError("templates/environment.yml.j2: packages did not survive rendering")
        return text

    @property
    def requirements(self) -> str:
        """What any index has: all of pip's part but builds with a local version."""
        return "".join(f"{line}\n" for line in self.pip if "+" not in line)

    @property
    def torch(self) -> str:
        """Builds for one CUDA, such as torch==2.0.0+cu118, which an index of their own has."""
        return "".join(f"{line}\n" for line in self.pip if "+" in line)

    @property
    def digest(self) -> str:
        """16 hex digits that name the environment: everything that it is made of."""
        parts = [
            self.environment_yml,
            self.lock.text if self.lock else "",
            *self.pip,
            "",
            *self.alone,
        ]
        return hashlib.sha256("\n".join(["conda", *parts]).encode()).hexdigest()[:16]


def recipe(name: str, accelerator: str) -> Recipe:
    """The environment that a setting names: one of the catalogue, or a path of an environment.yml.

    Raises FleetError, one line, for a name that is not there and for a file that no mirror serves.
    """
    if "/" in name or name.endswith((".yml", ".yaml")):
        return read(Path(name).expanduser())
    known = catalog.environments().environments
    if name not in known:
        raise FleetError(
            f"setting python_env.environment: no environment {name!r}; choose one of: "
            f"{', '.join(known)}, or the path of an environment.yml"
        )
    row = known[name]
    cuda, without = row.cuda, row.gpus_without_code
    if row.lock and accelerator == "cuda":
        locked = catalog.drivers().environments
        cuda, without = locked.cuda, locked.gpus_without_code
    return Recipe(
        name=name,
        python=row.python,
        channels=row.channels,
        conda=row.conda,
        pip=row.pip,
        alone=row.alone,
        lock=lock_for(accelerator) if row.lock else None,
        cuda=cuda,
        driver=row.driver,
        gpus_without_code=without,
    )


def recipes(settings: Settings) -> tuple[Recipe, ...]:
    """The environments that conda makes on a host: the demo's, then the one that is asked for."""
    chosen, demo = settings.python_env, DEMO
    if settings.runtime == "upstream":
        demo = code(settings).environment
    # The demo's own comes first; the application's is not made for upstream's code alone.
    names = dict.fromkeys([demo, *({chosen.environment} - {DEMO})])
    if chosen.manager == "uv":
        if others := [name for name in names if name != DEMO]:
            raise FleetError(
                f"environment {others[0]} needs conda: set python_env.manager to miniconda or "
                "miniforge"
            )
        return ()
    return tuple(recipe(name, settings.accelerator) for name in names)


def digests(settings: Settings) -> tuple[str, ...]:
    """The folders below ROOT/envs that a host keeps; the demo runs in the first."""
    made = recipes(settings)
    return tuple(one.digest for one in made) or (lock_for(settings.accelerator).digest,)


def read(path: Path) -> Recipe:
    """A user's own environment.yml. Raises FleetError, one line with everything that is wrong."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise FleetError(f"setting python_env.environment: {path}: {why}") from None
    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FleetError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if problems := lint(said):
        raise FleetError(f"{path}: {'; '.join(problems)}")
    specs = [each for each in said["dependencies"] if isinstance(each, str)]
    pip = [line for each in said["dependencies"] if isinstance(each, dict) for line in each["pip"]]
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", path.stem):
        raise FleetError(f"{path}: its name becomes a folder's: use letters, digits and . _ - only")
    if path.stem in catalog.environments().environments:
        raise FleetError(f"{path}: the catalogue has an environment {path.stem}; rename the file")
    (python,) = (spec for spec in specs if _package(spec) == "python")
    others = [spec for spec in specs if spec != python]
    if "pip" not in map(_package, others):
        others.append("pip")
    return Recipe(
        name=path.stem,
        python=re.sub(r"^python\s*={1,2}\s*", "", python.strip()),
        channels=tuple(said["channels"]),
        conda=tuple(others),
        pip=tuple(str(line).strip() for line in pip),
        cuda=_cuda(pip),
        own=True,
    )


_URL = re.compile(r"^[a-z][a-z0-9+.-]*://|^[/.~]")
_PIP_INDEX = re.compile(r"^(-i\b|--index-url|--extra-index-url|-f\b|--find-links|--trusted-host)")


def lint(said: Any) -> list[str]:
    """What keeps an environment.yml from being made from a mirror, each with what to do."""
    if not isinstance(said, dict) or not isinstance(said.get("dependencies"), list):
        return ["not an environment.yml: it has no list of dependencies"]
    found: list[str] = []
    channels = said.get("channels")
    if not isinstance(channels, list) or not channels:
        found.append("no channels: name them, such as `channels: [conda-forge]`")
        channels = []
    for channel in map(str, channels):
        if channel == "nodefaults":
            found.append("channel nodefaults drops the host's .condarc and its mirror: remove it")
        elif _URL.match(channel):
            found.append(
                f"channel {_plain(channel)} passes the mirror by: write the channel's name alone"
            )
    specs: list[str] = []
    for each in said["dependencies"]:
        if isinstance(each, str):
            specs.append(each)
            if "::" in each and _URL.match(each):
                found.append(f"package {_plain(each)} passes the mirror by: write its name alone")
        elif isinstance(each, dict) and list(each) == ["pip"] and isinstance(each["pip"], list):
            found += [problem for line in each["pip"] if (problem := _lint_pip(str(line).strip()))]
        else:
            found.append(f"dependency {str(each)[:60]!r} is neither a package nor a list for pip")
    pythons = [spec for spec in specs if _package(spec) == "python"]
    if len(pythons) != 1 or not re.fullmatch(r"python\s*={1,2}\s*3\.[0-9]+(\.[0-9]+)?", pythons[0]):
        found.append("no version of python: add one, such as `- python=3.10`")
    return found


def _plain(text: str) -> str:
    """An address without what may be a password."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def _lint_pip(line: str) -> str | None:
    if _PIP_INDEX.match(line):
        option = _plain(line)
        return (
            f"pip option {option} passes the mirror by: remove it, the host's pip.conf says where"
        )
    if line.startswith("-"):
        return f"pip option {line} is not taken over: write the packages into the file"
    return None


def _package(spec: str) -> str:
    return re.split(r"[\s=<>!~\[]", spec.rpartition("::")[2].strip(), maxsplit=1)[0].lower()


def _cuda(pip: Iterable[Any]) -> str | None:
    """The CUDA that a pip list's torch is built with, from a version such as 2.0.0+cu118."""
    for line in map(str, pip):
        if (tag := re.match(r"torch==[^+]+\+cu([0-9]{2,3})([0-9])$", line.strip())) is not None:
            return f"{tag[1]}.{tag[2]}"
    return None


def installer(chosen: PythonEnv, choice: Choice, sites: Mirrors) -> Installer:
    """Which installer, and from where: this machine, the chosen site, or else whatever site has it.

    The checksum says what it must be, so without a chosen site any of the catalogue's may give it.
    Raises FleetError where nothing says the checksum or the file is not there.
    """
    kind, name, sha256 = _installer(chosen)
    if "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise FleetError(f"setting python_env.installer: no file {path} on this machine")
        return Installer(kind, sha256, path, ())
    pick = choice.picks.get(kind)
    if pick is not None and pick.site is not None:
        having: list[Site] = [pick.site]
        if pick.policy != "pinned":
            having += [sites.sites[name] for name in pick.fallbacks if name in sites.sites]
    else:
        domains: dict[str, Site] = {}
        for listed in sites.sites.values():
            if listed.listed(kind):
                domains.setdefault(listed.domain, listed)
        having = list(domains.values())
    urls = []
    for one in having:
        folder = getattr(one.services, kind)
        if folder is not None:
            urls.append(one.url(f"{folder.dir.rstrip('/')}/{name}"))
    return Installer(kind, sha256, None, tuple(urls))


def _installer(chosen: PythonEnv) -> tuple[Literal["miniconda", "miniforge"], str, str]:
    """Distribution, name or path, and checksum of the installer."""
    kind = chosen.manager
    if kind == "uv":
        raise ValueError("uv needs no installer")
    row: CondaInstaller = getattr(catalog.environments().installers, kind)
    name = chosen.installer or row.file
    if chosen.installer_sha256 is None and PurePosixPath(name).name != row.file:
        raise FleetError(
            f"setting python_env.installer: {name} is not the {row.file} that the catalogue knows; "
            "set python_env.installer_sha256 to its sha256"
        )
    return kind, name, chosen.installer_sha256 or row.sha256


def check_installer(chosen: PythonEnv, sites: Mirrors) -> None:
    """Raise FleetError, one line, for settings that name no installer that could be run."""
    if "/" in _installer(chosen)[1]:
        installer(chosen, Choice({}), sites)


def torch_options(chosen: PythonEnv, choice: Choice, tag: str) -> tuple[str, ...]:
    """Where torch's builds with a tag such as cu118 or cpu come from: options of pip and uv."""
    if options := choice.torch(tag):
        return options
    return ("--index-url", re.sub(r"/cpu/?$", f"/{tag}", chosen.torch_index))


def pair_findings(
    made: Sequence[Recipe],
    driver: str | None,
    gpus: Sequence[str],
    drivers: Drivers,
    *,
    to_come: str | None = None,
) -> list[str]:
    """What of the environments the host's driver and GPUs cannot run; each with what to do.

    `driver` is the version that nvidia-smi answers, `gpus` are PCI device ids of vendor NVIDIA.
    `to_come` is the CUDA that the driver is for which this run brings in the other's place.
    """
    found: list[str] = []
    kinds = {name for gpu in gpus if (name := _generation(gpu, drivers)) is not None}
    for one in made:
        if one.cuda is None:
            continue
        floor = drivers.cuda.floors.get(one.cuda.partition(".")[0])
        least = one.driver or floor
        if to_come is not None:
            if _numbers(to_come)[0] < _numbers(one.cuda)[0]:
                found.append(
                    f"environment {one.name} has torch for CUDA {one.cuda}, and driver.cuda is "
                    f"{to_come}: set driver.cuda to {one.cuda}, or choose another "
                    "python_env.environment"
                )
        elif driver and least and _numbers(driver) < _numbers(least):
            found.append(
                f"environment {one.name} has torch for CUDA {one.cuda}, which needs driver {least} "
                f"or newer, and this host has {driver}: set driver.cuda to {one.cuda} and apply "
                "driver, or choose another python_env.environment"
            )
        for kind in sorted(kinds & set(one.gpus_without_code)):
            title = drivers.generations[kind].title
            found.append(
                f"environment {one.name} has torch for CUDA {one.cuda}, which has no code for the "
                f"{title} GPU of this host: choose another python_env.environment"
            )
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"[0-9]+", version)))


def _generation(device: str, drivers: Drivers) -> str | None:
    found = drivers.generation(device.removeprefix("0x"))
    return next((name for name, one in drivers.generations.items() if one is found), None)


PROFILE = "/etc/profile.d/gpufleet-conda.sh"
CUDA_PROFILE = "/etc/profile.d/gpufleet-cuda.sh"
CUDA_LIBRARIES = "/etc/ld.so.conf.d/gpufleet-cuda.conf"
SHELL_FILES = (PROFILE, CUDA_PROFILE, CUDA_LIBRARIES)


def profile_files(settings: Settings) -> tuple[list[ManagedFile], list[str]]:
    """What login shells get, whole files, and the paths of those that are not asked for."""
    chosen = settings.python_env
    wanted: list[ManagedFile] = []
    if chosen.shell_init and chosen.manager != "uv":
        script = f"{settings.root}/conda/etc/profile.d/conda.sh"
        text = f"# Written by gpufleet: the command conda.\n[ ! -r {script} ] || . {script}\n"
        wanted.append(ManagedFile(PROFILE, text))
    if (version := chosen.cuda_toolkit) is not None:
        said = f"# Written by gpufleet: CUDA toolkit {version}.\n"
        folder = f"/usr/local/cuda-{version}"
        path = f"PATH={folder}/bin:$PATH\nexport PATH CUDA_HOME={folder}\n"
        wanted.append(ManagedFile(CUDA_PROFILE, said + path))
        wanted.append(ManagedFile(CUDA_LIBRARIES, f"{said}{folder}/lib64\n"))
    return wanted, sorted(set(SHELL_FILES) - {file.path for file in wanted})
