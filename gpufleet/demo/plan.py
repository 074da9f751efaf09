"""Decides how the demo runs on a host: its service, its revision and whether to restart it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from shlex import quote

from gpufleet import render
from gpufleet.catalog import Model
from gpufleet.errors import FleetError
from gpufleet.gateway.plan import Backend, Balancer, join, paths
from gpufleet.managed.plan import ManagedFile
from gpufleet.settings import Settings
from gpufleet.weights.plan import folder as weights_folder

#: The service's name where one process serves.
UNIT = "minigpt4-demo.service"

#: Where several do: the unit that each is an instance of, and what all of them start and stop with.
TEMPLATE = "minigpt4-demo@.service"
TARGET = "minigpt4-demo.target"

#: nginx in front of several processes.
FRONT = "minigpt4-front"

_SYSTEMD = PurePosixPath("/etc/systemd/system")

#: A folder that names all units of several processes; it is not there for one.
PROCESSES = str(_SYSTEMD / f"{TARGET}.wants")

#: Characters that a password has at least; the application refuses shorter ones too.
SHORTEST = 8

#: Pictures that come with the application, below its folder, and the one that health asks about.
PICTURES = "modeldemo/pictures"
PICTURE = f"{PICTURES}/shapes.jpg"


def digest(*parts: str) -> str:
    """A short name for what the parts are together: 16 hex digits of sha256."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(f"{len(part)}:{part}".encode())
    return hasher.hexdigest()[:16]


@dataclass(frozen=True)
class Application:
    """The demo's own code, packed: a reproducible tar.gz and its digest."""

    archive: bytes
    digest: str
    checksum: str
    """sha256 of what `sha256sum` prints for its files in the order of their names."""


def pack(folder: Path) -> Application:
    """Pack a Python package folder, the same bytes for the same sources on every machine."""
    buffer = io.BytesIO()
    names, listing = hashlib.sha256(), hashlib.sha256()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            content = path.read_bytes()
            member = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
            names.update(member.name.encode() + hashlib.sha256(content).digest())
            listing.update(f"{hashlib.sha256(content).hexdigest()}  {member.name}\n".encode())
    return Application(buffer.getvalue(), names.hexdigest()[:16], listing.hexdigest())


@dataclass(frozen=True)
class Service:
    """The demo's unit as systemd has it; where several processes serve, all of them as one."""

    active: str
    """ActiveState: active, activating, inactive, failed …; of several, the first that is not
    active."""
    enabled: bool
    needs_reload: bool
    revision_on_disk: str | None
    revision_running: str | None
    """MODELDEMO_REVISION in the unit file and in the running process's environment; of several,
    the first that is not the one on the disk."""
    since: str = ""
    memory_bytes: int | None = None
    """Of several processes, all they take."""
    changed_since: str = ""
    """A file of the deploy that changed after the process started, empty if none did."""
    health: str = ""
    """What /healthz answered on the host, empty if nothing did."""
    name: str = UNIT
    processes: tuple[Service, ...] = ()
    """Each of several."""
    leftover: tuple[str, ...] = ()
    """Units that are there from another number of processes."""


def parse(lines: Iterable[str]) -> Service:
    """Read the lines of DemoService or DemoProcesses: key=value as `systemctl show` prints them.

    `unit=NAME` begins what is said of one of several processes, `unit=` what is said of all.
    """
    units: dict[str, list[str]] = {}
    about = units.setdefault("", [])
    for line in lines:
        key, _, value = line.partition("=")
        if key == "unit":
            about = units.setdefault(value, [])
        else:
            about.append(line)
    whole = units.pop("")
    leftover = tuple(line.partition("=")[2] for line in whole if line.startswith("leftover="))
    if not units:
        return replace(_one(UNIT, whole), leftover=leftover)
    processes = tuple(_one(name, said) for name, said in units.items())
    ill = [one for one in processes if one.active != "active"]
    old = [one for one in processes if one.revision_running != one.revision_on_disk]
    memory = [one.memory_bytes for one in processes if one.memory_bytes is not None]
    return Service(
        active=(ill or processes)[0].active,
        enabled="target=on" in whole and all(one.enabled for one in processes),
        needs_reload=any(one.needs_reload for one in processes),
        revision_on_disk=processes[0].revision_on_disk,
        revision_running=(old or processes)[0].revision_running,
        since=processes[0].since,
        memory_bytes=sum(memory) if memory else None,
        changed_since=next((one.changed_since for one in processes if one.changed_since), ""),
        health=dict(line.split("=", 1) for line in whole if "=" in line).get("health", ""),
        name=TEMPLATE,
        processes=processes,
        leftover=leftover,
    )


