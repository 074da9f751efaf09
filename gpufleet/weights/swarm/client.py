"""Starts the process that feeds a swarm of hosts, and tells how far each of them is."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from gpufleet.catalog import WeightFile
from gpufleet.weights.swarm.torrent import sources

#: How long the process may take to tell its hosts to stop, in seconds.
CLOSING = 30.0

State = Literal["starting", "checking", "sending", "done", "alone", "failed"]
#: States after which nothing follows.
ENDS = ("done", "alone", "failed")


@dataclass(frozen=True)
class Member:
    """A host that takes part: how to reach it and where its files go."""

    name: str
    ssh: tuple[str, ...]
    """The ssh command that reaches it, without a remote command: `Target.ssh()`."""
    sudo: bool
    """Whether `sudo -n` makes that login root; it is root already if not."""
    address: str
    """Its address in the inventory, by which other hosts may reach it: an IP or a name."""
    staging: str
    """The absolute folder on it that gets the files. What lies there already is used if it is
    right and overwritten if it is not: nothing there may be a hard link to a file in use."""
    paths: tuple[str, ...]
    """Those of the push's files that it is to get."""
    python: str = "python3"
    """Its own interpreter, by name or path."""


@dataclass(frozen=True)
class Progress:
    """How far one host is. `bytes` of `of` are right on it; `rate` is what it gets, bytes/s."""

    state: State
    bytes: int = 0
    of: int = 0
    rate: float = 0.0
    peers: int = 0
    """Hosts that it exchanges pieces with; the operator's machine is not counted."""
    why: str = ""
    """One line: why it failed or is alone, or what it waits for."""


class Swarm:
    """One push: files of this machine, and the hosts that exchange them. Ends with `close`.

    One child process holds libtorrent and an ssh for every host; it ends with this process,
    however that ends. Safe to use from threads and from a process that gevent has patched.
    """

    def __init__(
        self,
        files: Sequence[tuple[WeightFile, Path]],
        *,
        upload_kib: int = 0,
        quiet: float = 300.0,
        encrypt: bool = False,
    ) -> None:
        """`files` are verified, each with its place on this machine.

        `upload_kib` is what this machine sends at most, KiB/s, to all hosts together; 0 is no
        limit. A host that hears nothing for `quiet` seconds ends its part by itself. `encrypt`
        hides from the hosts' network what they exchange, at twice the CPU time.

        Raises FleetError for a file that is missing or of another size; one that changes from now
        on fails every host.
        """
        self._sources = sources(files)
        self._lock = threading.Lock()
        self._last: dict[str, Progress] = {}
        self._queues: dict[str, queue.Queue[Progress]] = {}
        self._ended = ""
        self.uploaded = 0
        """Bytes that this machine has sent: pieces, and the engine that hosts run."""
        self._child = subprocess.Popen(
            [sys.executable, "-m", "gpufleet.weights.swarm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which closes it
        )
        self._say(
            {
                "files": [
                    [s.file.path, s.file.bytes, s.file.sha256, str(s.place.absolute()), s.stat]
                    for s in self._sources
                ],
                "upload_kib": upload_kib,
                "quiet": quiet,
                "encrypt": encrypt,
            }
        )
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def join(self, member: Member) -> None:
        """Have a host take part, from now on and until `close`; at any time, and once."""
        with self._lock:
            if member.name in self._queues:
                return
            self._queues[member.name] = queue.Queue()
            self._last[member.name] = Progress("starting")
        self._say({"join": asdict(member)})

    def follow(self, name: str) -> Iterator[Progress]:
        """How a host that joined goes on, about once a second, ending with one of `ENDS`.

        A host that is done goes on giving pieces to others. One reader a host.
        """
        told = self._queues[name]
        while True:
            if self._ended and told.empty():
                last = self._last[name]
                if last.state not in ENDS:
                    yield Progress("failed", last.bytes, last.of, why=self._ended)
                return
            try:
                progress = told.get(timeout=0.5)
            except queue.Empty:
                continue
            yield progress
            if progress.state in ENDS:
                return

    def close(self) -> None:
        """End the push: every host's listener, process and port are gone when this returns.

        A host that cannot be told ends its part by itself, `quiet` seconds after it was last
        heard of.
        """
        with suppress(OSError, ValueError):
            if self._child.stdin is not None:
                self._child.stdin.close()
        try:
            self._child.wait(CLOSING)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join(5)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, message: dict[str, Any]) -> None:
        # A child that is gone has said so, or will: its end is what `follow` tells.
        with self._lock, suppress(OSError, ValueError):
            if self._child.stdin is not None:
                self._child.stdin.write(json.dumps(message) + "\n")
                self._child.stdin.flush()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        why = ""
        for line in self._child.stdout:
            message = json.loads(line)
            if "host" in message:
                progress = Progress(**message["progress"])
                self._last[message["host"]] = progress
                self._queues[message["host"]].put(progress)
            self.uploaded = message.get("uploaded", self.uploaded)
            why = message.get("failed", why)
        self._ended = why or "the swarm's process ended: apply again, it goes on where it was"
