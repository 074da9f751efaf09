"""sha256 of files on all cores, each computed once until the file changes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

import gevent
import platformdirs
from gevent.lock import BoundedSemaphore

# Threads of the system also in a process that pyinfra has patched, where waiting for them lets
# the other hosts go on.
from gevent.threadpool import ThreadPool

#: Bytes read at once, by each thread: more does not hash faster, and this stays in a core's cache.
_BLOCK = 1 << 18
#: Bytes after which what was read only for this is given back to the system.
_SPAN = 1 << 23
_LIBC = ctypes.CDLL(None, use_errno=True)
#: Not on macOS.
_ADVICE = hasattr(os, "posix_fadvise")
#: Seconds between two reports of progress.
_TICK = 0.2
#: Hosts that are checked side by side wait for one reading of the same files.
_TURN = BoundedSemaphore(1)


@dataclass(frozen=True)
class Progress:
    """How far hashing came: bytes, bytes of all files, bytes per second since it began."""

    done: int
    of: int
    rate: float

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None while nothing is known."""
        return (self.of - self.done) / self.rate if self.rate else None


class Digests:
    """Digests by file, remembered while path, size, mtime and inode stay the same.

    Each is a file of its own in the cache folder, replaced whole: any number of processes may
    use them at once. What was remembered is lost without harm.
    """

    def __init__(self, algorithm: Literal["sha256", "md5"] = "sha256") -> None:
        self._algorithm = algorithm
        self._folder = platformdirs.user_cache_path("gpufleet") / algorithm

    def known(self, path: Path) -> str | None:
        """The digest of a file that has not changed since it was computed, else None.

        Raises OSError if the file cannot be looked at.
        """
        now = _identity(path)
        try:
            remembered = json.loads(self._place(path).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(remembered, list) and len(remembered) == len(now) + 1
        return str(remembered[-1]) if whole and remembered[:-1] == now else None

    def remember(self, path: Path, digest: str) -> None:
        """Take note of a digest that somebody computed of the file as it is now."""
        self._keep(path, _identity(path), digest)

    def of(
        self,
        paths: Iterable[Path],
        *,
        deep: bool = False,
        watch: Callable[[Progress], None] = lambda progress: None,
    ) -> dict[Path, str | OSError]:
        """Hex digest of each file, or why it has none; `deep` reads all of them again.

        Files are read by as many threads as this process may use cores, the largest first; `watch`
        is called a few times a second while something is read.
        """
        found: dict[Path, str | OSError] = {}
        sizes: dict[Path, int] = {}
        for path in dict.fromkeys(paths):
            try:
                known = None if deep else self.known(path)
                if known is not None:
                    found[path] = known
                else:
                    sizes[path] = path.stat().st_size
            except OSError as error:
                found[path] = error
        if sizes:
            with _TURN:
                found |= self._read(sizes, deep, watch)
        return found

    def _read(
        self, sizes: Mapping[Path, int], deep: bool, watch: Callable[[Progress], None]
    ) -> dict[Path, str | OSError]:
        paths = sorted(sizes, key=lambda path: -sizes[path])
        read = dict.fromkeys(paths, 0)
        stopped: list[bool] = []

        found: dict[Path, str | OSError] = {}

        def job(path: Path) -> None:
            try:
                known = None if deep else self.known(path)  # whoever had the turn may have read it
                if known is not None:
                    read[path], found[path] = sizes[path], known
                    return
                identity, found[path] = _hash(path, self._algorithm, read, stopped)
                self._keep(path, identity, str(found[path]))
            except OSError as error:
                found[path] = error

        begun, total = time.monotonic(), sum(sizes.values())
        pool = ThreadPool(min(len(paths), _cores()))
        hub = gevent.get_hub()
        errors = hub.NOT_ERROR
        hub.NOT_ERROR = (*errors, KeyboardInterrupt)  # raised here; the hub would print it as well
        try:
            jobs = [pool.spawn(job, path) for path in paths]
            waiting = jobs
            while waiting:
                gevent.wait(waiting, timeout=_TICK)
                waiting = [one for one in waiting if not one.ready()]
                done = sum(read.values())
                watch(Progress(done, total, done / max(time.monotonic() - begun, 1e-6)))
            for one in jobs:
                one.get()
            return found
        finally:
            hub.NOT_ERROR = errors
            stopped.append(True)
            pool.kill()

    def _place(self, path: Path) -> Path:
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        return self._folder / f"{name}.json"

    def _keep(self, path: Path, identity: list[object], digest: str) -> None:
        place = self._place(path)
        aside = place.with_suffix(f".{os.getpid()}.{id(identity):x}")
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps([*identity, digest]), "utf-8")
            aside.replace(place)