def _one(name: str, lines: Iterable[str]) -> Service:
    value = dict(line.split("=", 1) for line in lines if "=" in line)
    memory = value.get("MemoryCurrent", "")
    return Service(
        active=value.get("ActiveState", "inactive"),
        enabled=value.get("UnitFileState") == "enabled",
        needs_reload=value.get("NeedDaemonReload") == "yes",
        revision_on_disk=value.get("revision_on_disk") or None,
        revision_running=value.get("revision_running") or None,
        since=value.get("ActiveEnterTimestamp", ""),
        memory_bytes=int(memory) if memory.isdigit() else None,
        changed_since=value.get("changed_since", ""),
        health=value.get("health", ""),
        name=name,
    )


def is_current(service: Service, revision: str) -> bool:
    """Whether the process that runs is the one that was asked for, or all of several are."""
    return (
        service.active == "active"
        and service.enabled
        and not service.needs_reload
        and service.revision_running == revision
        and not service.changed_since
        and not service.leftover
        and all(is_current(one, revision) for one in service.processes)
    )


def processes(settings: Settings, gpus: int) -> int:
    """How many processes serve the model on a host with so many NVIDIA GPUs."""
    if settings.runtime == "upstream":
        if settings.demo.processes > 1:
            raise FleetError(
                f"demo.processes is {settings.demo.processes}: the upstream runtime runs one "
                "process; set it to 1 or runtime to modern"
            )
        return 1
    one_a_gpu = max(gpus, 1) if settings.accelerator == "cuda" else 1
    return settings.demo.processes or one_a_gpu


def instance(number: int) -> str:
    """The unit of one of several processes."""
    return TEMPLATE.replace("@", f"@{number}")


def number_of(unit: str) -> int:
    """Which of several processes a unit is."""
    return int(unit.partition("@")[2].removesuffix(".service"))


def own_address(front: Balancer, unit: str) -> str:
    """address:port of one of several processes, also of one that the front no longer asks."""
    address, _, first = front.backends[0].address.rpartition(":")
    return join(address, int(first) + number_of(unit))


def port(settings: Settings, number: int) -> int:
    """The loopback port of one of several processes: they follow the demo's own."""
    return settings.demo.port + 1 + number


def front(settings: Settings, count: int) -> Balancer:
    """The nginx that listens where the demo is asked, in front of `count` processes."""
    backends = [Backend(join("127.0.0.1", port(settings, number))) for number in range(count)]
    return Balancer(
        name=FRONT,
        title=f"Front of the model demo ({settings.model_id})",
        listen=join(str(settings.demo.bind), settings.demo.port),
        backends=tuple(backends),
        user=settings.user,
        wanted_by=TARGET,
        part_of=TARGET,
        local=True,
        drain_seconds=settings.demo.max_seconds + 30,
    )


def beside(settings: Settings, count: int, gpus: int) -> tuple[ManagedFile, ...]:
    """What several processes have beside their unit: each one's port and GPU, and their target.

    Where there are more processes than GPUs, they share them evenly.
    """
    target = render.text("demo.target.j2", model=settings.model_id)
    files = [ManagedFile(str(_SYSTEMD / TARGET), target, validate="systemd-analyze verify {}")]
    for number in range(count):
        lines = [f"PORT={port(settings, number)}"]
        if settings.accelerator == "cuda":
            lines.append(f"CUDA_VISIBLE_DEVICES={number % max(gpus, 1)}")
        path = settings.root / "processes" / f"{number}.env"
        files.append(ManagedFile(str(path), "".join(f"{line}\n" for line in lines)))
    return tuple(files)


#: The files of several processes that one alone does not have, but for those of each process.
SEVERAL = (str(_SYSTEMD / TEMPLATE), str(_SYSTEMD / TARGET), *paths(FRONT))


