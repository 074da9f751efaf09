"""Runs on a host, with its own python3 alone: takes part in a swarm, as a transient unit.

Two processes share this file. The one that ssh starts (`attach`) brings the engine, starts the
unit and carries lines between the operator's machine and it; it ends with its ssh. The unit's
(`serve`) exchanges pieces until it is stopped or hears nothing for a while. What is secret comes
over ssh and stays in memory: nothing of it is in arguments, files or logs.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import os
import platform
import random
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from typing import Any

#: How long a connection to another host may take, and how often one is tried again, in seconds.
CONNECT, AGAIN = 3.0, 4.0
#: Tries after which a host counts as out of reach.
TRIES = 2
#: How often a host says how far it is, in seconds; how often it looks, and while an end is near.
REPORT, TICK, SHORT_TICK = 1.0, 0.1, 0.02
#: How often what was received is written down, in seconds: a host that dies has it then.
FLUSH = 5.0
#: Where ssh's forward comes from: the operator's machine.
LOOPBACK = frozenset({"127.0.0.1", "::1"})
#: A unit that heard from another operator's process within so many seconds is in use.
IN_USE = 20.0
#: How much a host asks the operator's machine for at once, whichever is most: pieces, bytes, and
#: seconds of what comes. With less, that machine is asked for pieces that others have already.
AHEAD, AHEAD_BYTES, AHEAD_SECONDS = 8, 16 << 20, 4.0
#: Blocks of 16 KiB that a host may have asked of the operator's machine at a time: about what ssh
#: lets be under way. What was asked comes, though another host may have given it meanwhile.
QUEUE = 128
#: libtorrent's state of a block that has come; below are those that have not.
WRITING = 2
#: Seconds for which a host that has all of its own turn leaves the operator's machine to others,
#: unless that has nothing to do: what they have asked for is on its way, and would be sent twice.
REST = 30.0
#: What a unit may use at most: of memory, page cache included, and days. The last is for a unit
#: that somehow goes on hearing of a push that is over: it ends by itself long before (`quiet`).
MEMORY, DAYS = "2G", 7


def settings(port: int, encrypt: bool) -> dict[str, Any]:
    """libtorrent's settings for a member, on whichever machine: no way to be found by others.

    `port` 0 listens nowhere: the operator's machine. A handshake is always encrypted, under a key
    that only those who know the torrent's hash can make; what follows only if `encrypt`, at twice
    the CPU time.
    """
    return {
        "listen_interfaces": f"0.0.0.0:{port},[::]:{port}" if port else "",
        "alert_mask": 1 | 8 | 64,  # errors, storage, status
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_incoming_utp": False,
        "enable_outgoing_utp": False,
        "in_enc_policy": 0,  # pe_forced
        "out_enc_policy": 0,
        "allowed_enc_level": 2 if encrypt else 1,  # pe_rc4, pe_plaintext
        "anonymous_mode": True,  # says nothing of its version and addresses
        "allow_multiple_connections_per_ip": True,  # all forwards come from 127.0.0.1
        "unchoke_slots_limit": -1,  # all are of one fleet: nobody is to be choked
        "close_redundant_connections": False,  # who lacks pieces may find them again at once
        "request_queue_time": 1,
        "connections_limit": 1000,
        "min_reconnect_time": 2,
        "max_failcount": 1000,
        "no_connect_privileged_ports": False,
        "peer_timeout": 60,
        "max_out_request_queue": 2000,
        "max_allowed_in_request_queue": 4000 if port else QUEUE,
        "send_buffer_watermark": 4 << 20,
        "send_not_sent_low_watermark": 1 << 18,
        "disk_write_mode": 0,  # pwrite: a full disk is an error, not a signal
        "aio_threads": 2,
        "hashing_threads": 2,
    }


def say(message: dict[str, Any]) -> None:
    """One line to the operator's machine."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def addresses() -> list[str]:
    """The addresses by which others may reach this host, the likeliest first."""
    found = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    try:
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5)
        found += done.stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        pass
    # Link-local ones say nothing without an interface.
    return list(dict.fromkeys(a for a in found if not a.startswith(("fe80:", "169.254."))))


# --- attach


def unit_of(staging: str) -> str:
    """The unit of a staging folder: one at a time."""
    return f"gpufleet-swarm-{hashlib.sha256(staging.encode()).hexdigest()[:12]}"


def active(unit: str) -> bool:
    """Whether the unit runs."""
    done = subprocess.run(["systemctl", "is-active", "--quiet", unit + ".service"])
    return done.returncode == 0


