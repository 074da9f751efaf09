"""The catalogue: what can be served and where packages come from, typed and validated once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from gpufleet import ROOT
from gpufleet.errors import FleetError, UsageError

CATALOG = ROOT / "catalog"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _relative(path: str) -> str:
    pure = PurePosixPath(path)
    plain = str(pure) == path and path.isprintable() and not path.startswith("-")
    if pure.is_absolute() or ".." in pure.parts or not plain:
        raise ValueError("must be a plain path relative to the weights folder")
    return path


RelativePath = Annotated[str, AfterValidator(_relative)]


class WeightFile(_Entry):
    """One file of a model: where it lies below the weights folder and what it must be."""

    path: RelativePath
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Needs(_Entry):
    """What a host must have for a model, in MiB; disk counts environment, weights and room."""

    disk_mib: Annotated[int, Field(gt=0)]
    memory_mib: Annotated[int, Field(gt=0)]
    gpu_memory_mib: Annotated[int, Field(ge=0)] = 0


class MiniGPT4(_Entry):
    """Which file plays which part, and the sizes that minigpt4.yaml gives the model."""

    image_size: int
    num_query_token: int
    vit_precision: Literal["fp16", "fp32"] = "fp16"
    low_resource: bool = False
    vit: Mapping[str, int] | None = None
    qformer: Mapping[str, int] | None = None
    vit_file: RelativePath
    qformer_file: RelativePath
    llama_dir: RelativePath
    projection_file: RelativePath


class HealthQuestion(_Entry):
    """A question whose answer is known: what `health` asks a demo that shall be called healthy."""

    picture: RelativePath
    question: str
    answer: str


class Model(_Entry):
    """One system that can be served."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    title: str
    system: Literal["mini_gpt4"]
    accelerators: tuple[Literal["cpu", "cuda"], ...]
    needs: Needs
    weights_in_checkout: RelativePath | None = None
    minigpt4: MiniGPT4
    health: HealthQuestion
    examples: RelativePath | None = None
    files: Annotated[tuple[WeightFile, ...], Field(min_length=1)]

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.bytes for file in self.files)


class Conda(_Entry):
    """A site's conda channels: `base` is below the host, `cloud` maps a channel to its folder."""

    base: str
    subchannels: tuple[Literal["main", "r", "msys2"], ...] = ()
    cloud: Mapping[str, str] = {}


class Evidence(_Entry):
    """Where a row comes from: nothing is in the catalogue without a source."""

    source: str
    seen: str
    state: Literal["verified", "listed", "unverified", "gone"]


class Site(_Entry):
    """One mirror site. A service that is absent is one the site does not carry."""

    title: str
    host: str
    domain: str
    evidence: Evidence
    pypi: str | None = None
    conda: Conda | None = None
    apt: tuple[Literal["debian", "debian-security", "ubuntu", "ubuntu-ports"], ...] = ()
    notes: tuple[str, ...] = ()

    def url(self, path: str) -> str:
        """The https address of a path on this site."""
        return f"https://{self.host}{path}"


