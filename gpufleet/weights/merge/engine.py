"""Merges: reads base and delta in pieces, adds them, writes the sum; several tensors at a time.

Bytes are read and written at their offsets through a few buffers that are used again and again,
so memory stays the same however large the model is, and no page of a file is mapped. Where the
system can, what is written goes past the page cache: it costs a tenth of the processor's time,
pushes nobody's files out of memory, and is on the disk when it is said to be.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpufleet.errors import FleetError, UsageError
from gpufleet.weights.merge import checkpoint, fixes, staging
from gpufleet.weights.merge.output import PAGE, Output
from gpufleet.weights.merge.plan import (
    Form,
    Merge,
    Shard,
    Stored,
    Sum,
    Version,
    alike,
    header,
    identity,
    index,
    plan,
)

#: Elements that are read, added and written at a time: three buffers of this stay in a core's
#: cache, which is faster than larger pieces.
_PIECE = 1 << 19
#: Bytes of memory that an element of a piece takes: two float32 at most, two float16 of the
#: conversion, and the sum.
_ELEMENT = 4 + 4 + 2 + 2 + 2

#: What the small files and the headers may take, beside the tensors.
_MARGIN = 16 << 20


@dataclass(frozen=True)
class Job:
    """What to merge, and how."""

    base: Path
    delta: Path
    output: Path
    version: Version | None = None
    form: Form = "safetensors"
    shard_bytes: int = 4 << 30
    memory: int = 64 << 20
    """Bytes of buffers."""
    threads: int = 2


@dataclass(frozen=True)
class Progress:
    """Bytes of the output that are there, of all; `kept` of them an earlier run had written."""

    done: int
    of: int
    kept: int


@dataclass(frozen=True)
class Result:
    """How a merge ended."""

    state: str
    """`merged`, or `there` where the output was made by this very merge before."""
    version: Version
    tensors: int
    bytes: int
    """Of all tensors."""
    kept: int
    """Bytes that an earlier run had written."""
    rows: int
    dropped: int


@dataclass(frozen=True)
class Prepared:
    """A merge that can be done: nothing was written yet."""

    job: Job
    merge: Merge
    identity: str
    inputs: Mapping[Path, tuple[int, int]]
    small: Mapping[str, bytes | Mapping[str, Any]]
    """The small files of the output: bytes to copy, or JSON."""
    there: bool


def prepare(job: Job) -> Prepared:
    """Look at everything that can be wrong before the first byte is written, without torch.

    Raises UsageError, one line, for inputs that do not belong together, an output that is in the
    way and too small a disk.
    """
    job = replace(job, output=_place(job.output))
    if _same_folder(job.base, job.delta):
        raise UsageError(f"base and delta are the same folder, {job.base}: give the delta's")
    base, delta = checkpoint.read(job.base), checkpoint.read(job.delta)
    merge = plan(base, delta, version=job.version, form=job.form, shard_bytes=job.shard_bytes)
    _not_merged_already(job, merge)
    small = _small(job, base.config, base.small, delta.small, merge.rows)
    files = {("base", path) for one in base.tensors.values() for path in [one.file]}
    files |= {("delta", path) for one in delta.tensors.values() for path in [one.file]}
    files |= {("base", path) for path in base.small.values()}
    files |= {("delta", path) for path in delta.small.values()}
    inputs = {path: _state(path) for _, path in files}
    told = [(f"{role}/{path.name}", *inputs[path]) for role, path in files]
    name = identity(merge, told, job.shard_bytes)
    there = staging.same(job.output, name)
    if not there:
        _free(job.output, merge.bytes)
    return Prepared(job, merge, name, inputs, small, there)


def _place(output: Path) -> Path:
    """Where the output gets its name by a rename, which no link and no mounted disk can be."""
    try:
        place = output.resolve()
    except (OSError, RuntimeError):
        raise UsageError(f"{output} is a link that leads nowhere: give another --output") from None
    if os.path.ismount(place):
        raise UsageError(f"{output} is a whole disk: give a folder on it, {output / 'merged'}")
    return place


def _same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _not_merged_already(job: Job, merge: Merge) -> None:
    sums = {one.name: one for shard in merge.shards for one in shard.sums}
    one = max(sums.values(), key=lambda each: ("self_attn.q_proj" in each.name, each.name))
    base, delta = (checkpoint.sample(side, 1 << 13) for side in (one.base, one.delta))
    if (what := alike(base, delta)) is not None:
        raise UsageError(f"{job.delta} {what} ({one.name}): give the folder of the delta")


def _small(
    job: Job,
    config: Mapping[str, Any],
    base: Mapping[str, Path],
    delta: Mapping[str, Path],
    rows: int,
) -> dict[str, bytes | Mapping[str, Any]]:
    """The output's small files: configuration of the base, tokenizer of the delta, corrected."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        if name not in delta:
            raise UsageError(
                f"{job.delta / name} is missing: fetch it, the tokenizer is the delta's"
            )
    model = delta["tokenizer.model"].read_bytes()
    if (what := checkpoint.no_checkpoint(model[:512])) is not None:
        raise UsageError(f"{delta['tokenizer.model']} {what}")
    if not model:
        raise UsageError(f"{delta['tokenizer.model']} is empty: {checkpoint.AGAIN}")

    def read(side: Mapping[str, Path], name: str) -> dict[str, Any] | None:
        return checkpoint.json_object(side[name]) if name in side else None

    small: dict[str, bytes | Mapping[str, Any]] = {
        "config.json": fixes.config(config, rows),
        "generation_config.json": fixes.generation_config(read(base, "generation_config.json")),
        "tokenizer_config.json": fixes.tokenizer_config(read(delta, "tokenizer_config.json") or {}),
        "special_tokens_map.json": fixes.special_tokens_map(
            read(delta, "special_tokens_map.json") or {}
        ),
        "tokenizer.model": model,
    }
    for name in ("added_tokens.json", "tokenizer.json"):
        if name in delta:
            small[name] = delta[name].read_bytes()
    return small


