"""Keeps one host in a push: its ssh, its forward, its unit, through cuts and reboots."""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpufleet.weights.swarm import plan
from gpufleet.weights.swarm.client import ENDS, Member, Progress

if TYPE_CHECKING:
    from gpufleet.weights.swarm.push import Push

SOURCE = Path(__file__).with_name("on_host.py")
#: Reads the program that follows, so that nothing of it is an argument.
BOOT = (
    "import sys; SOURCE = sys.stdin.buffer.read(int(sys.stdin.buffer.readline())); "
    "exec(compile(SOURCE, 'on_host.py', 'exec'))"
)
#: Ports of hosts that nobody gives out by itself (below Linux's ephemeral ones).
PORTS = range(20000, 32000)
#: How long a host that was there may be away, such as for a reboot, in seconds.
PATIENCE = 900.0
#: Logins that may fail before the first that does not.
FIRST_TRIES = 3
#: Seconds between words to a host, and without one from it after which its ssh is given up.
HEARTBEAT, SILENCE = 5.0, 40.0
#: How long a host may take to stop, in seconds.
STOPPING = 20.0

_OPTIONS = {
    "BatchMode": "yes",
    "ExitOnForwardFailure": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "4",
    "ControlMaster": "no",
    "ControlPath": "none",
    "LogLevel": "ERROR",
}


class Lost(Exception):
    """The way to a host broke; it is tried again."""


