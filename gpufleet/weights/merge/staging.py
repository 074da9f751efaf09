"""Where a merge is written until it is whole, and what of it a killed one had finished.

Beside the output lie a folder, `.NAME.merging`, which becomes the output by being renamed, and a
journal, `.NAME.merging.journal`: a line that names the merge, then one for each tensor that was
written, with its checksum. Whoever merges holds the journal's lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpufleet.errors import UsageError

#: Says in the output what it was made of; see `same`.
RECORD = "merge.json"

FILE_MODE, FOLDER_MODE = 0o644, 0o755


class Staging:
    """The folder and the journal of one merge, held by this process alone."""

    def __init__(self, output: Path, journal: int, identity: str) -> None:
        self.output = output
        self.folder = _folder(output)
        self._journal = journal
        self.written: dict[str, int] = {}
        """crc32 by tensor, as the journal has it."""
        self._open(identity)

    def _open(self, identity: str) -> None:
        first, *lines = _lines(self._journal)
        if self.folder.is_dir() and first == {"merge": identity}:
            for line in lines:
                self.written[line["tensor"]] = line["crc32"]
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        os.ftruncate(self._journal, 0)
        self._say({"merge": identity})
        self.folder.mkdir()
        self.folder.chmod(FOLDER_MODE)

    def note(self, tensor: str, crc32: int) -> None:
        """A tensor is written. Safe from any thread: a line is one write."""
        self._say({"tensor": tensor, "crc32": crc32})

    def _say(self, line: Mapping[str, Any]) -> None:
        os.write(self._journal, json.dumps(line).encode() + b"\n")

    def text(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        self.bytes(name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def bytes(self, name: str, data: bytes) -> None:
        """Write a small file, and have it on the disk."""
        with open(self.create(name), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def create(self, name: str) -> int:
        """A new file that every user may read, whatever the umask, open for reading and writing."""
        return create(self.folder / name)

    def become_the_output(self) -> None:
        """Give the folder its name; what is in it must be on the disk."""
        _sync(self.folder)
        os.rename(self.folder, self.output)
        _sync(self.output.parent)
        _journal_of(self.output).unlink()


def create(path: Path) -> int:
    """As `Staging.create`."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    os.fchmod(file, FILE_MODE)
    return file


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _folder(output: Path) -> Path:
    return output.parent / f".{output.name}.merging"


def _journal_of(output: Path) -> Path:
    return output.parent / f".{output.name}.merging.journal"


def _lines(journal: int) -> list[dict[str, Any]]:
    """The journal's lines up to the first that is not whole; at least one."""
    found: list[dict[str, Any]] = []
    for line in os.pread(journal, os.fstat(journal).st_size, 0).splitlines():
        try:
            found.append(dict(json.loads(line)))
        except ValueError:
            break
    return found or [{}]


@contextmanager
def alone(output: Path) -> Iterator[int]:
    """The journal of an output, locked and open; UsageError if another merge has it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = os.open(_journal_of(output), os.O_RDWR | os.O_CREAT | os.O_APPEND, FILE_MODE)
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield journal
    except BlockingIOError:
        raise UsageError(f"another merge is making {output}: wait for it, or end it") from None
    finally:
        os.close(journal)


def kept(output: Path) -> int:
    """Bytes on the disk that an earlier merge of the same output has left."""
    try:
        return sum(path.stat().st_blocks * 512 for path in _folder(output).iterdir())
    except OSError:
        return 0


def clean(output: Path) -> None:
    """Remove what a merge that was killed after its last step left beside the output."""
    shutil.rmtree(_folder(output), ignore_errors=True)
    _journal_of(output).unlink(missing_ok=True)


def same(output: Path, identity: str) -> bool:
    """Whether the output is there, whole, and of this very merge."""
    try:
        record = json.loads((output / RECORD).read_text("utf-8"))
        sizes = {name: (output / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(record.get("identity") == identity and sizes == record["files"])
