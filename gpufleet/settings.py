"""Every setting of a host, typed and validated once; everything else takes them as values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    TypeAdapter,
    ValidationError,
)

from gpufleet import schema
from gpufleet.catalog import OwnSites, Precision, Service
from gpufleet.errors import UsageError

#: Inventory data that is pyinfra's own and shares the namespace: connector keys and global
#: arguments (pyinfra 3.10, connectors/*.py and api/arguments.py).
PYINFRA_KEYS = re.compile(
    r"_.*|(ssh|fake|docker|podman|dockerssh|local|chroot|vagrant|terraform)_.*"
)


def _absolute(path: PurePosixPath) -> PurePosixPath:
    if not path.is_absolute() or path == PurePosixPath("/") or ".." in path.parts:
        raise ValueError("must be an absolute path below /, such as /opt/minigpt4")
    if not re.fullmatch(r"[A-Za-z0-9/._+-]+", str(path)):
        raise ValueError("may hold letters, digits and / . _ + - only")
    return path


def _model_name(name: str) -> str:
    stem = PurePosixPath(name).name.removesuffix(".yaml") if name.endswith(".yaml") else name
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", stem):
        raise ValueError("must be of small letters, digits and . _ -, or a path of NAME.yaml")
    return name


def _unprivileged(user: str) -> str:
    if user == "root":
        raise ValueError("must be an account of its own: the deploy takes its login shell away")
    return user


HostPath = Annotated[PurePosixPath, AfterValidator(_absolute)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Base(_Model):
    packages: tuple[str, ...] = ()
    """Distribution packages to install besides those that gpufleet needs."""


class Mirrors(_Model):
    site: str = "official"
    """Where apt, pip, uv, conda and others get packages on the host: a site of catalog/mirrors.yaml
    (nju, tuna, aliyun, …) or of `sites`; `auto`: what works and is fastest from that host;
    `official` writes nothing."""

    pinned: Mapping[Service, str] = {}
    """Services that get another site than `site` says, or `official`: {"conda": "nju"}."""

    sites: OwnSites = {}
    """Own sites beside the catalogue's, such as a company's mirror, in the catalogue's format. They
    may be http."""

    provider: Literal["", "aliyun", "tencent", "huawei", "ctyun", "volces"] = ""
    """The cloud that the host is in: its own internal mirror comes first with `auto`, and sites
    that refuse that cloud are left out."""

    exclude: tuple[str, ...] = ()
    """Sites that `auto` never takes."""

    ttl_hours: Annotated[int, Field(ge=1, le=8760)] = 168
    """Hours that a measurement of the sites holds."""

    hysteresis: Annotated[float, Field(ge=1, le=100)] = 1.5
    """How many times as fast another site must be for `auto` to leave the one in use."""

    git_proxy: Annotated[str, Field(pattern=r"^https://[A-Za-z0-9._/:-]+/$")] | None = None
    """An address that clones from GitHub go through, such as a company's git mirror. It is given to
    git per command and never written down. Unset: none."""

    apt_security: bool = False
    """Also take security updates from the mirror. Off: they stay where the distribution put them,
    because a mirror may lag by a day."""


class Driver(_Model):
    source: Literal["distribution", "nvidia", "nvidia-cn", "runfile", "present"] = "distribution"
    """Where the NVIDIA driver comes from: the distribution's own packages, NVIDIA's CUDA
    repository, its host in China, a .run file (`runfile`), or nowhere: it must be `present`."""

    branch: Annotated[str, Field(pattern=r"^[1-9][0-9]{2}$")] | None = None
    """Driver branch, such as 535. Unset: one that fits GPUs and CUDA and that the source has."""

    cuda: Annotated[str, Field(pattern=r"^[1-9][0-9]\.[0-9]$")] | None = None
    """CUDA that the driver must run, such as 12.2. Unset: that of the demo's locked environment."""

    modules: Literal["auto", "open", "proprietary"] = "auto"
    """Flavour of the kernel modules; `auto` takes what all GPUs of the host can use."""

    runfile: str | None = None
    """The .run file on the operator's machine that `source: runfile` installs."""

    boot_guard: bool = False
    """A unit that builds or loads the module at boot, before the demo, where it is missing."""


class Kernel(_Model):
    pin: bool = True
    """Keep kernel and driver as they are, once they work together, until the settings change."""

    drift: Literal["adopt", "revert"] = "adopt"
    """What to do where another kernel than the pinned one runs: pin that one once it works, or
    boot the pinned one again."""

    reboot: Literal["never", "when-safe"] = "never"
    """Whether apply may reboot a host: never, or where the next kernel has a working module, as
    a trial boot that falls back by itself."""

    reboot_timeout: Annotated[int, Field(ge=10, le=7200)] = 900
    """Seconds that a host may take to come back from a reboot."""


