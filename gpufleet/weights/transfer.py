"""Sends weight files to a host, through cuts of the connection, and has it verify and name them."""

from __future__ import annotations

import io
import os
import re
import subprocess
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import gevent
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from paramiko import SSHException
from pyinfra import logger
from pyinfra.api import Host, State
from pyinfra.api.exceptions import ConnectError

from gpufleet.catalog import WeightFile
from gpufleet.errors import FleetError
from gpufleet.shell import script
from gpufleet.weights.plan import Landing, Progress, size, staging, target
from gpufleet.weights.swarm.client import Member, Swarm

#: How long a host may be out of reach before its transfer is given up, in seconds.
PATIENCE = 300.0
#: Seconds without a byte after which rsync takes a connection for dead.
SILENCE = 120
#: Exit codes of rsync that a broken connection has (rsync(1)), and ssh's own.
CUT = frozenset({10, 12, 30, 35, 255})
# Those that a host's full disk may have.
_HOST_FAILED = frozenset({10, 11, 12, 23})
#: What ssh and rsync say where trying again changes nothing.
_FINAL = re.compile(
    r"Permission denied|Host key verification|rsync: (command )?not found|"
    r"No space left|Disk quota|Read-only file system|password is required|unknown option",
    re.I,
)
_RATE_SECONDS = 10.0
_REPORT_SECONDS = 0.5

Report = Callable[[Progress], None]

# $1 folder of the deploy, $2 version. What is to be done comes as lines on standard input, whole
# only with its last one: a connection that breaks leaves half a list.
#   send DIGEST PATH        arrived in the staging folder: verify it, give it its name, record it
#   adopt DIGEST STAT PATH  of the layout before, whose folder keeps a link to it
#   record LINE             read just now and right
#   link TARGET PATH        of the version's folder, which appears by one rename
# All of it may have been done before, by a run that was cut off.
LAND = r"""set -e
umask 022
root=$1 version=$2 w=$1/weights b=$1/weights/blobs from=$1/incoming/weights-$2
list=$(cat)
case $list in
  *"
end") ;;
  *) echo "the list of weight files did not arrive whole: apply again" >&2; exit 1;;
esac
tab=$(printf '\t')
part() { printf '%s\n' "$list" | sed -n "s/^$1$tab//p"; }
mkdir -p "$b"
export b from tab
part send | tr '\n' '\0' | xargs -0 -r -P "$(nproc)" -n 1 sh -c '
  sum=${1%%"$tab"*} path=${1#*"$tab"}
  stat() { (cd "$b" && command stat -c "%n %s %.9Z %i" "$sum"); }
  if [ ! -f "$from/$path" ] && [ -f "$b/$sum" ]; then
    grep -qxF "$(stat)" "$b/.verified" && exit 0
  fi
  if [ "$(sha256sum < "$from/$path" | cut -d" " -f1)" != "$sum" ]; then
    echo "weight file $path is corrupt on this host: its sha256 is not the one expected; it was" \
      "removed, apply again" >&2
    rm -f "$from/$path"; exit 1
  fi
  # The first move may be a copy to another disk.
  chmod 644 "$from/$path" && mv -f "$from/$path" "$b/.$sum.new" && sync "$b/.$sum.new" &&
  mv -f "$b/.$sum.new" "$b/$sum" && stat >> "$b/.verified"
' sh
part adopt | while IFS=$tab read -r sum said path; do
  [ -L "$path" ] && [ -f "$b/$sum" ] && continue
  if [ "$(stat -c '%s %.9Z %i' "$path")" != "$said" ]; then
    echo "weight file $path changed meanwhile: apply again" >&2; exit 1
  fi
  ln -f "$path" "$b/$sum"
  ln -sfn "$b/$sum" "$path.new"
  mv -fT "$path.new" "$path"
  (cd "$b" && stat -c '%n %s %.9Z %i' "$sum") >> "$b/.verified"
done
part record >> "$b/.verified"
part link | while IFS=$tab read -r to path; do
  [ -f "$b/${to##*/}" ] || { echo "weight file $path is not there: apply again" >&2; exit 1; }
done
new=$w/.$version.new
rm -rf "$new"
[ -d "$w/$version" ] || mkdir "$new"
part link | while IFS=$tab read -r to path; do
  if [ -d "$new" ]; then
    mkdir -p "$(dirname "$new/$path")"
    ln -s "$to" "$new/$path"
  else
    mkdir -p "$(dirname "$w/$version/$path")"
    ln -sfn "$to" "$w/$version/$path.new"
    mv -fT "$w/$version/$path.new" "$w/$version/$path"
  fi
done
[ ! -d "$new" ] || mv -T "$new" "$w/$version"
rm -rf "$from"
"""


