"""Prints the `files:` part of a catalogue entry for a folder of weight files."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import yaml

from gpufleet.catalog import WeightFile


def of(folder: Path) -> list[WeightFile]:
    """Every file of the folder with its size and digest, README.md excepted, by path."""
    found = [
        WeightFile(
            path=path.relative_to(folder).as_posix(),
            bytes=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in folder.rglob("*")
        if path.is_file() and path.name != "README.md"
    ]
    return sorted(found, key=lambda file: file.path)


if __name__ == "__main__":
    files = [entry.model_dump() for entry in of(Path(sys.argv[1]))]
    print(yaml.safe_dump({"files": files}, sort_keys=False), end="")
