"""Finds, in a folder that a browser downloads into, files that are wanted, whatever their names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from gpufleet.errors import UsageError
from gpufleet.weights.fetch.plan import Content, impostor, same_name


class Folders:
    """The files below some folders, by size. Raises UsageError for one that is not there."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._sizes: dict[int, list[Path]] = {}
        for folder in folders:
            if not folder.is_dir():
                raise UsageError(f"--from {folder}: no such folder; name the one with the files")
            for path in _files(folder):
                with suppress(FileNotFoundError):  # a browser gives its files other names
                    self._sizes.setdefault(path.stat().st_size, []).append(path)

    def whole(self, place: str, content: Content) -> list[Path]:
        """Files that may be the content, those with its name first; only a hash can tell."""
        if content.bytes is not None:
            of_size = self._sizes.get(content.bytes, [])
            return sorted(of_size, key=lambda path: not same_name(place, path.name))
        every = (path for paths in self._sizes.values() for path in paths)
        return [path for path in every if same_name(place, path.name)]

    def linkable(self, place: str, content: Content, store: Path) -> bool:
        """Whether a file that may be the content can be had without a byte of disk."""
        disk = store.stat().st_dev
        return any(_disk(path) == disk for path in self.whole(place, content))

    def start(self, place: str, content: Content, beyond: int) -> Path | None:
        """The longest unfinished download of a file, by its name, if it has more bytes than
        `beyond`; whether it is one shows when the whole is verified."""
        largest = content.bytes if content.bytes is not None else max(self._sizes, default=0) + 1
        for size in sorted(self._sizes, reverse=True):
            if not beyond < size < largest:
                continue
            for path in self._sizes[size]:
                # aria2 fills the file with holes before it has it; the list of them lies beside.
                holes = path.with_name(f"{path.name}.aria2").exists()
                if same_name(place, path.name) and not holes and not impostor(_head(path)):
                    return path
        return None


def _files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                yield path


def _disk(path: Path) -> int | None:
    try:
        return path.stat().st_dev
    except FileNotFoundError:
        return None


def _head(path: Path) -> bytes:
    """The first bytes; of a file that is gone by now, what is no weights."""
    try:
        with path.open("rb") as stream:
            return stream.read(512)
    except FileNotFoundError:
        return b"<html"


def take(path: Path, to: Path, told: Callable[[int], None]) -> bool:
    """Give a file a second name, or copy it where that cannot be; it is never moved.

    Returns whether it is a second name. `told` hears how many bytes are copied, and may raise to
    end it. Raises OSError.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
        return True
    except OSError:  # another file system, one without links, or another user's file
        with path.open("rb") as stream, to.open("wb") as copy:
            while block := stream.read(1 << 20):
                copy.write(block)
                told(copy.tell())
            copy.flush()
            os.fsync(copy.fileno())
        return False