class Mirrors(_Entry):
    """catalog/mirrors.yaml."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    sites: Mapping[str, Site]


Branch = Annotated[str, Field(pattern=r"^[1-9][0-9]{2}$")]
ModuleFlavour = Literal["open", "proprietary"]


class Environments(_Entry):
    """What the locked environments need of a driver."""

    cuda: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]


class Cuda(_Entry):
    """Which driver each CUDA needs: a branch by its major version, and the one it came with."""

    floors: Mapping[Annotated[str, Field(pattern=r"^[0-9]+$")], Branch]
    pairs: Mapping[
        Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")],
        Annotated[str, Field(pattern=r"^[0-9]{3}(\.[0-9]+)+$")],
    ]
    evidence: Evidence


class Devices(_Entry):
    """A block of PCI device ids, both ends in it; written as ``1d80-1dff``."""

    first: int
    last: int

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        ends = re.fullmatch(r"([0-9a-f]{4})-([0-9a-f]{4})", given)
        if ends is None or ends[1] > ends[2]:
            raise ValueError("must be two ids of four hex digits, as in 1d80-1dff")
        return {"first": int(ends[1], 16), "last": int(ends[2], 16)}


class Generation(_Entry):
    """GPUs of one architecture, and which drivers take them."""

    title: str
    devices: Annotated[tuple[Devices, ...], Field(min_length=1)]
    modules: Annotated[tuple[ModuleFlavour, ...], Field(min_length=1)]
    first: Branch
    last: Branch | None = None
    """None: no branch has dropped them yet."""
    subnet_manager: bool = False
    """Where they are joined by NVSwitches (NVLink 5), the fabric manager needs one."""
    evidence: Evidence


class DriverBranch(_Entry):
    """A driver branch and how long NVIDIA mends it."""

    support: Literal["lts", "production", "new-feature", "ended"]
    until: Annotated[str, Field(pattern=r"^20[0-9]{2}-[01][0-9]$")] | None = None
    modules: Annotated[tuple[ModuleFlavour, ...], Field(min_length=1)] = ("open", "proprietary")
    evidence: Evidence


class DriverPackages(_Entry):
    """Package names of one source, with ``{branch}`` and ``{open}`` to be filled in."""

    branches: Mapping[str, tuple[Branch, ...]] = {}
    open: tuple[str, ...]
    """What builds the open modules by DKMS; so `proprietary`."""
    proprietary: tuple[str, ...]
    userland: tuple[str, ...] = ()
    prebuilt: tuple[str, ...] = ()
    fabric_manager: tuple[str, ...] = ()
    subnet_manager: tuple[str, ...] = ()
    evidence: Evidence


class Packages(_Entry):
    """Package names by where the driver comes from."""

    debian: DriverPackages
    ubuntu: DriverPackages
    nvidia: DriverPackages
    nvidia_rhel: Annotated[DriverPackages, Field(alias="nvidia-rhel")]
    runfile: DriverPackages


class Drivers(_Entry):
    """catalog/drivers.yaml."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    environments: Environments
    cuda: Cuda
    generations: Mapping[str, Generation]
    branches: Mapping[Branch, DriverBranch]
    packages: Packages

    @model_validator(mode="after")
    def _whole(self) -> Drivers:
        blocks = sorted(
            (block.first, block.last, name)
            for name, generation in self.generations.items()
            for block in generation.devices
        )
        for (_, last, one), (first, _, other) in pairwise(blocks):
            if first <= last:
                raise ValueError(f"generations {one} and {other} both have device {first:04x}")
        major = self.environments.cuda.partition(".")[0]
        if major not in self.cuda.floors:
            raise ValueError(f"environments: CUDA {major} has no floor")
        return self

    def generation(self, device: str) -> Generation | None:
        """The generation of a PCI device id such as ``20b5``, None if it is in no block."""
        number = int(device, 16)
        for generation in self.generations.values():
            if any(block.first <= number <= block.last for block in generation.devices):
                return generation
        return None


_M = TypeVar("_M", bound=BaseModel)


def _load(kind: type[_M], path: Path) -> _M:
    try:
        return kind.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FleetError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise FleetError(f"{path}: {problems}; correct the catalogue entry") from None


def names() -> list[str]:
    """The models that can be served, sorted."""
    return sorted(path.stem for path in (CATALOG / "models").glob("*.yaml"))


@cache
def model(name: str) -> Model:
    """The catalogue entry of a model.

    Raises UsageError for a name that is not there, FleetError for an invalid entry.
    """
    if name not in names():
        raise UsageError(f"setting model: no model {name!r}; choose one of: {', '.join(names())}")
    return _load(Model, CATALOG / "models" / f"{name}.yaml")


@cache
def mirrors() -> Mirrors:
    """All mirror sites. Raises FleetError for an invalid catalogue."""
    return _load(Mirrors, CATALOG / "mirrors.yaml")


def site(name: str) -> Site:
    """A mirror site by name. Raises UsageError for a name that is not there."""
    sites = mirrors().sites
    if name not in sites:
        raise UsageError(
            f"setting mirrors.site: no site {name!r}; choose official or one of: "
            f"{', '.join(sorted(sites))}"
        )
    return sites[name]


@cache
def drivers() -> Drivers:
    """GPUs, driver branches and their packages. Raises FleetError for an invalid catalogue."""
    return _load(Drivers, CATALOG / "drivers.yaml")
