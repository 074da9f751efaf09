"""Reads recordings and lays them into a host's filesystem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpufleet.errors import FleetError, UsageError

_HERE = Path(__file__).parent
_RECORDINGS = _HERE / "recordings"
_LAYER = _HERE / "layer"

#: Everything of the double lies here on a host, save what must be found elsewhere.
HOME = "usr/local/lib/gpu-double"

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{4}$")]
Version = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Part):
    """A device of NVIDIA's on the PCI bus."""

    address: Annotated[str, Field(pattern=r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")]
    device: Hex
    kind: Hex = "0302"
    """Class and subclass: 0302 is a data centre's GPU, 0300 one with a display, 0680 a switch."""
    driver: str = ""
    """The kernel driver that is bound."""
    lost: bool = False
    """Fell off the bus: it is listed still, and answers only ones."""


class Row(_Part):
    """What nvidia-smi says of one GPU."""

    address: Annotated[str, Field(pattern=r"^[0-9A-F]{8}:[0-9A-F]{2}:[0-9A-F]{2}\.[0-7]$")]
    name: str
    memory_mib: Annotated[int, Field(gt=0)]
    uuid: str


class Smi(_Part):
    """How nvidia-smi answers: with its GPUs, or with a complaint and an exit status."""

    gpus: tuple[Row, ...] = ()
    says: str = ""
    status: Annotated[int, Field(ge=0, le=255)] = 0
    installed: bool = True
    """False: only once a package brings the real one; then it says what that would say."""


class Module(_Part):
    """A loaded kernel module."""

    refcnt: Annotated[int, Field(ge=0)] = 0
    holders: tuple[str, ...] = ()
    version: Version | None = None


class Recording(_Part):
    """One host's GPUs, as they were seen or as a fault makes them look."""

    title: str
    pci: tuple[Device, ...] = ()
    modules: Mapping[str, Module] = {}
    userland: Version | None = None
    """Version of the libraries beside it; None: none, or those of the packages to come."""
    smi: Smi | None = None
    """None: there is no nvidia-smi."""
    devices: tuple[Annotated[str, Field(pattern=r"^nvidia[a-z0-9-]*$")], ...] = ()
    """Files in /dev."""
    held: bool = False
    """A process has /dev/nvidiactl open: the persistence daemon's double."""
    services: Mapping[Literal["nvidia-persistenced", "nvidia-fabricmanager"], bool] = {}
    """Units that are there, and whether they start."""
    fabricmanager: Version | None = None


def names() -> list[str]:
    """The recordings there are, sorted."""
    return sorted(path.stem for path in _RECORDINGS.glob("*.yaml"))


def load(name: str) -> Recording:
    """The recording of that name. UsageError where there is none, FleetError for an invalid one."""
    if name not in names():
        raise UsageError(f"--gpus {name}: no such recording; use one of {', '.join(names())}")
    path = _RECORDINGS / f"{name}.yaml"
    try:
        return Recording.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise FleetError(f"{path}: {problems}; correct the recording") from None


def lay(name: str, root: Path) -> None:
    """Put the recording `name` into the filesystem at `root`, which is not running."""
    recording = load(name)
    for path, text in _files(name, recording):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, bytes):
            target.write_bytes(text)
        else:
            target.write_text(text)
        program = target.parent.name in ("bin", "sbin") or target.name == "appear"
        target.chmod(0o755 if program else 0o644)
    home = root / HOME
    for part in ("sys/bus/pci/devices", "sys/module", "proc/driver/nvidia/gpus"):
        (home / part).mkdir(parents=True, exist_ok=True)
    for device in recording.pci:
        folder = home / "sys/bus/pci/devices" / device.address
        if device.driver:
            (folder / "driver").symlink_to(f"../../drivers/{device.driver}")
        if device.driver == "nvidia" and device.kind.startswith("03"):
            (home / "proc/driver/nvidia/gpus" / device.address).mkdir()
        if device.driver == "nvidia" and device.kind == "0680":
            switches = home / "proc/driver/nvidia-nvswitch/devices"
            (switches / device.address).mkdir(parents=True)
    for module, state in recording.modules.items():
        (home / "sys/module" / module / "holders").mkdir()
        for holder in state.holders:
            (home / "sys/module" / module / "holders" / holder).mkdir()
    wants = root / "etc/systemd/system/sysinit.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    (wants / "gpu-double.service").symlink_to("/usr/local/lib/systemd/system/gpu-double.service")
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    for service in recording.services:
        unit = f"{service}.service"
        (wants / unit).symlink_to(f"/usr/local/lib/systemd/system/{unit}")
        (home / service).symlink_to("/usr/bin/sleep")


def _files(name: str, recording: Recording) -> Iterator[tuple[str, str | bytes]]:
    """Path below the root and content of every file of the double."""
    yield f"{HOME}/README", f"The GPU double of a lab host. Recording: {name}, {recording.title}.\n"
    yield f"{HOME}/appear", (_LAYER / "appear").read_text()
    yield "usr/local/lib/systemd/system/gpu-double.service", (_LAYER / "unit").read_text()
    for device in recording.pci:
        folder = f"{HOME}/sys/bus/pci/devices/{device.address}"
        yield f"{folder}/vendor", "0x10de\n"
        yield f"{folder}/device", f"0x{device.device}\n"
        yield f"{folder}/class", f"0x{device.kind}00\n"
        numbers = (0x10DE, int(device.device, 16))
        space = b"".join(number.to_bytes(2, "little") for number in numbers)
        yield f"{folder}/config", b"\xff" * 64 if device.lost else space.ljust(64, b"\0")
    for module, state in recording.modules.items():
        yield f"{HOME}/sys/module/{module}/refcnt", f"{state.refcnt}\n"
        if state.version:
            yield f"{HOME}/sys/module/{module}/version", f"{state.version}\n"
    if recording.userland:
        # Where a .run file puts it; text, so that no program can load it.
        library = f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{recording.userland}"
        yield library, "The GPU double's: not a library.\n"
    if recording.smi is not None:
        yield "usr/local/bin/nvidia-smi", (_LAYER / "nvidia-smi").read_text()
        yield from _answers(recording, recording.smi)
        if not recording.smi.installed:
            for program in ("modprobe", "rmmod"):
                yield f"usr/local/sbin/{program}", (_LAYER / program).read_text()
            unit = "etc/systemd/system/nvidia-persistenced.service.d/gpu-double.conf"
            yield unit, (_LAYER / "persistenced.conf").read_text()
    yield f"{HOME}/devices", "".join(f"{device}\n" for device in recording.devices)
    for service, starts in recording.services.items():
        held = recording.held and service == "nvidia-persistenced"
        text = (_LAYER / "service").read_text().replace("@NAME@", service)
        # A name of its own, which is what ps and the kernel show.
        run = f"exec /{HOME}/{service} infinity"
        command = ("exec 9< /dev/nvidiactl; " * held + run) if starts else "exit 1"
        yield f"usr/local/lib/systemd/system/{service}.service", text.replace("@COMMAND@", command)
    if recording.fabricmanager:
        said = f"Fabric Manager version is : {recording.fabricmanager}"
        yield "usr/local/bin/nv-fabricmanager", f"#!/bin/sh\n# GPU double.\necho '{said}'\n"


def _answers(recording: Recording, smi: Smi) -> Iterator[tuple[str, str]]:
    """What nvidia-smi's double reads: a table of its GPUs, or what it says instead."""
    module = recording.modules.get("nvidia")
    version = (module.version if module else None) or ""
    rows = [
        f"{index}|{row.address}|{row.name}|{row.uuid}|{row.memory_mib}|{version}\n"
        for index, row in enumerate(smi.gpus)
    ]
    yield f"{HOME}/gpus", "".join(rows)
    if smi.says:
        yield f"{HOME}/says", smi.says.rstrip() + "\n"
        yield f"{HOME}/status", f"{smi.status}\n"
    if not smi.installed:
        yield f"{HOME}/lives", "nvidia-smi answers by what is installed and loaded.\n"
