"""The lab's own Miniconda and channel, made and used on this machine: it must be as conda is
documented, because what is tested with it is meant for the real one."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpufleet.errors import FleetError
from gpufleet.lab import channel, sources


@pytest.fixture(scope="module")
def anaconda() -> Path:
    try:
        return channel.ensure()
    except FleetError as error:
        if sources.distribution(sources.read_os_release()) == "debian":
            raise
        pytest.skip(str(error))


class Site:
    """A mirror site of this test: /anaconda by http, failures by path, and what was asked for."""

    def __init__(self, anaconda: Path) -> None:
        self.log: list[str] = []
        self.fail: dict[str, int] = {}
        site = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                site.log.append(self.path)
                for part, code in site.fail.items():
                    if part in self.path:
                        self.send_error(code)
                        return
                super().do_GET()

            def log_message(self, *args: object) -> None:
                """The log is a list."""

        serve = functools.partial(Handler, directory=str(anaconda))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site(anaconda: Path) -> Iterator[Site]:
    made = Site(anaconda)
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


class Conda:
    """An installed conda with a home of its own."""

    def __init__(self, prefix: Path, home: Path) -> None:
        self.prefix, self.home = prefix, home

    def __call__(self, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.prefix / "bin" / "conda"), *map(str, arguments)]
        clean = {"PATH": os.environ["PATH"], "HOME": str(self.home), **env}
        return subprocess.run(command, env=clean, capture_output=True, text=True, check=False)

    def json(self, *arguments: str | Path, **env: str) -> Any:
        done = self(*arguments, "--json", **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


def install(anaconda: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = anaconda / "miniconda" / channel.INSTALLER
    command = ["sh", str(script), *map(str, arguments)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


@pytest.fixture
def conda(anaconda: Path, site: Site, tmp_path: Path) -> Conda:
    prefix, home = tmp_path / "conda", tmp_path / "home"
    home.mkdir()
    done = install(anaconda, "-b", "-p", prefix)
    assert done.returncode == 0, done.stderr
    (home / ".condarc").write_text(
        f"channels: [conda-forge]\ncustom_channels: {{conda-forge: {site.url}/cloud}}\n"
        f"default_channels: [{site.url}/pkgs/main]\n"
    )
    return Conda(prefix, home)


def test_the_layout_is_that_of_a_mirror_site(anaconda: Path):
    for base in ("pkgs/main", "cloud/conda-forge"):
        for subdir in ("linux-64", "noarch"):
            index = json.loads((anaconda / base / subdir / "repodata.json").read_text())
            for name, record in index["packages.conda"].items():
                archive = (anaconda / base / subdir / name).read_bytes()
                assert hashlib.sha256(archive).hexdigest() == record["sha256"]
    installer = (anaconda / "miniconda" / channel.INSTALLER).read_bytes()
    assert hashlib.sha256(installer).hexdigest() == channel.checksum(anaconda)


def test_a_second_call_makes_nothing_again(anaconda: Path):
    before = anaconda.stat().st_mtime_ns
    assert channel.ensure(into=anaconda.parent) == anaconda
    assert anaconda.stat().st_mtime_ns == before


class TestTheInstaller:
    def test_batch_mode_asks_nothing_and_ships_a_condarc_that_names_defaults(
        self, anaconda: Path, tmp_path: Path
    ):
        done = install(anaconda, "-b", "-u", "-p", tmp_path / "c")
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "c" / ".condarc").read_text() == "channels:\n  - defaults\n"
        assert (tmp_path / "c" / "conda-meta" / "history").exists()

    def test_an_existing_folder_is_updated_only_when_asked(self, anaconda: Path, tmp_path: Path):
        (tmp_path / "c").mkdir()
        done = install(anaconda, "-b", "-p", tmp_path / "c")
        assert done.returncode == 1
        assert "use the -u option" in done.stderr
        assert install(anaconda, "-b", "-u", "-p", tmp_path / "c").returncode == 0

    def test_without_batch_mode_it_asks_for_the_licence_and_stops_without_an_answer(
        self, anaconda: Path, tmp_path: Path
    ):
        done = install(anaconda, "-p", tmp_path / "c")
        assert done.returncode != 0
        assert "license" in done.stdout
        assert not (tmp_path / "c").exists()

    def test_a_file_that_was_cut_off_is_refused(self, anaconda: Path, tmp_path: Path):
        whole = (anaconda / "miniconda" / channel.INSTALLER).read_bytes()
        (tmp_path / "cut.sh").write_bytes(whole[:-1])
        command = ["sh", str(tmp_path / "cut.sh"), "-b", "-p", str(tmp_path / "c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "size of" in done.stderr


ENVIRONMENT = "channels: [conda-forge]\ndependencies: [python=3.11, pip]\n"


class TestConda:
    def test_makes_an_environment_that_runs_from_its_own_folder(self, conda: Conda, tmp_path: Path):
        (tmp_path / "e.yml").write_text(ENVIRONMENT)
        prefix = tmp_path / "made here"
        done = conda("env", "create", "-q", "-p", prefix, "-f", tmp_path / "e.yml")
        assert (done.returncode, done.stderr) == (0, "")
        code = "import sys, ssl, sqlite3, ctypes, pip; print(sys.prefix, pip.__file__)"
        said = subprocess.run(
            [prefix / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
        )
        assert said.stdout.startswith(f"{prefix} {prefix}/lib/python3.11/site-packages/pip/")
        # The placeholder that the archive has was replaced by this folder.
        first_lines = (prefix / "bin/pydoc3.11").read_text().splitlines()[:2]
        assert f"{prefix}/bin/python3.11" in "".join(first_lines)
        assert {one["name"] for one in conda.json("list", "-p", prefix)} == {"python", "pip"}
        again = conda("env", "create", "-p", prefix, "-f", tmp_path / "e.yml")
        assert again.returncode == 1
        assert "prefix already exists" in again.stderr

    def test_a_dry_run_solves_and_writes_nothing(self, conda: Conda, tmp_path: Path):
        done = conda("create", "-p", tmp_path / "e", "--dry-run", "-y", "python=3.11", "pip")
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\s+python +3\.11", done.stdout, re.MULTILINE)
        assert "DryRunExit" in done.stdout
        assert not (tmp_path / "e").exists()

    def test_says_where_its_configuration_comes_from(self, conda: Conda, site: Site):
        seen = conda.json("config", "--show-sources", CONDA_CHANNELS="x")
        assert seen[str(conda.prefix / ".condarc")] == {"channels": ["defaults"]}
        assert seen["envvars"] == {"channels": ["x"]}
        channels = conda.json("info")["channels"]
        assert channels == [
            f"{site.url}/{base}/{subdir}"
            for base in ("cloud/conda-forge", "pkgs/main")
            for subdir in ("linux-64", "noarch")
        ]

    def test_keeps_an_index_as_long_as_it_was_told_and_clean_drops_it(
        self, conda: Conda, site: Site, tmp_path: Path
    ):
        for path in (conda.prefix / "pkgs").glob("cache/*"):
            path.unlink()
        dry = ("create", "-p", tmp_path / "e", "--dry-run", "-y", "python")
        assert conda(*dry).returncode == 0
        info = next((conda.prefix / "pkgs" / "cache").glob("*.info.json"))
        assert conda("clean", "-i", "-y").returncode == 0
        assert not info.exists()

    @pytest.mark.parametrize(
        ("fail", "code", "words"),
        [
            ("conda-forge/noarch", 404, ["UnavailableInvalidChannel: HTTP 404", "/conda-forge>"]),
            ("conda-forge/noarch", 403, ["UnavailableInvalidChannel: HTTP 403"]),
            ("linux-64/repodata", 503, ["CondaHTTPError: HTTP 503", "repodata.json"]),
            (".conda", 404, ["CondaHTTPError: HTTP 404", ".conda>"]),
        ],
    )
    def test_a_site_that_fails_is_named_in_condas_words(
        self, conda: Conda, site: Site, tmp_path: Path, fail: str, code: int, words: list[str]
    ):
        site.fail[fail] = code
        done = conda("create", "-q", "-y", "-p", tmp_path / "e", "python=3.11", "pip")
        assert done.returncode == 1
        assert [word for word in words if word not in done.stderr] == []

    def test_what_no_channel_has_is_named(self, conda: Conda, tmp_path: Path):
        done = conda("create", "-q", "-y", "-p", tmp_path / "e", "python=3.9")
        assert "LibMambaUnsatisfiableError" in done.stderr
        assert "python 3.9" in done.stderr
        done = conda("create", "-q", "-y", "-p", tmp_path / "e", "nothing-of-the-kind")
        assert "PackagesNotFoundError" in done.stderr
        assert "  - nothing-of-the-kind\n" in done.stderr
        assert done.returncode == 1
