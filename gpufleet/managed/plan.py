"""Decides which managed files differ from what a host has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: Stands for a file's digest in its record while a switch that wrote it is not over.
UNSETTLED = "unsettled"


@dataclass(frozen=True)
class ManagedFile:
    """A file that gpufleet owns whole: its place, bytes and permissions."""

    path: str
    content: str
    mode: str = "644"
    owner: str = "root"
    group: str = "root"
    validate: str | None = None
    """Shell command that must succeed on the new file, `{}` standing for its path."""

    @property
    def sha256(self) -> str:
        """Hex digest of the content."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Present:
    """What a host has at a path, and whether gpufleet wrote it."""

    mode: str
    owner: str
    group: str
    sha256: str


@dataclass(frozen=True)
class Record:
    """gpufleet's note about a path: the digest of what it wrote there last."""

    sha256: str


@dataclass(frozen=True)
class Files:
    """A host's managed files: what lies there and what gpufleet wrote."""

    present: Mapping[str, Present]
    records: Mapping[str, Record]


def differing(wanted: Iterable[ManagedFile], found: Files) -> list[ManagedFile]:
    """The files that must be written: bytes, mode, owner or gpufleet's record differ."""
    return [
        file
        for file in wanted
        if found.present.get(file.path) != Present(file.mode, file.owner, file.group, file.sha256)
        or found.records.get(file.path) != Record(file.sha256)
    ]


def parse(lines: Iterable[str]) -> Files:
    """Read the ManagedFiles fact's lines: kind, path and fields, split by tabs."""
    present: dict[str, Present] = {}
    records: dict[str, Record] = {}
    for line in lines:
        kind, path, *fields = line.split("\t")
        if kind == "file":
            mode, owner, group, sha256 = fields
            present[path] = Present(mode, owner, group, sha256)
        elif kind == "record":
            records[path] = Record(fields[0])
    return Files(present, records)
