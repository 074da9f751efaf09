"""A lab of real hosts for tests, the fleet command as a person runs it, and looks at a host by
other means than the deploy's own."""

from __future__ import annotations

import base64
import io
import json
import os
import pprint
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "files" / "demo"))

from modeldemo.pico import pictures  # noqa: E402

from gpufleet import lab  # noqa: E402
from gpufleet.errors import FleetError  # noqa: E402
from gpufleet.lab import image, machine, sources, state  # noqa: E402

UNIT = "minigpt4-demo.service"
HOME = "/opt/minigpt4"
#: A first apply downloads wheels once, and the machine may be busy with other things.
PATIENCE = 1200.0


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit status and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """What a command printed with --json."""
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line on stderr, after checking that it is one and no traceback was printed."""
        assert "Traceback" not in self.out + self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, f"{len(lines)} lines on stderr:\n{self.err}\nstdout:\n{self.out}"
        return lines[0]

    def changed(self, host: str) -> dict[str, list[str]]:
        """Concern -> operations that changed something on the host, from `apply --json`."""
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        concerns = _host(self.document, host)["concerns"]
        return {one["name"]: one["changed"] for one in concerns if one["changed"]}

    def pending(self, host: str) -> dict[str, list[str]]:
        """Concern -> operations that `plan --json` says apply would run."""
        found: dict[str, list[str]] = {}
        for one in _host(self.document, host)["pending"]:
            found.setdefault(one["concern"], []).append(one["operation"])
        return found


def _host(document: Any, name: str) -> Any:
    return next(host for host in document["hosts"] if host["name"] == name)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    # Not the terminal's width, colours or a lab that the caller's shell names.
    dropped = ("GPUFLEET_LAB", "GPUFLEET_DEBUG", "COLUMNS", "FORCE_COLOR")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, **extra}


def run(*command: str | Path, cwd: Path = ROOT, timeout: float = PATIENCE, **env: str) -> Done:
    """Run a command as a person would, to its end."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=_environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def fleet(*arguments: str | Path, cwd: Path = ROOT, timeout: float = PATIENCE, **env: str) -> Done:
    """Run ./fleet with the arguments, to its end."""
    return run(cwd / "fleet", *arguments, cwd=cwd, timeout=timeout, **env)


def ok(done: Done) -> Done:
    """The same, after checking that it went well."""
    assert done.code == 0, f"exit {done.code}\n{done.out}\n{done.err}"
    return done


