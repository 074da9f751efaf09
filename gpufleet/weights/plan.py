"""Decides which weight files a host lacks, and which of those it has are right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpufleet.catalog import WeightFile


@dataclass(frozen=True)
class Found:
    """A file on a host: its digest, and whether the host remembers having verified it."""

    sha256: str
    recorded: bool


def manifest_digest(files: Iterable[WeightFile]) -> str:
    """16 hex digits that name a set of files by path, size and content."""
    text = "\n".join(f"{f.path} {f.bytes} {f.sha256}" for f in sorted(files, key=lambda f: f.path))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse(lines: Iterable[str]) -> dict[str, Found]:
    """Read the WeightsOnHost fact's lines: path, digest, `recorded` or `new`, split by tabs."""
    split = (line.split("\t") for line in lines)
    return {path: Found(sha256, state == "recorded") for path, sha256, state in split}


def to_send(files: Iterable[WeightFile], found: Mapping[str, Found]) -> list[WeightFile]:
    """Files that the host lacks or has with other content."""
    return [f for f in files if f.path not in found or found[f.path].sha256 != f.sha256]


def to_record(files: Iterable[WeightFile], found: Mapping[str, Found]) -> list[WeightFile]:
    """Files that are right, but changed since the host last took note of it."""
    return [f for f in files if found.get(f.path) == Found(f.sha256, recorded=False)]