def stop(unit: str, folder: str) -> None:
    """End the unit, and whatever of it is left; returns when it is gone."""
    subprocess.run(["systemctl", "stop", unit + ".service"], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def quoted(path: str) -> str:
    """A path as systemd reads it in a command line."""
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        path = path.replace(special, escaped)
    return f'"{path}"'


def start(unit: str, folder: str, staging: str, port: int, quiet: float) -> str:
    """Start the unit; what was wrong, or nothing."""
    properties = [
        f"ReadWritePaths={quoted(staging)}",
        f"RuntimeDirectory={unit}",
        "RuntimeDirectoryMode=0700",
        f"ExecStopPost=+/bin/rm -rf {quoted(folder)}",
        f"RuntimeMaxSec={DAYS}d",
        f"MemoryMax={MEMORY}",
        "TasksMax=64",
        "LimitNOFILE=8192",
        "OOMScoreAdjust=500",
        "UMask=0022",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        "PrivateTmp=yes",
        "PrivateDevices=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallErrorNumber=EPERM",
    ]
    command = ["systemd-run", "--quiet", "--collect", f"--unit={unit}"]
    command += [f"--description=weights from other hosts, into {staging}"]
    command += [option for one in properties for option in ("-p", one)]
    command += [sys.executable, "-B", f"{folder}/on_host.py", str(port), str(quiet)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"systemd-run: {error.strerror}"
    return (done.stderr.strip().splitlines() or ["systemd-run failed"])[-1] * (done.returncode != 0)


def connect(unit: str) -> socket.socket | None:
    """The unit's own socket, if it listens."""
    control = socket.socket(socket.AF_UNIX)
    try:
        control.connect(f"/run/{unit}/control")
    except OSError:
        control.close()
        return None
    return control


def occupied(unit: str, push: str) -> bool | None:
    """Whether the unit is of this push (False), of another that goes on (True), or of neither."""
    control = connect(unit)
    if control is None:
        return None
    with control, control.makefile("rw") as stream:
        control.settimeout(10)
        try:
            stream.write('{"who": true}\n')
            stream.flush()
            who = json.loads(stream.readline())
        except (OSError, ValueError):
            return None
    if who["push"] == push:
        return False
    return True if who["heard"] < IN_USE else None


def takes(port: int) -> bool:
    """Whether something else has the port."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", port))
    except OSError:
        return True
    return False


def fetch(give: dict[str, Any]) -> bytes | None:
    """The engine from another host that has it; None if none can be reached."""
    for address, port in give["from"]:
        try:
            with socket.create_connection((address, port), CONNECT) as peer:
                peer.settimeout(20)
                with peer.makefile("rb") as stream:
                    key = base64.b64decode(give["key"])
                    peer.sendall(hmac.digest(key, stream.read(32), "sha256"))
                    data = stream.read(give["bytes"])
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == give["sha256"]:
            return data
    return None


def unpack(folder: str, wheel: bytes, source: bytes) -> None:
    """Lay down what the unit runs, whole or not at all."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder, mode=0o700)
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        archive.extractall(f"{folder}/lib")
    with open(f"{folder}/engine.whl", "wb") as stream:
        stream.write(wheel)
    with open(f"{folder}/on_host.py", "wb") as stream:
        stream.write(source)


def attach(source: bytes) -> dict[str, Any] | None:
    """Bring the unit up and carry lines, until stdin ends (it goes on) or says stop (it ends).

    What is wrong, if that cannot be.
    """
    lines = sys.stdin.buffer
    wanted = json.loads(lines.readline())
    staging, push, port = wanted["staging"], wanted["push"], wanted["port"]
    unit, folder = unit_of(staging), staging.rstrip("/") + ".swarm"
    until = time.monotonic() + IN_USE + 5
    while (whose := occupied(unit, push) if active(unit) else None) and time.monotonic() < until:
        time.sleep(1)
    if whose:
        return {"failed": f"another push to {staging} goes on"}
    if whose is None:
        stop(unit, folder)
        if takes(port):
            return {"taken": port}
    say(
        {
            "runs": whose is False,
            "tag": f"cp{sys.version_info[0]}{sys.version_info[1]}",
            "machine": platform.machine(),
            "addresses": addresses(),
        }
    )
    give = json.loads(lines.readline())
    if "engine" in give:
        wheel = fetch(give["engine"])
        say({"send": wheel is None})
        if wheel is None:
            wheel = lines.read(give["engine"]["bytes"])
            if len(wheel) < give["engine"]["bytes"]:
                return None  # the way here was cut
        try:
            os.makedirs(staging, mode=0o755, exist_ok=True)
            unpack(folder, wheel, source)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            return {"failed": f"{folder}: {error.strerror}"}
        problem = start(unit, folder, staging, port, wanted["quiet"])
        if problem:
            stop(unit, folder)
            return {"alone": f"its unit does not start: {problem}"}
    until = time.monotonic() + 60
    while (control := connect(unit)) is None:
        if not active(unit) or time.monotonic() > until:
            said = last_words(unit)
            stop(unit, folder)
            return {"alone": f"its unit does not stay up: {said}"}
        time.sleep(0.02)
    bridge(control, lines, unit, folder)
    return None


def last_words(unit: str) -> str:
    """The last line that the unit logged."""
    command = [
        "journalctl",
        "--no-pager",
        "-q",
        "-o",
        "cat",
        "-n",
        "1",
        "-u",
        unit,
        "_COMM=python3",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "no word"
    return done.stdout.strip() or "no word"


def bridge(control: socket.socket, lines: Any, unit: str, folder: str) -> None:
    """Carry lines both ways; a stop ends the unit, the end of stdin does not."""

    stopping = threading.Event()

    def up() -> None:
        with control.makefile("rb") as stream:
            for line in stream:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
        if not stopping.is_set():  # it ended by itself
            say({"ended": last_words(unit)})
            os._exit(0)

    threading.Thread(target=up, daemon=True).start()
    for line in lines:
        if json.loads(line).get("stop"):
            stopping.set()
            stop(unit, folder)
            say({"gone": not active(unit)})
            break
        control.sendall(line)
    sys.stdout.flush()
    os._exit(0)


# --- serve


class Peer:
    """Another host of the push, and whether it was reached."""

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.name = name
        self.addresses = list(given["addresses"])
        self.port = int(given["port"])
        self.at = ""
        """The address that answered."""
        self.tries = 0
        self.next = 0.0
        self.trying = False

    def try_(self) -> None:
        """See which address answers. Runs in a thread."""
        for address in [self.at, *self.addresses] if self.at else self.addresses:
            try:
                found = socket.getaddrinfo(address, self.port, type=socket.SOCK_STREAM)
                at = str(found[0][4][0])
                with socket.create_connection((at, self.port), CONNECT):
                    self.at = at
                    break
            except OSError:
                continue
        else:
            self.at = ""
        self.tries += 1
        self.next = time.monotonic() + AGAIN
        self.trying = False

    @property
    def reached(self) -> bool | None:
        """Whether it answered; None while that is open."""
        return True if self.at else False if self.tries >= TRIES else None


class Serve:
    """The unit: one torrent, one listener for peers, one for the engine, one for ssh."""

    def __init__(self, port: int, quiet: float) -> None:
        warnings.simplefilter("ignore")
        folder = os.path.dirname(os.path.abspath(__file__))
        sys.path.insert(0, f"{folder}/lib")
        import libtorrent

        self.lt: Any = libtorrent
        self.folder, self.port, self.quiet = folder, port, quiet
        self.heard = time.monotonic()
        self.name = self.push = ""
        self.session: Any = None
        self.torrent: Any = None
        self.peers: dict[str, Peer] = {}
        self.wanted: dict[int, int] = {}
        """Index and size of every file that this host is to get."""
        self.all: frozenset[int] = frozenset()
        """Pieces of those files."""
        self.waiting: set[int] = set()
        """Pieces of those files that it does not ask for yet."""
        self.turn = (0, 1)
        """Which of how many hosts this one is: whose turn it is to ask for a piece first."""
        self.open: set[int] = set()
        """Pieces that it asks the operator's machine for."""
        self.lacks = False
        """Whether there are pieces that neither it has nor a host that it exchanges with."""
        self.rested = 0.0
        """When it began its rest, 0 while there are pieces of its own turn to ask for."""
        self.rests = False
        self.help = False
        """Whether the operator's machine has nothing to do while hosts still lack pieces."""
        self.piece = 1
        self.checked = False
        self.flushing = self.done = False
        self.flushes, self.flushed = 0, time.monotonic()
        self.problem = ""
        self.told = (0.0, "")
        self.wheel_port = 0
        self.streams: dict[socket.socket, bytes] = {}
        self.selector = selectors.DefaultSelector()
        self.control = socket.socket(socket.AF_UNIX)
        self.control.bind(os.environ["RUNTIME_DIRECTORY"] + "/control")  # systemd's
        self.control.listen(8)
        self.selector.register(self.control, selectors.EVENT_READ)

    def run(self) -> None:
        """Until nothing was heard for a while, or systemd ends it before."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            self.loop()
        except Exception as error:  # the journal's last line is what the operator is told
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            self.keep()

    def keep(self) -> None:
        """Write down what was received, for whoever goes on with it."""
        if self.torrent is not None:
            self.session.pause()
            self.flush()
            until = time.monotonic() + 10
            while self.flushes and time.monotonic() < until:
                self.session.wait_for_alert(100)
                self.watch()
        sys.stdout.flush()
        os._exit(0)  # without the engine's goodbyes to everyone

    def flush(self) -> None:
        """Have the engine write down what it has received; `watch` sees when it has."""
        self.flushes += 1
        self.flushed = time.monotonic()
        self.torrent.flush_cache()

    def loop(self) -> None:
        """Serve whoever speaks, and the swarm."""
        while time.monotonic() - self.heard < self.quiet:
            soon = self.torrent is not None and (self.flushing or not self.checked)
            for key, _ in self.selector.select(SHORT_TICK if soon else TICK):
                if key.fileobj is self.control:
                    stream, _ = self.control.accept()
                    stream.settimeout(5)
                    self.streams[stream] = b""
                    self.selector.register(stream, selectors.EVENT_READ)
                else:
                    self.read(key.fileobj)  # type: ignore[arg-type]
            if self.torrent is not None:
                self.watch()
                self.choose()
                self.seek()
                self.report()

    def read(self, stream: socket.socket) -> None:
        """Take in what came over one connection of ssh's."""
        try:
            data = stream.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            return self.drop(stream)
        *lines, self.streams[stream] = (self.streams[stream] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "who" in message:
                heard = time.monotonic() - self.heard if len(self.streams) > 1 else IN_USE
                self.send({"push": self.push, "heard": heard}, stream)
                continue
            self.heard = time.monotonic()
            if "start" in message and self.torrent is None:
                self.begin(message["start"])
            if "peers" in message:
                self.meet(message)
            self.help = message.get("help", self.help)
            self.told = (0.0, "")  # whoever asks is answered at once
        return None

    def drop(self, stream: socket.socket) -> None:
        """Forget a connection."""
        self.selector.unregister(stream)
        del self.streams[stream]
        stream.close()

    def send(self, message: dict[str, Any], *streams: socket.socket) -> None:
        """One line to those connections, or to all."""
        for stream in streams or list(self.streams):
            try:
                stream.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                self.drop(stream)

    def begin(self, given: dict[str, Any]) -> None:
        """Add the torrent: check what is there, then get what is not."""
        lt = self.lt
        self.name, self.push = given["name"], given["push"]
        self.key = base64.b64decode(given["key"])
        rate = {"upload_rate_limit": 0, "download_rate_limit": 0}
        self.session = lt.session({**settings(self.port, given["encrypt"]), **rate})
        self.allow([])
        torrent = lt.add_torrent_params()
        torrent.ti = lt.torrent_info(lt.bdecode(base64.b64decode(given["torrent"])))
        torrent.save_path = given["staging"]
        torrent.flags = quiet_flags(lt)
        files, size = torrent.ti.files(), torrent.ti.piece_length()
        self.piece = size
        names: dict[int, str] = {}
        for index, name in enumerate(file_names(torrent.ti)):
            if name in given["files"]:
                names[index] = given["files"][name]
                self.wanted[index] = files.file_size(index)
                first = files.file_offset(index) // size
                self.waiting.update(range(first, first - -files.file_size(index) // size))
        torrent.renamed_files = names
        self.all = frozenset(self.waiting)
        self.turn = given["turn"]
        torrent.piece_priorities = [0] * torrent.ti.num_pieces()
        for path in given["empty"]:
            os.makedirs(os.path.dirname(os.path.join(given["staging"], path)), exist_ok=True)
            open(os.path.join(given["staging"], path), "wb").close()
        self.torrent = self.session.add_torrent(torrent)
        self.offer_engine()

    def allow(self, peers: list[Peer]) -> None:
        """Let in the end of ssh's forward and the hosts of the push, by address."""
        rules = self.lt.ip_filter()
        rules.add_rule("0.0.0.0", "255.255.255.255", 1)
        rules.add_rule("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 1)
        known = [address for peer in peers for address in peer.addresses]
        for address in [*known, *(() if self.rests else LOOPBACK)]:
            try:
                rules.add_rule(address, address, 0)
            except RuntimeError:
                continue  # a name: the host behind it said its addresses itself
        self.session.set_ip_filter(rules)

    def offer_engine(self) -> None:
        """Give the engine to hosts that prove that they know the push's key."""
        listener = socket.socket()
        listener.bind(("0.0.0.0", 0))
        listener.listen(16)
        self.wheel_port = listener.getsockname()[1]
        threading.Thread(target=self.give_engine, args=(listener,), daemon=True).start()

    def give_engine(self, listener: socket.socket) -> None:
        """Answer whoever asks for the engine, one after another."""
        while True:
            peer, _ = listener.accept()
            with peer:
                try:
                    peer.settimeout(10)
                    challenge = secrets.token_bytes(32)
                    peer.sendall(challenge)
                    with peer.makefile("rb") as stream:
                        answer = stream.read(32)
                    if hmac.compare_digest(answer, hmac.digest(self.key, challenge, "sha256")):
                        with open(f"{self.folder}/engine.whl", "rb") as wheel:
                            peer.sendfile(wheel)
                except OSError:
                    continue

    def meet(self, message: dict[str, Any]) -> None:
        """Know the other hosts of the push from now on, and which pieces are one's own to ask."""
        given = message["peers"]
        self.turn = message["turn"]
        for name, one in given.items():
            old = self.peers.get(name)
            if old is None or (old.addresses, old.port) != (one["addresses"], one["port"]):
                self.peers[name] = Peer(name, one)
        for name in self.peers.keys() - given.keys():
            del self.peers[name]
        self.allow(list(self.peers.values()))

    def ask(self, pieces: set[int], priority: int) -> None:
        """Ask for these pieces from now on."""
        if pieces:
            self.waiting -= pieces
            self.torrent.prioritize_pieces([(piece, priority) for piece in pieces])

    def choose(self) -> None:
        """Ask for the pieces that another host has by now, and for some that none has.

        The latter are asked of the operator's machine: those of one's own turn, a few at a time,
        from the first, and then, where that machine has nothing to do, those of a host that is
        slow or gone, from the last ones. So it sends each about once, whoever comes late.
        """
        if not self.checked or self.done:
            return
        held = self.torrent.status(self.lt.torrent_handle.query_pieces).pieces
        self.waiting -= {piece for piece in self.waiting if held[piece]}
        from_there = [p for p in self.torrent.get_peer_info() if p.ip[0] in LOOPBACK]
        seen = self.torrent.piece_availability()
        if not seen:  # it is whole since a moment
            return
        self.ask({piece for piece in self.waiting if seen[piece] > bool(from_there)}, 2)
        self.lacks = any(not held[piece] and seen[piece] <= bool(from_there) for piece in self.all)
        self.open = {piece for piece in self.open if not held[piece]}
        own, now = in_turn(self.waiting, self.turn), time.monotonic()
        if own:
            self.rested = 0.0
            self.rest(False)
        elif self.open and not self.arrived(self.open):
            return
        elif self.peers and not self.help and (not self.rested or now - self.rested < REST):
            self.rested = self.rested or now
            self.rest(True)
            return
        else:
            self.rest(False)
        rate = sum(peer.payload_down_speed for peer in from_there)
        ahead = max(AHEAD_BYTES, AHEAD_SECONDS * rate) / self.piece
        need = max(AHEAD, int(ahead)) - len(self.open)
        if need <= 0:
            return
        some = sorted(own)[:need]
        if not some:
            last = sorted(self.waiting)[len(self.waiting) // 2 :]
            some = random.sample(last, min(need, len(last)))
        self.open |= set(some)
        self.ask(set(some), 7)

    def arrived(self, pieces: set[int]) -> bool:
        """Whether all of those pieces are here, though perhaps not yet written and verified."""
        partial = {one["piece_index"]: one["blocks"] for one in self.torrent.get_download_queue()}
        return all(
            piece in partial and all(block["state"] >= WRITING for block in partial[piece])
            for piece in pieces
        )

    def rest(self, rests: bool) -> None:
        """Leave the operator's machine to others, or be served by it again.

        Without a connection meanwhile, since the engine would ask it for what others send, too.
        """
        if rests != self.rests:
            self.rests = rests
            self.allow(list(self.peers.values()))
            self.told = (0.0, "")

    def connected(self) -> set[str]:
        """Addresses of the hosts that pieces are exchanged with."""
        busy = self.lt.peer_info.connecting | self.lt.peer_info.handshake
        found = {p.ip[0] for p in self.torrent.get_peer_info() if not p.flags & busy}
        return {address.removeprefix("::ffff:") for address in found} - LOOPBACK

    def seek(self) -> None:
        """Try hosts that were not reached yet, and connect to those that are not connected."""
        now = time.monotonic()
        due = [peer for peer in self.peers.values() if now >= peer.next and not peer.trying]
        if not due:
            return
        connected = self.connected()
        for peer in due:
            if peer.at and (self.done or connected & {peer.at, *peer.addresses}):
                peer.next = now + AGAIN
            elif peer.at and peer.tries:
                self.torrent.connect_peer((peer.at, peer.port))
                peer.next = now + AGAIN
                peer.tries = 0  # tried again in a thread if that came to nothing
            else:
                peer.trying = True
                threading.Thread(target=self.reach, args=(peer,), daemon=True).start()

    def reach(self, peer: Peer) -> None:
        """Find a host and connect to it. Runs in a thread."""
        peer.try_()
        # One of two begins: two connections at once would end each other.
        if peer.at and not self.done and self.name > peer.name:
            self.torrent.connect_peer((peer.at, peer.port))

    def watch(self) -> None:
        """See what became of the torrent since the last look."""
        for alert in self.session.pop_alerts():
            if isinstance(alert, self.lt.file_error_alert | self.lt.torrent_error_alert):
                self.problem = self.problem or error_line(alert)
            elif isinstance(alert, self.lt.torrent_checked_alert):
                self.checked = True
            elif isinstance(alert, self.lt.cache_flushed_alert):
                self.flushes = max(self.flushes - 1, 0)
        if self.done:
            return
        if self.flushing and not self.flushes:
            self.done = self.whole()
            self.flushing = False
        elif not self.flushing and self.whole():
            # What was checked is not yet what others read from the disk.
            self.flushing = True
            self.flush()
        elif time.monotonic() - self.flushed > FLUSH:
            self.flush()

    def have(self) -> int:
        """Bytes of whole and verified pieces."""
        pieces = self.torrent.file_progress(self.lt.file_progress_flags_t.piece_granularity)
        return sum(min(pieces[index], size) for index, size in self.wanted.items())

    def whole(self) -> bool:
        """Whether every file that this host is to get is there."""
        return self.checked and self.have() == self.total()

    def total(self) -> int:
        """Bytes that this host is to have."""
        return sum(self.wanted.values())

    def report(self) -> None:
        """Say how far this host is: when that changed, and once in a while."""
        status = self.torrent.status()
        checking = not self.checked
        state = "done" if self.done else "checking" if checking else "sending"
        state = "failed" if self.problem else state
        now = time.monotonic()
        if now - self.told[0] < REPORT and self.told[1] == state:
            return
        self.told = (now, state)
        total, have = self.total(), self.have()
        self.send(
            {
                "state": state,
                "bytes": total if self.done else int(total * status.progress) if checking else have,
                "of": total,
                "rate": status.download_payload_rate,
                "peers": len(self.connected()),
                "why": self.problem,
                "rests": self.rests,
                "lacks": self.lacks,
                "reached": {peer.name: peer.reached for peer in self.peers.values()},
                "port": self.port,
                "wheel_port": self.wheel_port,
            }
        )


def in_turn(pieces: set[int], turn: tuple[int, int]) -> set[int]:
    """Those of the pieces that this host, one of so many, asks the operator's machine for."""
    number, hosts = turn
    return {piece for piece in pieces if piece % hosts == number}


def quiet_flags(lt: Any) -> int:
    """Flags of a torrent that nobody finds: its peers are those that it is told."""
    flags = lt.torrent_flags
    return int(flags.disable_dht | flags.disable_lsd | flags.disable_pex | flags.apply_ip_filter)


def file_names(info: Any) -> list[str]:
    """The names of a torrent's files by index, without the torrent's own."""
    files = info.files()
    return [files.file_path(index).rpartition("/")[2] for index in range(files.num_files())]


def error_line(alert: Any) -> str:
    """What went wrong with a file, in one line."""
    where = getattr(alert, "filename", None)
    path = where() if callable(where) else ""
    return f"{path}: {alert.error.message()}" if path else str(alert.message())


if __name__ == "__main__":
    if len(sys.argv) > 2:
        Serve(int(sys.argv[1]), float(sys.argv[2])).run()
    else:
        wrong = attach(globals()["SOURCE"])
        if wrong is not None:
            say(wrong)
