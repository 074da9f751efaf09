"""Fetches one file: from where it already is, else from its set's sources until it is verified."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gpufleet.weights.fetch import found, hubs, plan, transfer
from gpufleet.weights.fetch.partial import Partial, unlike, where
from gpufleet.weights.fetch.plan import Content, Turn
from gpufleet.weights.fetch.sources import Sources
from gpufleet.weights.fetch.turns import Turns
from gpufleet.weights.fetch.work import Failed, File, Memory, Options, Stopped

if TYPE_CHECKING:
    import requests


class Single:
    """Looks at files and fetches them, each by a call of its own in any thread."""

    def __init__(
        self,
        options: Options,
        memory: Memory,
        folders: found.Folders,
        stop: threading.Event,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._root = options.store.root
        self._memory = memory
        self._folders = folders
        self._stop = stop
        self._say = say
        self._local = threading.local()

    # -- what is there ----------------------------------------------------------------------

    def look(self, file: File) -> str:
        """Note a file that is there and right; why it is wrong, empty if it is not there.

        Raises OSError, Stopped.
        """
        path = self._root / file.place
        file.of = file.content.bytes
        if not path.is_file():
            return ""
        size = path.stat().st_size
        if file.content.bytes not in (None, size):
            return f"{size} bytes, not {file.content.bytes}"
        file.state = "checking"
        right = self._is(path, file.content, partial(self._told, file, of=size))
        file.state = "waiting"
        if not right:
            file.bytes = 0
            return "its hash is another"
        file.sha256 = self._digest(path)
        file.state, file.bytes, file.of = "present", size, size
        return ""

    def _cut_off(self, file: File) -> int:
        """Bytes under the final name of a file that was cut off there: its start. Else 0."""
        path = self._root / file.place
        try:
            seen = path.lstat()
            # Nobody else's file: no link, and no second name of one in a browser's folder.
            own = stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1
            if not own or not file.content.sha256 or seen.st_size >= (file.content.bytes or 0):
                return 0
            with path.open("rb") as stream:
                return 0 if plan.impostor(stream.read(512)) else seen.st_size
        except OSError:
            return 0

    def tidy(self, file: File) -> None:
        """Drop what an earlier run had of a file that is there since."""
        if where(self._root, file.place, file.content).exists():
            with (
                suppress(BlockingIOError),
                Partial(self._root, file.place, file.content, _leave) as growing,
            ):
                growing.discard()

    def missing(self, file: File) -> int:
        """Bytes that the disk must have room for."""
        content = file.content
        if not content.bytes or not content.identity:
            return 0
        if self._folders.linkable(file.place, content, self._root):
            return 0
        growing = where(self._root, file.place, content)
        there = 0
        with suppress(FileNotFoundError):
            there = growing.stat().st_size
        return max(content.bytes - (there or self._cut_off(file)), 0)

    def _is(
        self, path: Path, content: Content, told: Callable[[int], None] = lambda done: None
    ) -> bool:
        """Whether a file has the content, by its hash."""
        if content.sha256 is not None and self._digest(path, told) != content.sha256:
            return False
        return bool(content.identity) and unlike(path, content) is None

    def _digest(self, path: Path, told: Callable[[int], None] = lambda done: None) -> str:
        """The sha256 of a file, read only where nobody remembers it. Raises OSError, Stopped."""
        known = self._memory.known(path)
        if known is not None:
            return known
        hasher, done = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as stream:
            begun = os.fstat(stream.fileno())
            while block := stream.read(1 << 20):
                hasher.update(block)
                done += len(block)
                told(done)
                if self._stop.is_set():
                    raise Stopped
        ended = path.stat()
        if (begun.st_ino, begun.st_size, begun.st_mtime_ns) != (
            ended.st_ino,
            ended.st_size,
            ended.st_mtime_ns,
        ):
            raise OSError(errno.EBUSY, "it changed while it was read", str(path))
        self._memory.remember(path, hasher.hexdigest())
        return hasher.hexdigest()

    # -- one file ---------------------------------------------------------------------------

    def fetch(self, file: File, sources: Sources) -> None:
        """Bring the file under its name, verified. Raises Failed, Stopped, OSError."""
        if not file.content.identity:
            raise Failed(
                "nothing known can verify it: a plain address proves nothing; "
                "give its sha256 in the catalogue"
            )
        with Partial(self._root, file.place, file.content, lambda: self._held(file)) as growing:
            if growing.size == 0 and self._cut_off(file):
                growing.adopt()
            # While this one waited, another process may have fetched it.
            try:
                wrong = self.look(file)
            except OSError as error:
                raise Failed(f"cannot be read: {error.strerror}") from None
            if wrong:
                self._say(f"{file.place} is there and wrong ({wrong}): it is fetched again")
            if file.state == "present":
                growing.discard()
                return
            if self._pick(file, growing):
                return
            self._start(file, growing)
            if self._whole(file, growing):
                return
            if not len(sources):
                raise Failed(f"no program can fetch it{sources.hint()}")
            self._from_sources(file, growing, sources)

    def _held(self, file: File) -> None:
        if self._stop.is_set():
            raise Stopped
        file.state, file.why = "resting", "another fetch has it"

    def _told(self, file: File, size: int, of: int | None) -> None:
        if self._stop.is_set():
            raise Stopped
        file.bytes, file.of = size, of

    def _pick(self, file: File, growing: Partial) -> bool:
        """Take it from the folders that were named, if one of them has it."""
        # Under another name first: a copy that is cut off has no final name.
        aside = growing.path.with_name(f"{growing.path.name}.taken")
        aside.unlink(missing_ok=True)
        for path in self._folders.whole(file.place, file.content):
            try:
                size = path.stat().st_size
                told = partial(self._told, file, of=size)
                file.state = "checking"
                if not self._is(path, file.content, told):
                    continue
            except OSError as error:  # such as a browser's that has just got another name
                self._say(f"{file.place}: {path} is passed over: {error.strerror}")
                continue
            file.state = "copying"
            try:
                linked = found.take(path, aside, told)
                if not linked and not self._is(aside, file.content, told):
                    continue
                growing.final.parent.mkdir(parents=True, exist_ok=True)
                aside.replace(growing.final)
            finally:
                aside.unlink(missing_ok=True)
            growing.discard()
            file.sha256 = self._digest(growing.final)
            file.state, file.bytes, file.of, file.source = "picked", size, size, str(path)
            self._say(f"{file.place}: {path} is it")
            return True
        file.bytes = 0
        return False

    def _start(self, file: File, growing: Partial) -> None:
        """Begin with what an earlier run, or a browser, has of it."""
        start = self._folders.start(file.place, file.content, growing.size)
        if start is not None and file.content.sha256:
            file.state = "copying"
            with suppress(FileNotFoundError), start.open("rb") as stream:
                growing.discard()
                self._say(f"{file.place}: goes on from {start}")
                while block := stream.read(1 << 20):
                    growing.write(growing.hashed, block)
                    self._told(file, growing.hashed, file.content.bytes)
        file.state = "checking"
        growing.catch_up(partial(self._told, file, of=file.content.bytes))

    def _whole(self, file: File, growing: Partial) -> bool:
        """Whether all of it was there but its name."""
        if growing.size == 0 or growing.size < (file.content.bytes or 0):
            return False
        if growing.wrong() is None:
            self._finish(file, growing)
            return True
        if file.content.bytes is not None:
            growing.discard()
        return False

    def _from_sources(self, file: File, growing: Partial, sources: Sources) -> None:
        policy = self._options.policy
        turns = Turns(len(sources), policy, self._stop)
        strikes: Counter[int] = Counter()
        most = growing.size
        # Bytes that the source in turn did not give: of an earlier run, a browser, another source.
        inherited = growing.size > 0
        last = -1
        while True:
            try:
                index = turns.next()
            except Failed as error:
                raise Failed(f"{error}{sources.hint()}") from None
            inherited = inherited or (index != last != -1 and growing.size > 0)
            last, name = index, sources.name(index)
            file.source, file.state = name, "fetching"
            turn = self._ask(file, growing, sources, index)
            if growing.size > most:
                most = growing.size
                turns.progress()
            if turn is None:
                wrong = growing.wrong()
                if wrong is None:
                    self._finish(file, growing)
                    return
                wrong = plan.impostor(growing.head()) or f"another file: {wrong}"
                turn = Turn("anew" if inherited else "strike", f"gives {wrong}")
                growing.discard()
            if turn.then == "anew":
                growing.discard()
                if inherited:
                    self._say(f"{file.place}: what was there of it is of no use: from the start")
                    inherited, most = False, 0
                    continue
                turn = Turn("strike", turn.why)
            most = min(most, growing.size)
            strikes[index] += turn.then == "strike"
            if turn.then == "never" or strikes[index] >= policy.strikes:
                turns.out(index, f"{name} {turn.why}")
                if turns.left:
                    self._say(f"{file.place}: {name} {turn.why}; the next source is tried")
                continue
            rest = turns.rest(f"{name} {turn.why}", turn.wait)
            file.state, file.why = "resting", f"{name} {turn.why}"
            if rest >= 1:
                self._say(f"{file.place}: {file.why}; again in {rest:.0f} s")
            turns.sleep(rest)
            growing.catch_up(partial(self._told, file, of=file.content.bytes))

    def _finish(self, file: File, growing: Partial) -> None:
        file.sha256 = growing.finish()
        self._memory.remember(growing.final, file.sha256)
        size = growing.final.stat().st_size
        file.state, file.why, file.bytes, file.of = "fetched", "", size, size

    def _ask(self, file: File, growing: Partial, sources: Sources, index: int) -> Turn | None:
        """One request to one source; None if the whole file has come."""
        try:
            listing = sources.listing(index)
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
            self._options.policy,
            partial(self._told, file),
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


def _leave() -> None:
    """Does not wait for who holds a partial file."""
    raise BlockingIOError
