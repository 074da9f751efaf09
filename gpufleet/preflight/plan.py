"""Decides whether a host can be deployed to: every finding, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gpufleet.catalog import Drivers, Model, WeightFile
from gpufleet.demo.plan import FRONT, UNIT
from gpufleet.driver.heal import look
from gpufleet.driver.picture import GpuPicture
from gpufleet.driver.plan import Refusal
from gpufleet.kernel.picture import KernelPicture
from gpufleet.python_env.conda import Recipe
from gpufleet.settings import Settings
from gpufleet.weights.plan import Stored, no_room
from gpufleet.weights.plan import parse as parse_weights

#: Systems whose packages and paths the tasks know: (os-release ID, VERSION_ID).
SUPPORTED = {("debian", "12"), ("debian", "13"), ("ubuntu", "22.04"), ("ubuntu", "24.04")}

#: What conda takes besides the environment, MiB: its installer, itself (0.6 GiB), its packages.
CONDA_MIB = 1000

#: What cuda.lock takes beyond cpu.lock, MiB: wheels 2750 and environment 5040, for 1400 together.
#: A model that runs on GPUs alone counts it.
CUDA_MIB = 6400

#: Left free on the disk after a deploy, MiB: logs, uploads and the next apply need room.
SPARE_MIB = 256


@dataclass(frozen=True)
class HostPicture:
    """What a host is and has. Sizes in KiB, as /proc/meminfo, df and du give them."""

    os: str
    os_version: str
    os_codename: str
    arch: str
    uid: int
    init: str
    memory_kib: int
    disk_free_kib: int
    disk_used_kib: int
    """Disk that an earlier deploy takes already."""
    python: str | None
    """The interpreter that the environment's lock is for, or None."""
    gpus: tuple[str, ...]
    """PCI device ids of NVIDIA display controllers."""
    driver: str | None
    """Version that nvidia-smi answers, empty if it does not answer, None without nvidia-smi."""
    port_taken_by: str | None
    port_is_ours: bool
    gpu_memory_mib: tuple[int, ...] = ()
    """Of every GPU that nvidia-smi lists."""
    weights: Stored = field(default_factory=Stored)


def parse(lines: Iterable[str]) -> HostPicture:
    """Read the preflight script's lines: key, tab, value; `gpu` may repeat.

    Raises KeyError or ValueError for output that is not the script's.
    """
    lines = list(lines)
    pairs = [line.split("\t", 1) for line in lines if "\t" in line]
    value = dict(pairs)
    return HostPicture(
        os=value["os"],
        os_version=value["os_version"],
        os_codename=value["os_codename"],
        arch=value["arch"],
        uid=int(value["uid"]),
        init=value["init"],
        memory_kib=int(value["memory_kib"]),
        disk_free_kib=int(value["disk_free_kib"]),
        disk_used_kib=int(value["disk_used_kib"]),
        python=value.get("python"),
        gpus=tuple(text for key, text in pairs if key == "gpu"),
        driver=value.get("driver"),
        port_taken_by=value.get("port_taken"),
        port_is_ours=any(ours in value.get("port_cgroup", "") for ours in (UNIT, FRONT)),
        gpu_memory_mib=tuple(int(text) for key, text in pairs if key == "gpu_memory_mib"),
        weights=parse_weights(lines),
    )


#: GPU memory beside that of fp16, for all of a model: weights, what it computes with, and parts
#: that stay fp16. 7B in 8 bit is known to fit 12 GB, 13B 23 GB.
_OF_FP16 = {"fp32": 1.9, "fp16": 1.0, "bf16": 1.0, "8bit": 0.6, "4bit": 0.4}


def precision_findings(
    settings: Settings, name: str, model: Model, memory_mib: Iterable[int]
) -> list[str]:
    """What speaks against the precision on this accelerator and GPUs of this size, where known."""
    usual = model.parts.precision
    asked = settings.demo.precision
    chosen = usual if asked == "auto" else asked
    if settings.accelerator == "cpu":
        if chosen in ("8bit", "4bit"):
            return [
                f"model {name} in {chosen} needs a GPU: set demo.precision to fp32, or accelerator "
                "to cuda"
            ]
        return []
    usual, chosen = ("fp16" if one == "auto" else one for one in (usual, chosen))
    least = min(memory_mib, default=None)
    needs = {
        each: round(model.needs.gpu_memory_mib * share / _OF_FP16[usual], -2)
        for each, share in _OF_FP16.items()
    }
    if least is None or least >= needs[chosen]:
        return []
    fits = next((each for each in ("8bit", "4bit") if needs[each] <= least), None)
    smaller = f"set demo.precision to {fits} ({needs[fits]:.0f}), or " if fits else ""
    return [
        f"GPU memory of {least} MiB, model {name} in {chosen} needs {needs[chosen]:.0f}: {smaller}"
        "use a larger GPU or a smaller model"
    ]


def part_findings(name: str, model: Model, files: Iterable[WeightFile]) -> list[str]:
    """The parts that the model names and none of its weight sets brings: a line each."""
    paths = {file.path for file in files}
    if not paths:
        return []
    parts = model.parts
    named: dict[str, str | None] = {}
    for field_name in ("vit_file", "qformer_file", "llama_dir", "projection_file", "folder"):
        named[field_name] = getattr(parts, field_name, None)
    named["examples"], named["health.picture"] = model.examples, model.health.picture
    return [
        f"model {name} has {what} {place}, and none of its weight sets brings that: correct the "
        "model's file, where no placeholder may stay"
        for what, place in named.items()
        if place is not None
        and place not in paths
        and not any(path.startswith(f"{place}/") for path in paths)
    ]