class Running:
    """A ./fleet command that runs beside the test, its output kept in files."""

    def __init__(self, folder: Path, *arguments: str | Path, **env: str) -> None:
        self._said = [Path(tempfile.mkstemp(dir=folder)[1]) for _ in range(2)]
        with self._said[0].open("w") as out, self._said[1].open("w") as err:
            self.process = subprocess.Popen(
                [ROOT / "fleet", *map(str, arguments)],
                cwd=ROOT,
                env=_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def said(self) -> tuple[str, str]:
        """What it has printed so far: stdout, stderr."""
        return self._said[0].read_text(), self._said[1].read_text()

    def wait(self, timeout: float = PATIENCE) -> Done:
        """Wait for its end."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return Done(code, *self.said())

    def stop(self) -> list[int]:
        """Hold it and all that it started, as when a laptop is closed; what `go_on` takes."""
        held = [self.process.pid, *_descendants(self.process.pid)]
        for pid in held:
            _signal(pid, signal.SIGSTOP)
        return held

    @staticmethod
    def go_on(held: Sequence[int]) -> None:
        """Let processes that were held go on."""
        for pid in held:
            _signal(pid, signal.SIGCONT)

    def interrupt(self) -> None:
        """What Ctrl-C sends."""
        self.process.send_signal(signal.SIGINT)

    def kill(self, descendants: bool = True) -> None:
        """SIGKILL, to it alone or with everything that it started."""
        # Stopped first, so that none of them starts another one meanwhile.
        doomed = [self.process.pid, *(_descendants(self.process.pid) if descendants else [])]
        for pid in doomed:
            _signal(pid, signal.SIGSTOP)
        for pid in doomed:
            _signal(pid, signal.SIGKILL)
        self.process.wait()


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def until(condition: Callable[[], Any], what: str, timeout: float = 120, every: float = 0.1) -> Any:
    """Wait until the condition holds and return what it gave; fail with `what` if it never does."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(every)
    return value


def weights(host: Host, model: str = "pico") -> Path:
    """The one folder of a model's weights on a host, as this machine sees it."""
    (found,) = host.path(f"{HOME}/weights").glob(f"{model}-*")
    return found


Snapshot = dict[str, tuple[int, ...]]


def touched(before: Snapshot, after: Snapshot) -> list[str]:
    """The paths that were added, removed or changed between two snapshots."""
    return sorted({path for path, _ in before.items() ^ after.items()})


@dataclass(frozen=True)
class Host:
    """One lab host, looked at through ssh and through its filesystem from outside."""

    lab: lab.Lab = field(repr=False)
    name: str

    @property
    def address(self) -> str:
        return self.lab.host(self.name).address

    @property
    def root(self) -> Path:
        """Its filesystem as this machine sees it."""
        return self.lab.root(self.name)

    def path(self, path: str) -> Path:
        """A path of the host's, as this machine sees it."""
        return self.root / path.removeprefix("/")

    def try_(self, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell line as root through ssh, whatever becomes of it."""
        return self.lab.run(self.name, command, timeout=timeout)

    def sh(self, command: str, timeout: float = 120) -> str:
        """What a shell line prints, run as root through ssh; it must succeed."""
        done = self.try_(command, timeout)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def reload_sshd(self) -> None:
        """Have sshd read its configuration again; returns when it listens again."""
        heard = "journalctl -u ssh -o cat | grep -c '^Server listening' || :"
        before = self.sh(heard)
        self.sh("systemctl reload ssh")
        until(lambda: self.try_(heard).stdout.strip() not in ("", before), "sshd listens", 30)

    def show(self, prop: str, unit: str = UNIT) -> str:
        """A property of a unit, as systemd tells it."""
        return self.sh(f"systemctl show -p {prop} --value {unit}")

    @property
    def pid(self) -> int:
        """The service's main process, 0 if it does not run."""
        return int(self.show("MainPID"))

    def healthy(self) -> bool:
        """Whether /healthz says ok, asked on the host."""
        answer = self.try_("curl -s -m 5 http://127.0.0.1:7860/healthz").stdout
        try:
            return bool(json.loads(answer)["status"] == "ok")
        except (ValueError, KeyError, TypeError):
            return False

    def settled(self) -> Host:
        """The same, once nothing of its boot goes on any more."""
        self.try_("systemctl is-system-running --wait")
        return self

    def snapshot(self) -> Snapshot:
        """Every file that a deploy could change: mode, owner, size and times, by path.

        A file's change time cannot be set back, so equal snapshots mean that no file was touched.
        A folder's is left out: overlayfs sets it when the folder is first listed.
        """
        trees = ("etc", "opt", "usr", "root", "home", "var/lib/dpkg", "var/lib/gpufleet")
        found: Snapshot = {}
        queue = [self.root / tree for tree in trees]
        while queue:
            folder = queue.pop()
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                stat = entry.stat(follow_symlinks=False)
                key = entry.path.removeprefix(str(self.root))
                folder_itself = entry.is_dir(follow_symlinks=False)
                changed = 0 if folder_itself else stat.st_ctime_ns
                owner = (stat.st_mode, stat.st_uid, stat.st_gid)
                found[key] = (*owner, stat.st_size, stat.st_mtime_ns, changed)
                if folder_itself:
                    queue.append(Path(entry.path))
        return found

    def data(self) -> dict[str, Any]:
        """Its inventory data: how pyinfra reaches it."""
        return {
            "ssh_hostname": self.address,
            "ssh_user": "root",
            "ssh_key": str(self.lab.key),
            "ssh_known_hosts_file": str(self.lab.known_hosts),
            "ssh_strict_host_key_checking": "yes",
            "python_env": {"manager": "uv"},
        }

    @contextmanager
    def tunnel(self) -> Iterator[str]:
        """The demo's address on this machine, through an ssh of the test's own."""
        port = free_port()
        options = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{port}:127.0.0.1:7860"]
        ssh = self.lab.ssh_command(self.name)
        child = subprocess.Popen([ssh[0], *options, *ssh[1:]], stdin=subprocess.DEVNULL)
        try:
            until(lambda: listens(port), f"a tunnel to {self.name}", 30)
            yield f"http://127.0.0.1:{port}"
        finally:
            child.terminate()
            child.wait()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int, address: str = "127.0.0.1") -> bool:
    """Whether something accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((address, port)) == 0


def require_image(name: str) -> None:
    """Have the lab's image; skips the test, with the lab's own reason, where there can be none."""
    wanted = sources.release(name)
    in_use = [Path(each.image_root) for each in map(state.load, state.names()) if each]
    try:
        machine.require_root()
        machine.ensure_packages(wanted)
        machine.require_kernel()
        image.ensure(image.recipe(wanted), in_use)
    except FleetError as error:
        pytest.skip(str(error))


def get(url: str) -> requests.Response:
    """GET, with nothing between us and the address."""
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=60)


def png(example: pictures.Example) -> bytes:
    """The picture that the question is about, as a file."""
    buffer = io.BytesIO()
    pictures.draw(example.scene).save(buffer, "PNG")
    return buffer.getvalue()


def ask(url: str, example: pictures.Example) -> str:
    """What the demo at the address answers to the example's question."""
    picture = "data:image/png;base64," + base64.b64encode(png(example)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": example.question},
    ]
    messages = [{"role": "user", "content": content}]
    body = {"model": "pico", "temperature": 0, "max_tokens": 64, "messages": messages}
    with requests.Session() as session:
        session.trust_env = False
        reply = session.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


Data = Mapping[str, Any]


def inventory(folder: Path, hosts: Mapping[str, Data], name: str = "fleet.py") -> Path:
    """An inventory file: host name -> its data."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    entries = [(host, dict(data)) for host, data in hosts.items()]
    path.write_text(f"hosts = {pprint.pformat(entries, sort_dicts=False)}\n", "utf-8")
    return path


@dataclass
class Fleet:
    """A lab and what was seen while it was made."""

    name: str
    hosts: list[Host] = field(default_factory=list, repr=False)
    seen: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def lab(self) -> lab.Lab:
        return lab.load(self.name)

    @property
    def gateway(self) -> str:
        """This machine's address on the lab's bridge."""
        return re.sub(r"\.\d+/\d+$", ".1", self.lab.subnet)

    def inventory(self, folder: Path, settings: Data | None = None, **per_host: Data) -> Path:
        """An inventory of all hosts with these settings; `per_host` (h1, h2 …) adds to one's."""
        own = {
            host.name: {
                **host.data(),
                **(settings or {}),
                **per_host.get(f"h{number}", {}),
            }
            for number, host in enumerate(self.hosts, 1)
        }
        return inventory(folder, own)

    def apply(self, *options: str | Path, **env: str) -> Done:
        """./fleet apply --json of inventory/lab.py, which is this lab."""
        lab_py = ("-i", "inventory/lab.py", "--json")
        return fleet("apply", *lab_py, *options, GPUFLEET_LAB=self.name, **env)

    def plan(self, *options: str | Path) -> Done:
        """./fleet plan --json of inventory/lab.py, which is this lab."""
        lab_py = ("-i", "inventory/lab.py", "--json")
        return fleet("plan", *lab_py, *options, GPUFLEET_LAB=self.name)


#: Boots a fresh lab: how many hosts, further options of `fleet lab up`.
Boot = Callable[..., Fleet]


def boot(name: str, hosts: int, *options: str) -> Fleet:
    """Boot a lab through the command line; whoever calls takes it down."""
    ok(fleet("lab", "up", "--name", name, "--hosts", str(hosts), "--json", *options))
    seen = lab.load(name)
    return Fleet(name, [Host(seen, host.name).settled() for host in seen.hosts])


def take_down(name: str) -> None:
    """Take a lab down through the command line; none may be left behind."""
    ok(fleet("lab", "down", "--name", name))


def sweep() -> None:
    """Take down labs of test runs that were killed."""
    for name in lab.names():
        owner = re.fullmatch(r"t-(\d+)(-[a-z0-9-]+)?", name)
        if owner and not Path("/proc", owner[1]).exists():
            take_down(name)


_SHARED = pytest.StashKey[Fleet]()


def shared(config: pytest.Config, hosts: int = 2) -> Fleet:
    """The one deployed lab of this test run, made when it is first asked for.

    What `plan` said and what changed before the first apply is in `seen`.
    """
    if _SHARED not in config.stash:
        sweep()
        name = f"t-{os.getpid()}"
        config.add_cleanup(lambda: take_down(name))
        made = boot(name, hosts)
        made.seen["fresh"] = [host.snapshot() for host in made.hosts]
        made.seen["plan"] = made.plan()
        made.seen["planned"] = [host.snapshot() for host in made.hosts]
        made.seen["apply"] = made.apply()
        config.stash[_SHARED] = made
    return config.stash[_SHARED]


def checkout(into: Path) -> Path:
    """A checkout of its own that uses this one's environment."""
    into.mkdir()
    left_out = shutil.ignore_patterns("__pycache__")
    for part in ("catalog", "files", "gpufleet", "inventory", "requirements", "tasks", "templates"):
        shutil.copytree(ROOT / part, into / part, ignore=left_out)
    for part in ("deploy.py", "fleet"):
        shutil.copy2(ROOT / part, into / part)
    (into / ".venv").symlink_to(ROOT / ".venv")
    return into


def words(line: str, *expected: str) -> None:
    """Fail unless the line has every one of the expected words."""
    missing = [word for word in expected if word not in line]
    assert not missing, f"{missing} not in: {line}"


def lines_about(text: str, host: Host) -> Sequence[str]:
    """The lines that begin with the host's name."""
    return [line for line in text.splitlines() if line.startswith(f"{host.name}:")]
