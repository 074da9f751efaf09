"""Decides how the demo runs on a host: its service, its revision and whether to restart it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from gpufleet import render
from gpufleet.catalog import Model
from gpufleet.managed.plan import ManagedFile
from gpufleet.settings import Settings
from gpufleet.weights.plan import folder as weights_folder

#: The service's name on every host.
UNIT = "minigpt4-demo.service"

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
    """The demo's unit as systemd has it."""

    active: str
    """ActiveState: active, activating, inactive, failed …"""
    enabled: bool
    needs_reload: bool
    revision_on_disk: str | None
    revision_running: str | None
    """MODELDEMO_REVISION in the unit file and in the running process's environment."""
    since: str = ""
    memory_bytes: int | None = None
    changed_since: str = ""
    """A file of the deploy that changed after the process started, empty if none did."""
    health: str = ""
    """What /healthz answered on the host, empty if nothing did."""


def parse(lines: Iterable[str]) -> Service:
    """Read the DemoService fact's lines: key=value as `systemctl show` prints them."""
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
    )


def is_current(service: Service, revision: str) -> bool:
    """Whether the process that runs is the one that was asked for."""
    return (
        service.active == "active"
        and service.enabled
        and not service.needs_reload
        and service.revision_running == revision
        and not service.changed_since
    )


def unit(
    settings: Settings,
    model: Model,
    *,
    environment: str,
    application: str,
    weights: str,
    config: Sequence[ManagedFile],
) -> tuple[ManagedFile, str]:
    """The service's unit file and its revision.

    The arguments are the digests of what the service runs, the version of its weights and the
    files that configure it; a change of any of them, or of the unit itself, makes a new revision,
    and a process of an older one is restarted.
    """
    root = settings.root
    words = ["--cfg-path", config[-1].path]
    if len(config) == 2:
        words += ["--model-config", config[0].path]
    words += ["--model-id", settings.model_id, "--host", str(settings.demo.bind)]
    words += ["--port", str(settings.demo.port), "--device", settings.accelerator]
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
            loopback=settings.demo.bind.is_loopback,
        )

    revision = digest(rendered(""), weights, digest(*(file.content for file in config)))
    path = f"/etc/systemd/system/{UNIT}"
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


def address(settings: Settings) -> str:
    """Where the demo is asked on its own host: an unspecified bind address is asked at loopback."""
    bind = settings.demo.bind
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(bind), str(bind))
    return f"http://{f'[{name}]' if ':' in name else name}:{settings.demo.port}"
