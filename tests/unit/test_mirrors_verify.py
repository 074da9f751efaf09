"""The check of a switch: which addresses count, and the real apt on this machine's own loopback."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpufleet import catalog, settings
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.mirrors import verify
from gpufleet.mirrors.choice import Choice, decide
from gpufleet.mirrors.plan import CONDARC, PIP_CONF, AptSources
from gpufleet.python_env.plan import lock_for
from gpufleet.shell import script

DEBIAN = "/etc/apt/sources.list.d/debian.sources"


def chosen(name: str) -> Choice:
    return decide(settings.Mirrors(site=name), catalog.mirrors())


def test_the_lock_names_the_wheel_with_its_hashes():
    first, *hashes = verify.requirement(lock_for("cpu").text).splitlines()
    assert first.startswith(f"{verify.PACKAGE}==")
    assert hashes
    assert all("--hash=sha256:" in line for line in hashes)


def test_a_lock_without_the_wheel_is_said():
    with pytest.raises(FleetError, match="does not name idna"):
        verify.requirement("numpy==1 \\\n    --hash=sha256:0\n")


def test_addresses_are_those_that_apt_names():
    text = "deb http://a/debian/ bookworm main\ndeb [arch=amd64] https://b/debian bookworm main\n"
    assert verify.apt_addresses({"/etc/apt/sources.list": text}) == (
        "http://a/debian",
        "https://b/debian",
    )


def test_where_a_list_of_mirrors_is_asked_any_address_counts():
    text = "deb mirror+file:///etc/apt/mirrors/debian.list bookworm main\n"
    assert verify.apt_addresses({"/etc/apt/sources.list": text}) == ()


def test_of_a_mirrors_source_file_only_the_mirrors_own_addresses_count():
    file = ManagedFile(
        DEBIAN,
        "Types: deb\nURIs: https://mirrors.nju.edu.cn/debian\nSuites: bookworm\nComponents: main\n"
        "\nTypes: deb\nURIs: http://s.example.org/debian-security\nSuites: bookworm-security\n"
        "Components: main\n",
    )
    sources = AptSources("debian", "bookworm", {}, ())
    text = verify.script("/opt/m", "x==1\n", chosen("nju"), [file], [], sources)
    assert "apt_addresses=https://mirrors.nju.edu.cn/debian\n" in text
    assert "apt_site=mirrors.nju.edu.cn\n" in text


def test_going_back_to_official_counts_what_the_original_asked():
    original = "deb http://d.example.org/debian bookworm main\n"
    path = "/etc/apt/sources.list"
    sources = AptSources("debian", "bookworm", {path: original}, (path,))
    text = verify.script("/opt/m", "x==1\n", chosen("official"), [], [path, PIP_CONF], sources)
    assert "apt_addresses=http://d.example.org/debian\n" in text
    assert "apt_site='the official site'\n" in text


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            """Nobody reads it."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


class TestOnThisMachine:
    """With apt's configuration in a folder, and an archive that answers or does not."""

    def check(self, tmp_path: Path, sh, *uris: str, ours: str, changed: str = DEBIAN):
        if shutil.which("apt-get") is None:
            pytest.skip("this machine has no apt-get")
        for part in ("apt.conf", "auth.conf", "preferences", "sources.list", "trusted.gpg"):
            (tmp_path / "etc" / f"{part}.d").mkdir(parents=True)
        listed = "".join(f"deb {uri} bookworm main\n" for uri in uris)
        (tmp_path / "etc/sources.list").write_text(listed)
        conf = tmp_path / "apt.conf"
        conf.write_text(f'Dir::Etc "{tmp_path}/etc";\n')
        sources = AptSources("debian", "bookworm", {}, ())
        site = settings.Mirrors.model_validate(
            {
                "site": "own",
                "sites": {
                    "own": {
                        "hosts": [ours.removeprefix("http://")],
                        "scheme": "http",
                        "services": {"apt": {"archives": {"debian": "/debian"}}},
                    }
                },
            }
        )
        choice = decide(site, catalog.mirrors())
        file = ManagedFile(DEBIAN, f"Types: deb\nURIs: {ours}/debian\nSuites: bookworm\n")
        text = verify.script(str(tmp_path), "x==1\n", choice, [file], [], sources)
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        env = {"PATH": path, "APT_CONFIG": str(conf), "TMPDIR": str(tmp_path)}
        return sh(script(text, "new", changed, "", "", ""), env=env)

    def test_what_the_mirror_lacks_fails_in_one_line(self, server: str, tmp_path: Path, sh):
        done = self.check(tmp_path, sh, f"{server}/debian", ours=server)
        assert done.returncode == 1
        assert done.stderr.startswith(f"gpufleet: apt cannot use {server.removeprefix('http://')}")
        assert "does not have a Release file" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not list(tmp_path.glob("tmp.*"))

    def test_what_somebody_elses_source_lacks_is_not_held_against_it(
        self, server: str, tmp_path: Path, sh
    ):
        done = self.check(tmp_path, sh, f"{server}/theirs", ours="http://127.0.0.1:9")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "works with: apt\n"

    def test_a_source_that_apt_cannot_read_fails(self, server: str, tmp_path: Path, sh):
        done = self.check(tmp_path, sh, "nonsense", ours=server)
        assert done.returncode == 1
        assert "Malformed entry" in done.stderr

    def test_a_client_that_is_not_there_is_not_asked(self, server: str, tmp_path: Path, sh):
        done = self.check(tmp_path, sh, f"{server}/debian", ours=server, changed=CONDARC)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "works with: no client is there yet\n"
