"""What a command's options say in place of settings, handed to pyinfra's process."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gpufleet.settings import Settings

#: Environment variable that holds an Override as JSON; unset or empty means that all is as set.
ENV = "GPUFLEET_OVERRIDE"


@dataclass(frozen=True)
class Override:
    """Options of `fleet weights push`; None is as the settings say."""

    model: str | None = None
    source: str | None = None
    via: Literal["auto", "rsync", "swarm"] | None = None
    bandwidth_kib: int | None = None
    deep: bool = False
    """Read all weight files on the hosts again."""
    together: bool = False
    """All hosts at once, whatever `rolling` says."""

    def dump(self) -> str:
        """As one line of JSON, which `read` takes."""
        return json.dumps(asdict(self))


def read() -> Override:
    """What this run was given."""
    return Override(**json.loads(os.environ.get(ENV) or "{}"))


def settled(settings: Settings) -> Settings:
    """The settings with what this run was given in their place."""
    given = read()
    weights: dict[str, Any] = {
        "source": given.source,
        "via": given.via,
        "bandwidth_kib": given.bandwidth_kib,
    }
    weights = {name: value for name, value in weights.items() if value is not None}
    changes: dict[str, Any] = {"model": given.model} if given.model is not None else {}
    if weights:
        changes["weights"] = settings.weights.model_copy(update=weights)
    return settings.model_copy(update=changes) if changes else settings
