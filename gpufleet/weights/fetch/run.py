"""Fetches weight sets into a store: sees what is there, lists what is missing, many at once."""

from __future__ import annotations

import errno
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from functools import partial

from gpufleet import catalog
from gpufleet.catalog import WeightFile
from gpufleet.errors import FleetError
from gpufleet.weights.fetch import found, plan
from gpufleet.weights.fetch.partial import FOLDER
from gpufleet.weights.fetch.plan import Content, Remote
from gpufleet.weights.fetch.single import Single
from gpufleet.weights.fetch.sources import Sources
from gpufleet.weights.fetch.turns import Turns
from gpufleet.weights.fetch.work import Failed, File, Memory, Options, Set, Stopped
from gpufleet.weights.store import Learnt


def sets_of(names: Sequence[str], parts: bool = False) -> list[str]:
    """The weight sets that models and sets by name need, each once.

    `parts` takes what a merged set is made of in its stead; so does a merged set that no source
    has. Raises UsageError for a name that is neither a model nor a set.
    """
    every: list[str] = []
    for name in names:
        for one in catalog.model(name).weights if name in catalog.names() else (name,):
            weights = catalog.weight_set(one)
            made, alone = weights.made, not (weights.sources or weights.in_checkout)
            every += [made.base, made.delta] if made and (parts or alone) else [one]
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
        self._sources = {one.name: Sources(one, options) for one in self.sets}
        self._say = say
        self._stop = threading.Event()
        folders = found.Folders(options.folders)
        self._single = Single(options, memory, folders, self._stop, say)

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
        root = self.options.store.root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FleetError(f"cannot make {root}: {error.strerror}; see --store") from None
        for one in self.sets:
            one.files = self._known(one) or []
        self._all([partial(self._look, file) for file in self.files], watch)
        unfinished = [one for one in self.sets if not one.files or not one.done]
        self._all([partial(self._list, one) for one in unfinished], watch)
        new = [file for one in unfinished for file in one.files]
        self._all([partial(self._look, file) for file in new], watch)
        missing = [file for file in self.files if file.state == "waiting"]
        wrong = plan.room(sum(map(self._single.missing, missing)), shutil.disk_usage(root).free)
        if wrong is not None:
            raise FleetError(f"{root}: {wrong}: make room, or name another folder with --store")
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
                except (queue.Empty, Stopped):
                    return
                except BaseException as error:  # raised again by the thread that waits
                    errors.append(error)
                    self._stop.set()

        count = min(self.options.jobs, len(work))
        threads = [threading.Thread(target=worker, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watch()
            for thread in threads:
                thread.join(0.2 / count)
        watch()
        if errors:
            raise errors[0]

    def _known(self, one: Set) -> list[File] | None:
        """The set's files where catalogue and store know them all, None where they do not."""
        with suppress(FleetError):
            inside = len(one.weights.folder) + 1 if one.weights.folder else 0
            return [
                self._file(one, file.path[inside:], Content(file.bytes, file.sha256))
                for file in self.options.store.files(one.name)
            ]
        if one.weights.listed and all(file.sha256 for file in one.weights.files):
            return [self._file(one, file.path, plan.content_of(file)) for file in one.weights.files]
        return None

    def _file(self, one: Set, path: str, content: Content) -> File:
        return File(one.name, path, one.weights.place(path), content, of=content.bytes)

    def _look(self, file: File) -> None:
        try:
            self._single.look(file)
            if file.state == "present":
                self._single.tidy(file)
        except OSError as error:
            file.state, file.why = "failed", f"cannot be read: {error.strerror or error}"
            self._say(f"{file.place}: {file.why}")

    def _list(self, one: Set) -> None:
        """Ask the sources which files the set has."""
        sources, known = self._sources[one.name], one.files
        if one.weights.in_checkout is not None and not len(sources):
            one.files = []
            self._say(f"{one.name} is in this checkout: nothing to fetch")
            return
        remote: dict[str, Remote] = {}
        try:
            if len(sources):
                turns = Turns(len(sources), self.options.policy, self._stop)
                remote = dict(sources.first(turns, self._say))
            elif not known:
                raise Failed(f"no source lists its files{sources.hint()}")
        except Failed as error:
            if not known:
                one.error = f"{one.name}: {error}"
                if len(sources):
                    one.error += sources.hint()
                return
            # They may be picked up; otherwise each says for itself that it cannot be had.
            self._say(f"{one.name}: {error}")
        if remote:
            wanted = plan.wanted(one.weights, remote)
            for file in known:
                other = remote.get(file.path)
                more = plan.completed(file.content, other.content) if other else file.content
                wanted[file.path] = more
            one.files = [self._file(one, path, content) for path, content in wanted.items()]
        if not one.files:
            one.error = f"{one.name}: {one.origin} has none of its files: look at the catalogue"

    def _fetch(self, file: File) -> None:
        try:
            self._single.fetch(file, self._sources[file.set])
        except Failed as error:
            file.state, file.why = "failed", str(error)
            self._say(f"{file.place}: {error}")
        except Stopped:
            file.state = "stopped"
            raise
        except OSError as error:
            file.state, file.why = "failed", f"cannot be written: {error.strerror or error}"
            self._say(f"{file.place}: {file.why}")
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                root = self.options.store.root
                line = f"{root}: the disk is full: make room, then the same command goes on"
                raise FleetError(line) from None

    def _learn(self, one: Set) -> None:
        """Write down what the whole, verified set is, where that was not known."""
        if not one.files or not one.done:
            return
        store, known = self.options.store, False
        with suppress(FleetError):
            known = bool(store.files(one.name))
        if store.learnt(one.name) is None and (one.origin or not known):
            files = tuple(
                WeightFile(path=file.path, bytes=file.bytes, sha256=file.sha256)
                for file in one.files
            )
            origin = one.origin or "files that were there"
            store.learn(one.name, Learnt(origin, files, date.today().isoformat()))
        self._sources[one.name].forget()
        with suppress(OSError):
            (store.root / FOLDER).rmdir()