def users(text: str, path: str) -> str:
    """A file of USER:PASSWORD lines as hosts get it: without blank lines and comments.

    Raises FleetError, which names file and line and never shows what the line says.
    """
    lines: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        user, colon, word = line.partition(":")
        where = f"demo.auth_file {path} line {number}"
        if not (user and colon and word):
            raise FleetError(f"{where}: write USER:PASSWORD")
        if len(word) < SHORTEST:
            raise FleetError(
                f"{where}: the password has under {SHORTEST} characters; take a longer one"
            )
        if user in seen:
            raise FleetError(f"{where}: this user was named before")
        seen.add(user)
        lines.append(f"{line}\n")
    if not lines:
        raise FleetError(f"demo.auth_file {path}: no user in it; write USER:PASSWORD lines")
    return "".join(lines)


def secret(settings: Settings) -> str:
    """Where users and passwords are on a host, root's alone."""
    return str(settings.root / "secrets" / "auth")


def unit(
    settings: Settings,
    model: Model,
    *,
    environment: str,
    application: str,
    weights: str,
    config: Sequence[ManagedFile],
    several: bool = False,
    behind: bool = False,
) -> tuple[ManagedFile, str]:
    """The service's unit file and its revision; `several` processes are instances of it.

    One `behind` a gateway lets nobody in before it can answer: who is refused is sent elsewhere.

    The arguments are the digests of what the service runs, the version of its weights and the
    files that configure it; a change of any of them, or of the unit itself, makes a new revision,
    and a process of an older one is restarted.
    """
    root = settings.root
    words = ["--cfg-path", config[-1].path]
    if len(config) == 2:
        words += ["--model-config", config[0].path]
    words += ["--model-id", settings.model_id]
    if not several:
        words += ["--host", str(settings.demo.bind), "--port", str(settings.demo.port)]
        words += ["--share-port", *(["--late"] if behind else [])]
    words += ["--device", settings.accelerator]
    words += ["--max-waiting", str(settings.demo.queue)]
    words += ["--max-seconds", str(settings.demo.max_seconds), "--weights", weights]
    if settings.demo.threads:
        words += ["--threads", str(settings.demo.threads)]
    if model.examples is not None:
        words += ["--examples", str(weights_folder(root, weights) / model.examples)]
    elif model.needs_picture:
        words += ["--examples", str(root / "app" / application / PICTURES)]

    def rendered(revision: str) -> str:
        return render.text(
            "demo.service.j2",
            model=settings.model_id,
            root=root,
            user=settings.user,
            application=root / "app" / application,
            python=root / "envs" / environment / "bin" / "python",
            # % and $ are systemd's own: specifiers and variables
            arguments=" ".join(quote(w).replace("%", "%%").replace("$", "$$") for w in words),
            revision=revision,
            start_timeout=settings.demo.start_timeout,
            memory_max=settings.demo.memory_max,
            cache="minigpt4-demo",
            accelerator=settings.accelerator,
            loopback=several or settings.demo.bind.is_loopback,
            several=several,
            target=TARGET,
            secret=secret(settings) if settings.demo.auth_file else None,
        )

    revision = digest(rendered(""), weights, digest(*(file.content for file in config)))
    path = str(_SYSTEMD / (TEMPLATE if several else UNIT))
    text = rendered(revision)
    return ManagedFile(path, text, validate="systemd-analyze verify {}"), revision


@dataclass(frozen=True)
class Answer:
    """What the demo said, or why it said nothing."""

    text: str | None
    problem: str = ""


def parse_answer(output: str) -> Answer:
    """Read what curl printed: a chat completion, an API error, or curl's own complaint."""
    try:
        body = json.loads(output)
        if "error" in body:
            return Answer(None, str(body["error"]["message"]))
        return Answer(str(body["choices"][0]["message"]["content"]))
    except (ValueError, KeyError, IndexError, TypeError):
        return Answer(None, " ".join(output.split())[:200] or "nothing answered")


def is_right(answer: str, expected: str | None) -> bool:
    """Whether an answer is the expected one but for case, blanks and the last full stop.

    Where none is known, any words are.
    """
    if expected is None:
        return bool(_words(answer))
    return _words(answer) == _words(expected)


def _words(text: str) -> list[str]:
    return text.casefold().rstrip(" .").split()


def addresses(settings: Settings, count: int) -> list[str]:
    """Where a host asks each of its processes, and what stands in front of several."""
    if count == 1:
        return [address(settings)]
    own = [f"http://{join('127.0.0.1', port(settings, number))}" for number in range(count)]
    return [*own, address(settings)]


def address(settings: Settings) -> str:
    """Where the demo is asked on its own host: an unspecified bind address is asked at loopback."""
    bind = settings.demo.bind
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(bind), str(bind))
    return f"http://{join(name, settings.demo.port)}"
