"""Writes a large file at its offsets, past the page cache where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

#: What offsets, lengths and addresses of direct writes are multiples of: 4 KiB suit every disk
#: (open(2), "O_DIRECT").
PAGE = 1 << 12

_NOT_TO_BE_HAD = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class Output:
    """A file that is there in its full size, and is to be filled; any thread may write."""

    def __init__(self, path: Path) -> None:
        """Open the file and take the room for all of it; OSError where the disk has too little."""
        self.path = path
        self.file = os.open(path, os.O_RDWR)
        self._direct: int | None = None
        try:
            _allocate(self.file)
            if hasattr(os, "O_DIRECT"):
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _NOT_TO_BE_HAD:
                os.close(self.file)
                raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)
        if self._direct is not None:
            os.close(self._direct)

    def write(self, data: memoryview, offset: int) -> None:
        """Write at an offset. Data whose address is `offset` bytes behind a page's, modulo PAGE,
        goes past the page cache, but for what of it does not fill a page."""
        first = min(-offset % PAGE, len(data))
        last = max(first, len(data) - (offset + len(data)) % PAGE)
        self.patch(data[:first], offset)
        self._past(data[first:last], offset + first)
        self.patch(data[last:], offset + last)

    def _past(self, data: memoryview, offset: int) -> None:
        if self._direct is None:
            self.patch(data, offset)
            return
        try:
            while data:
                count = os.pwrite(self._direct, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.patch(data, offset)  # a disk with larger blocks

    def patch(self, data: bytes | memoryview, offset: int) -> None:
        """Write a few bytes at an offset."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self.file, view, offset)
            view, offset = view[count:], offset + count

    def sync(self) -> None:
        """Have all of it on the disk."""
        os.fsync(self.file)


def _allocate(file: int) -> None:
    """Take the room of the whole file, where the file system can; Linux's fallocate(2), since
    posix_fallocate writes into every block where it cannot."""
    size = os.fstat(file).st_size
    libc = ctypes.CDLL(None, use_errno=True)
    if size and hasattr(libc, "fallocate"):
        failed = libc.fallocate(file, 0, ctypes.c_long(0), ctypes.c_long(size))
        if failed and (code := ctypes.get_errno()) not in _NOT_TO_BE_HAD:
            raise OSError(code, os.strerror(code))
