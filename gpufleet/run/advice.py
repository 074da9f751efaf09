"""Turns what pyinfra, ssh and the hosts' tools say when something fails into one line a person
can act on: what is wrong, where, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gpufleet.run.targets import Target

#: What a connection error means, matched in order against pyinfra's message (3.10,
#: connectors/ssh.py) which quotes paramiko's: pattern, reason, what to do.
CONNECTION: tuple[tuple[str, str, str], ...] = (
    (
        r"Authentication|No authentication methods|No existing session|not a valid .* private key",
        "the host refused the key or user",
        "check ssh_user and ssh_key, and that the key is in the host's authorized_keys",
    ),
    (
        r"host key error|Host key .* does not match",
        "its host key is not the one in known_hosts",
        "if it was reinstalled: {forget}; if not, someone may be in between",
    ),
    (
        r"No host key for .* found",
        "its host key is not in known_hosts",
        "connect once with ssh, or set ssh_strict_host_key_checking to accept-new",
    ),
    (
        r"Could not resolve|Name or service not known|nodename nor servname|No address associated",
        "no such host name",
        "check ssh_hostname, or give an address",
    ),
    (
        r"refused",
        "connection refused",
        "check that sshd runs there and listens on this port",
    ),
    (
        # paramiko's word for a refusal and for a host that is not there alike
        r"Unable to connect to port",
        "nothing answers there",
        "check the address, that the host is on, and that sshd listens on this port",
    ),
    (
        r"timed out|Timeout",
        "no answer in time",
        "check the address, that the host is on, and the firewall between",
    ),
    (
        r"No route to host|Network is unreachable|unreachable",
        "no route to the host",
        "check the address and this machine's network or VPN",
    ),
    (
        r"protocol banner|EOF error|Connection reset|closed by remote",
        "the connection was closed before the login",
        "check that the port is sshd's; a key with a passphrase must be in ssh-agent (ssh-add)",
    ),
)

#: What a failing operation's output means: pattern, what to do.
OPERATION: tuple[tuple[str, str], ...] = (
    (r"No space left on device|disk full|not enough free space", "free space on the host"),
    (r"Disk quota exceeded", "raise the quota or free space on the host"),
    (
        r"Could not get lock|Unable to acquire the dpkg|dpkg frontend lock|lock-frontend",
        "another apt or dpkg runs on the host: wait for it to end",
    ),
    (r"dpkg was interrupted", "run dpkg --configure -a on the host"),
    (
        r"Could not resolve|Temporary failure (in name resolution|resolving)|Name or service not"
        r" known|failed to lookup address",
        "the host cannot resolve names: check its DNS, or set mirrors.site",
    ),
    (
        r"Network is unreachable|No route to host|Connection timed out|Failed to connect to"
        r"|Could not connect to|Connection refused|ConnectTimeout|Read timed out",
        "the host cannot reach that address: check its network, or set mirrors.site",
    ),
    (r"NO_PUBKEY|is not signed|EXPKEYSIG", "the package source's key is missing or expired there"),
    (r"Release file .* (expired|not valid yet)", "check the host's clock"),
    (
        r"Unable to locate package|has no installation candidate",
        "the package sources of the host do not have it: check them and mirrors.site",
    ),
    (r"404 +Not Found", "the package lists are out of date or the mirror lacks the file"),
    (r"Address already in use", "another process has the port: stop it or set demo.port"),
    (r"[Hh]ash mismatch for", "the file is not the one of the lock: check the mirror or index"),
    (
        r"sha256|[Cc]hecksum|[Hh]ash(es)? (sum )?mismatch|DO NOT MATCH THE HASHES",
        "the file is damaged or not the expected one: fetch it again",
    ),
    (r"No matching distribution|Could not find a version", "the index or wheelhouse lacks it"),
    (
        r"password is required|not in the sudoers|sudo: a terminal is required",
        "connect as root or allow sudo without a password",
    ),
    (r"Permission denied|Operation not permitted", "connect as root or set _sudo = True"),
    (r"Read-only file system", "the disk of the host is read-only: check it"),
    (r"Out of memory|Cannot allocate memory|MemoryError|oom-kill", "the host needs more memory"),
    (r"Command timed out", "it took too long: look at the host, then apply again"),
    (
        r"SSH session not active|Socket is closed|socket/SSH error|Server connection dropped",
        "the connection broke: apply again when the host answers",
    ),
)

#: Begins a line that a script of gpufleet's own says; it holds what to do.
OWN = "gpufleet: "

#: What to do when nothing better is known.
SEE_LOG = "see the log"

# Lines that close a failing command's output without saying why it failed.
_NOISE = re.compile(
    r"^(Error: executed \d+ commands.*|Error|Error in nested operation|E: Sub-process .*"
    r"|Traceback \(most recent call last\):|During handling of .*|See .* for details\.?"
    r"|\W*|N: .*|W: .*|rsync error: .*|hint: .*|\[notice\].*|Errors were encountered while .*)$"
)
_TELLING = re.compile(
    r"^(E:|error:|fatal:|ERROR:?|dpkg: error|rsync: )|(Error|Exception): |cannot |failed", re.I
)
_CALLBACK = re.compile(
    r"Unexpected error in Python callback: (\w+)\((['\"])(?P<message>.*?)\2,?\)", re.DOTALL
)


def connection(message: str, target: Target) -> str:
    """Reason and advice for a connector's error, joined by a semicolon."""
    name = f"[{target.address}]:{target.port}" if target.port not in (None, 22) else target.address
    file = f" -f {target.known_hosts}" if target.known_hosts else ""
    for pattern, reason, advice in CONNECTION:
        if re.search(pattern, message, re.I):
            return f"{reason}; {advice.format(forget=f'ssh-keygen -R {name!r}{file}')}"
    return f"{one_line(message)}; try ssh to it by hand"


