"""The catalogue: what can be served and where packages come from, typed and validated once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from gpufleet import ROOT, schema
from gpufleet.errors import FleetError, UsageError

CATALOG = ROOT / "catalog"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def plain(path: str) -> bool:
    """Whether a path stays below the folder that it is relative to, and fits on a line."""
    pure = PurePosixPath(path)
    inside = not pure.is_absolute() and ".." not in pure.parts and pure != PurePosixPath()
    return inside and str(pure) == path and path.isprintable() and not path.startswith("-")


def _relative(path: str) -> str:
    if not plain(path):
        raise ValueError("must be a plain path relative to the weights folder")
    return path


RelativePath = Annotated[str, AfterValidator(_relative)]


class WeightFile(_Entry):
    """One file of a model: where it lies below the weights folder and what it must be."""

    path: RelativePath
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Evidence(_Entry):
    """Where a row comes from: nothing is in the catalogue without a source."""

    source: str
    seen: str
    state: Literal["verified", "listed", "unverified", "gone"]


class ListedFile(_Entry):
    """One file of a weight set as far as the catalogue knows it; the rest is learnt."""

    path: RelativePath
    """Below the set's folder."""
    bytes: Annotated[int, Field(ge=0)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    """Where nobody has published the sha256: proves the first sight of the file."""


_Repository = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$")
]


class WeightSource(_Entry):
    """A place that a set's files can be had from: exactly one of the four."""

    huggingface: _Repository | None = None
    modelscope: _Repository | None = None
    url: Annotated[str, Field(pattern=r"^https?://[^\s{}]+/?$")] | None = None
    """The folder that the files lie in."""
    by_hand: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """A page that only a browser gets the file from."""
    kind: Literal["model", "space", "dataset"] = "model"
    """Of a repository."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """The repository's commit. None: what its main branch is at the first fetch."""
    paths: Mapping[RelativePath, RelativePath] = {}
    """Names there of files that have another name here: here -> there."""

    @model_validator(mode="after")
    def _one(self) -> WeightSource:
        given = (self.huggingface, self.modelscope, self.url, self.by_hand)
        if sum(place is not None for place in given) != 1:
            raise ValueError("has exactly one of huggingface, modelscope, url and by_hand")
        return self


class Made(_Entry):
    """A set that is merged on the operator's machine."""

    base: str
    delta: str
    version: Literal["v0", "v1.1"]
    """Of the delta: v0 has one more row of vocabulary than the base, v1.1 has not."""


class WeightSet(_Entry):
    """A named collection of files: one checkpoint, or one repository."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    title: str
    folder: RelativePath | Literal[""] = ""
    """Where in a store its files lie; empty is the store itself."""
    kind: Literal[
        "llama",
        "delta",
        "vision-tower",
        "q-former",
        "projection",
        "gpt-bigcode",
        "clip",
        "pictures",
    ]
    hidden_size: Annotated[int, Field(gt=0)] | None = None
    """Of the language model that it is, or fits to."""
    vocabulary: Annotated[int, Field(gt=0)] | None = None
    pairs: tuple[str, ...] = ()
    """Sets that it works with; with others of their kind it does not."""
    in_checkout: RelativePath | None = None
    """The store in the checkout that has it."""
    sources: tuple[WeightSource, ...] = ()
    """In order of preference."""
    made: Made | None = None
    include: tuple[str, ...] = ()
    """Patterns, as fnmatch has them, of a source's files that belong to the set beside `files`."""
    files: tuple[ListedFile, ...] = ()
    evidence: Evidence

    @model_validator(mode="after")
    def _whole(self) -> WeightSet:
        if not (self.sources or self.made or self.in_checkout):
            raise ValueError("has neither sources nor made nor in_checkout")
        if not (self.files or self.include or self.made):
            raise ValueError("has neither files nor include")
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("names a file twice")
        return self

    @property
    def listed(self) -> bool:
        """Whether `files` are all that the set has."""
        return bool(self.files) and not self.include

    def place(self, path: str) -> str:
        """Where a file of the set lies in a store."""
        return f"{self.folder}/{path}" if self.folder else path


