"""What of the weight sets is in a store: what is there, missing, wrong, and what to do about it."""

from __future__ import annotations

import datetime as dt
import errno
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gpufleet import ROOT, catalog
from gpufleet.catalog import WeightFile, WeightSet, plain
from gpufleet.errors import FleetError
from gpufleet.weights import inspect, store
from gpufleet.weights.digests import Digests, Progress
from gpufleet.weights.inspect import CHECKPOINTS, Flaw
from gpufleet.weights.store import Learnt, Store

#: `here`: whole by its size, and not hashed since it changed. `partial`: a download that goes on.
State = Literal["verified", "here", "partial", "missing", "wrong"]

#: What `fleet weights verify` writes as the origin of files that it was the first to see.
SEEN = "seen here, whole and consistent"


#: Flaws that getting the file again would not mend: it came like this, or the disk is at fault.
_NOT_BY_GETTING = {"unreadable", "old-tokenizer", "old-format", "delta-not-merged"}


@dataclass(frozen=True)
class File:
    """One file of a set: what it must be, and what it is."""

    path: str
    """Below the set's folder."""
    state: State
    here: int
    """Bytes that are there."""
    bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    known: Literal["catalogue", "learnt", "no"] = "no"
    flaw: Flaw | None = None


@dataclass(frozen=True)
class Stock:
    """A set in a store. `files` are all that are known of it; `lacks` says what else it needs."""

    name: str
    weights: WeightSet
    root: Path
    files: tuple[File, ...]
    lacks: str = ""
    learnt: Learnt | None = None
    """What this look at it added to the store."""
    unlearnt: str = ""
    """Why it could not."""

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return Store(self.root).folder(self.weights)

    @property
    def state(self) -> State:
        """Of the set: that of its worst file, `partial` where some are there."""
        states = {file.state for file in self.files}
        if "wrong" in states:
            return "wrong"
        if not states or states == {"missing"}:
            return "missing"
        if states & {"missing", "partial"} or self.lacks:
            return "partial"
        return "here" if "here" in states else "verified"

    @property
    def here(self) -> int:
        """Bytes that are there."""
        return sum(file.here for file in self.files)

    @property
    def bytes(self) -> int | None:
        """Bytes of the whole set, None while some size is not known."""
        if self.lacks or any(file.bytes is None for file in self.files):
            return None
        return sum(file.bytes or 0 for file in self.files)

    @property
    def next(self) -> tuple[str, ...]:
        """Commands that would complete or mend it, the first being the usual one."""
        if self.state == "verified":
            return ()
        if self.state == "here":
            return (Store(self.root).command("verify", self.name),)
        return ways(self.name, self.weights, self.root)

    def problems(self, *, missing: bool = True) -> list[tuple[str, str, str]]:
        """Kind, path and one line of everything that is wrong; `missing` files are one line."""
        lines: list[tuple[str, str, str]] = [
            (one.flaw.kind, one.path, self.line(one))
            for one in self.files
            if one.flaw is not None and one.flaw.kind != "missing"
        ]
        if missing:
            absent = [one.path for one in self.files if one.state in ("missing", "partial")]
            if absent or self.lacks:
                lines.append(("missing", ", ".join(absent), self._absent(absent)))
        if self.unlearnt:
            lines.append(("unreadable", "", self.unlearnt))
        return lines

    def line(self, file: File) -> str:
        """What is wrong with a file, where, and what to do; empty if nothing is."""
        flaw = file.flaw
        if flaw is None:
            return ""
        again = " or ".join(ways(self.name, self.weights, self.root))
        do = flaw.do or again
        if flaw.do and again and flaw.kind not in _NOT_BY_GETTING:
            do = f"{flaw.do}, or {again}"
        return f"{self.folder / file.path} {flaw.what}: {do}"

    def _absent(self, absent: Sequence[str]) -> str:
        again = " or ".join(ways(self.name, self.weights, self.root))
        if len(absent) == 1:
            (one,) = (file for file in self.files if file.path == absent[0])
            begun = f"is not whole yet: {one.here} of {one.bytes or '?'} bytes"
            what = begun if one.state == "partial" else "is missing"
            return f"{self.folder / one.path} {what}: {again}"
        if len(absent) == len(self.files):
            return f"{self.folder}: no file of {self.name} is there: {again}"
        if absent:
            names = ", ".join(absent[:3]) + (" and others" if len(absent) > 3 else "")
            return f"{self.folder}: {len(absent)} files are missing ({names}): {again}"
        return f"{self.folder}: {self.lacks}: {again}"


def ways(name: str, weights: WeightSet, root: Path) -> tuple[str, ...]:
    """What gets a set, or a file of it, again into the store at `root`."""
    if weights.in_checkout is not None:
        own = ROOT / weights.in_checkout
        return (f"git restore {own}" if root == own else f"copy it from {own}",)
    store = Store(root)
    found = [store.command("merge", name)] if weights.made else []
    if any(source.by_hand is None for source in weights.sources):
        found.append(store.command("fetch", name))
    elif weights.sources:
        place = weights.sources[0].by_hand
        then = store.command("fetch", name, "--from FOLDER")
        found.append(f"download it from {place}, then {then}")
    return tuple(found)


