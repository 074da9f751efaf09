"""Fetches the files of weight sets into a store: many at once, each until it is verified."""

from __future__ import annotations

import errno
import hashlib
import queue
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from gpufleet import catalog
from gpufleet.catalog import WeightFile, WeightSet, WeightSource
from gpufleet.errors import FleetError
from gpufleet.weights.fetch import found, hubs, plan, transfer
from gpufleet.weights.fetch.partial import FOLDER, Partial, blob, where
from gpufleet.weights.fetch.plan import Content, Policy, Remote, Turn
from gpufleet.weights.store import Learnt, Store

if TYPE_CHECKING:
    import requests

State = Literal[
    "waiting", "checking", "copying", "fetching", "resting", "present", "fetched", "picked",
    "failed", "stopped",
]  # fmt: skip

#: States in which a file is whole, verified and under its name.
DONE = ("present", "fetched", "picked")


class Stopped(Exception):
    """The person wants it to end."""


class Failed(Exception):
    """A file, or a set's list of files, cannot be had; the text is one line."""


@dataclass
class File:
    """One file of a set and how far it has come."""

    set: str
    path: str
    """Below the set's folder."""
    place: str
    """Below the store."""
    content: Content
    state: State = "waiting"
    bytes: int = 0
    of: int | None = None
    source: str = ""
    why: str = ""
    """Why it rests, failed, or came from another source."""
    sha256: str = ""
    """Of the verified file."""


@dataclass
class Set:
    """One weight set and its files; they are known once a source has listed them."""

    name: str
    weights: WeightSet
    files: list[File] = field(default_factory=list)
    origin: str = ""
    error: str = ""
    listings: dict[int, hubs.Listing | hubs.Refused] = field(default_factory=dict)
    sources: list[WeightSource] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def done(self) -> bool:
        """Whether the whole set is there."""
        return not self.error and all(file.state in DONE for file in self.files)


class Memory(Protocol):
    """What remembers the sha256 of files that have not changed since."""

    def known(self, path: Path) -> str | None:
        """The digest of a file as it is now, None where it must be read."""

    def remember(self, path: Path, sha256: str) -> None:
        """Take note of the digest of a file as it is now."""


@dataclass(frozen=True)
class Options:
    """What a person asked for beside the names."""

    store: Store
    endpoints: hubs.Endpoints = field(default_factory=hubs.Endpoints)
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    folders: tuple[Path, ...] = ()
    jobs: int = 4
    policy: Policy = field(default_factory=Policy)


def sets_of(names: Sequence[str], parts: bool = False) -> list[str]:
    """The weight sets that models and sets by name need, each once.

    `parts` takes what a merged set is made of in its stead; so does a merged set that no source
    has. Raises UsageError for a name that is neither a model nor a set.
    """
    every: list[str] = []
    for name in names:
        sets = catalog.model(name).weights if name in catalog.names() else (name,)
        for one in sets:
            made, sources = catalog.weight_set(one).made, catalog.weight_set(one).sources
            every += [made.base, made.delta] if made and (parts or not sources) else [one]
    return list(dict.fromkeys(every))


