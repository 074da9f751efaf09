"""Decides what a host lacks of a model's weights, what it has already and what may go.

On a host every content lies once, under its sha256, in ROOT/weights/blobs; a version of a model is
a folder of symbolic links to them, ROOT/weights/MODEL-DIGEST, that appears by one rename. Links of
this kind, unlike hard ones, leave a file's ctime alone, by which its verification is remembered.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from gpufleet.catalog import WeightFile

#: Left free on a host's disk beside the files, in bytes.
ROOM = 256 << 20

#: Prints what a host holds, for `parse`; $1 is the folder of the deploy. No file is read. A blob
#: is `recorded` while size, ctime with nanoseconds and inode are those of when it was verified:
#: no write, and no copy over it, leaves the ctime as it was, whatever mtime says. `earlier` are
#: files of the layout before, ROOT/weights/MODEL, whose record holds by the same rule.
STORED = r"""
w=$1/weights b=$1/weights/blobs v=/dev/null
[ -f "$b/.verified" ] && v=$b/.verified
if [ -d "$b" ]; then
  now=$(cd "$b" && stat -c '%n %s %.9Z %i' -- [0-9a-f]* 2>/dev/null)
  said='\([0-9a-f]*\) \([0-9]*\) .*'
  printf '%s\n' "$now" | grep -xF -f "$v" | sed -n "s/^$said/recorded\t\1\t\2/p"
  printf '%s\n' "$now" | grep -vxF -f "$v" | sed -n "s/^$said/unsure\t\1\t\2/p"
fi
if [ -d "$w" ]; then
  find "$w/" -mindepth 1 -maxdepth 1 -type d ! -name blobs ! -name '.*' \
    -printf 'version\t%f\t%T@\n'
  find "$w/" -mindepth 2 -type l -printf 'link\t%P\t%l\n'
  for r in "$w"/*/.verified; do
    d=${r%/.verified}
    [ -f "$r" ] && [ "$d" != "$b" ] || continue
    while read -r sum size ctime inode path; do
      [ -f "$d/$path" ] && [ ! -L "$d/$path" ] || continue
      [ "$(stat -c '%s %.9Z %i' "$d/$path")" = "$size $ctime $inode" ] || continue
      printf 'earlier\t%s\t%s %s %s\t%s\n' "$sum" "$size" "$ctime" "$inode" "$d/$path"
    done < "$r"
  done
fi
for d in "$1"/incoming/weights-*/; do
  [ -d "$d" ] || continue
  d=${d%/}
  find "$d" -type f -printf "staged\t${d##*/weights-}\t%s\t%b\t%P\n"