def land_list(plan: Landing) -> str:
    """What LAND is to do, as it reads it."""
    lines = [f"send\t{file.sha256}\t{file.path}" for file in plan.send]
    lines += [f"adopt\t{sha256}\t{old.stat}\t{old.path}" for sha256, old in plan.adopt]
    lines += [f"record\t{line}" for line in plan.record]
    lines += [f"link\t{target(path, sha256)}\t{path}" for path, sha256 in plan.link]
    return "\n".join([*lines, "end\n"])


@dataclass(frozen=True)
class Way:
    """How programs of this machine reach a host. Without `ssh` it is this machine itself."""

    ssh: tuple[str, ...] = ()
    """The command that ends with the address; a remote command may follow."""
    sudo: bool = False

    def run(self, line: str) -> list[str]:
        """The command that has the host's shell run a line."""
        line = f"sudo -n {line}" if self.sudo else line
        return [*self.ssh, line] if self.ssh else ["sh", "-c", line]

    def rsync(self, folder: str) -> list[str]:
        """rsync's options for how to get there, and the folder as it names it."""
        if not self.ssh:
            return [f"{folder}/"]
        *shell, address = self.ssh
        options = ["--rsh", " ".join(_quoted(word) for word in shell)]
        if self.sudo:
            options += ["--rsync-path", "sudo -n rsync"]
        return [*options, f"{f'[{address}]' if ':' in address else address}:{folder}/"]


def _quoted(word: str) -> str:
    """As rsync reads the value of --rsh: it knows quotes, and no backslashes."""
    if re.fullmatch(r"[A-Za-z0-9/._=:,@%+-]+", word):
        return word
    return "'" + word.replace("'", "''") + "'"


@dataclass(frozen=True)
class Order:
    """What is to be brought to one host, and how."""

    root: str
    plan: Landing
    source: Path
    """Folder of this machine with the files."""
    files: tuple[WeightFile, ...] = ()
    """All of the version, what a swarm exchanges."""
    via: Literal["rsync", "swarm"] = "rsync"
    bandwidth_kib: int = 0
    encrypt: bool = False
    """Of what the hosts of a swarm exchange."""
    at_once: int = 0
    patience: float = PATIENCE

    @property
    def staging(self) -> str:
        """The folder on the host that files arrive in."""
        return str(staging(self.root, self.plan.version))


class Meter:
    """Counts the bytes of one host's transfer and reports them, not too often."""

    def __init__(self, order: Order, report: Report) -> None:
        self.of = order.plan.sending
        self.bytes = self.of - order.plan.to_send
        self.via: Literal["", "rsync", "swarm"] = "rsync"
        self.report = report
        self.fallback = ""
        """Why it is rsync though it was to be the swarm."""
        self._seen: deque[tuple[float, int]] = deque()
        self._said = 0.0

    def at(self, count: int, *, rate: float | None = None, peers: int = 0) -> None:
        """So many bytes have arrived; fewer than before are passed over."""
        now = time.monotonic()
        self.bytes = max(self.bytes, min(count, self.of))
        self._seen.append((now, self.bytes))
        while now - self._seen[0][0] > _RATE_SECONDS:
            self._seen.popleft()
        if now - self._said >= _REPORT_SECONDS:
            self._said = now
            self.say("sending", rate=self._rate() if rate is None else rate, peers=peers)

    def _rate(self) -> float:
        (since, before), (now, count) = self._seen[0], self._seen[-1]
        return (count - before) / (now - since) if now > since else 0.0

    def say(
        self,
        state: Literal["waiting", "starting", "sending", "cut", "verifying"],
        *,
        rate: float = 0.0,
        peers: int = 0,
        why: str = "",
    ) -> None:
        """Report the state that the transfer is in."""
        self.report(Progress(state, self.via, self.bytes, self.of, rate, peers, why))


class Watched:
    """The files to send as they are now; one that changes under way is noticed."""

    def __init__(self, order: Order) -> None:
        self._places = {file.path: order.source / file.path for file in order.plan.send}
        self._before = {path: self._stat(place) for path, place in self._places.items()}

    @staticmethod
    def _stat(place: Path) -> tuple[int, int, int] | None:
        try:
            seen = place.stat()
        except OSError:
            return None
        return seen.st_size, seen.st_mtime_ns, seen.st_ino

    def check(self) -> None:
        """Raise FleetError if a file is not what it was when the transfer began."""
        for path, place in self._places.items():
            if self._stat(place) != self._before[path]:
                raise FleetError(
                    f"weight file {place} changed on this machine while it was sent, and nothing "
                    "of this version is in use on the host: let the change end, then apply again"
                )