class Needs(_Entry):
    """What a host must have for a model, in MiB; disk counts environment, weights and room."""

    disk_mib: Annotated[int, Field(gt=0)]
    memory_mib: Annotated[int, Field(gt=0)]
    gpu_memory_mib: Annotated[int, Field(ge=0)] = 0


#: What a model computes in; `auto` is fp16 on a GPU, fp32 on a CPU.
Precision = Literal["auto", "fp32", "fp16", "bf16", "8bit", "4bit"]


class MiniGPT4(_Entry):
    """Which file plays which part, and the sizes that minigpt4.yaml gives the model."""

    image_size: int
    num_query_token: int
    vit_precision: Literal["fp16", "fp32"] = "fp16"
    precision: Precision = "auto"
    """Of the language model."""
    vit: Mapping[str, int] | None = None
    qformer: Mapping[str, int] | None = None
    vit_file: RelativePath
    qformer_file: RelativePath
    llama_dir: RelativePath
    projection_file: RelativePath


class Checkpoint(_Entry):
    """A model in Hugging Face's layout."""

    folder: RelativePath
    """Its folder, below that of the weights."""
    precision: Precision = "auto"


class HealthQuestion(_Entry):
    """What `health` asks a demo that shall be called healthy."""

    question: str
    picture: RelativePath | None = None
    """A file of the weights. None: the picture that comes with the application, where the system
    needs one."""
    answer: str | None = None
    """What it must answer. None: any words will do."""


class Model(_Entry):
    """One system of the catalogue."""

    schema_version: Annotated[Literal[2], Field(alias="schema")]
    title: str
    system: Literal["mini_gpt4", "starchat", "clip"]
    accelerators: tuple[Literal["cpu", "cuda"], ...]
    needs: Needs
    weights: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the weight sets that it is made of."""
    minigpt4: MiniGPT4 | None = None
    starchat: Checkpoint | None = None
    clip: Checkpoint | None = None
    health: HealthQuestion
    examples: RelativePath | None = None

    @model_validator(mode="after")
    def _its_own_parts(self) -> Model:
        given = {"mini_gpt4": self.minigpt4, "starchat": self.starchat, "clip": self.clip}
        other = [name for name, part in given.items() if part and name != self.system]
        if other:
            raise ValueError(f"a {self.system} has no {other[0].replace('_', '')}")
        if given[self.system] is None:
            raise ValueError(f"a {self.system} needs {self.system.replace('_', '')}")
        return self

    @property
    def needs_picture(self) -> bool:
        """Whether a question to it is about a picture."""
        return self.system != "starchat"

    @property
    def parts(self) -> MiniGPT4 | Checkpoint:
        """Files and sizes."""
        part = self.minigpt4 or self.starchat or self.clip
        assert part is not None  # as the check above saw
        return part


#: What a mirror site can carry.
Service = Literal["apt", "pypi", "conda", "miniconda", "miniforge", "torch", "cuda_apt", "hf"]
SERVICES: tuple[Service, ...] = get_args(Service)

Provider = Literal["aliyun", "tencent", "huawei", "ctyun", "volces"]
Subchannel = Literal["main", "r", "msys2"]

SitePath = Annotated[
    str, Field(pattern=r"^/([A-Za-z0-9][A-Za-z0-9_.+~-]*(/[A-Za-z0-9][A-Za-z0-9_.+~-]*)*/?)?$")
]
#: A name, and a port where it is not the scheme's own.
HostName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*(:[0-9]{1,5})?$"
    ),
]
ChannelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


class _Service(_Entry):
    state: Literal["listed", "unverified"] = "listed"
    """`unverified` is used only where a probe passed or a setting names the site for it."""


class Apt(_Service):
    """A site's distribution archives: archive -> folder."""

    archives: Annotated[
        Mapping[Literal["debian", "debian-security", "ubuntu", "ubuntu-ports"], SitePath],
        Field(min_length=1),
    ]


class Pypi(_Service):
    """A site's simple index."""

    index: SitePath


class Conda(_Service):
    """A site's conda channels: `base` is below the host, `cloud` maps a channel to its folder."""

    base: SitePath
    subchannels: tuple[Subchannel, ...] = ()
    unverified: tuple[Subchannel, ...] = ()
    """Subchannels that only a probe can tell."""
    cloud: Mapping[ChannelName, SitePath] = {}