def _identity(path: Path) -> list[object]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]


def _cores() -> int:
    with suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _hash(
    path: Path, algorithm: str, read: dict[Path, int], stopped: list[bool]
) -> tuple[list[object], str]:
    """What the file was while it was read, and its digest. Raises OSError."""
    kind = path.stat().st_mode
    if not stat.S_ISREG(kind):
        code = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        raise OSError(code, os.strerror(code), str(path))
    identity, hasher = _identity(path), hashlib.new(algorithm, usedforsecurity=False)
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as stream, _PageCache(stream) as cache:
        while size := stream.readinto(block):
            hasher.update(block[:size])
            read[path] += size
            cache.reaches(read[path])
            if stopped:
                raise OSError(errno.EINTR, "stopped", str(path))
    if _identity(path) != identity:
        raise OSError(errno.EBUSY, "changed while it was read", str(path))
    return identity, hasher.hexdigest()


class _PageCache:
    """Leaves the system's page cache as it was before a file was read from its start.

    What was in memory stays there; what had to be fetched from the disk goes again, so that forty
    gigabytes of weights do not push out what this machine works with. Where the system does not
    tell one from the other, nothing is given back.
    """

    def __init__(self, stream: FileIO) -> None:
        self._fd = stream.fileno()
        self._span = -1
        self._cold = False
        self._next_is_cold = False

    def __enter__(self) -> _PageCache:
        if _ADVICE:
            self._advise(0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._next_is_cold = not self._in_memory(0)
            self.reaches(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def reaches(self, offset: int) -> None:
        """To be called before the byte at `offset` is read."""
        span = offset // _SPAN
        if span == self._span or not _ADVICE:
            return
        self._give_back()
        self._span, self._cold = span, self._next_is_cold
        # The disk works on the next span while this one is hashed; asked about before that.
        self._next_is_cold = not self._in_memory(span + 1)
        if self._next_is_cold:
            self._advise((span + 1) * _SPAN, _SPAN, os.POSIX_FADV_WILLNEED)

    def _give_back(self) -> None:
        if self._cold:
            self._advise(self._span * _SPAN, _SPAN, os.POSIX_FADV_DONTNEED)

    def _advise(self, start: int, length: int, advice: int) -> None:
        with suppress(OSError):  # it is advice: a file is read without it as well
            os.posix_fadvise(self._fd, start, length, advice)

    def _in_memory(self, span: int) -> bool:
        """Whether most of the span is: its first pages may have been read ahead."""
        start = span * _SPAN
        length = min(_SPAN, os.fstat(self._fd).st_size - start)
        if length <= 0:
            return True
        pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        access = mmap.PROT_READ | mmap.PROT_WRITE  # ctypes asks for both; nothing is touched
        try:
            view = mmap.mmap(self._fd, length, mmap.MAP_PRIVATE, access, offset=start)
        except (OSError, ValueError):  # as for a file of /proc
            return True
        with view:
            first = ctypes.c_char.from_buffer(view)
            failed = _LIBC.mincore(ctypes.c_void_p(ctypes.addressof(first)), length, pages)
            del first  # else the map cannot be closed
        return bool(failed) or 2 * sum(page & 1 for page in pages) > len(pages)