def _free(output: Path, needed: int) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"{output} is there already, and not of this merge: remove it, or give another --output"
        )
    parent = next(path for path in output.parents if path.exists())
    # A killed merge's bytes are used again.
    left = shutil.disk_usage(parent).free + staging.kept(output)
    if left < needed + _MARGIN:
        raise UsageError(
            f"{parent} has {_gb(left)} free, the merged model takes {_gb(needed + _MARGIN)}: "
            "make room, or give --output on another disk"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def run(prepared: Prepared, report: Callable[[Progress], None]) -> Result:
    """Do it; an earlier run that was killed is continued. `report` is called now and then.

    Raises FleetError, one line, for a full disk, an input that changed meanwhile, a read error.
    """
    job, merge = prepared.job, prepared.merge
    try:
        with staging.alone(job.output) as journal:
            # Another merge may have ended since.
            if staging.same(job.output, prepared.identity):
                staging.clean(job.output)
                return _result(prepared, "there", kept=merge.bytes)
            _free(job.output, merge.bytes)
            stage = staging.Staging(job.output, journal, prepared.identity)
            kept = _Writing(prepared, stage, report).all()
            for name, content in prepared.small.items():
                if isinstance(content, bytes):
                    stage.bytes(name, content)
                else:
                    stage.text(name, content)
            if (listed := index(merge)) is not None:
                stage.text(*listed)
            _record(prepared, stage)
            changed = [path for path, state in prepared.inputs.items() if _state(path) != state]
            if changed:
                raise FleetError(f"{changed[0]} changed during the merge: merge again")
            stage.become_the_output()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FleetError(
                f"{job.output.parent} is full: make room and merge again, which continues from here"
            ) from None
        where = error.filename or job.output
        raise FleetError(f"{where}: {error.strerror}: check permissions and the disk") from None
    return _result(prepared, "merged", kept)


def _result(prepared: Prepared, state: str, kept: int) -> Result:
    merge = prepared.merge
    count = sum(len(shard.sums) for shard in merge.shards)
    return Result(state, merge.version, count, merge.bytes, kept, merge.rows, len(merge.dropped))


def _record(prepared: Prepared, stage: staging.Staging) -> None:
    job = prepared.job
    sizes = {path.name: path.stat().st_size for path in sorted(stage.folder.iterdir())}
    sizes.pop(staging.RECORD, None)
    made = {
        "identity": prepared.identity,
        "version": prepared.merge.version,
        "base": job.base.resolve().name,
        "delta": job.delta.resolve().name,
        "files": sizes,
    }
    stage.text(staging.RECORD, made)


@dataclass
class _Writing:
    """The tensors of one merge, on their way to the staging folder."""

    prepared: Prepared
    stage: staging.Staging
    report: Callable[[Progress], None]
    done: int = 0
    kept: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self) -> int:
        """Write every shard, have it on the disk, and return the bytes that were there before."""
        merge, job = self.prepared.merge, self.prepared.job
        places: dict[str, tuple[Output, int]] = {}
        with ExitStack() as stack:
            files = []
            for shard in merge.shards:
                offsets = self._place(shard)
                file = stack.enter_context(Output(self.stage.folder / shard.file))
                files.append(file)
                places |= {name: (file, offset) for name, offset in offsets.items()}
            sources = {path: _source(path, stack) for path in self.prepared.inputs}
            pool = stack.enter_context(ThreadPoolExecutor(job.threads))
            local = threading.local()

            def one(each: Sum) -> None:
                if not hasattr(local, "buffers"):
                    local.buffers = _Buffers(job.memory // job.threads)
                self._one(each, *places[each.name], sources, local.buffers)

            sums = [each for shard in merge.shards for each in shard.sums]
            self._wait([pool.submit(one, each) for each in sums])
            if merge.form == "bin":
                for shard, file in zip(merge.shards, files, strict=True):
                    _seal(file, self.stage.written, shard)
            self._wait([pool.submit(file.sync) for file in files])
        return self.kept

    def _wait(self, futures: Sequence[Future[None]]) -> None:
        waiting: set[Future[None]] = set(futures)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                self.report(Progress(self.done, self.prepared.merge.bytes, self.kept))
        finally:
            if waiting:
                self.stop.set()
            for future in waiting:
                future.cancel()

    def _place(self, shard: Shard) -> dict[str, int]:
        """Make the shard's file, as large as it will be; returns where its tensors go."""
        path = self.stage.folder / shard.file
        if self.prepared.merge.form == "safetensors":
            head, offsets = header(shard)
            size = len(head) + shard.bytes
            if not _begins(path, head, size):
                self._forget(shard)
                with open(staging.create(path), "wb") as stream:
                    stream.write(head)
                    stream.truncate(size)
            return offsets
        if not path.exists():
            self._forget(shard)
            aside = path.with_suffix(".part")
            _empty_bin(shard, aside)
            os.chmod(aside, staging.FILE_MODE)
            aside.rename(path)
        return {name: one.offset for name, one in checkpoint.tensors_of(path).items()}

    def _forget(self, shard: Shard) -> None:
        for one in shard.sums:
            self.stage.written.pop(one.name, None)

    def _one(
        self,
        each: Sum,
        file: Output,
        offset: int,
        sources: Mapping[Path, int],
        buffers: _Buffers,
    ) -> None:
        """Verify a tensor that an earlier run wrote, or write it."""
        crc = self.stage.written.get(each.name)
        if crc is not None and buffers.checksum(file.file, offset, each.bytes, self.stop) == crc:
            self._count(each.bytes, kept=True)
            return
        crc = buffers.add(
            each, sources, file, offset, lambda done: self._count(done, kept=False), self.stop
        )
        if not self.stop.is_set():
            self.stage.written[each.name] = crc
            self.stage.note(each.name, crc)

    def _count(self, size: int, *, kept: bool) -> None:
        with self.lock:
            self.done += size
            self.kept += size if kept else 0


def _source(path: Path, stack: ExitStack) -> int:
    file = os.open(path, os.O_RDONLY)
    stack.callback(os.close, file)
    return file


def _begins(path: Path, head: bytes, size: int) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(head)) == head and os.fstat(stream.fileno()).st_size == size
    except FileNotFoundError:
        return False