class Installers(_Service):
    """The folder of a site that holds a conda distribution's installers."""

    dir: SitePath


class Torch(_Service):
    """Wheels of torch for one CUDA tag such as cu121 or cpu, which `{cuda}` stands for."""

    url: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9][A-Za-z0-9_.-]*)*/\{cuda\}/?$")]
    style: Literal["simple", "find-links"]


class CudaApt(_Service):
    """A copy of NVIDIA's CUDA package archive: below it are the distributions' folders."""

    url: SitePath


class Hf(_Service):
    """A Hugging Face endpoint."""

    endpoint: SitePath = "/"


class Services(_Entry):
    """What a site carries; a service that is absent is one it does not have."""

    apt: Apt | None = None
    pypi: Pypi | None = None
    conda: Conda | None = None
    miniconda: Installers | None = None
    miniforge: Installers | None = None
    torch: Torch | None = None
    cuda_apt: CudaApt | None = None
    hf: Hf | None = None


class Internal(_Entry):
    """The same site inside a cloud, under another name and for some of its services."""

    provider: Provider
    host: HostName
    schemes: Annotated[tuple[Literal["https", "http"], ...], Field(min_length=1)] = ("https",)
    """In the order in which they are tried."""
    services: Annotated[tuple[Service, ...], Field(min_length=1)]


