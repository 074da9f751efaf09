"""Digests: what sha256sum says, of many files at once, each read once until it changes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from gpufleet import ROOT
from gpufleet.weights.digests import Digests, Progress


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Uneven sizes, around the size of a block and of a span."""
    folder = tmp_path / "files"
    folder.mkdir()
    sizes = [0, 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 23) + 12345, 3 << 20]
    for number, size in enumerate(sizes):
        (folder / f"{number} é.bin").write_bytes(os.urandom(size))
    return sorted(folder.iterdir())


def rewrite(path: Path, content: bytes) -> None:
    """Other bytes without a trace: the same size, time and inode."""
    stamp = path.stat().st_mtime_ns
    with path.open("r+b") as stream:
        stream.write(content)
    os.utime(path, ns=(stamp, stamp))


def test_they_are_what_sha256sum_says(files: list[Path]):
    said = subprocess.run(["sha256sum", *files], capture_output=True, text=True, check=True)
    expected = {
        Path(name): sha for sha, name in (li.split("  ", 1) for li in said.stdout.splitlines())
    }
    assert Digests().of(files) == expected


def test_a_file_that_was_read_is_not_read_again_by_anybody(files: list[Path]):
    first = Digests().of(files)
    rewrite(files[-1], b"other")
    assert Digests().of(files) == first
    assert Digests().known(files[-1]) == first[files[-1]]


def test_deep_reads_it_again_and_remembers_what_it_found(files: list[Path]):
    Digests().of(files)
    rewrite(files[-1], b"other")
    found = Digests().of(files, deep=True)
    assert found[files[-1]] == digest(files[-1].read_bytes())
    assert Digests().known(files[-1]) == found[files[-1]]


class TestAFileThatChangedIsReadAgain:
    @pytest.fixture
    def path(self, files: list[Path]) -> Path:
        path = files[-1]
        os.utime(path, ns=(1, 1_700_000_000_123_456_789))
        Digests().of([path])
        assert Digests().known(path) is not None
        return path

    def test_in_its_time(self, path: Path):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        assert Digests().known(path) is None

    def test_in_its_inode(self, path: Path):
        stamp, twin = path.stat().st_mtime_ns, path.with_name("twin")
        twin.write_bytes(path.read_bytes())
        os.utime(twin, ns=(1, stamp))
        twin.replace(path)
        assert Digests().known(path) is None

    def test_in_its_size(self, path: Path):
        stamp = path.stat().st_mtime_ns
        with path.open("ab") as stream:
            stream.write(b"!")
        os.utime(path, ns=(1, stamp))
        assert Digests().known(path) is None
        assert Digests().of([path]) == {path: digest(path.read_bytes())}

    def test_in_its_place(self, path: Path, tmp_path: Path):
        os.link(path, tmp_path / "link")
        assert Digests().known(tmp_path / "link") is None


def test_what_somebody_computed_while_writing_is_not_computed_again(files: list[Path]):
    Digests().remember(files[0], "0" * 64)
    assert Digests().of(files[:1]) == {files[0]: "0" * 64}


def test_a_file_that_cannot_be_read_says_why_and_the_others_are_read(files: list[Path]):
    folder, none, loop = files[0].parent, files[0].parent / "none", files[0].parent / "loop"
    loop.symlink_to("loop")
    found = Digests().of([folder, none, loop, files[1]])
    reasons = {path: e.strerror for path, e in found.items() if isinstance(e, OSError)}
    assert reasons == {
        folder: "Is a directory",
        none: "No such file or directory",
        loop: "Too many levels of symbolic links",
    }
    assert found[files[1]] == digest(files[1].read_bytes())


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (found,) = Digests().of([tmp_path / "pipe"]).values()
    assert isinstance(found, OSError)


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path: Path):
    path = tmp_path / "grows"
    path.write_bytes(os.urandom(1 << 24))
    stop = threading.Event()

    def append() -> None:
        with path.open("ab") as stream:
            while not stop.is_set():
                stream.write(b"x" * 64)
                stream.flush()

    writer = threading.Thread(target=append)
    writer.start()
    try:
        found = Digests().of([path])[path]
    finally:
        stop.set()
        writer.join()
    assert isinstance(found, OSError)
    assert found.strerror == "changed while it was read"
    assert Digests().known(path) is None


def test_progress_ends_with_every_byte(files: list[Path]):
    seen: list[Progress] = []
    Digests().of(files, watch=seen.append)
    total = sum(path.stat().st_size for path in files)
    assert (seen[-1].done, seen[-1].of) == (total, total)
    assert all(one.done <= two.done for one, two in pairwise(seen))
    assert seen[-1].seconds_left == 0


def test_nothing_is_shown_where_nothing_is_read(files: list[Path]):
    Digests().of(files)
    seen: list[Progress] = []
    Digests().of(files, watch=seen.append)
    assert seen == []


def in_memory(path: Path) -> bool:
    with path.open("rb", buffering=0) as stream:
        try:
            return os.preadv(stream.fileno(), [bytearray(4096)], 1 << 20, os.RWF_NOWAIT) == 4096
        except BlockingIOError:
            return False


def drop(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what is in memory")
def test_the_page_cache_is_left_as_it_was(tmp_path: Path):
    warm, cold = tmp_path / "warm", tmp_path / "cold"
    for path in (warm, cold):
        path.write_bytes(os.urandom(5 << 20))
    drop(cold)
    if in_memory(cold):
        pytest.skip("this file system keeps everything in memory")
    found = Digests().of([warm, cold])
    assert in_memory(warm)
    assert not in_memory(cold)
    assert found[cold] == digest(cold.read_bytes())


def test_a_cache_that_cannot_be_written_does_not_stop_it(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Digests().of(files[1:2]) == {files[1]: digest(files[1].read_bytes())}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '["a", 1]'])
def test_a_memory_that_was_spoilt_is_none(files: list[Path], cache: Path, text: str):
    Digests().of(files[1:2])
    (kept,) = (cache / "sha256").iterdir()
    kept.write_text(text)
    assert Digests().of(files[1:2]) == {files[1]: digest(files[1].read_bytes())}
    assert Digests().known(files[1]) is not None


#: In a process that pyinfra patched: hosts side by side, while a greenlet counts its turns.
_PATCHED = """
from gevent import monkey; monkey.patch_all()
import sys, gevent, threading
from pathlib import Path
from gpufleet.weights import digests
paths = [Path(path) for path in sys.argv[1:]]
read = []
inner = digests._hash
digests._hash = lambda path, *rest: (read.append(path), inner(path, *rest))[1]
turns, done = [], []
def count():
    while not done:
        turns.append(1)
        gevent.sleep(0.002)
counting = gevent.spawn(count)
hosts = [gevent.spawn(digests.Digests().of, paths) for _ in range(3)]
gevent.joinall(hosts)
done.append(True)
assert hosts[0].get() == hosts[1].get() == hosts[2].get()
print(len(read), len(turns))
"""


def test_hosts_that_are_checked_side_by_side_read_once_and_do_not_stop_each_other(tmp_path: Path):
    paths = [tmp_path / name for name in ("one", "two", "three")]
    for path in paths:
        path.write_bytes(os.urandom(8 << 20))
    done = subprocess.run(
        [sys.executable, "-c", _PATCHED, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    read, turns = map(int, done.stdout.split())
    assert read == 3
    assert turns > 2