def _empty_bin(shard: Shard, path: Path) -> None:
    """torch's zip format with room for every tensor; the room takes no space on the disk yet."""
    import torch

    # Memory that is never touched is never there.
    tensors = {one.name: torch.empty(one.shape, dtype=torch.float16) for one in shard.sums}
    with torch.serialization.skip_data():
        torch.save(tensors, path)


def _seal(file: Output, crcs: Mapping[str, int], shard: Shard) -> None:
    """Write the checksums of a .bin into its zip records (APPNOTE.TXT, 4.3.9 and 4.3.12)."""
    stored = checkpoint.tensors_of(file.path)
    by_start = {stored[one.name].offset: one for one in shard.sums}
    with zipfile.ZipFile(file.path) as archive, file.path.open("rb") as stream:
        record = archive.start_dir
        for member in archive.infolist():
            stream.seek(record + 28)
            lengths = [int.from_bytes(stream.read(2), "little") for _ in range(3)]
            stream.seek(member.header_offset + 26)
            local = [int.from_bytes(stream.read(2), "little") for _ in range(2)]
            one = by_start.get(member.header_offset + 30 + sum(local))
            if one is not None:
                crc = crcs[one.name].to_bytes(4, "little")
                file.patch(crc, record + 16)
                # Torch writes the checksum once more behind the data, after four bytes.
                file.patch(crc, stored[one.name].offset + one.bytes + 4)
            record += 46 + sum(lengths)