done
# Where they arrive and where they stay may be two disks, if one of the folders is a link.
printf 'free_kib\t%s\n' "$(for d in "$w" "$1/incoming"; do
  while [ ! -d "$d" ]; do d=${d%/*}; d=${d:-/}; done
  df -Pk "$d" | awk 'NR==2 {print $4}'
done | sort -n | head -n 1)"
command -v rsync >/dev/null && printf 'rsync\tyes\n'
:
"""


def manifest_digest(files: Iterable[WeightFile]) -> str:
    """16 hex digits that name a set of files by path, size and content."""
    text = "\n".join(f"{f.path} {f.bytes} {f.sha256}" for f in sorted(files, key=lambda f: f.path))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def version(model: str, files: Iterable[WeightFile]) -> str:
    """The name of a model's files as they are now."""
    return f"{model}-{manifest_digest(files)}"


def folder(root: PurePosixPath | str, version: str) -> PurePosixPath:
    """Where a version's files are on a host."""
    return PurePosixPath(root) / "weights" / version


def staging(root: PurePosixPath | str, version: str) -> PurePosixPath:
    """Where a version's files arrive on a host, before they are verified."""
    return PurePosixPath(root) / "incoming" / f"weights-{version}"


def target(path: str, sha256: str) -> str:
    """What a version's link of this path says."""
    return f"{'../' * (path.count('/') + 1)}blobs/{sha256}"


@dataclass(frozen=True)
class Earlier:
    """A verified file of the layout before: its path on the host, and its stat as recorded."""

    path: str
    stat: str

    @property
    def bytes(self) -> int:
        """Its size."""
        return int(self.stat.partition(" ")[0])


@dataclass(frozen=True)
class Hashed:
    """What a blob was found to be: its digest, and its line for the record."""

    sha256: str
    line: str


@dataclass(frozen=True)
class Stored:
    """What a host holds of weights, by sha256 where nothing else is said; sizes in bytes."""

    recorded: Mapping[str, int] = field(default_factory=dict)
    """Verified, and untouched since."""
    unsure: Mapping[str, int] = field(default_factory=dict)
    """Touched since they were verified, or never."""
    hashed: Mapping[str, Hashed] = field(default_factory=dict)
    """Those that were read just now."""
    earlier: Mapping[str, Earlier] = field(default_factory=dict)
    links: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Version -> path -> what the link says."""
    versions: Mapping[str, float] = field(default_factory=dict)
    """Folders of ROOT/weights -> when they changed last, in seconds since the epoch."""
    staged: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Version -> path -> bytes that have arrived, verified or not."""
    free: int = 0
    rsync: bool = False
    """Whether the host has the program."""

    def right(self, sha256: str) -> bool:
        """Whether the host has this content, by its record or by what was just read."""
        if (seen := self.hashed.get(sha256)) is not None:
            return seen.sha256 == sha256
        return sha256 in self.recorded


def parse(lines: Iterable[str]) -> Stored:
    """Read what STORED printed, and `hash` lines: digest by name, digest found, record line.

    Lines of other kinds are passed over. Raises ValueError for one that is broken.
    """
    recorded: dict[str, int] = {}
    unsure: dict[str, int] = {}
    hashed: dict[str, Hashed] = {}
    earlier: dict[str, Earlier] = {}
    links: dict[str, dict[str, str]] = {}
    versions: dict[str, float] = {}
    staged: dict[str, dict[str, int]] = {}
    free, rsync = 0, False
    for line in lines:
        kind, *words = line.split("\t")
        if kind in ("recorded", "unsure"):
            sha256, size = words
            (recorded if kind == "recorded" else unsure)[sha256] = int(size)
        elif kind == "hash":
            name, sha256, record = words
            hashed[name] = Hashed(sha256, record)
        elif kind == "earlier":
            sha256, stat, path = words
            earlier[sha256] = Earlier(path, stat)
        elif kind == "version":
            name, changed = words
            versions[name] = float(changed)
        elif kind == "link":
            place, said = words
            name, _, path = place.partition("/")
            links.setdefault(name, {})[path] = said
        elif kind == "staged":
            name, size, blocks, path = words
            # A file that was made at its full size takes blocks only where something arrived.
            staged.setdefault(name, {})[path] = min(int(size), int(blocks) * 512)
        elif kind == "free_kib":
            free = int(words[0]) * 1024
        elif kind == "rsync":
            rsync = True
    return Stored(
        recorded, unsure, hashed, earlier, links, versions, staged, free=free, rsync=rsync
    )


@dataclass(frozen=True)
class Landing:
    """What brings a version of a model to a host."""

    version: str
    send: tuple[WeightFile, ...] = ()
    """Contents that the host lacks, each once."""
    adopt: tuple[tuple[str, Earlier], ...] = ()
    """Contents that lie there under the layout before."""
    record: tuple[str, ...] = ()
    """Lines for the record: blobs that were read and are right."""
    link: tuple[tuple[str, str], ...] = ()
    """Path and sha256 of every link that is missing or wrong."""
    bytes: int = 0
    """Of all of the version's files."""
    to_send: int = 0
    """Bytes that the host lacks, those that have arrived already left out."""

    @property
    def nothing(self) -> bool:
        """Whether the host is right as it is."""
        return not (self.send or self.adopt or self.record or self.link)

    @property
    def sending(self) -> int:
        """Bytes of the files to send, from their beginnings."""
        return sum(file.bytes for file in self.send)


def landing(model: str, files: Iterable[WeightFile], stored: Stored) -> Landing:
    """What it takes to have these files of the model on the host."""
    every = tuple(files)
    name = version(model, every)
    contents = {file.sha256: file for file in reversed(every)}
    links = stored.links.get(name, {})
    lacking = sorted(
        (file for sha256, file in contents.items() if not stored.right(sha256)),
        key=lambda file: file.path,
    )
    send = [file for file in lacking if file.sha256 not in stored.earlier]
    arrived = stored.staged.get(name, {})
    return Landing(
        version=name,
        send=tuple(send),
        adopt=tuple(
            (file.sha256, stored.earlier[file.sha256])
            for file in lacking
            if file.sha256 in stored.earlier
        ),
        record=tuple(
            seen.line
            for sha256, seen in stored.hashed.items()
            if sha256 in contents and seen.sha256 == sha256 and sha256 not in stored.recorded
        ),
        link=tuple(
            (file.path, file.sha256)
            for file in every
            if links.get(file.path) != target(file.path, file.sha256)
        ),
        bytes=sum(file.bytes for file in every),
        to_send=sum(max(file.bytes - arrived.get(file.path, 0), 0) for file in send),
    )


def _others(model: str, current: str, stored: Stored) -> list[str]:
    """The model's other versions, the newest first."""
    own = re.compile(re.escape(model) + r"-[0-9a-f]{16}")
    found = [name for name in stored.versions if own.fullmatch(name) and name != current]
    return sorted(found, key=lambda name: (-stored.versions[name], name))


def older(model: str, current: str, stored: Stored, keep: int) -> tuple[str, ...]:
    """Versions that may go once the demo works on the current one; the newest `keep` stay.

    The model's folder of the layout before always goes. Other models are not touched.
    """
    before = [model] if model in stored.versions else []
    return (*_others(model, current, stored)[keep:], *before)


def abandoned(model: str, current: str, stored: Stored) -> tuple[str, ...]:
    """Versions of the model, not the current one, of which a part has arrived."""
    own = re.compile(re.escape(model) + r"-[0-9a-f]{16}")
    found = (name for name in stored.staged if own.fullmatch(name) or name == model)
    return tuple(sorted(name for name in found if name != current))


def freed(model: str, current: str, stored: Stored, wanted: Iterable[str]) -> int:
    """Bytes that the removal of the model's older versions would free."""
    going = {*_others(model, current, stored)}

    def held(names: Iterable[str]) -> set[str]:
        return {
            said.rpartition("/")[2]
            for name in names
            for said in stored.links.get(name, {}).values()
        }

    sizes = {**stored.unsure, **stored.recorded}
    stay = held(stored.links.keys() - going) | set(wanted)
    return sum(sizes.get(sha256, 0) for sha256 in held(going) - stay)


def no_room(model: str, files: Iterable[WeightFile], stored: Stored) -> str | None:
    """What is wrong with the host's free space for the model's files; None if they fit."""
    every = tuple(files)
    plan = landing(model, [f for f in every if f.sha256 not in stored.unsure], stored)
    name = version(model, every)
    arrived = stored.staged.get(name, {})
    to_send = sum(max(file.bytes - arrived.get(file.path, 0), 0) for file in plan.send)
    missing = to_send + ROOM - stored.free
    if not to_send or missing <= 0:
        return None
    less = freed(model, name, stored, (file.sha256 for file in every))
    older_free = f"; older versions of {model} hold {size(less)}" if less else ""
    return (
        f"disk full: {size(stored.free)} free for weights, {size(to_send)} of {model} are to come "
        f"and {size(ROOM)} shall stay free: free {size(missing)} more{older_free}"
    )


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of ten: 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


@dataclass(frozen=True)
class Progress:
    """How far a host's weights are. `bytes` of `of` have arrived of what is sent to it."""

    state: Literal["waiting", "starting", "sending", "cut", "verifying", "done"]
    via: Literal["", "rsync", "swarm"] = ""
    bytes: int = 0
    of: int = 0
    rate: float = 0.0
    """Bytes a second."""
    peers: int = 0
    why: str = ""
    """What it waits for, in a few words."""
    files: int = 0
    """Of the version; set with those below once it is done."""
    sent: int = 0
    """Bytes that travelled."""
    there: int = 0
    """Bytes that the host had already."""
    seconds: float = 0.0
