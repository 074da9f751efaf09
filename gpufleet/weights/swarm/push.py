"""Feeds a push from this machine: seeds its torrent and brings its hosts together."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import libtorrent as lt

from gpufleet.errors import FleetError
from gpufleet.weights.swarm import engine, plan
from gpufleet.weights.swarm.client import ENDS, Member, Progress
from gpufleet.weights.swarm.link import Link
from gpufleet.weights.swarm.on_host import file_names, quiet_flags, settings
from gpufleet.weights.swarm.torrent import Source, Torrent, changed_line, make

#: Seconds between looks at the files of this machine, and between looks at the swarm.
LOOK, TICK = 1.0, 0.5
#: Looks after which this machine, next to idle, helps: hosts that lack what no other has, or any.
IDLE_LACKING, IDLE = 8, 20
#: How long a host waits for another to have the engine, in seconds.
ENGINE_WAIT = 60.0

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Wheel:
    """The engine for one kind of host."""

    data: bytes
    sha256: str
    key: str

    def offer(self, givers: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """What a host is told of it: where it may be had, and how to know that it is right."""
        return {
            "bytes": len(self.data),
            "sha256": self.sha256,
            "key": self.key,
            "from": [list(giver) for giver in givers],
        }


class Push:
    """One push. Its hosts share two secrets, made for it: a salt of the torrent's hash, without
    which a handshake fails, and a key that opens the engine to other hosts.

    SSL torrents were measured beside this: they cost twice the CPU time of the whole transfer,
    as does RC4 (`encrypt`). Without either, whoever can listen between two hosts could learn the
    hash, but would have to send from a member's address to use it (the filter of each host), and
    what it sends is checked.
    """

    def __init__(
        self, sources: Sequence[Source], say: Say, *, upload_kib: int, quiet: float, encrypt: bool
    ) -> None:
        self.id = secrets.token_hex(8)
        self.quiet, self.encrypt = quiet, encrypt
        self.engine_bytes = 0
        self.links: dict[str, Link] = {}
        self._sources, self._say = sources, say
        self._key = base64.b64encode(secrets.token_bytes(32)).decode()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wheels: dict[tuple[str, str], asyncio.Task[Wheel | str]] = {}
        self._endings: list[asyncio.Task[None]] = []
        self._leads: dict[tuple[str, str], Link] = {}
        self._known: Mapping[str, Any] = {}
        self._upload_kib = upload_kib
        self._help = False
        self._peak = 0
        self._idle = 0
        self.opened = asyncio.Event()
        """Set once the files are hashed, or the push ends: hosts are prepared until then."""
        self._torrent: Torrent
        self._session: Any = None
        self._seed: Any = None

    async def open(self) -> None:
        """Hash the files and be ready to give them. Raises FleetError."""
        await asyncio.to_thread(self._open)
        self.opened.set()

    def _open(self) -> None:
        self._torrent = make(self._sources, lt.bencode)
        options: Any = settings(0, self.encrypt) | {"max_failcount": 3}
        self._session = lt.session(options)
        params = lt.add_torrent_params()
        content: Any = lt.bdecode(self._torrent.content)
        params.ti = lt.torrent_info(content)
        places = {
            self._torrent.names[source.file.path]: str(source.place)
            for source in self._sources
            if source.file.bytes
        }
        params.renamed_files = {
            index: places[name]
            for index, name in enumerate(file_names(params.ti))
            if name in places
        }
        params.save_path = str(Path.home())  # every file has a place of its own
        params.flags = quiet_flags(lt) | lt.torrent_flags.seed_mode
        self._seed = self._session.add_torrent(params)
        self._seed.set_upload_limit(self._upload_kib * 1024 or -1)

    def join(self, member: Member) -> None:
        """Have a host take part."""
        link = self.links[member.name] = Link(member, self)
        self._tasks[member.name] = asyncio.create_task(link.run())

    def tell(self, host: str, progress: Progress) -> None:
        """Tell how far a host is."""
        self._say({"host": host, "progress": asdict(progress), "uploaded": self.uploaded()})

    def uploaded(self) -> int:
        """Bytes that this machine sent."""
        sent = self._seed.status().total_payload_upload if self._seed is not None else 0
        return int(sent) + self.engine_bytes

    def start(self, member: Member) -> dict[str, Any]:
        """What a host needs to take part."""
        names = self._torrent.names
        wanted = set(member.paths)
        return {
            "name": member.name,
            "push": self.id,
            "key": self._key,
            "encrypt": self.encrypt,
            "torrent": base64.b64encode(self._torrent.content).decode(),
            "staging": member.staging,
            "files": {name: path for path, name in names.items() if path in wanted},
            "turn": self._turn(member.name),
            "empty": [path for path in self._torrent.empty if path in wanted],
        }

    def _turn(self, name: str) -> tuple[int, int]:
        """Which of how many hosts one is, so that each asks this machine for other pieces."""
        left = [
            one
            for one, link in self.links.items()
            if one == name or link.progress.state not in ("alone", "failed")
        ]
        return left.index(name), len(left)

    async def engine(self, link: Link) -> Wheel | str:
        """The engine for a host, or why there is none; waits for one of its kind to have it."""
        if link.kind not in self._wheels:
            self._wheels[link.kind] = asyncio.create_task(self._wheel(*link.kind))
        wheel = await self._wheels[link.kind]
        waited = 0.0
        while isinstance(wheel, Wheel) and not self.givers(link) and waited < ENGINE_WAIT:
            lead = self._leads.get(link.kind)
            if lead is None or lead is link or lead.progress.state in ENDS:
                self._leads[link.kind] = link
                break
            await self.opened.wait()  # nobody gives it before that
            await asyncio.sleep(0.05)
            waited += 0.05
        return wheel

    async def _wheel(self, tag: str, machine: str) -> Wheel | str:
        try:
            path = await asyncio.to_thread(engine.wheel, tag, machine)
        except FleetError as error:
            return str(error)
        data = path.read_bytes()
        return Wheel(data, hashlib.sha256(data).hexdigest(), self._key)

    def givers(self, link: Link) -> list[tuple[str, int]]:
        """Where hosts of its kind may have the engine: two addresses of each of two hosts."""
        found = [
            one
            for one in self.links.values()
            if one is not link and one.kind == link.kind and one.local and one.engine_port
        ]
        secrets.SystemRandom().shuffle(found)
        return [(place, one.engine_port) for one in found[:2] for place in one.addresses[:2]]

    def met(self) -> None:
        """Tell all hosts of all others, since one came or went."""
        known = {
            name: {"addresses": link.addresses, "port": link.port}
            for name, link in self.links.items()
            if link.takes_part
        }
        for name, link in self.links.items():
            others = {other: known[other] for other in known if other != name}
            link.send({"peers": others, "turn": self._turn(name), "help": self._help})

    def feed(self) -> None:
        """Connect to the hosts that are not done, each through its forward."""
        connected = {peer.ip for peer in self._seed.get_peer_info()}
        for link in self.links.values():
            waits = link.progress.state in ("checking", "sending") and not link.rests
            if link.local and waits and ("127.0.0.1", link.local) not in connected:
                self._seed.connect_peer(("127.0.0.1", link.local))

    async def watch(self) -> str:
        """See to the swarm until a file of this machine changes; the line that says so."""
        looked = 0.0
        while True:
            await asyncio.sleep(TICK)
            self._session.pop_alerts()
            self.feed()
            self._part_with_lone()
            self._ask_for_help()
            looked += TICK
            if looked >= LOOK:
                looked = 0.0
                for source in self._sources:
                    if await asyncio.to_thread(source.changed):
                        return changed_line(source)

    def _ask_for_help(self) -> None:
        """Have hosts help out slow ones while this machine sends next to nothing."""
        rate = self._seed.status().upload_payload_rate
        self._peak = max(self._peak, rate)
        self._idle = self._idle + 1 if rate < self._peak / 4 else 0
        lacking = any(
            link.lacks and link.progress.state == "sending" for link in self.links.values()
        )
        help_ = self._idle >= (IDLE_LACKING if lacking else IDLE)
        if help_ != self._help:
            self._help = help_
            for link in self.links.values():
                link.send({"help": help_})

    def _part_with_lone(self) -> None:
        tried = {
            name: link.reached
            for name, link in self.links.items()
            if link.takes_part and link.engine_port
        }
        for name in [name for name in tried if plan.alone(tried, name)]:
            link = self.links[name]
            if link.progress.state in ENDS:
                continue
            why = f"it reaches no other host, nor they it: tcp port {link.port} between hosts"
            link.say(Progress("alone", link.progress.bytes, link.progress.of, why=why))
            self._endings.append(asyncio.create_task(link.end()))

    async def close(self) -> None:
        """End every host's part; returns when all that can be told have ended it."""
        for link in self.links.values():
            link.over = True
        self.opened.set()
        await asyncio.gather(*self._endings, *(link.end() for link in self.links.values()))
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