def bring(
    state: State, host: Host, order: Order, way: Way, report: Report, ended: Callable[[], None]
) -> bool:
    """Bring an order to a host; False, and one line in pyinfra's log, if that fails.

    `ended` is called once nothing more changes on the host.
    """
    meter = Meter(order, report)
    began = time.monotonic()
    broken = 0
    try:
        if order.plan.send:
            broken = _send(state, host.name, order, way, meter)
        meter.say("verifying")
        broken += _land(order, way, meter)
    except FleetError as error:
        _reconnect(host)
        logger.error(f"{host.print_prefix}gpufleet: {error}")
        return False
    finally:
        ended()
    if broken:
        _reconnect(host)
    report(
        Progress(
            "done",
            meter.via if order.plan.send else "",
            meter.of,
            meter.of,
            why=meter.fallback,
            files=len(order.files),
            sent=order.plan.to_send,
            there=order.plan.bytes - order.plan.to_send,
            seconds=round(time.monotonic() - began, 3),
        )
    )
    return True


def _send(state: State, name: str, order: Order, way: Way, meter: Meter) -> int:
    """Have the files in the host's staging folder; returns how often the connection broke."""
    watched = Watched(order)
    if order.via == "swarm" and way.ssh:
        meter.via = "swarm"
        meter.fallback = _swarm(state, name, order, way, meter, watched)
        if not meter.fallback:
            return 0
        meter.via = "rsync"
    meter.say("waiting", why="waits for its turn")
    with _turn(state, order.at_once):
        return _rsync(order, way, meter, watched)


class _Shared:
    """One swarm for all hosts of a run that get the same version; the last to leave ends it."""

    def __init__(self, order: Order) -> None:
        files = [(file, order.source / file.path) for file in order.files]
        self.swarm = Swarm(files, upload_kib=order.bandwidth_kib, encrypt=order.encrypt)
        self.inside = 0
        self.ended = Event()


_swarms: weakref.WeakKeyDictionary[State, dict[str, _Shared]] = weakref.WeakKeyDictionary()


def _swarm(state: State, name: str, order: Order, way: Way, meter: Meter, watched: Watched) -> str:
    """Get the files from the swarm; why that did not work, or an empty text."""
    running = _swarms.setdefault(state, {})
    shared = running.get(order.plan.version)
    if shared is None:
        shared = running[order.plan.version] = _Shared(order)
    shared.inside += 1
    why = ""
    try:
        paths = tuple(file.path for file in order.plan.send)
        member = Member(name, way.ssh, way.sudo, way.ssh[-1], order.staging, paths)
        shared.swarm.join(member)
        for progress in shared.swarm.follow(name):
            watched.check()
            if progress.state == "sending":
                meter.at(progress.bytes, rate=progress.rate, peers=progress.peers)
            elif progress.state in ("alone", "failed"):
                why = progress.why or progress.state
            elif progress.state != "done":
                meter.say("starting", why=progress.why)
    finally:
        shared.inside -= 1
        if not shared.inside:
            if running.get(order.plan.version) is shared:
                del running[order.plan.version]
            shared.swarm.close()
            shared.ended.set()
    if not why:
        # Until then this host gives what it has to the others, from where it arrived.
        meter.bytes = meter.of
        meter.say("starting", why="has all, gives to the other hosts")
        shared.ended.wait()
        watched.check()
    return why


# How many hosts rsync feeds at a time, in each run.
_slots: weakref.WeakKeyDictionary[State, BoundedSemaphore] = weakref.WeakKeyDictionary()


@contextmanager
def _turn(state: State, at_once: int) -> Iterator[None]:
    if not at_once:
        yield
        return
    with _slots.setdefault(state, BoundedSemaphore(at_once)):
        yield


def _rsync(order: Order, way: Way, meter: Meter, watched: Watched) -> int:
    """Send by rsync, again and again while the connection breaks; returns how often it broke."""
    whole = {file.path: file.bytes for file in order.plan.send}
    done: set[str] = set()
    patience = _Patience(order.patience)
    while True:
        before = meter.bytes
        ended = sum(whole[path] for path in done)
        code, said = _rsync_once(order, way, meter, watched, ended, done)
        watched.check()
        if code == 0:
            meter.at(meter.of)
            return patience.broken
        why = _reason(said)
        if code in _HOST_FAILED and _is_full(order, way, meter):
            why = "No space left on device"  # what the host said of it may be lost
        if code not in CUT or _FINAL.search(why):
            raise FleetError(_failure(why, order, meter))
        patience.again(why, moved=meter.bytes > before, meter=meter)