class Rolling(_Model):
    canary: bool = True
    """Apply to one host of each kind (OS, kernel flavour, GPU, driver) before all others."""

    batch: Annotated[int, Field(ge=0, le=10000)] = 0
    """How many hosts are applied to at once after the canaries; 0 is all."""


class PythonEnv(_Model):
    manager: Literal["miniconda", "miniforge", "uv"] = "miniconda"
    """What makes environments: conda of one of its distributions, in ROOT/conda, or uv alone, with
    the host's own python."""

    environment: str = "modern"
    """Another environment beside the demo's own (`modern`): one of catalog/environments.yaml, or
    the path of an environment.yml on the operator's machine."""

    installer: str | None = None
    """Conda's installer: the path of a file on the operator's machine, or a file name in the
    mirror's folder. Unset: the one that catalog/environments.yaml names, from the mirror."""

    installer_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The installer's checksum, where it is not the catalogue's."""

    shell_init: bool = False
    """Offer the command conda in login shells, by a file in /etc/profile.d."""

    cuda_toolkit: Annotated[str, Field(pattern=r"^[1-9][0-9]\.[0-9]$")] | None = None
    """CUDA toolkit to install from NVIDIA's repository, without a driver, such as 11.8: for
    packages that are compiled against it. Unset: none."""

    source: Literal["auto", "index", "wheelhouse"] = "auto"
    """`wheelhouse`: the operator's own pip downloads the wheels of the lock, once, and rsync brings
    them: for hosts with no way out. `index`: each host downloads for itself. `auto`: index on hosts
    with GPUs, where they are 2.8 GiB for each host, wheelhouse on others."""

    torch_index: str = "https://download.pytorch.org/whl/cpu"
    """Where the build of torch without CUDA comes from when the index that pip is configured with
    does not have it: PyTorch's wheel site or a mirror of it. Builds for CUDA come from beside it
    (cpu replaced by cu118 …)."""


class Weights(_Model):
    source: str | None = None
    """Folder on the operator's machine that holds the model's files. Unset: the catalogue's own
    folder in the checkout (only pico has one), else the store of `fleet weights fetch`."""

    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """Where `fleet weights fetch` looks first, of a set's sources."""

    via: Literal["auto", "rsync", "swarm"] = "auto"
    """How files travel to the hosts: `rsync` from this machine to each, or `swarm`: the hosts
    exchange pieces among themselves; `auto` chooses by size, number of hosts and whether they
    reach each other."""

    at_once: Annotated[int, Field(ge=0, le=10000)] = 0
    """Hosts that rsync sends to at a time; 0 is all."""

    keep: Annotated[int, Field(ge=0, le=100)] = 1
    """Older versions that stay on a host once the demo is healthy on the new one."""

    bandwidth_kib: Annotated[int, Field(ge=0)] = 0
    """Upload limit in KiB/s, of each host with rsync and of all together in a swarm; 0 is none."""

    encrypt: bool = False
    """Hide what the hosts of a swarm exchange from the network between them, at twice the CPU
    time. What this machine sends goes through SSH in any case."""


class Demo(_Model):
    bind: IPvAnyAddress = TypeAdapter(IPvAnyAddress).validate_python("127.0.0.1")
    """Address the demo listens on. 127.0.0.1: reach it through `fleet tunnel`. Open it to a network
    only with `auth_file`, or behind something that asks for passwords."""

    port: Annotated[int, Field(ge=1024, le=65535)] = 7860
    """Port the demo listens on."""

    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of torch; 0 lets torch choose."""

    precision: Precision = "auto"
    """What the model computes in: fp32, fp16, bf16, or 8bit and 4bit, which need a GPU. `auto`: as
    the catalogue has it, and that is fp16 on a GPU and fp32 on a CPU where it says nothing."""

    processes: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that serve the model, with nginx in front of several; 0 is one a GPU, and one on
    cpu."""

    auth_file: str | None = None
    """A file on the operator's machine with USER:PASSWORD lines: page and API ask for one of
    them. Unset: nobody is asked."""

    queue: Annotated[int, Field(ge=1, le=1000)] = 8
    """Questions that may wait while one is answered; more are refused with 503."""

    max_seconds: Annotated[int, Field(ge=1, le=86400)] = 300
    """Seconds from a question's arrival to the end of its answer; then it is ended with 504."""

    memory_max: Annotated[str, Field(pattern=r"^([1-9][0-9]*[KMGT]?|infinity)$")] = "infinity"
    """systemd's MemoryMax for the service, such as 24G."""

    start_timeout: Annotated[int, Field(ge=10, le=7200)] = 900
    """Seconds that loading the model may take."""


