"""Miniconda and environments that conda makes, from a mirror that this machine serves.

Miniconda itself cannot be fetched where these tests run. What is served stands for it: an installer
of the same flags and files whose `conda` is built on py-rattler, and a channel of real packages
(gpufleet/lab/conda_double). The deploy is not told: it calls what the real one has.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fleets
import pytest
from fleets import HOME, Boot, Done, Fleet, Host, fleet, ok, words

from gpufleet.lab import channel
from gpufleet.python_env import wheelhouse
from gpufleet.python_env.conda import CONDARC, DEMO, recipe
from gpufleet.python_env.plan import lock_for

#: The demo's environment as conda makes it.
DIGEST = recipe(DEMO, "cpu").digest


@dataclass
class Site:
    """A mirror site: /anaconda is the lab's own, /pypi an index of the demo's wheels.

    `log` is what was asked for; `cut` holds wheels whose answer is broken off, once each; `gone`
    ends of paths that answer 404.
    """

    anaconda: Path
    wheels: Path
    log: list[str] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    address: str = ""

    def settings(self, **python_env: Any) -> dict[str, Any]:
        """What an inventory says for a host that uses this site."""
        conda = {"base": "/anaconda", "subchannels": ["main"]}
        services = {
            "conda": {**conda, "cloud": {"conda-forge": "/anaconda/cloud"}},
            "miniconda": {"dir": "/anaconda/miniconda"},
            "pypi": {"index": "/pypi/simple"},
        }
        own = {"hosts": [self.address], "scheme": "http", "services": services}
        chosen = {
            "manager": "miniconda",
            "installer": channel.INSTALLER,
            "installer_sha256": channel.checksum(self.anaconda),
        }
        mirrors = {"site": "own", "sites": {"own": own}}
        return {"mirrors": mirrors, "python_env": {**chosen, **python_env}}


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, site: Site) -> None:
        self.site = site
        super().__init__(*args)

    def translate_path(self, path: str) -> str:
        if match := re.fullmatch(r"/pypi/files/([^/]+)", path):
            return str(self.site.wheels / match[1])
        return str(self.site.anaconda / path.removeprefix("/anaconda/"))

    def do_GET(self) -> None:
        self.site.log.append(self.path)
        if self.path.endswith(tuple(self.site.gone)):
            self.send_error(404)
        elif match := re.fullmatch(r"/pypi/simple/([a-z0-9-]+)/", self.path):
            self._project(match[1])
        elif match := re.fullmatch(r"/pypi/files/([^/]+)\.metadata", self.path):
            with zipfile.ZipFile(self.site.wheels / match[1]) as wheel:
                (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
                self._answer(wheel.read(name))
        elif (name := self.path.rpartition("/")[2]) in self.site.cut:
            self.site.cut.discard(name)
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def _project(self, project: str) -> None:
        names = [path.name for path in self.site.wheels.glob("*.whl") if _of(path) == project]
        has = 'data-core-metadata="true"'  # PEP 714, as mirrors of PyPI have it
        links = "".join(f'<a href="/pypi/files/{name}" {has}>{name}</a>' for name in names)
        body = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
        self._answer(body, 200 if names else 404)

    def _answer(self, body: bytes, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """The log is a list."""


def _of(wheel: Path) -> str:
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


@pytest.fixture(scope="module")
def site(can_boot: None) -> Iterator[Site]:
    """Served on all addresses of this machine; hosts reach it on their bridge."""
    lock = lock_for("cpu")
    wheels = wheelhouse.build(lock, "https://download.pytorch.org/whl/cpu")
    made = Site(channel.ensure(), wheels)

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A download that was broken off is the client's affair."""

    server = Server(("", 0), functools.partial(_Handler, site=made))
    made.address = str(server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def lab(site: Site, pytestconfig: pytest.Config) -> Iterator[Fleet]:
    """One fresh host whose only way out is this machine."""
    name = f"t-{fleets.os.getpid()}-conda"
    made = fleets.boot(name, 1)
    site.address = f"{made.gateway}:{site.address}"
    try:
        yield made
    finally:
        fleets.take_down(name)


@pytest.fixture
def host(lab: Fleet) -> Host:
    return lab.hosts[0]


@pytest.fixture
def serving(lab: Fleet, host: Host, site: Site, tmp_path: Path) -> Host:
    """The host with its demo healthy."""
    if not host.healthy():
        ok(apply(lab, site, tmp_path))
        fleets.until(host.healthy, "the demo answers", 60)
    return host


def apply(lab: Fleet, site: Site, folder: Path, *options: str, **python_env: Any) -> Done:
    inventory = lab.inventory(folder, site.settings(**python_env))
    return fleet("apply", "-i", inventory, "--json", *options)


#: Kills what runs on the host as soon as a path is there: $1 the path, $2 how its command begins.
KILL = r"""
until [ -e "$1" ]; do :; done
kill -9 $(pgrep -f "^$2")
"""


def kill_when(host: Host, path: str, command: str) -> None:
    host.path("/root/kill").write_text(KILL)
    host.sh(f"systemd-run -q --collect sh /root/kill {path} {command!r}")


ONLY = ("--only", "base,mirrors,python_env")


def test_an_installer_with_another_checksum_is_never_run(
    lab: Fleet, host: Host, site: Site, tmp_path: Path
) -> None:
    done = apply(lab, site, tmp_path, *ONLY, installer_sha256="0" * 64)
    assert done.code == 1
    line = _failure(done)
    words(line, "another checksum", channel.INSTALLER, "python_env.installer")
    assert not host.path(f"{HOME}/conda").exists()
    # Nor is one from this machine.
    own = tmp_path / channel.INSTALLER
    own.write_text("#!/bin/sh\ntouch /root/ran\n")
    done = apply(lab, site, tmp_path, *ONLY, installer=str(own))
    words(_failure(done), "another sha256", "it was not run")
    assert not host.path("/root/ran").exists()


def _failure(done: Done) -> str:
    assert done.code == 1, done.out
    (line,) = done.document["errors"]
    return str(line)


def test_a_killed_install_and_a_killed_environment_are_made_anew(
    lab: Fleet, host: Host, site: Site, tmp_path: Path
) -> None:
    kill_when(host, f"{HOME}/conda/lib/python3.11", f"bash {HOME}/incoming/conda-")
    done = apply(lab, site, tmp_path, *ONLY)
    assert done.code == 1
    assert host.path(f"{HOME}/conda").exists()
    assert not host.path(f"{HOME}/conda/.whole").exists()

    environment = f"{HOME}/envs/{DIGEST}"
    conda = f"{HOME}/conda/bin"
    kill_when(host, f"{environment}/lib", f"{conda}/python {conda}/conda env create")
    done = apply(lab, site, tmp_path, *ONLY)
    assert done.code == 1
    assert host.sh(f"cat {HOME}/conda/.whole") == channel.checksum(site.anaconda)
    assert not host.path(f"{environment}/.whole").exists()

    asked = len(site.log)
    done = ok(apply(lab, site, tmp_path, *ONLY))
    assert "python_env" in done.changed(host.name)
    assert host.sh(f"cat {environment}/.whole") == DIGEST
    # The installer was not downloaded again: conda was whole by then.
    assert [path for path in site.log[asked:] if path.endswith(".sh")] == []


def test_the_demo_runs_on_condas_python_and_applied_again_nothing_changes(
    lab: Fleet, host: Host, site: Site, tmp_path: Path
) -> None:
    before = {path: host.path(path).read_bytes() for path in ("/root/.bashrc", "/etc/profile")}
    ok(apply(lab, site, tmp_path))
    fleets.until(host.healthy, "the demo answers", 60)
    environment = f"{HOME}/envs/{DIGEST}"
    running = host.sh(f"readlink /proc/{host.pid}/exe")
    assert running == f"{environment}/bin/python3.11"
    assert not host.path(running).is_symlink()
    # conda's part and the lock's, hash for hash: what pip lists is the lock and pip itself.
    listed = json.loads(host.sh(f"{environment}/bin/pip list --format json"))
    locked = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", lock_for("cpu").text, re.MULTILINE))
    found = {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in listed}
    assert found.keys() - locked.keys() == {"pip"}
    assert {name: found[name] for name in locked} == locked
    channels = host.sh(f"{HOME}/conda/bin/conda config --show-sources --json")
    sources = json.loads(channels)
    assert sources[f"{HOME}/conda/.condarc"] == {"channels": ["conda-forge"]}
    assert host.path(f"{HOME}/conda/.condarc").read_text() == CONDARC
    # Nothing outside of the deploy's folder, and no file of a shell, is the installer's.
    assert {path: host.path(path).read_bytes() for path in before} == before
    assert [p for p in host.path("/etc/profile.d").iterdir() if "conda" in p.name] == []
    assert not host.path("/root/.conda").exists()
    snapshot = host.snapshot()
    again = ok(apply(lab, site, tmp_path))
    assert again.changed(host.name) == {}
    assert fleets.touched(snapshot, host.snapshot()) == []


def test_what_no_mirror_has_is_named_and_the_demo_stays(
    lab: Fleet, serving: Host, site: Site, tmp_path: Path
) -> None:
    served = serving.pid
    own = tmp_path / "old.yml"
    own.write_text("channels: [conda-forge]\ndependencies: [python=3.9, pip]\n")
    line = _failure(apply(lab, site, tmp_path, environment=str(own)))
    words(line, serving.name, "environment old", "python 3.9", "mirrors.site")
    assert serving.pid == served
    assert serving.healthy()
    assert [p.name for p in serving.path(f"{HOME}/envs").iterdir() if not p.is_symlink()] == [
        DIGEST
    ]


def test_a_file_that_passes_the_mirror_by_is_refused_before_anything(
    lab: Fleet, host: Host, site: Site, tmp_path: Path
) -> None:
    own = tmp_path / "own.yml"
    own.write_text(
        "channels: [https://example.org/conda-forge, nodefaults]\n"
        "dependencies: [python=3.11, {pip: [--extra-index-url https://example.org/simple, six]}]\n"
    )
    before = host.snapshot()
    inventory = lab.inventory(tmp_path, site.settings(environment=str(own)))
    done = fleet("apply", "-i", inventory)
    assert done.code == 1
    words(done.complaint, "preflight", "own.yml", "https://example.org/conda-forge", "nodefaults")
    words(done.complaint, "--extra-index-url")
    assert fleets.touched(before, host.snapshot()) == []


OWN = """\
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - pip:
    - jinja2==3.1.6
    - sentencepiece
"""


def test_a_flaky_line_goes_on_where_it_was(
    lab: Fleet, serving: Host, site: Site, tmp_path: Path
) -> None:
    own = tmp_path / "own.yml"
    own.write_text(OWN)
    wheel = next(path.name for path in site.wheels.glob("sentencepiece*"))
    site.gone.add(wheel)
    asked = len(site.log)
    line = _failure(apply(lab, site, tmp_path, environment=str(own)))
    words(line, "sentencepiece", "own", "what came is kept")
    assert serving.healthy()
    site.gone.clear()
    site.cut.add(wheel)  # pip's own retries go on after this one
    ok(apply(lab, site, tmp_path, environment=str(own)))
    # What had come already was not asked for again.
    fetched = [path.rpartition("/")[2] for path in site.log[asked:] if path.startswith("/pypi/f")]
    assert [name for name in set(fetched) if fetched.count(name) > 1] == [wheel]
    python = f"{HOME}/envs/own/bin/python"
    assert serving.sh(f"{python} -c 'import jinja2, sentencepiece; print(jinja2.__version__)'") == (
        "3.1.6"
    )
    again = ok(apply(lab, site, tmp_path, environment=str(own)))
    assert again.changed(serving.name) == {}
    # Once nobody asks for it, it goes, and its name too.
    ok(apply(lab, site, tmp_path))
    assert {path.name for path in serving.path(f"{HOME}/envs").iterdir()} == {DIGEST, DEMO}


def _codes(lab: Fleet, site: Site, folder: Path) -> dict[str, Any]:
    inventory = lab.inventory(folder, site.settings())
    done = fleet("doctor", "-i", inventory, "--json")
    (one,) = done.document["hosts"]
    return {finding["code"]: finding for finding in one["findings"]}


def test_the_doctor_names_what_an_environment_lacks_and_its_command_mends_it(
    lab: Fleet, host: Host, site: Site, tmp_path: Path
) -> None:
    assert not {code for code in _codes(lab, site, tmp_path) if code.startswith(("env-", "no-s"))}
    packages = f"{HOME}/envs/{DIGEST}/lib/python3.11/site-packages"
    host.sh(f"rm -r {packages}/sentencepiece {packages}/sentencepiece-*")
    found = _codes(lab, site, tmp_path)["no-sentencepiece"]
    assert found["severity"] == "error"
    assert f"{HOME}/envs/{DIGEST}" in found["evidence"]
    on_host = re.match(r"on the host: (.+); then .*fleet apply.* --only python_env", found["mend"])
    assert on_host is not None
    host.sh(on_host[1])
    assert "env-half" in _codes(lab, site, tmp_path)
    ok(apply(lab, site, tmp_path, "--only", "python_env"))
    assert host.path(f"{packages}/sentencepiece").is_dir()
    assert not {code for code in _codes(lab, site, tmp_path) if code.startswith(("env-", "no-s"))}
    host.sh(f"rm {HOME}/envs/{DIGEST}/bin/python")
    assert "env-no-python" in _codes(lab, site, tmp_path)
    ok(apply(lab, site, tmp_path))
    assert "env-no-python" not in _codes(lab, site, tmp_path)


# Fills the disk while the installer unpacks, to a few MiB that other files need.
FILL = r"""
until [ -e /opt/minigpt4/conda/bin ]; do sleep 0.002; done
fallocate -l $(( $(df -Pk / | awk 'NR==2 {print $4}') * 1024 - 4194304 )) /full
"""


def test_a_disk_that_fills_while_installing_is_said_and_the_same_command_finishes_later(
    boot: Boot, site: Site, tmp_path: Path
) -> None:
    made = boot(1, "--disk-mib", "2600")
    small = made.hosts[0]
    port = site.address.rpartition(":")[2]
    here = Site(site.anaconda, site.wheels, address=f"{made.gateway}:{port}")
    small.path("/root/fill").write_text(FILL)
    small.sh("systemd-run -q --unit fill sh /root/fill")
    line = _failure(apply(made, here, tmp_path, *ONLY))
    words(line, "No space left", "free")
    assert not small.path(f"{HOME}/conda/.whole").exists()
    small.path("/full").unlink()
    ok(apply(made, here, tmp_path, *ONLY))
    assert small.sh(f"cat {HOME}/envs/{DIGEST}/.whole") == DIGEST