class Fetch:
    """One run: `run` does the work, in threads; `sets` may be looked at meanwhile."""

    def __init__(
        self,
        names: Sequence[str],
        options: Options,
        memory: Memory,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.options = options
        self.sets = [Set(name, catalog.weight_set(name)) for name in names]
        self._memory = memory
        self._say = say
        self._stop = threading.Event()
        self._folders = found.Folders(options.folders)
        self._luck = random.Random()
        self._local = threading.local()

    @property
    def files(self) -> list[File]:
        """All files of all sets."""
        return [file for one in self.sets for file in one.files]

    def stop(self) -> None:
        """Let every thread end soon; what has come stays."""
        self._stop.set()

    def run(self, watch: Callable[[], None] = lambda: None) -> None:
        """Fetch everything; `watch` is called five times a second from this thread.

        Raises FleetError, one line, if the disk has no room; what becomes of each file is in its
        state.
        """
        store = self.options.store.root
        try:
            store.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FleetError(f"cannot make {store}: {error.strerror}; see --store") from None
        self._all([partial(self._prepare, one) for one in self.sets], watch)
        missing = [file for file in self.files if file.state == "waiting"]
        self._check_room(missing)
        self._all([partial(self._fetch, file) for file in missing], watch)
        for one in self.sets:
            self._learn(one)

    def _all(self, work: Sequence[Callable[[], None]], watch: Callable[[], None]) -> None:
        """Do all of it, `jobs` at once, in threads that do not outlive the process."""
        todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for one in work:
            todo.put(one)
        errors: list[BaseException] = []

        def worker() -> None:
            while not self._stop.is_set():
                try:
                    todo.get_nowait()()
                except queue.Empty:
                    return
                except Stopped:
                    return
                except BaseException as error:  # shown by the thread that waits
                    errors.append(error)
                    self._stop.set()

        count = min(self.options.jobs, len(work))
        threads = [threading.Thread(target=worker, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                watch()
                for thread in threads:
                    thread.join(0.2 / len(threads))
        finally:
            if any(thread.is_alive() for thread in threads):
                self._stop.set()
        watch()
        if errors:
            raise errors[0]

    # -- what there is to do ----------------------------------------------------------------

    def _prepare(self, one: Set) -> None:
        """Learn which files the set has, and see which are there."""
        store, name = self.options.store, one.name
        one.sources = plan.ordered(one.weights.sources, self.options.hub)
        known = self._known(one)
        if known is not None:
            one.files = known
            for file in known:
                self._see(one, file)
            if one.done:
                learnt = store.learnt(name)
                one.origin = learnt.origin if learnt else ""
                return
        if one.weights.in_checkout is not None and not one.sources:
            self._say(f"{name} is in this checkout: nothing to fetch")
            one.files = []
            return
        if not one.sources:
            if known is None:
                one.error = f"{name}: no source lists its files{self._hint(one)}"
            return
        try:
            remote = self._first_listing(one)
        except Failed as error:
            if known is None:
                one.error = f"{name}: {error}{self._hint(one)}"
                return
            # The files can be picked up; each says for itself that it cannot be fetched.
            self._say(f"{name}: {error}")
            remote = {}
        wanted = plan.wanted(one.weights, remote)
        if known is None or remote:
            one.files = [self._file(one, path, content) for path, content in wanted.items()]
            for file in one.files:
                self._see(one, file)
        if not one.files:
            one.error = f"{name}: {one.origin} has none of its files; tell who keeps the catalogue"

    def _known(self, one: Set) -> list[File] | None:
        """The set's files where catalogue and store know them all, None where they do not."""
        try:
            files = self.options.store.files(one.name)
        except FleetError:
            files = ()
        inside = len(one.weights.folder) + 1 if one.weights.folder else 0
        if files:
            return [
                File(one.name, file.path[inside:], file.path, Content(file.bytes, file.sha256))
                for file in files
            ]
        if one.weights.listed and all(file.sha256 for file in one.weights.files):
            return [self._file(one, file.path, plan.content_of(file)) for file in one.weights.files]
        return None

    def _file(self, one: Set, path: str, content: Content) -> File:
        return File(one.name, path, one.weights.place(path), content, of=content.bytes)

    def _see(self, one: Set, file: File) -> None:
        """Note a file that is there and right."""
        path = self.options.store.root / file.place
        file.of = file.content.bytes
        if not path.is_file():
            return
        size = path.stat().st_size
        file.state = "checking"
        wrong = ""
        if file.content.bytes is not None and size != file.content.bytes:
            wrong = f"{size} bytes, not {file.content.bytes}"
        elif not self._is(path, file.content):
            wrong = "its hash is another"
        if not wrong:
            file.sha256 = self._digest(path)
            file.state, file.bytes, file.of = "present", size, size
            return
        file.state = "waiting"
        self._say(f"{file.place} is there and wrong ({wrong}): it is fetched again")
        self._reuse(path, size, file)

    def _is(self, path: Path, content: Content) -> bool:
        """Whether a file has the content, by its hash."""
        if content.sha256 is not None:
            return self._digest(path) == content.sha256
        return content.blob is not None and blob(path) == content.blob

    def _digest(self, path: Path) -> str:
        """The sha256 of a file, read only where nobody remembers it. Raises OSError, Stopped."""
        known = self._memory.known(path)
        if known is not None:
            return known
        hasher = hashlib.sha256()
        with path.open("rb", buffering=0) as stream:
            while block := stream.read(1 << 20):
                hasher.update(block)
                if self._stop.is_set():
                    raise Stopped
        self._memory.remember(path, hasher.hexdigest())
        return hasher.hexdigest()

    def _reuse(self, path: Path, size: int, file: File) -> None:
        """A file that was cut off is the start of what it shall be."""
        goal = where(self.options.store.root, file.place, file.content)
        short = file.content.bytes is not None and size < file.content.bytes
        if not short or not file.content.sha256 or goal.exists():
            return
        with path.open("rb") as stream:
            if plan.impostor(stream.read(512)):
                return
        goal.parent.mkdir(parents=True, exist_ok=True)
        path.replace(goal)

    def _hint(self, one: Set) -> str:
        """What a person can do about a set, or a file of it, that no program can fetch."""
        hints = [
            f"download it by hand from {page} into a folder, then ./fleet weights fetch "
            f"{one.name} --from FOLDER"
            for page in plan.by_hand(one.weights.sources)
        ]
        if one.weights.made:
            hints.append(f"./fleet weights fetch {one.name} --parts, then merge them")
        return "".join(f"; or {hint}" if i else f": {hint}" for i, hint in enumerate(hints))

    def _check_room(self, files: Sequence[File]) -> None:
        """Raises FleetError if the disk cannot hold what is missing."""
        root = self.options.store.root
        needed = 0
        for file in files:
            if file.content.bytes is not None and file.content.identity:
                if self._folders.linkable(file.place, file.content, root):
                    continue
                path = where(root, file.place, file.content)
                needed += file.content.bytes - (path.stat().st_size if path.exists() else 0)
        wrong = plan.room(max(needed, 0), shutil.disk_usage(root).free)
        if wrong is not None:
            raise FleetError(f"{root}: {wrong}: make room, or name another folder with --store")

    # -- sources ----------------------------------------------------------------------------

    def _first_listing(self, one: Set) -> Mapping[str, Remote]:
        """What the first source that answers has; waits for one as long as patience goes.

        Raises Failed if none will, Stopped.
        """
        turns = _Turns(self, len(one.sources))
        while True:
            index = turns.next()
            name = hubs.name_of(one.sources[index], self.options.endpoints)
            try:
                listing = self._listing(one, index)
            except hubs.Refused as error:
                turns.out(index, f"{name} {error}")
                if turns.left:
                    self._say(f"{one.name}: {name} {error}; the next source is tried")
            except hubs.Unreachable as error:
                rest = turns.rest(f"{name} {error}", error.wait)
                self._say(f"{one.name}: {name} {error}; again in {rest:.0f} s")
                turns.change()
                turns.sleep(rest)
            else:
                one.origin = listing.origin
                self._pin(one, listing.origin)
                return listing.files

    def _listing(self, one: Set, index: int) -> hubs.Listing:
        """A source's list, asked for once. Raises Refused or Unreachable."""
        with one.lock:
            kept = one.listings.get(index)
            if kept is None:
                catalogued = {file.path: plan.content_of(file) for file in one.weights.files}
                try:
                    kept = hubs.listing(
                        one.sources[index], self.options.endpoints, catalogued, self._pinned(one)
                    )
                except hubs.Refused as error:
                    kept = error
                one.listings[index] = kept
        if isinstance(kept, hubs.Refused):
            raise kept
        return kept

    def _pin_file(self, one: Set) -> Path:
        return self.options.store.root / FOLDER / f"{Path(one.name).stem}.origin"

    def _pinned(self, one: Set) -> str | None:
        """The origin that an earlier run began with: a repository may move on in between."""
        learnt = self.options.store.learnt(one.name)
        if learnt is not None:
            return learnt.origin
        try:
            return self._pin_file(one).read_text("utf-8").strip()
        except (OSError, ValueError):
            return None

    def _pin(self, one: Set, origin: str) -> None:
        path = self._pin_file(one)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{threading.get_native_id()}")
        aside.write_text(f"{origin}\n", "utf-8")
        aside.replace(path)

    # -- one file ---------------------------------------------------------------------------

    def _fetch(self, file: File) -> None:
        one = next(one for one in self.sets if one.name == file.set)
        try:
            self._fetch_or_fail(one, file)
        except Failed as error:
            file.state, file.why = "failed", f"{error}"
            self._say(f"{file.place}: {error}")
        except Stopped:
            file.state = "stopped"
            raise
        except OSError as error:
            file.state, file.why = "failed", f"cannot be written: {error.strerror or error}"
            self._say(f"{file.place}: {file.why}")
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                root = self.options.store.root
                line = f"{root}: the disk is full; make room, then the same command goes on"
                raise FleetError(line) from None

    def _fetch_or_fail(self, one: Set, file: File) -> None:
        root = self.options.store.root
        if not file.content.identity:
            raise Failed(
                "nothing known can verify it: a plain address proves nothing; "
                "give its sha256 in the catalogue"
            )
        with Partial(root, file.place, file.content, lambda: self._held(file)) as growing:
            if self._arrived(one, file) or self._pick(file, growing):
                return
            self._start(file, growing)
            self._from_sources(one, file, growing)

    def _held(self, file: File) -> None:
        if self._stop.is_set():
            raise Stopped
        file.state, file.why = "resting", "another fetch has it"

    def _arrived(self, one: Set, file: File) -> bool:
        """Whether another process has fetched it meanwhile."""
        if (self.options.store.root / file.place).exists():
            self._see(one, file)
        return file.state == "present"

    def _pick(self, file: File, growing: Partial) -> bool:
        """Take it from the folders that were named, if one of them has it."""
        for path in self._folders.whole(file.place, file.content):
            file.state, file.of = "checking", path.stat().st_size
            if not self._is(path, file.content):
                continue
            # Under another name first: a copy that is cut off has no final name.
            aside = growing.path.with_name(f"{growing.path.name}.taken")
            file.state = "copying"
            found.take(path, aside)
            growing.final.parent.mkdir(parents=True, exist_ok=True)
            if not aside.samefile(path) and not self._is(aside, file.content):
                aside.unlink()
                continue
            aside.replace(growing.final)
            growing.discard()
            file.sha256 = self._digest(growing.final)
            file.state, file.bytes, file.source = "picked", growing.final.stat().st_size, str(path)
            self._say(f"{file.place}: {path} is it")
            return True
        return False

    def _start(self, file: File, growing: Partial) -> None:
        """Begin with what an earlier run, or a browser, has of it."""
        start = self._folders.start(file.place, file.content, growing.size)
        if start is not None and file.content.sha256:
            file.state = "copying"
            growing.discard()
            found.copy_start(start, growing.write)
            self._say(f"{file.place}: goes on from {start}")
        file.state = "checking"
        growing.catch_up(lambda size: self._told(file, size, file.content.bytes))

    def _told(self, file: File, size: int, of: int | None) -> None:
        if self._stop.is_set():
            raise Stopped
        file.bytes, file.of = size, of

    def _from_sources(self, one: Set, file: File, growing: Partial) -> None:
        if not one.sources:
            raise Failed(f"no program can fetch it{self._hint(one)}")
        turns = _Turns(self, len(one.sources))
        strikes: Counter[int] = Counter()
        most = growing.size
        # Bytes of unknown merit: from an earlier run, another source, or a browser.
        inherited = growing.size > 0
        while True:
            try:
                index = turns.next()
            except Failed as error:
                raise Failed(f"{error}{self._hint(one)}") from None
            name = hubs.name_of(one.sources[index], self.options.endpoints)
            file.source, file.state = name, "fetching"
            turn = self._ask(one, index, file, growing)
            if growing.size > most:
                most = growing.size
                turns.progress()
            if turn is None:
                if (wrong := self._wrong(growing)) is None:
                    file.sha256 = growing.finish()
                    self._memory.remember(growing.final, file.sha256)
                    file.state, file.why, file.bytes = "fetched", "", most
                    return
                growing.discard()
                most = 0
                if inherited:
                    inherited = False
                    self._say(f"{file.place}: what was there of it is wrong: from the beginning")
                    continue
                turn = Turn("strike", f"gives another file: {wrong}")
            if turn.then == "anew":
                growing.discard()
                most, inherited = 0, False
                turn = Turn("strike", turn.why, turn.wait)
            strikes[index] += turn.then == "strike"
            if turn.then == "never" or strikes[index] >= self.options.policy.strikes:
                turns.out(index, f"{name} {turn.why}")
                inherited = inherited or growing.size > 0
                if turns.left:
                    self._say(f"{file.place}: {name} {turn.why}; the next source is tried")
                continue
            rest = turns.rest(f"{name} {turn.why}", turn.wait)
            file.state, file.why = "resting", f"{name} {turn.why}"
            if rest >= 1:
                self._say(f"{file.place}: {name} {turn.why}; again in {rest:.0f} s")
            if turns.change():
                inherited = inherited or growing.size > 0
            turns.sleep(rest)
            growing.catch_up(lambda size: self._told(file, size, file.content.bytes))

    def _wrong(self, growing: Partial) -> str | None:
        wrong = growing.wrong()
        if wrong and (what := plan.impostor(growing.head())):
            return what
        return wrong

    def _ask(self, one: Set, index: int, file: File, growing: Partial) -> Turn | None:
        """One request to one source."""
        try:
            listing = self._listing(one, index)
        except hubs.Refused as error:
            return Turn("never", str(error))
        except hubs.Unreachable as error:
            return Turn("later", str(error), error.wait)
        remote = listing.files.get(file.path)
        if remote is None:
            return Turn("never", "does not have it")
        if why := plan.contradiction(file.content, remote.content):
            return Turn("never", why)
        turn = transfer.attempt(
            self._session(),
            remote.url,
            listing.headers,
            growing,
            self.options.policy,
            lambda size, of: self._told(file, size, of),
        )
        # Where the size is not known, the hash knows the end.
        if turn is not None and file.content.bytes is None and growing.size:
            growing.catch_up(lambda size: None)
            if growing.wrong() is None:
                return None
        return turn

    def _session(self) -> requests.Session:
        """This thread's connections."""
        import requests

        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        session: requests.Session = self._local.session
        return session

    # -- afterwards -------------------------------------------------------------------------

    def _learn(self, one: Set) -> None:
        """Write down what the whole, verified set is."""
        if not one.files or not one.done:
            return
        store = self.options.store
        if store.learnt(one.name) is None:
            files = tuple(
                WeightFile(path=file.path, bytes=file.bytes, sha256=file.sha256)
                for file in one.files
            )
            origin = one.origin or "files that were there"
            store.learn(one.name, Learnt(origin, files, date.today().isoformat()))
        self._pin_file(one).unlink(missing_ok=True)
        with suppress(OSError):
            (store.root / FOLDER).rmdir()

    # -- patience, for _Turns ---------------------------------------------------------------

    def pause(self, tries: int, asked: float | None) -> float:
        """Seconds until the next try."""
        return plan.pause(self.options.policy, tries, self._luck.random(), asked)

    def sleep(self, seconds: float) -> None:
        """Rest. Raises Stopped."""
        if self._stop.wait(seconds):
            raise Stopped


class _Turns:
    """Whose turn it is of some sources, and how much patience is left with them."""

    def __init__(self, fetch: Fetch, count: int) -> None:
        self._fetch = fetch
        self._live = list(range(count))
        self._why: list[str] = []
        self._last = ""
        self._tries = 0
        self._since = time.monotonic()

    @property
    def left(self) -> int:
        """How many sources are left."""
        return len(self._live)

    def next(self) -> int:
        """The source to ask. Raises Failed if none is left, or patience is at its end."""
        if not self._live:
            raise Failed("; ".join(self._why))
        patience = self._fetch.options.policy.patience
        if self._tries and time.monotonic() - self._since > patience:
            raise Failed(f"nothing came for {patience / 3600:g} hours: {self._last}")
        return self._live[0]

    def progress(self) -> None:
        """Something came."""
        self._tries = 0
        self._since = time.monotonic()

    def out(self, index: int, why: str) -> None:
        """A source is of no use."""
        self._live.remove(index)
        self._why.append(why)

    def rest(self, why: str, asked: float | None) -> float:
        """How many seconds to rest after a try in vain."""
        self._last = why
        self._tries += 1
        return self._fetch.pause(self._tries, asked)

    def change(self) -> bool:
        """Go to the next source after three tries in vain; whether it did."""
        if self._tries % 3 or len(self._live) < 2:
            return False
        self._live.append(self._live.pop(0))
        return True

    def sleep(self, seconds: float) -> None:
        """Rest. Raises Stopped."""
        self._fetch.sleep(seconds)