def place(name: str, given: Path | None) -> Store:
    """The store that a set is looked for in: the one given, else the checkout's or the user's."""
    inside = catalog.weight_set(name).in_checkout
    if given is not None:
        return Store(given)
    return Store(ROOT / inside if inside is not None else store.default())


def look(name: str, where: Store, digests: Digests) -> Stock:
    """What is there of a set, by names and sizes and what was hashed before; nothing is read.

    Raises UsageError for an unknown name, FleetError for a broken entry or record.
    """
    weights = catalog.weight_set(name)
    folder = where.folder(weights)
    files = [_seen(where, weights, folder, file, digests) for file in _wanted(name, weights, where)]
    return Stock(name, weights, where.root, tuple(files), _lacking(name, weights, where, files))


def _wanted(name: str, weights: WeightSet, where: Store) -> Iterable[File]:
    """Every file that is known to belong to the set; of an unlisted one, what lies there too."""
    record = where.learnt(name)
    learnt = {file.path: file for file in record.files} if record else {}
    for listed in weights.files:
        other = learnt.pop(listed.path, None)
        size = listed.bytes if listed.bytes is not None or other is None else other.bytes
        if listed.sha256 is not None:
            yield File(listed.path, "missing", 0, size, listed.sha256, None, "catalogue")
        elif other is not None:
            yield File(listed.path, "missing", 0, size, other.sha256, listed.md5, "learnt")
        else:
            yield File(listed.path, "missing", 0, size, None, listed.md5)
    for file in learnt.values():
        yield File(file.path, "missing", 0, file.bytes, file.sha256, None, "learnt")
    if record is None and not weights.listed:
        listed_already = {file.path for file in weights.files}
        for path in sorted(_lying(where.folder(weights), weights) - listed_already):
            yield File(path, "missing", 0)


def _lying(folder: Path, weights: WeightSet) -> set[str]:
    """Names that the set's patterns or its index give to files."""
    found = set(inspect.shards(folder, weights).values())
    if folder.is_dir():
        found |= {path.name for path in folder.iterdir() if path.is_file()}
    named = {name for name in found if any(fnmatch.fnmatch(name, one) for one in weights.include)}
    return {name for name in named if plain(name)}


def _lacking(name: str, weights: WeightSet, where: Store, files: Sequence[File]) -> str:
    """What a set must have that no list names, in words; empty if nothing."""
    if weights.listed or where.learnt(name) is not None:
        return ""
    there = {file.path for file in files}
    if not any(Path(path).suffix in CHECKPOINTS for path in there):
        return "no checkpoint is there"
    plain = [one for one in weights.include if not any(sign in one for sign in "*?[")]
    if "*.json" in weights.include:
        plain.append("config.json")
    absent = [path for path in plain if path not in there]
    return f"{', '.join(absent)} is missing" if absent else ""


def _seen(where: Store, weights: WeightSet, folder: Path, file: File, digests: Digests) -> File:
    path = folder / file.path
    try:
        here = path.stat().st_size
        known = digests.known(path)
    except FileNotFoundError:
        begun = _begun(where.root / ".partial" / weights.place(file.path))
        if not begun and path.exists():  # a fetch has just given it its name
            return _seen(where, weights, folder, file, digests)
        return replace(file, state="partial" if begun else "missing", here=max(begun, default=0))
    except OSError:
        flaw = inspect.flaw(path)
        return replace(file, state="wrong", flaw=flaw)
    if file.bytes is not None and here != file.bytes:
        found = inspect.flaw(path, file.bytes)
        size = Flaw("wrong-size", f"has {here} bytes, expected {file.bytes}")
        return replace(file, state="wrong", here=here, flaw=found or size)
    if file.sha256 is not None and known == file.sha256:
        return replace(file, state="verified", here=here)
    return replace(file, state="here", here=here)


def _begun(place: Path) -> list[int]:
    """Bytes of unfinished downloads of a file: its name, a dot, the first digits of its hash."""
    named = re.compile(re.escape(place.name) + r"\.[0-9a-f]{0,16}")
    try:
        return [one.stat().st_size for one in place.parent.iterdir() if named.fullmatch(one.name)]
    except (FileNotFoundError, NotADirectoryError):  # a fetch may end meanwhile
        return []


@dataclass
class Verified:
    """What came of verifying sets."""

    sets: list[Stock]
    pairs: list[str] = field(default_factory=list)
    """Lines about sets that do not fit each other."""

    def problems(self, *, missing: bool = True) -> list[str]:
        """Everything that is wrong, a line each."""
        lines = [line for one in self.sets for _, _, line in one.problems(missing=missing)]
        return lines + self.pairs