class Gone(_Entry):
    """A service that a site had once; the row keeps anybody from adding it again."""

    service: Service
    since: Annotated[str, Field(pattern=r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]$")]
    source: str


def _first_host(data: Mapping[str, object]) -> str:
    hosts = data.get("hosts")
    return hosts[0] if isinstance(hosts, tuple) and hosts else ""


class Site(_Entry):
    """One mirror site, of the catalogue or of the setting mirrors.sites."""

    name: str = ""
    """The key that the site has; whatever reads a table of sites fills it in."""
    hosts: Annotated[tuple[HostName, ...], Field(min_length=1)]
    title: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", default_factory=_first_host)]
    scheme: Literal["https", "http"] = "https"
    domain: Annotated[str, Field(default_factory=_first_host)]
    services: Services
    internal: Internal | None = None
    evidence: Evidence | None = None
    gone: tuple[Gone, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Site:
        both = [row.service for row in self.gone if self.carries(row.service)]
        if both:
            raise ValueError(f"{', '.join(both)} is both carried and gone")
        return self

    @property
    def host(self) -> str:
        """The name that the site's addresses have."""
        return self.hosts[0]

    def url(self, path: str) -> str:
        """The address of a path on this site."""
        return f"{self.scheme}://{self.host}{path}"

    def carries(self, service: Service) -> bool:
        """Whether the site has the service at all."""
        return getattr(self.services, service) is not None

    def listed(self, service: Service) -> bool:
        """Whether the site itself says that it has the service."""
        found = getattr(self.services, service)
        return found is not None and found.state == "listed"

    def inside(self, provider: str) -> tuple[Site, ...]:
        """The site as a cloud's own hosts see it, a value for each scheme; none elsewhere."""
        inner = self.internal
        if inner is None or inner.provider != provider:
            return ()
        kept = {name: getattr(self.services, name) for name in inner.services}
        change = {"hosts": (inner.host,), "services": Services(**kept), "internal": None}
        return tuple(self.model_copy(update={**change, "scheme": s}) for s in inner.schemes)


class ListedSite(Site):
    """A site of the catalogue: never without evidence, never without https."""

    scheme: Literal["https"] = "https"
    evidence: Evidence


def _named(sites: object) -> object:
    """A table of sites, each told its own name."""
    if not isinstance(sites, Mapping):
        return sites
    return {
        key: {**site, "name": key} if isinstance(site, Mapping) and "name" not in site else site
        for key, site in sites.items()
    }


def _free(name: str) -> str:
    if name in ("official", "auto"):
        raise ValueError(
            f"{name} is no name for a site: the setting mirrors.site gives it a meaning"
        )
    return name


SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$"), AfterValidator(_free)]
#: Sites that an inventory defines.
OwnSites = Annotated[Mapping[SiteName, Site], BeforeValidator(_named)]


class Exclusion(_Entry):
    """A site that a provider's hosts do not use."""

    site: str
    provider: Provider
    source: str


class Policy(_Entry):
    """How one site is chosen for a service."""

    order: tuple[Literal["pinned", "internal", "measured", "official"], ...]
    exclude: tuple[Exclusion, ...] = ()
    hysteresis: Annotated[float, Field(ge=1)]
    ttl_hours: Annotated[int, Field(gt=0)]
    on_all_fail: Literal["keep_current", "official"]

    def excluded(self, provider: str) -> frozenset[str]:
        """Names of the sites that a provider's hosts do not use."""
        return frozenset(row.site for row in self.exclude if row.provider == provider)


class Mirrors(_Entry):
    """catalog/mirrors.yaml."""

    schema_version: Annotated[Literal[2], Field(alias="schema")]
    policy: Policy
    sites: Annotated[Mapping[SiteName, ListedSite], BeforeValidator(_named)]

    @model_validator(mode="after")
    def _whole(self) -> Mirrors:
        owners: dict[str, str] = {}
        for name, site in self.sites.items():
            for host in [*site.hosts, *([site.internal.host] if site.internal else [])]:
                if owners.setdefault(host, name) != name:
                    raise ValueError(f"sites {owners[host]} and {name} both have host {host}")
        for row in self.policy.exclude:
            if row.site not in self.sites:
                raise ValueError(f"policy.exclude: no site {row.site}")
        return self


Branch = Annotated[str, Field(pattern=r"^[1-9][0-9]{2}$")]
ModuleFlavour = Literal["open", "proprietary"]


class Environments(_Entry):
    """What the locked environments need of a driver."""

    cuda: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]
    gpus_without_code: tuple[str, ...] = ()
    """Generations that torch's build has no code for."""


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
        if unknown := set(self.environments.gpus_without_code) - set(self.generations):
            raise ValueError(f"environments: no generation {min(unknown)}")
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
        problems = "; ".join(_problem(kind, e) for e in error.errors())
        raise FleetError(f"{path}: {problems}; correct the catalogue entry") from None


def _problem(kind: type[BaseModel], error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    near = schema.nearest(kind, error["loc"]) if error["type"] == "extra_forbidden" else ""
    said = f"{where}: {message}" if where else message
    return f"{said} (did you mean {near}?)" if near else said


def names() -> list[str]:
    """The models that can be served, sorted."""
    return sorted(path.stem for path in (CATALOG / "models").glob("*.yaml"))


@cache
def model(name: str) -> Model:
    """A model by its name, or by the path of an own file in the catalogue's format.

    Own weight sets that such a file names, `….yaml`, lie where it says or beside it. Raises
    UsageError for a name that is not there, FleetError for an invalid entry.
    """
    if name.endswith(".yaml"):
        own = Path(name).expanduser()
        if not own.is_file():
            raise UsageError(f"setting model: no file {own}; write the path of a model's YAML")
        found = _load(Model, own)
        beside = (str(own.parent / one) if one.endswith(".yaml") else one for one in found.weights)
        return found.model_copy(update={"weights": tuple(beside)})
    if name not in names():
        raise UsageError(f"setting model: no model {name!r}; choose one of: {', '.join(names())}")
    return _load(Model, CATALOG / "models" / f"{name}.yaml")


def weight_sets() -> list[str]:
    """The weight sets of the catalogue, sorted."""
    return sorted(path.stem for path in (CATALOG / "weights").glob("*.yaml"))


@cache
def weight_set(name: str) -> WeightSet:
    """A weight set by its name, or by the path of an own file in the catalogue's format.

    Raises UsageError for a name that is not there, FleetError for an invalid entry.
    """
    own = Path(name)
    if own.suffix == ".yaml" and own.is_file():
        return _load(WeightSet, own)
    if name not in weight_sets():
        near = difflib.get_close_matches(name, weight_sets(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"no weight set {name!r}: {hint}./fleet weights list shows all")
    return _load(WeightSet, CATALOG / "weights" / f"{name}.yaml")


@cache
def mirrors() -> Mirrors:
    """All mirror sites. Raises FleetError for an invalid catalogue."""
    return _load(Mirrors, CATALOG / "mirrors.yaml")


@cache
def drivers() -> Drivers:
    """GPUs, driver branches and their packages. Raises FleetError for an invalid catalogue."""
    return _load(Drivers, CATALOG / "drivers.yaml")


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Exact = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*==[A-Za-z0-9.!]+(\+[a-z0-9.]+)?$")]


class CondaInstaller(_Entry):
    """An installer of conda, the same wherever it is downloaded: file name and checksum."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+\.sh$")]
    sha256: _Sha256
    evidence: Evidence


class CondaInstallers(_Entry):
    """The installer of each of conda's distributions."""

    miniconda: CondaInstaller
    miniforge: CondaInstaller


class ReadyEnvironment(_Entry):
    """An environment that conda and pip make: exact packages, and what torch in it needs."""

    title: str
    python: Annotated[str, Field(pattern=r"^3\.[0-9]{1,2}$")]
    channels: Annotated[tuple[ChannelName, ...], Field(min_length=1)]
    conda: tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*(=[0-9][^\s]*)?$")], ...]
    pip: tuple[_Exact, ...] = ()
    alone: tuple[_Exact, ...] = ()
    """Installed without their dependencies."""
    lock: Literal["files/demo/{accelerator}.lock"] | None = None
    """Instead of `pip`: a lock with hashes."""
    cuda: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")] | None = None
    driver: Annotated[str, Field(pattern=r"^[1-9][0-9]{2}(\.[0-9]+)+$")] | None = None
    gpus_without_code: tuple[str, ...] = ()
    """Generations that torch's build has no code for: they came later."""
    evidence: Evidence

    @model_validator(mode="after")
    def _one_pip_part(self) -> ReadyEnvironment:
        if (self.lock is None) == (not self.pip):
            raise ValueError("has either pip or lock")
        if (self.cuda is None) != (self.driver is None):
            raise ValueError("cuda and driver belong together")
        tag = f"+cu{self.cuda.replace('.', '')}" if self.cuda else ""
        wrong = [line for line in self.pip if "+" in line and not (tag and line.endswith(tag))]
        if wrong:
            raise ValueError(f"{wrong[0]} is not built for CUDA {self.cuda}")
        return self


class ReadyEnvironments(_Entry):
    """catalog/environments.yaml."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    installers: CondaInstallers
    environments: Mapping[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], ReadyEnvironment]


@cache
def environments() -> ReadyEnvironments:
    """Environments and conda's installers. Raises FleetError for an invalid catalogue."""
    found = _load(ReadyEnvironments, CATALOG / "environments.yaml")
    known = drivers()
    for name, row in found.environments.items():
        floor = known.cuda.floors.get(row.cuda.partition(".")[0]) if row.cuda else None
        if row.driver is not None and row.driver.partition(".")[0] != floor:
            problem = f"driver {row.driver} is not of branch {floor}, which CUDA {row.cuda} needs"
        elif unknown := [one for one in row.gpus_without_code if one not in known.generations]:
            problem = f"no GPU generation {unknown[0]} in drivers.yaml"
        else:
            continue
        raise FleetError(
            f"{CATALOG / 'environments.yaml'}: environments.{name}: {problem}; "
            "correct the catalogue entry"
        )
    return found


class UpstreamVersion(_Entry):
    """A state of Vision-CAIR's code, what its YAML file calls the model, and where it runs."""

    title: str
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    arch: str
    model_type: str
    environment: str
    evidence: Evidence


class Upstream(_Entry):
    """catalog/upstream.yaml."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    repository: Annotated[str, Field(pattern=r"^https://\S+\.git$")]
    versions: Mapping[Annotated[str, Field(pattern=r"^20[0-9]{2}-[01][0-9]$")], UpstreamVersion]


@cache
def upstream() -> Upstream:
    """The states of upstream's code. Raises FleetError for an invalid catalogue."""
    found = _load(Upstream, CATALOG / "upstream.yaml")
    known = environments().environments
    for name, row in found.versions.items():
        if row.environment not in known:
            raise FleetError(
                f"{CATALOG / 'upstream.yaml'}: versions.{name}: no environment "
                f"{row.environment} in environments.yaml; correct the catalogue entry"
            )
    return found