def torch_findings(accelerator: str, made: Iterable[Recipe]) -> list[str]:
    """Environments whose torch cannot use the GPU that the host is for."""
    if accelerator != "cuda":
        return []
    return [
        f"environment {one.name} has {line}, which is torch without CUDA, and accelerator is cuda: "
        "name a build for CUDA, such as torch==2.0.0+cu118"
        for one in made
        for line in one.pip
        if line.startswith("torch==") and line.endswith("+cpu")
    ]


def idle_gpus(settings: Settings, picture: HostPicture) -> str | None:
    """What to tell a person whose GPU would stand idle: it may be meant so."""
    if settings.accelerator != "cpu" or not picture.gpus:
        return None
    return (
        f"this host has {len(picture.gpus)} NVIDIA GPU{'s' * (len(picture.gpus) > 1)}, and "
        "accelerator is cpu: the model will not use it; set accelerator to cuda"
    )


def driver_findings(
    settings: Settings, kernels: KernelPicture, gpus: GpuPicture, drivers: Drivers
) -> list[str]:
    """All that keeps the run from giving this host's GPUs their driver."""
    at = look(settings, drivers, kernels, gpus)
    return list(at.findings if isinstance(at, Refusal) else at.decision.refusals)


def findings(
    settings: Settings,
    name: str,
    model: Model,
    picture: HostPicture,
    python: str,
    *,
    environment: bool = True,
    driver: Iterable[str] | None = None,
    files: Iterable[WeightFile] = (),
    serving: bool = True,
) -> list[str]:
    """All that keeps this host from serving this model; each says what and what to do.

    `python` is the interpreter's name that the environment's lock is for, such as python3.11.
    `environment`: whether the run makes the environment. `driver` is what `driver_findings` says
    where the run brings the driver; None: it must be there already. `files` are the weights to
    bring. `serving`: whether the run does more than bring those.
    """
    found: list[str] = []
    if picture.uid != 0:
        found.append("not root: connect as root, or set _sudo = True in the inventory")
    if (picture.os, picture.os_version) not in SUPPORTED:
        known = ", ".join(f"{os} {version}" for os, version in sorted(SUPPORTED))
        found.append(f"{picture.os} {picture.os_version} is not supported: use one of {known}")
    if not serving:
        full = no_room(name, files, picture.weights)
        return [*found, full] if full else found
    if picture.arch != "x86_64":
        found.append(f"architecture {picture.arch} is not supported: use x86_64")
    if picture.init != "systemd":
        found.append(f"init is {picture.init}, not systemd: the demo runs as a systemd service")
    if picture.python is None and environment and settings.python_env.manager == "uv":
        found.append(
            f"no {python}: the environment is locked for it; set python_env.manager to miniconda, "
            "which brings it, or use debian 12"
        )
    needed = model.needs
    if picture.memory_kib < needed.memory_mib * 1024:
        found.append(
            f"{picture.memory_kib // 1024} MiB of memory, model {name} needs {needed.memory_mib}: "
            "use a larger host or a smaller model"
        )
    conda_mib = CONDA_MIB if environment and settings.python_env.manager != "uv" else 0
    on_both = environment and settings.accelerator == "cuda" and "cpu" in model.accelerators
    cuda_mib = CUDA_MIB if on_both else 0
    to_come_mib = needed.disk_mib + conda_mib + cuda_mib - picture.disk_used_kib // 1024
    room_mib = SPARE_MIB + max(to_come_mib, 0)
    if picture.disk_free_kib < room_mib * 1024:
        found.append(
            f"disk full: {picture.disk_free_kib // 1024} MiB free for {settings.root}, this deploy "
            f"needs {room_mib}: free some space or set root to a folder on a larger disk"
        )
    elif full := no_room(name, files, picture.weights):
        found.append(full)
    # Only root is told who has a port: to anybody else our own service is unknown too.
    hidden = picture.uid != 0 and picture.port_taken_by == "unknown"
    if picture.port_taken_by and not picture.port_is_ours and not hidden:
        found.append(
            f"port {settings.demo.port} is in use by {picture.port_taken_by}: "
            "stop it or set demo.port"
        )
    found.extend(_accelerator(settings, name, model, picture, environment, driver))
    return found + precision_findings(settings, name, model, picture.gpu_memory_mib)


def _accelerator(
    settings: Settings,
    name: str,
    model: Model,
    picture: HostPicture,
    environment: bool,
    driver: Iterable[str] | None,
) -> Iterable[str]:
    if settings.accelerator not in model.accelerators and environment:
        yield (
            f"model {name} does not run on accelerator {settings.accelerator}: "
            f"set accelerator to {' or '.join(model.accelerators)}"
        )
    if settings.accelerator == "cuda":
        if not picture.gpus:
            yield "no NVIDIA GPU on the PCI bus: set accelerator to cpu, or check the host"
        elif driver is not None:
            yield from driver
        elif not picture.driver:
            yield "the NVIDIA driver does not answer: install it and reboot, nvidia-smi must work"