def free_port() -> int:
    """A port of 127.0.0.1 that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Link:
    """One host. `run` lasts until it is told to end, or the host failed or is alone."""

    def __init__(self, member: Member, push: Push) -> None:
        self.member, self.push = member, push
        self.progress = Progress("starting")
        self.addresses: list[str] = []
        self.port = random.choice(PORTS)
        self.local = 0
        """The end of the forward on this machine while the host answers, else 0."""
        self.engine_port = 0
        self.kind = ("", "")
        """The interpreter and machine that its engine is for."""
        self.reached: Mapping[str, bool | None] = {}
        self.rests = False
        """Whether it leaves this machine to others for a moment."""
        self.lacks = False
        """Whether it needs pieces that it knows no other host to have."""
        self._ssh: asyncio.subprocess.Process | None = None
        self._gone = asyncio.Event()
        self._attached = False
        """Whether its unit runs and hears what is sent."""
        self.over = False
        self._seen: float | None = None

    @property
    def takes_part(self) -> bool:
        """Whether other hosts may find it."""
        return bool(self.addresses) and self.progress.state not in ("alone", "failed")

    def say(self, progress: Progress) -> None:
        """Tell whoever follows; nothing comes after an end."""
        if self.progress.state not in ENDS:
            self.progress = progress
            self.push.tell(self.member.name, progress)

    async def run(self) -> None:
        """Keep the host in the push."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._session()
                return
            except Lost as lost:
                why = str(lost)
            finally:
                self.local, self._attached = 0, False
                self._gone.set()  # nothing more comes of this ssh
                self._kill()
            if self.over:
                return
            if self._seen is not None and self._seen > began:
                failures = 0
            failures += 1
            away = time.monotonic() - (self._seen or began)
            if (self._seen is None and failures >= FIRST_TRIES) or away > PATIENCE:
                self.say(self._with("failed", f"ssh: {why}"))
                return
            self.say(self._with("starting", f"ssh: {why}; trying again"))
            await asyncio.sleep(min(2.0 ** (failures - 1), 15.0))

    def _with(self, state: Any, why: str) -> Progress:
        return Progress(state, self.progress.bytes, self.progress.of, why=why)

    async def end(self) -> None:
        """Have the host's unit stop, if it can be told, and end `run`."""
        self.over = True
        ssh = self._ssh
        if ssh is not None and ssh.returncode is None and self._attached:
            self._send({"stop": True})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._gone.wait(), STOPPING)
        self._kill()

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell the host something, if it takes part now."""
        if self.local:
            self._send(message)

    def _kill(self) -> None:
        if self._ssh is not None and self._ssh.returncode is None:
            with suppress(ProcessLookupError):
                self._ssh.kill()

    def _send(self, message: Mapping[str, Any]) -> None:
        ssh = self._ssh
        if ssh is not None and ssh.stdin is not None and not ssh.stdin.is_closing():
            ssh.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self, timeout: float) -> Any:
        assert self._ssh is not None
        assert self._ssh.stdout is not None
        try:
            line = await asyncio.wait_for(self._ssh.stdout.readline(), timeout)
        except asyncio.TimeoutError:
            raise Lost("no answer in time") from None
        if not line:
            raise Lost(await self._complaint())
        return json.loads(line)

    async def _complaint(self) -> str:
        """What ssh said last."""
        assert self._ssh is not None
        assert self._ssh.stderr is not None
        said = ""
        with suppress(asyncio.TimeoutError):
            said = (await asyncio.wait_for(self._ssh.stderr.read(), 5)).decode(errors="replace")
        return (said.strip().splitlines() or ["the connection ended"])[-1]

    async def _session(self) -> None:
        """One ssh, from its start to its end. Raises Lost if it ends by itself."""
        member, push = self.member, self.push
        local = free_port()
        given = {**_OPTIONS, **await self._cipher()}
        options = [word for key, value in given.items() for word in ("-o", f"{key}={value}")]
        forward = ["-L", f"127.0.0.1:{local}:127.0.0.1:{self.port}"]
        remote = shlex.join([*(["sudo", "-n"] if member.sudo else []), member.python, "-c", BOOT])
        self._ssh = await asyncio.create_subprocess_exec(
            *(member.ssh[0], *options, *forward, *member.ssh[1:], remote),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 22,
        )
        assert self._ssh.stdin is not None
        source = SOURCE.read_bytes()
        self._ssh.stdin.write(b"%d\n" % len(source) + source)
        self._send(
            {"push": push.id, "staging": member.staging, "port": self.port, "quiet": push.quiet}
        )
        hello = await self._read(90)
        if "taken" in hello:
            self.port = random.choice(PORTS)
            return await self._session()
        if self._is_over(hello):
            return None
        self.addresses = list(dict.fromkeys([member.address, *hello["addresses"]]))
        self.kind = (hello["tag"], hello["machine"])
        if hello["runs"]:
            self._send({})
        elif not await self._bring_engine():
            return None
        self._attached = True
        self._gone.clear()
        heartbeat = asyncio.create_task(self._heartbeat())
        try:
            await push.opened.wait()
            if not self.over:
                self._send({"start": push.start(member)})
                self.local = local
                push.met()
            while True:
                message = await self._read(SILENCE)
                self._seen = time.monotonic()
                if "gone" in message:
                    self._gone.set()
                    return None
                if self._is_over(message):
                    return None
                self._take(message)
        finally:
            heartbeat.cancel()

    async def _cipher(self) -> dict[str, str]:
        """The ciphers that ssh would offer this host, those first that cost least; none if it
        does not say.
        """
        ssh = await asyncio.create_subprocess_exec(
            *(self.member.ssh[0], "-G", *self.member.ssh[1:]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        said, _ = await ssh.communicate()
        for line in said.decode(errors="replace").splitlines():
            key, _, value = line.partition(" ")
            if key == "ciphers":
                return {"Ciphers": plan.cheapest_first(value)}
        return {}

    async def _bring_engine(self) -> bool:
        """Have the host get the engine from others or from here; False if that is its end."""
        push = self.push
        wheel = await push.engine(self)
        if isinstance(wheel, str):
            self.say(self._with("alone", wheel))
            return False
        self._send({"engine": wheel.offer(push.givers(self))})
        answer = await self._read(120)
        if answer["send"]:
            assert self._ssh is not None
            assert self._ssh.stdin is not None
            self._ssh.stdin.write(wheel.data)
            with suppress(ConnectionError):
                await self._ssh.stdin.drain()
            push.engine_bytes += len(wheel.data)
        return True

    def _is_over(self, message: Mapping[str, Any]) -> bool:
        for state in ("failed", "alone"):
            if isinstance(why := message.get(state), str):
                self.say(self._with(state, why))
                self.push.met()
                return True
        if "ended" in message:
            raise Lost(f"its unit ended: {message['ended']}")
        return False

    def _take(self, message: Mapping[str, Any]) -> None:
        """A report of the host's."""
        if "state" not in message:
            return
        first, self.engine_port = not self.engine_port, message["wheel_port"]
        self.reached, self.rests = message["reached"], message["rests"]
        self.lacks = message["lacks"]
        known = {name: message[name] for name in ("state", "bytes", "of", "rate", "peers", "why")}
        self.say(Progress(**known))
        if first:
            self.push.feed()

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            self._send({})
