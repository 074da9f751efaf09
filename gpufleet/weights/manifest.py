"""Prints the `files:` part of a weight set's catalogue entry for a folder with its files."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from gpufleet.catalog import WeightFile
from gpufleet.weights.digests import Digests


def of(folder: Path) -> list[WeightFile]:
    """Every file of the folder with its size and digest, by path.

    Without README.md, and without what a store keeps for itself in hidden folders. Raises OSError
    for a file that cannot be read.
    """
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name != "README.md"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    found: list[WeightFile] = []
    for path, sha256 in Digests().of(paths).items():
        if isinstance(sha256, OSError):
            raise sha256
        name = path.relative_to(folder).as_posix()
        found.append(WeightFile(path=name, bytes=path.stat().st_size, sha256=sha256))
    return sorted(found, key=lambda file: file.path)


if __name__ == "__main__":
    files = [entry.model_dump() for entry in of(Path(sys.argv[1]))]
    print(yaml.safe_dump({"files": files}, sort_keys=False), end="")