class Upstream(_Model):
    version: Annotated[str, Field(pattern=r"^20[0-9]{2}-[01][0-9]$")] = "2023-05"
    """Which state of Vision-CAIR's code runtime `upstream` runs: one of catalog/upstream.yaml."""

    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Another commit than the version's, such as one of a fork that `git` or `source` has."""

    git: (
        Annotated[
            str,
            Field(pattern=r"^(https?|ssh|git|file)://([A-Za-z0-9._-]+@)?[A-Za-z0-9._~/:%+-]+$"),
        ]
        | None
    ) = None
    """The address of a git mirror that hosts fetch the code from. Unset: GitHub, by way of
    mirrors.git_proxy."""

    source: str | None = None
    """A copy of the code on the operator's machine, brought to hosts over SSH: the folder of a git
    repository, a git bundle or a .tar.gz. Unset: each host fetches for itself."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of the .tar.gz. Unset: learnt at first sight, and compared from then on."""

    environment: str | None = None
    """Another environment than the version's: of catalog/environments.yaml, or the path of an
    environment.yml."""

    options: Mapping[Annotated[str, Field(pattern=r"^[a-z_][A-Za-z0-9_.]*$")], str] = {}
    """More values for its configuration, as demo.py's --options takes them, such as
    {"run.seed": "7"}."""


class Health(_Model):
    timeout: Annotated[int, Field(ge=1, le=3600)] = 120
    """Seconds that the demo has to answer the catalogue's question."""


class Gateway(_Model):
    enabled: bool = False
    """Run nginx on this host, before the demos of all hosts of the inventory."""

    bind: IPvAnyAddress = TypeAdapter(IPvAnyAddress).validate_python("127.0.0.1")
    """Address the gateway listens on."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    """Port the gateway listens on."""


class Settings(_Model):
    """What one host shall be. Immutable; made by `parse` from pyinfra's inventory data."""

    accelerator: Literal["cpu", "cuda"] = "cpu"
    """What the model runs on. `cpu` leaves kernel and driver alone."""

    model: Annotated[str, AfterValidator(_model_name)] = "pico"
    """The system to serve: a file of catalog/models/, without .yaml, or the path of an own such
    file on the operator's machine."""

    runtime: Literal["modern", "upstream"] = "modern"
    """What runs the model: this project's application, or (MiniGPT-4 only) the original code of
    Vision-CAIR in the environment of its time."""

    root: HostPath = PurePosixPath("/opt/minigpt4")
    """Folder on the host that holds environments, weights, configuration and application."""

    user: Annotated[
        str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,30}$"), AfterValidator(_unprivileged)
    ] = "minigpt4"
    """The account that the demo runs as; made if missing, without a password or a shell."""

    base: Base = Base()
    driver: Driver = Driver()
    kernel: Kernel = Kernel()
    rolling: Rolling = Rolling()
    mirrors: Mirrors = Mirrors()
    python_env: PythonEnv = PythonEnv()
    weights: Weights = Weights()
    demo: Demo = Demo()
    upstream: Upstream = Upstream()
    health: Health = Health()
    gateway: Gateway = Gateway()

    @property
    def model_id(self) -> str:
        """The model's name, in the API and in the names of files."""
        return PurePosixPath(self.model).name.removesuffix(".yaml")


def parse(data: Mapping[str, Any], host: str) -> Settings:
    """Turn a host's inventory data into settings.

    Keys of pyinfra's own (`ssh_…`, `_sudo`, …) are passed over.

    Raises UsageError, one line naming the host and every wrong field.
    """
    own = {key: value for key, value in data.items() if not PYINFRA_KEYS.fullmatch(key)}
    try:
        return Settings.model_validate(own)
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
        raise UsageError(f"{host}: {problems}; see inventory/group_data/all.py") from None


def _problem(error: Any) -> str:
    """One pydantic error in words: where, what is wrong, what it was given."""
    where = ".".join(map(str, error["loc"]))
    given = json.dumps(error["input"], default=str)[:60]
    if error["type"] != "extra_forbidden":
        return f"setting {where}: {error['msg'].removeprefix('Value error, ')}, not {given}"
    near = schema.nearest(Settings, error["loc"])
    hint = f", did you mean {'.'.join([*map(str, error['loc'][:-1]), near])}?" if near else ""
    return f"unknown setting {where}{hint}"
