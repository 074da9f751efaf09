"""The sources of one set: each lists its files once, at the commit that a fetch began with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from gpufleet.catalog import plain
from gpufleet.errors import FleetError
from gpufleet.weights.fetch import hubs, plan
from gpufleet.weights.fetch.partial import FOLDER
from gpufleet.weights.fetch.plan import Remote
from gpufleet.weights.fetch.turns import Turns
from gpufleet.weights.fetch.work import Options, Set


class Sources:
    """What a program can fetch a set from, in the order in which it is asked."""

    def __init__(self, one: Set, options: Options) -> None:
        self._set = one
        self._options = options
        self._every = plan.ordered(one.weights.sources, options.hub)
        self._listings: dict[int, hubs.Listing | hubs.Refused] = {}
        self._lock = threading.Lock()
        # A repository may move on between runs.
        self._pin = options.store.root / FOLDER / f"{Path(one.name).stem}.origin"

    def __len__(self) -> int:
        return len(self._every)

    def name(self, index: int) -> str:
        """A source as people call it."""
        return hubs.name_of(self._every[index], self._options.endpoints)

    def listing(self, index: int) -> hubs.Listing:
        """What a source has, which it is asked for once. Raises Refused or Unreachable."""
        with self._lock:
            kept = self._listings.get(index)
            if kept is None:
                listed = {file.path: plan.content_of(file) for file in self._set.weights.files}
                source, endpoints = self._every[index], self._options.endpoints
                try:
                    kept = hubs.listing(source, endpoints, listed, self._pinned())
                    self._refuse_odd_names(kept)
                except hubs.Refused as error:
                    kept = error
                self._listings[index] = kept
        if isinstance(kept, hubs.Refused):
            raise kept
        return kept

    def _refuse_odd_names(self, listing: hubs.Listing) -> None:
        """A mirror is as good as who runs it: a file's name could lead out of the store."""
        for path in plan.wanted(self._set.weights, listing.files):
            if not plain(path):
                raise hubs.Refused(f"lists {path!r}, no name of a file below its folder")

    def first(self, turns: Turns, say: Callable[[str], None]) -> Mapping[str, Remote]:
        """What the first source that answers has; waits for one as long as patience goes.

        Raises Failed if none will, Stopped.
        """
        while True:
            index = turns.next()
            try:
                listing = self.listing(index)
            except hubs.Refused as error:
                turns.out(index, f"{self.name(index)} {error}")
                if turns.left:
                    say(f"{self._set.name}: {self.name(index)} {error}; the next source is tried")
            except hubs.Unreachable as error:
                rest = turns.rest(f"{self.name(index)} {error}", error.wait)
                say(f"{self._set.name}: {self.name(index)} {error}; again in {rest:.0f} s")
                turns.sleep(rest)
            else:
                self._set.origin = listing.origin
                self._keep(listing.origin)
                return listing.files

    def _pinned(self) -> str | None:
        """The origin that an earlier run began with."""
        learnt = self._options.store.learnt(self._set.name)
        if learnt is not None:
            return learnt.origin
        try:
            return self._pin.read_text("utf-8").strip()
        except (OSError, ValueError):
            return None

    def _keep(self, origin: str) -> None:
        aside = self._pin.with_suffix(f".{threading.get_native_id()}")
        # Another fetch may end meanwhile and remove the empty folder; the origin is then learnt.
        try:
            self._pin.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(f"{origin}\n", "utf-8")
            aside.replace(self._pin)
        except (FileNotFoundError, FileExistsError):
            pass
        except OSError as error:
            line = f"cannot write {self._pin.parent}: {error.strerror}: see --store"
            raise FleetError(line) from None

    def forget(self) -> None:
        """The set is whole: the store has its origin now."""
        with suppress(OSError):
            self._pin.unlink()

    def hint(self) -> str:
        """What a person can do about what no program can fetch, to follow a line; may be empty."""
        weights, name = self._set.weights, self._set.name
        command = self._options.store.command
        hints = [
            f"download it by hand from {page} into a folder, then "
            f"{command('fetch', name, '--from FOLDER')}"
            for page in plan.by_hand(weights.sources)
        ]
        if weights.made:
            parts = command("fetch", name, "--parts")
            hints.append(f"{parts}, then {command('merge', name)}")
        return f": {'; or '.join(hints)}" if hints else ""
