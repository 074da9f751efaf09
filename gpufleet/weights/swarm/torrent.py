"""Makes the torrent of a push (BEP 52), hashing each file of this machine once until it changes."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from gpufleet.catalog import WeightFile
from gpufleet.errors import FleetError
from gpufleet.weights.swarm.plan import BLOCK, piece_root, piece_size, root

Stat = tuple[int, int, int]


@dataclass(frozen=True)
class Source:
    """A file of a push on this machine, as it was when the push began."""

    file: WeightFile
    place: Path
    stat: Stat
    """Size, mtime in nanoseconds, inode."""

    def changed(self) -> bool:
        """Whether it is no longer what it was."""
        try:
            return stat_of(self.place) != self.stat
        except OSError:
            return True


@dataclass(frozen=True)
class Torrent:
    """A torrent whose hash only the members of one push know: it carries a salt of the push's."""

    content: bytes
    names: dict[str, str]
    """Path of each file in the catalogue, and its name in the torrent; empty files have none."""
    empty: tuple[str, ...]


def stat_of(path: Path) -> Stat:
    """What changes with a file's content. Raises OSError."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def sources(files: Sequence[tuple[WeightFile, Path]]) -> list[Source]:
    """The files as they are now. Raises FleetError for one that is missing or of another size."""
    found = []
    for file, place in files:
        try:
            source = Source(file, place, stat_of(place))
        except OSError as error:
            raise FleetError(f"weight file {place}: {error.strerror}: fetch it again") from None
        if source.stat[0] != file.bytes:
            raise FleetError(f"weight file {place}: {source.stat[0]} bytes, expected {file.bytes}")
        found.append(source)
    return found


def make(found: Sequence[Source], bencode: Any) -> Torrent:
    """The torrent of these files; `bencode` is libtorrent's."""
    size = piece_size(sum(source.file.bytes for source in found))
    tree: dict[str, Any] = {}
    layers: dict[bytes, bytes] = {}
    names: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number, source in enumerate(found):
            if not source.file.bytes:
                continue
            name = f"f{number:06}"
            hashes = _pieces(source, size, pool)
            top = root(hashes, size)
            tree[name] = {"": {"length": source.file.bytes, "pieces root": top}}
            names[source.file.path] = name
            if source.file.bytes > size:
                layers[top] = b"".join(hashes)
    info = {
        "file tree": tree,
        "meta version": 2,
        "name": "weights",
        "piece length": size,
        "private": 1,
        "salt": secrets.token_bytes(32),
    }
    empty = tuple(source.file.path for source in found if not source.file.bytes)
    return Torrent(bencode({"info": info, "piece layers": layers}), names, empty)


def _pieces(source: Source, size: int, pool: ThreadPoolExecutor) -> list[bytes]:
    """The hashes of a file's pieces: remembered, or made on all cores."""
    kept = platformdirs.user_cache_path("gpufleet") / "pieces" / f"{source.file.sha256}-{size}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        document = json.loads(kept.read_text("utf-8"))
        if tuple(document["stat"]) == source.stat:
            data = base64.b64decode(document["hashes"])
            return [data[at : at + 32] for at in range(0, len(data), 32)]
    whole = source.file.bytes <= size
    with source.place.open("rb") as stream:

        def one(at: int) -> bytes:
            return piece_root(os.pread(stream.fileno(), size, at), 0 if whole else size // BLOCK)

        hashes = list(pool.map(one, range(0, source.file.bytes, size)))
    if source.changed():
        raise FleetError(changed_line(source))
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(f".{os.getpid()}")
        text = base64.b64encode(b"".join(hashes)).decode()
        aside.write_text(json.dumps({"stat": source.stat, "hashes": text}), "utf-8")
        aside.replace(kept)
    return hashes


def changed_line(source: Source) -> str:
    """What is said of a file that changed."""
    return (
        f"weight file {source.place} changed on this machine during the push: "
        "verify it, then push again"
    )