def operation(output: Sequence[str]) -> str:
    """The line of a failing operation's output that says why, and what to do."""
    if (raised := _CALLBACK.search("\n".join(output))) and raised["message"]:
        output = raised["message"].replace("\\n", "\n").splitlines()
    lines = [line.strip() for line in output if not _NOISE.match(line.strip())]
    for line in reversed(lines):
        if line.startswith(OWN):
            return one_line(line.removeprefix(OWN), limit=600)
    for pattern, advice in OPERATION:
        for line in reversed(lines):
            if re.search(pattern, line):
                # An error of gpufleet's own brings its advice along.
                return one_line(line) if raised else f"{one_line(line)}; {advice}"
    if not lines:
        return f"it failed without a word; {SEE_LOG}"
    line = one_line(next((one for one in reversed(lines) if _TELLING.search(one)), lines[-1]))
    # Lines of gpufleet's own end with what to do.
    return line if raised or "; " in line else f"{line}; {SEE_LOG}"


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line; words of its middle are left out if it is longer than `limit`."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    head, tail = line[: limit // 2], line[-limit // 2 :]
    return f"{head.rpartition(' ')[0] or head} … {tail.partition(' ')[2] or tail}"


@dataclass(frozen=True)
class Abort:
    """Why pyinfra stopped the whole run. `invalid`: what it was given, not what it met."""

    message: str
    invalid: bool = False


_HEADING = re.compile(
    r"^--> (?P<name>pyinfra error|Operation error|Connector data type error|Argument type error"
    r"|Local IO error|unknown error|An exception occurred in|An internal exception occurred)"
    r"(?: in (?P<file>.+?) line (?P<line>\d+))?: ?(?P<rest>.*)$"
)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)')
_RAISED = re.compile(r"^(?P<type>[\w.]*[A-Z]\w*(?:\.\w+)*)(?:: (?P<message>.*))?$")
_INVALID = re.compile(r"(UsageError|SyntaxError|IndentationError|TabError)$")


def abort(log: Sequence[str]) -> Abort | None:
    """Read from pyinfra's own output why it stopped, or None if it does not say.

    Hosts that failed one by one are no such reason: their errors are events.
    """
    starts = [i for i, line in enumerate(log) if _HEADING.match(line)]
    if not starts:
        return None
    heading = _HEADING.match(log[starts[-1]])
    assert heading is not None
    rest = [line for line in log[starts[-1] + 1 :] if not line.startswith("-->")]
    if heading["name"].startswith("An "):
        return _raised(rest) or Abort(one_line(heading["rest"] or heading["name"]))
    message = "; ".join(filter(None, [heading["rest"], *(line.strip() for line in rest)]))
    if message.startswith("No hosts remaining"):
        return None
    where = "" if heading["name"] == "pyinfra error" else _where(heading["file"], heading["line"])
    return Abort(one_line(where + message))


def _raised(lines: Sequence[str]) -> Abort | None:
    """A Python traceback in one line: where, what."""
    frames = [frame for line in lines if (frame := _FRAME.match(line))]
    errors = [error for line in lines if (error := _RAISED.match(line))]
    if not errors:
        return None
    name, message = errors[-1]["type"].rpartition(".")[2], errors[-1]["message"] or ""
    if name in ("FleetError", "UsageError", "DeployError"):
        return Abort(one_line(message), name == "UsageError")
    where = _where(frames[-1]["file"], frames[-1]["line"]) if frames else ""
    return Abort(one_line(f"{where}{name}: {message}"), bool(_INVALID.search(name)))


def _where(file: str | None, line: str | None) -> str:
    return f"{file} line {line}: " if file else ""
