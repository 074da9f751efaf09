"""Asks every host of an inventory how its demo is, in one connection and one command each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpufleet.demo.plan import Service
from gpufleet.run import asking


@dataclass(frozen=True)
class HostStatus:
    """What is known of one host. `service` is None if it could not be asked; `error` says why."""

    name: str
    service: Service | None
    error: str | None = None

    @property
    def answer(self) -> dict[str, Any]:
        """What /healthz said on the host, empty if nothing or no JSON."""
        return _read(self.service.health) if self.service else {}

    @property
    def processes(self) -> list[dict[str, Any]]:
        """Each of several processes, flat, for JSON; empty where there is one."""
        keys = ("name", "active", "revision_running", "since", "memory_bytes")
        found = []
        for one in self.service.processes if self.service else ():
            said = _read(one.health)
            health = {"health": str(said.get("status") or "no answer"), "error": said.get("error")}
            found.append({**{key: getattr(one, key) for key in keys}, **health})
        return found

    @property
    def model(self) -> str | None:
        return self.answer.get("model")

    @property
    def health(self) -> str:
        """ok, loading, failed … as the demo says, or that it says nothing."""
        if self.service is None:
            return "unreachable"
        return str(self.answer.get("status") or "no answer")

    @property
    def problem(self) -> str | None:
        """Why the demo is not well: not running, not started at boot, not what is on disk, or
        not well by its own answer."""
        if self.service is None:
            return "unreachable"
        if self.service.active != "active":
            down = [one.name for one in self.service.processes if one.active != "active"]
            return f"{', '.join(down) or 'unit'} is {self.service.active}"
        if ill := [one for one in self.processes if one["health"] != "ok"]:
            return f"{ill[0]['name']}: {ill[0]['error'] or ill[0]['health']}"
        if self.health != "ok":
            return str(self.answer.get("error") or self.health)
        if self.service.revision_running != self.service.revision_on_disk:
            return "runs an older revision"
        return None if self.service.enabled else "not started at boot"

    @property
    def healthy(self) -> bool:
        return self.problem is None

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        service = asdict(self.service) if self.service else {}
        keys = ("active", "enabled", "revision_running", "revision_on_disk", "since")
        return {
            "name": self.name,
            "healthy": self.healthy,
            "error": self.error or self.problem,
            "health": self.health,
            "model": self.model,
            **{key: service.get(key) for key in (*keys, "memory_bytes")},
            "processes": self.processes,
        }


def _read(health: str) -> dict[str, Any]:
    try:
        answer = json.loads(health)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def ask(path: Path, limit: Sequence[str] = ()) -> list[HostStatus]:
    """The status of every host, in the inventory's order.

    Raises UsageError for an inventory or limit that is invalid.
    """

    def one(host: asking.Asker) -> Service:
        from gpufleet.demo.facts import DemoService

        return host.fact(DemoService, address=f"http://{host.target.demo_on_host}")

    return [HostStatus(each.name, each.answer, each.error) for each in asking.ask(path, one, limit)]