class _Buffers:
    """What one thread reads into, adds in and writes from."""

    def __init__(self, memory: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._torch = torch
        # Whole pages.
        self.elements = max(PAGE, min(_PIECE, memory // _ELEMENT) // PAGE * PAGE)
        # Anonymous pages: what is not touched takes no memory.
        self.base, self.delta = (mmap.mmap(-1, 4 * self.elements) for _ in range(2))
        self.sum = mmap.mmap(-1, 2 * self.elements + PAGE)

    def checksum(self, file: int, offset: int, size: int, stop: threading.Event) -> int:
        """crc32 of a piece of a file."""
        crc, view = 0, memoryview(self.base)
        for start in range(0, size, len(view)):
            if stop.is_set():
                return -1
            piece = view[: min(len(view), size - start)]
            _read(file, piece, offset + start)
            crc = zlib.crc32(piece, crc)
        return crc

    def add(
        self,
        each: Sum,
        sources: Mapping[Path, int],
        file: Output,
        offset: int,
        count: Callable[[int], None],
        stop: threading.Event,
    ) -> int:
        """Write base + delta in float16 at an offset of a file; returns the crc32 of it."""
        torch, crc = self._torch, 0
        total, start = each.delta.elements, 0
        while start < total:
            if stop.is_set():
                return -1
            at = offset + 2 * start
            # The sum lies in memory as it will in the file's pages, and pieces end with a page.
            ahead = at % PAGE
            length = min(self.elements - ahead // 2, total - start)
            base = self._load(self.base, each.base, sources, start, length)
            delta = self._load(self.delta, each.delta, sources, start, length)
            out = torch.frombuffer(self.sum, dtype=torch.float16, offset=ahead, count=length)
            torch.add(base, delta, out=out)
            piece = memoryview(self.sum)[ahead : ahead + 2 * length]
            crc = zlib.crc32(piece, crc)
            file.write(piece, at)
            count(2 * length)
            start += length
        return crc

    def _load(
        self, buffer: mmap.mmap, one: Stored, sources: Mapping[Path, int], start: int, length: int
    ) -> Any:
        """Elements of a tensor as float16; behind its end, zero."""
        torch = self._torch
        width = one.bytes // one.elements
        there = max(0, min(length, one.elements - start))
        view = memoryview(buffer)[: length * width]
        _read(sources[one.file], view[: there * width], one.offset + start * width)
        kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        values = torch.frombuffer(buffer, dtype=kinds[one.dtype], count=length)
        values[there:] = 0
        return values.to(torch.float16)


def _read(file: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise FleetError("an input became shorter during the merge: merge again")
        view, offset = view[count:], offset + count