def verify(
    sets: Sequence[tuple[str, Store]],
    *,
    deep: bool = False,
    learn: bool = True,
    models: Mapping[str, Sequence[str]] | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Verified:
    """Hash and inspect sets, and learn what the catalogue does not know of those that are right.

    Files that were hashed before and have not changed are read again only if `deep`. `models`,
    each with the names of its sets, are those whose sets are held against each other. Raises as
    `look` does.
    """
    digests = Digests()
    stocks = [look(name, where, digests) for name, where in sets]
    paths = [one.folder / file.path for one in stocks for file in one.files if file.state in _WHOLE]
    sums = digests.of(paths, deep=deep, watch=watch)
    alias = _names(stocks)
    checked = [_together(_checked(one, sums, alias)) for one in stocks]
    if learn:
        checked = [_learn(one, sums) for one in checked]
    pairs: list[str] = []
    for name, own in (models or {}).items():
        for root in dict.fromkeys(one.root for one in checked):
            parts = {s.name: s.weights for s in checked if s.name in own and s.root == root}
            pairs += [f"model {name}: {line}" for line in inspect.pair(root, parts)]
    return Verified(checked, pairs)


_WHOLE = ("here", "verified")


def _names(stocks: Sequence[Stock]) -> dict[str, str]:
    """Digest -> which file of which set has it, as far as anybody knows."""
    found: dict[str, str] = {}
    for name in catalog.weight_sets():
        for listed in catalog.weight_set(name).files:
            if listed.sha256 is not None:
                found.setdefault(listed.sha256, f"{listed.path} of {name}")
    for one in stocks:
        for file in one.files:
            if file.sha256 is not None:
                found.setdefault(file.sha256, f"{file.path} of {one.name}")
    return found


def _checked(stock: Stock, sums: Mapping[Path, str | OSError], names: Mapping[str, str]) -> Stock:
    files = [
        _check(stock, file, sums[stock.folder / file.path], names) if file.state in _WHOLE else file
        for file in stock.files
    ]
    return replace(stock, files=tuple(files))


def _check(stock: Stock, file: File, said: str | OSError, names: Mapping[str, str]) -> File:
    path = stock.folder / file.path
    flaw: Flaw | None
    if isinstance(said, OSError):
        what, do = f"cannot be read: {said.strerror}", "check its permissions and the disk"
        if said.errno == errno.EBUSY:
            what, do = str(said.strerror), "let the change end, then verify again"
        flaw = Flaw("unreadable", what, do)
    elif said == file.sha256:
        return replace(file, state="verified")
    else:
        flaw = _flaw(path, file, said, names)
    return replace(file, state="wrong", flaw=flaw) if flaw else replace(file, state="here")


def _flaw(path: Path, file: File, said: str, names: Mapping[str, str]) -> Flaw | None:
    """What is wrong with a whole file; None for one of which nothing else is known."""
    found = inspect.flaw(path, file.bytes)
    if file.sha256 is not None:
        whole = file.bytes is not None and path.stat().st_size == file.bytes
        if found is not None and (found.kind == "unfinished" or not whole):
            return found
        if said in names:
            return Flaw("other-file", f"is {names[said]}, under another name")
        whose = "the catalogue's" if file.known == "catalogue" else "what was learnt"
        what = f"is corrupt: sha256 {said[:12]}… is not {whose} ({file.sha256[:12]}…)"
        return Flaw("wrong-sha256", what)
    if found is None and file.md5 is not None:
        md5 = Digests("md5").of([path])[path]
        if md5 != file.md5:
            what = f"is corrupt: its md5 is not the catalogue's ({file.md5[:12]}…)"
            return Flaw("wrong-sha256", what)
    return found


def _together(stock: Stock) -> Stock:
    """Add what is wrong between the files; what the catalogue's hash proves right stays right."""
    whole = [file for file in stock.files if file.state in _WHOLE]
    proven = {f.path for f in whole if f.known == "catalogue" and f.state == "verified"}
    paths = [file.path for file in whole]
    doubtful = set(paths) - proven
    found = inspect.together(stock.folder, stock.weights, paths) if doubtful else []
    flaws = {one.path: one.flaw for one in reversed(found) if one.path in doubtful}
    files = [
        replace(file, state="wrong", flaw=flaws[file.path]) if file.path in flaws else file
        for file in stock.files
    ]
    return replace(stock, files=tuple(files))


def _learn(stock: Stock, sums: Mapping[Path, str | OSError]) -> Stock:
    if stock.state != "here":
        return stock
    files = tuple(
        WeightFile(path=one.path, bytes=one.here, sha256=str(sums[stock.folder / one.path]))
        for one in stock.files
    )
    learnt = Learnt(SEEN, files, dt.date.today().isoformat())
    try:
        Store(stock.root).learn(stock.name, learnt)
    except FleetError as error:
        return replace(stock, unlearnt=str(error))
    known = {file.path: file.sha256 for file in files}
    verified = [
        replace(
            one,
            state="verified",
            bytes=one.here,
            sha256=known[one.path],
            known="learnt" if one.known == "no" else one.known,
        )
        for one in stock.files
    ]
    return replace(stock, files=tuple(verified), learnt=learnt)
