"""A file that is not whole yet: kept between runs, held by one process, hashed while it grows.

It lies in the store's `.partial`, under the file's path and its content's identity, so that a
final name always means a verified file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from gpufleet.weights.fetch.plan import Content

FOLDER = ".partial"

_BLOCK = 1 << 20

#: How often a folder is made that goes again.
_TRIES = 100


def where(store: Path, place: str, content: Content) -> Path:
    """The partial file of a content that gets the name `place` in the store."""
    return store / FOLDER / f"{place}.{content.identity[:16]}"


class Partial:
    """The partial file, locked while the block runs; waits for whoever else has it.

    `ready` of the block's value is False where another process gave the file its final name while
    this one waited. `waiting` is called again and again meanwhile, and may raise.
    """

    def __init__(
        self, store: Path, place: str, content: Content, waiting: Callable[[], None]
    ) -> None:
        self.final = store / place
        self.path = where(store, place, content)
        self.content = content
        self.store = store
        self._waiting = waiting
        self._file = -1
        self._hash = hashlib.sha256()
        self.hashed = 0
        """Bytes that the hash has seen: the file's first ones."""

    def __enter__(self) -> Partial:
        tries = 0
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except (FileNotFoundError, FileExistsError):
                # Another was done there, and removed the empty folder.
                tries += 1
                if tries > _TRIES:
                    raise
                continue
            try:
                while not _locked(self._file):
                    self._waiting()
                    time.sleep(0.2)
                # Whoever held it may have given it its final name: then this is another's file.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._file), self.path.stat()):
                        return self
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            if os.fstat(self._file).st_size == 0 and os.path.samestat(
                os.fstat(self._file), self.path.stat()
            ):
                self.path.unlink()
        os.close(self._file)
        self._tidy()

    def _tidy(self) -> None:
        """Remove folders of partial files that have none."""
        folder = self.path.parent
        while folder != self.store:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return os.fstat(self._file).st_size

    def write(self, at: int, data: bytes) -> None:
        """Write at a place that the hash has come to, or has passed: then it begins anew there.

        Raises OSError, of a full disk above all.
        """
        if at != self.hashed:
            if at:
                raise ValueError(f"byte {at} comes after a gap")
            self._forget()
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file, view, self.hashed)
            self._hash.update(view[:done])
            self.hashed += done
            view = view[done:]

    def catch_up(self, told: Callable[[int], None]) -> None:
        """Hash what is there and was not hashed yet; `told` how far it has come."""
        while block := os.pread(self._file, _BLOCK, self.hashed):
            self._hash.update(block)
            self.hashed += len(block)
            told(self.hashed)

    def cut(self, size: int) -> None:
        """Drop what is beyond a size."""
        os.ftruncate(self._file, size)
        if self.hashed > size:
            self._forget()

    def _forget(self) -> None:
        self._hash = hashlib.sha256()
        self.hashed = 0

    def wrong(self) -> str | None:
        """Why the whole file is not what it must be, None if it is. All of it must be hashed."""
        size = self.size
        if self.content.bytes is not None and size != self.content.bytes:
            return f"{size} bytes, not {self.content.bytes}"
        if self.content.sha256 is not None and self._hash.hexdigest() != self.content.sha256:
            return f"sha256 {self._hash.hexdigest()[:12]}…, not {self.content.sha256[:12]}…"
        return unlike(self.path, self.content)

    def adopt(self) -> None:
        """Go on with what lies under the final name, in the place of this file; raises OSError.

        It is locked before it moves: whoever waits for this file then waits for that one.
        """
        file = os.open(self.final, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.replace(self.final, self.path)
        except BaseException:
            os.close(file)
            raise
        os.close(self._file)
        self._file = file
        self._forget()

    def head(self) -> bytes:
        """The first bytes."""
        return os.pread(self._file, 512, 0)

    def finish(self) -> str:
        """Give the file its final name, on the disk and not only in memory; its sha256."""
        os.fsync(self._file)
        self.final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, self.final)
        folder = os.open(self.final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Begin with nothing."""
        self.cut(0)
        self._forget()


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlike(path: Path, content: Content) -> str | None:
    """What of a file is not the content's, by the hashes that count where nobody says its sha256.

    None if nothing is. Raises OSError.
    """
    if content.sha256 is None and content.blob is not None:
        head = b"blob %d\0" % path.stat().st_size
        found = _read(path, hashlib.sha1(head, usedforsecurity=False))
        if found != content.blob:
            return f"git's hash is {found[:12]}…, not {content.blob[:12]}…"
    if content.md5 is not None:
        found = _read(path, hashlib.md5(usedforsecurity=False))
        if found != content.md5:
            return f"md5 {found[:12]}…, not {content.md5[:12]}…"
    return None


def _read(path: Path, hasher: hashlib._Hash) -> str:
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()
