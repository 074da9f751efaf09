"""What a fetch works on: weight sets, their files, and how far each has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from gpufleet.catalog import WeightSet
from gpufleet.weights.fetch.hubs import Endpoints
from gpufleet.weights.fetch.plan import Content, Policy
from gpufleet.weights.store import Store

State = Literal[
    "waiting",
    "checking",
    "copying",
    "fetching",
    "resting",
    "present",
    "fetched",
    "picked",
    "failed",
    "stopped",
]

#: States in which a file is whole, verified and under its name.
DONE = ("present", "fetched", "picked")


class Stopped(Exception):
    """The person wants it to end."""


class Failed(Exception):
    """A file, or a set's list of files, cannot be had; the text is one line."""


class Memory(Protocol):
    """What remembers the sha256 of files that have not changed since."""

    def known(self, path: Path) -> str | None:
        """The digest of a file as it is now, None where it must be read."""

    def remember(self, path: Path, sha256: str) -> None:
        """Take note of the digest of a file as it is now."""


@dataclass
class File:
    """One file of a set and how far it has come."""

    set: str
    path: str
    """Below the set's folder."""
    place: str
    """Below the store."""
    content: Content
    state: State = "waiting"
    bytes: int = 0
    of: int | None = None
    source: str = ""
    why: str = ""
    """Why it rests, or failed."""
    sha256: str = ""
    """Of the verified file."""


@dataclass
class Set:
    """One weight set and its files, which may be known only once a source has listed them."""

    name: str
    weights: WeightSet
    files: list[File] = field(default_factory=list)
    origin: str = ""
    """Where the list is from, if a source was asked for it."""
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether the whole set is there."""
        return not self.error and all(file.state in DONE for file in self.files)


@dataclass(frozen=True)
class Options:
    """What a person asked for beside the names."""

    store: Store
    endpoints: Endpoints = field(default_factory=Endpoints)
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    folders: tuple[Path, ...] = ()
    jobs: int = 4
    policy: Policy = field(default_factory=Policy)