class _Patience:
    """Waits before another try, and gives up where nothing has moved for too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.broken = 0
        self._pause = 1.0
        self._until = time.monotonic() + seconds

    def again(self, why: str, *, moved: bool, meter: Meter) -> None:
        """Return when it is time to try again. Raises FleetError where it is not worth it."""
        self.broken += 1
        if moved or self.broken == 1:
            self._pause, self._until = 1.0, time.monotonic() + self.seconds
        if time.monotonic() + self._pause > self._until:
            raise FleetError(
                f"the connection broke and did not come back in {self.seconds:.0f} s: {why}; "
                "apply again when the host answers, it goes on where this stopped"
            )
        meter.say("cut", why="the connection broke")
        gevent.sleep(self._pause)
        self._pause = min(self._pause * 2, 30.0)


_PROGRESS = re.compile(r"\s*(\d+)\s+\d+%\s")


def _rsync_once(
    order: Order, way: Way, meter: Meter, watched: Watched, ended: int, done: set[str]
) -> tuple[int, list[str]]:
    """One rsync: its exit code and what it said beside progress.

    `done` gets the paths that it has sent; `ended` are the bytes of those that it passes over.
    """
    command = ["rsync", "-rt", "--copy-links", "--files-from=-", "--from0", "--partial"]
    command += ["--inplace", "--chmod=F644,D755", f"--timeout={SILENCE}", "--info=progress2"]
    command += ["--no-inc-recursive", "--no-human-readable", "--out-format=> %b %n"]
    if order.bandwidth_kib:
        command.append(f"--bwlimit={order.bandwidth_kib}")
    child = subprocess.Popen(
        [*command, f"{order.source}/", *way.rsync(order.staging)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},
    )
    said: list[str] = []
    assert child.stdin is not None
    assert child.stdout is not None
    output = cast(io.BufferedReader, child.stdout)
    try:
        with suppress(BrokenPipeError):
            child.stdin.write(b"".join(f"{file.path}\0".encode() for file in order.plan.send))
            child.stdin.close()
        rest = b""
        while data := output.read1(65536):
            # A line of progress begins with a carriage return, and is whole before the next one.
            *lines, rest = re.split(rb"[\r\n]", rest + data)
            for line in (text.decode(errors="replace") for text in [*lines, rest]):
                if (seen := _PROGRESS.match(line)) is not None:
                    meter.at(ended + int(seen[1]))
                    watched.check()
            for line in (text.decode(errors="replace") for text in lines):
                if line.startswith("> "):
                    done.add(line.split(" ", 2)[2])
                elif line.strip() and not _PROGRESS.match(line):
                    said.append(line.strip())
        return child.wait(), [*said, *filter(None, [rest.decode(errors="replace").strip()])]
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
        child.stdout.close()


def _is_full(order: Order, way: Way, meter: Meter) -> bool:
    """Whether the host has no room for what is still to come."""
    line = script('df -Pk "$1" | tail -n 1', order.staging).get_raw_value()
    done = subprocess.run(way.run(line), capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return len(words) > 3 and words[3].isdigit() and int(words[3]) * 1024 < meter.of - meter.bytes


def _reason(said: Sequence[str]) -> str:
    """The line that says why rsync, or the ssh below it, failed."""
    telling = [line for line in said if not line.startswith(("rsync error:", "rsync warning:"))]
    final = [line for line in telling if _FINAL.search(line)]
    return next(iter(final or telling[-1:] or said[-1:]), "it said nothing")


def _failure(why: str, order: Order, meter: Meter) -> str:
    if re.search(r"No space left|Disk quota", why):
        return (
            f"the host's disk is full: {size(meter.of - meter.bytes)} are still to come; free some "
            f"space, then apply again: it goes on from what lies in {order.staging}"
        )
    if re.search(r"rsync: (command )?not found", why):
        return f"{why}: install rsync on the host"
    if "unknown option" in why:
        return f"{why}: install rsync 3.1 or newer on this machine"
    return f"rsync: {why}; apply again, it goes on where this stopped"


def _land(order: Order, way: Way, meter: Meter) -> int:
    """Have the host verify and name what arrived; returns how often the connection broke."""
    command = way.run(script(LAND, order.root, order.plan.version).get_raw_value())
    given = land_list(order.plan)
    patience = _Patience(order.patience)
    while True:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode == 0:
            return patience.broken
        why = done.stderr.strip().splitlines() or ["it said nothing"]
        if not way.ssh or done.returncode != 255 or _FINAL.search(why[-1]):
            corrupt = [line for line in why if line.startswith("weight file")]
            raise FleetError((corrupt or why)[0 if corrupt else -1])
        patience.again(why[-1], moved=False, meter=meter)


def _reconnect(host: Host) -> None:
    """Have pyinfra's own connection to the host work again, after one that broke."""
    client = getattr(host.connector, "client", None)
    if client is None:
        return
    client.close()
    for pause in (0.0, 1.0, 3.0, 10.0):
        gevent.sleep(pause)
        with suppress(ConnectError, OSError, SSHException, EOFError):
            # Not by host.connect: that counts a host as lost at the first failure.
            host.connector.disconnect()
            host.connector.connect()
            return
