"""Behind the wall: hosts that reach nothing but a mirror host are deployed to as any others, what
they send elsewhere is counted, and the mirror can fail as mirrors do, seen by the real clients."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import fleets
import pytest
from fleets import Done, Fleet, Host, fleet, ok, words

from gpufleet import lab
from gpufleet.lab.walled import Mirror
from gpufleet.python_env.plan import lock_for

URL = "https://mirror.gpufleet.test"
INDEX = f"{URL}/pypi/web/simple"
#: apt with lists of its own, kept apart from the host's.
APT_UPDATE = (
    "rm -rf /var/tmp/lists; install -d -o _apt -m 755 /var/tmp/lists /var/tmp/lists/partial; "
    "apt-get update --error-on=any -o Dir::State::Lists=/var/tmp/lists"
)
#: Both start from nothing every time; they are themselves from the mirror.
PIP = (
    "rm -rf /root/got; /root/tools/bin/pip download --no-deps --no-cache-dir --retries 0 "
    "--timeout 20 -d /root/got"
)
UV = (
    "rm -rf /root/placed; UV_SYSTEM_CERTS=1 UV_HTTP_RETRIES=0 /root/tools/bin/uv pip install "
    "--no-cache --no-deps --target /root/placed"
)
CURL = "curl -sS -o /root/page -m 60"


@pytest.fixture(scope="module")
def walled(can_boot: None) -> Iterator[Fleet]:
    """What `fleet demo --walled --check` made of this machine, and what it said."""
    fleets.sweep()
    name = f"t-{os.getpid()}-walled"
    try:
        done = fleet("demo", "--walled", "--check", "--hosts", "2", "--name", name, "--json")
        made = Fleet(name, seen={"demo": done})
        made.hosts = [Host(made.lab, host.name) for host in made.lab.hosts]
        yield made
    finally:
        fleets.take_down(name)


@pytest.fixture
def one(walled: Fleet) -> Host:
    return walled.hosts[0]


@pytest.fixture
def other(walled: Fleet) -> Host:
    return walled.hosts[1]


@pytest.fixture
def mirror(walled: Fleet) -> Iterator[Mirror]:
    """The mirror, in order again after the test."""
    seen = walled.lab.mirror
    yield seen
    seen.clear()


@pytest.fixture(scope="module")
def client(walled: Fleet) -> Host:
    """The first host with pip and uv, which came from the mirror like everything."""
    host = walled.hosts[0]
    apt = "DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends"
    host.sh(f"apt-get -qq update && {apt} python3-venv >/dev/null", timeout=600)
    host.sh("python3 -m venv /root/tools && /root/tools/bin/pip -q install uv", timeout=600)
    return host


def demo(walled: Fleet) -> Done:
    done: Done = walled.seen["demo"]
    return ok(done)


def test_a_demo_comes_up_behind_the_wall_and_nobody_sent_anything_elsewhere(walled: Fleet) -> None:
    document = demo(walled).document
    assert document["strays"] == {host.name: 0 for host in walled.hosts}
    assert [(one["passed"], one["asked"]) for one in document["check"]] == [(True, 40)] * 2
    assert lab.strays(walled.name) == document["strays"]
    for host in walled.hosts:
        assert host.healthy()


def test_every_package_of_the_deploy_came_from_the_mirror(walled: Fleet) -> None:
    demo(walled)
    asked = [line.split() for line in walled.lab.mirror.requests()]
    for host in walled.hosts:
        got = [url for address, url, *_ in asked if address == host.address]
        assert all(url.startswith(URL) for url in got)
        debs = [url for url in got if re.search(r"/pool/.*\.deb$", url)]
        wheels = [url for url in got if "/pypi/files/" in url and url.endswith(".whl")]
        torch = [url for url in got if "/pytorch/whl/cpu/torch/torch-" in url]
        assert len(debs) > 10
        assert len(wheels) > 40
        assert torch


def test_hosts_have_no_way_out_and_know_no_name_but_the_mirrors(walled: Fleet) -> None:
    for host in walled.hosts:
        routes = host.sh("ip route; ip -6 route show dev eth0").splitlines()
        assert [route.split()[0] for route in routes] == [walled.lab.subnet]
        known = host.sh("getent ahostsv4 mirror.gpufleet.test").split()
        assert known[0] == walled.lab.mirror.host.address


def test_apt_updates_and_installs_without_a_word_of_complaint(client: Host) -> None:
    update = client.try_(APT_UPDATE)
    assert (update.returncode, update.stderr) == (0, "")
    assert {line.split()[1] for line in update.stdout.splitlines() if line.startswith("Get:")} == {
        f"{URL}/debian",
        f"{URL}/debian-security",
    }
    assert "Hello, world!" in client.sh("apt-get -qq install -y hello >/dev/null && hello")


def test_pip_and_uv_download_what_the_index_says_hash_for_hash(
    client: Host, mirror: Mirror
) -> None:
    client.sh(f"{PIP} -q markupsafe; {UV} -q markupsafe")
    (wheel,) = client.sh("ls /root/got").split()
    page = client.sh(f"curl -sS {INDEX}/markupsafe/")
    digest = client.sh(f"sha256sum /root/got/{wheel}").split()[0]
    assert f"{wheel}#sha256={digest}" in page
    assert client.sh("ls /root/placed").split()[0] == "markupsafe"
    # No link of the page leads away from the mirror, in neither form.
    json_page = client.sh(
        f"curl -sS -H 'Accept: application/vnd.pypi.simple.v1+json' {INDEX}/markupsafe/"
    )
    for text in (page, json_page):
        links = re.findall(r"""(?:href=["']|"url":\s*")([^"']+)""", text)
        assert links
        assert all(link.startswith(("/pypi/", "../")) for link in links)


def test_a_second_download_is_warm(client: Host, mirror: Mirror) -> None:
    log = mirror.root / "var/log/nginx/site.log"
    client.sh(f"{PIP} -q idna")
    before = len(log.read_text())
    client.sh(f"{PIP} -q idna")
    again = log.read_text()[before:].splitlines()
    assert [line.split()[-1] for line in again] == ["HIT"] * len(again)
    assert any("/pypi/files/" in line for line in again)


def test_torch_without_cuda_is_served_as_pytorchs_site_serves_it(client: Host) -> None:
    (locked,) = re.findall(r"^torch==\S+\+cpu", lock_for("cpu").text, re.MULTILINE)
    index = f"--index {URL}/pytorch/whl/cpu --index-strategy unsafe-best-match"
    said = client.try_(f"{UV} --dry-run {index} {locked}").stderr
    assert f" + {locked}\n" in said


@pytest.fixture
def channel(mirror: Mirror, tmp_path: Path) -> str:
    """A folder as the sites have it, put on the mirror; its address."""
    for part in ("pkgs/main/linux-64", "pkgs/main/noarch", "cloud/conda-forge/noarch"):
        folder = tmp_path / part
        folder.mkdir(parents=True)
        (folder / "repodata.json").write_text(json.dumps({"info": {"subdir": folder.name}}))
        (folder / "thing-1-0.conda").write_bytes(b"PK" * 1000)
    (tmp_path / "miniconda").mkdir()
    (tmp_path / "miniconda/Miniconda3-latest-Linux-x86_64.sh").write_text("#!/bin/sh\n")
    mirror.put_channel(tmp_path)
    return f"{URL}/anaconda"


def test_a_conda_channel_is_served_from_a_folder(client: Host, channel: str) -> None:
    for part in ("pkgs/main/linux-64", "pkgs/main/noarch", "cloud/conda-forge/noarch"):
        page = client.sh(f"curl -sSf {channel}/{part}/repodata.json")
        assert json.loads(page) == {"info": {"subdir": part.rpartition("/")[2]}}
        assert client.sh(f"curl -sSf {channel}/{part}/thing-1-0.conda | wc -c") == "2000"
    installer = f"{channel}/miniconda/Miniconda3-latest-Linux-x86_64.sh"
    assert client.sh(f"curl -sSf {installer}") == "#!/bin/sh"


class TestFaults:
    """Each as the clients see it, and gone after clear()."""

    def test_slow(self, client: Host, mirror: Mirror) -> None:
        timed = f"{CURL} -w '%{{time_total}}' {INDEX}/markupsafe/"
        assert float(client.sh(timed)) < 1.5
        mirror.fault("pypi", "slow", rate="100k")  # the page has about 350 kB
        assert float(client.sh(timed)) > 2

    def test_forbidden_for_pip_alone(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("pypi", "forbidden", agent="^pip/")
        refused = client.try_(f"{PIP} markupsafe")
        assert refused.returncode == 1
        words(refused.stderr, "No matching distribution found for markupsafe")
        assert client.sh(f"{CURL} -w '%{{http_code}}' {INDEX}/markupsafe/") == "200"
        client.sh(f"{UV} -q markupsafe")

    def test_forbidden(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("apt", "forbidden")
        refused = client.try_(APT_UPDATE)
        assert refused.returncode == 100
        words(refused.stderr, "403  Forbidden")
        client.sh(f"{PIP} -q markupsafe")  # of apt alone
        mirror.fault("pypi", "forbidden")
        words(client.try_(f"{UV} markupsafe").stderr, "403 Forbidden")

    def test_one_subchannel_is_missing(self, client: Host, mirror: Mirror, channel: str) -> None:
        mirror.fault("conda", "missing", path="^/anaconda/pkgs/main/linux-64/")
        codes = [
            client.sh(f"{CURL} -w '%{{http_code}}' {channel}/{part}/repodata.json")
            for part in ("pkgs/main/linux-64", "pkgs/main/noarch", "cloud/conda-forge/noarch")
        ]
        assert codes == ["404", "200", "200"]

    def test_a_stale_index(self, client: Host, mirror: Mirror, channel: str) -> None:
        mirror.fault("apt", "stale")
        apt = client.try_(APT_UPDATE)
        assert apt.returncode == 100
        words(apt.stderr, "File has unexpected size", "Mirror sync in progress?")
        mirror.fault("pypi", "stale")
        pip = client.try_(f"{PIP} markupsafe")
        words(pip.stderr, "No matching distribution found for markupsafe")
        mirror.fault("conda", "stale")
        page = client.sh(f"curl -sSf {channel}/pkgs/main/linux-64/repodata.json")
        assert json.loads(page)["packages"] == {}

    def test_connections_that_are_cut(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("pypi", "cut")
        done = client.try_(f"{CURL} {INDEX}/markupsafe/")
        assert done.returncode == 18  # curl: a partial file
        size = int(client.sh("stat -c %s /root/page"))
        assert 30_000 < size < 200_000
        pip = client.try_(f"{PIP} markupsafe")
        assert pip.returncode != 0
        words(pip.stderr, "Connection broken")
        uv = client.try_(f"{UV} markupsafe")
        assert uv.returncode != 0

    def test_connections_that_are_closed_at_once(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("apt", "dropped")
        assert client.try_(APT_UPDATE).returncode == 100
        assert client.try_(f"{CURL} {URL}/debian/").returncode == 52  # an empty reply

    def test_an_index_whose_packages_are_dead(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("pypi", "dead")
        assert client.sh(f"{CURL} -w '%{{http_code}}' {INDEX}/markupsafe/") == "200"
        pip = client.try_(f"{PIP} markupsafe")
        assert pip.returncode != 0
        words(pip.stderr, "/pypi/files/", "RemoteDisconnected")
        mirror.fault("apt", "dead")
        update = client.try_(APT_UPDATE)
        assert update.returncode == 0, update.stderr
        fetch = client.try_("cd /root && apt-get download -o Acquire::Retries=0 hello-traditional")
        assert fetch.returncode == 100
        words(fetch.stderr, "Failed to fetch", "/pool/")

    def test_a_redirect_to_another_host(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("pypi", "elsewhere")
        final = client.sh(f"{CURL} -L -w '%{{url_effective}}' {INDEX}/markupsafe/")
        assert final == "https://elsewhere.gpufleet.test/pypi/web/simple/markupsafe/"
        # To pip that looks like success: only the final host tells.
        client.sh(f"{PIP} -q markupsafe")

    def test_garbage_with_200(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("apt", "garbage")
        apt = client.try_(APT_UPDATE)
        assert apt.returncode == 100
        words(apt.stderr, "E: ")
        mirror.fault("pypi", "garbage")
        assert client.sh(f"{CURL} -w '%{{http_code}}' {INDEX}/markupsafe/") == "200"
        assert client.try_(f"{PIP} markupsafe").returncode == 1
        assert client.try_(f"{UV} markupsafe").returncode != 0

    def test_a_captive_portal(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("site", "portal")
        final = client.sh(f"{CURL} -L -w '%{{url_effective}} %{{http_code}}' {URL}/anything")
        assert final == "http://login.gpufleet.test/ 200"
        assert "<title>Login</title>" in client.sh("cat /root/page")
        assert client.try_(APT_UPDATE).returncode == 100
        assert client.try_(f"{PIP} markupsafe").returncode == 1

    def test_a_wrong_certificate(self, client: Host, mirror: Mirror) -> None:
        mirror.fault("site", "certificate")
        assert client.try_(f"{CURL} {INDEX}/").returncode == 60  # curl: not to be trusted
        words(client.try_(APT_UPDATE).stderr, "certificate")
        words(client.try_(f"{PIP} -v markupsafe").stdout, "CERTIFICATE_VERIFY_FAILED")
        words(client.try_(f"{UV} markupsafe").stderr, "certificate")

    def test_none_is_left_when_all_is_put_right(self, client: Host, mirror: Mirror) -> None:
        for service, kind in (("apt", "forbidden"), ("pypi", "cut"), ("site", "certificate")):
            mirror.fault(service, kind)
        mirror.clear()
        client.sh(APT_UPDATE)
        client.sh(f"{PIP} -q markupsafe; {UV} -q markupsafe")


class CompanyIndex:
    """A package index as companies have it: a password, JSON pages, links of every kind."""

    PAGES = "/root/+simple/"

    def __init__(self, address: str, wheel: bytes) -> None:
        self.wheel = wheel
        self.refused = 0
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                files = self.server is index.files
                account = base64.b64encode(b"me:s3cret").decode()
                if not files and self.headers.get("Authorization") != f"Basic {account}":
                    index.refused += 1
                    self.send_error(401)
                elif self.path.endswith(".whl"):
                    self.answer("application/octet-stream", index.wheel)
                elif self.path.startswith(index.PAGES):
                    self.answer("application/vnd.pypi.simple.v1+json", index.page())
                else:
                    self.send_error(404)

            def answer(self, kind: str, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """What was asked is in the mirror's own log."""

        self.pages = http.server.ThreadingHTTPServer((address, 0), Handler)
        self.files = http.server.ThreadingHTTPServer((address, 0), Handler)
        self.url = f"http://me:s3cret@{address}:{self.pages.server_port}{self.PAGES}"
        self.elsewhere = f"http://{address}:{self.files.server_port}/f/"
        for server in (self.pages, self.files):
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def page(self) -> bytes:
        """The same wheel three times: on another host, above the page, below the host's root."""
        links = (self.elsewhere, "../../+f/", "/root/+f/")
        names = [f"thing-{number}-py3-none-any.whl" for number in (1, 2, 3)]
        urls = [link + name for link, name in zip(links, names, strict=True)]
        files = [{"filename": n, "url": u, "hashes": {}} for n, u in zip(names, urls, strict=True)]
        return json.dumps(
            {"meta": {"api-version": "1.0"}, "name": "thing", "files": files}
        ).encode()

    def close(self) -> None:
        for server in (self.pages, self.files):
            server.shutdown()
            server.server_close()


def wheel() -> bytes:
    """An empty wheel; only the pages know its version."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("thing.py", "")
    return file.getvalue()


def test_an_index_with_a_password_and_json_pages_is_mirrored_whole(
    walled: Fleet, client: Host, mirror: Mirror
) -> None:
    company = CompanyIndex(walled.gateway, wheel())
    stop = "systemctl stop nginx"
    try:
        walled.lab.run(mirror.host, stop)
        ok(fleet("lab", "up", "--name", walled.name, PIP_INDEX_URL=company.url))
        accept = "-H 'Accept: application/vnd.pypi.simple.v1+json'"
        page = client.sh(f"curl -sSf {accept} {INDEX}/thing/")
        links = [file["url"] for file in json.loads(page)["files"]]
        assert len(links) == 3
        for link in links:
            address = urljoin(f"{INDEX}/thing/", link)
            assert address.startswith(f"{URL}/")
            size = client.sh(f"curl -sSf {address} | wc -c")
            assert int(size) == len(company.wheel)
        assert company.refused == 0
        # Nobody but root of the mirror host reads the password there.
        assert "Authorization" in (mirror.root / "etc/nginx/mirror/site.conf").read_text()
        assert (mirror.root / "etc/nginx/mirror").stat().st_mode & 0o077 == 0
    finally:
        company.close()
        walled.lab.run(mirror.host, stop)
        ok(fleet("lab", "up", "--name", walled.name))
    client.sh(f"{PIP} -q markupsafe")


def test_clients_of_the_mirror_never_looked_elsewhere(walled: Fleet, client: Host) -> None:
    """After all the faults above: no client tried its own default when the mirror failed."""
    assert lab.strays(walled.name) == {host.name: 0 for host in walled.hosts}


STRAY = {
    "another host": "ping -c 1 -W 1 {other}",
    "an address of the lab that nobody has": "ping -c 1 -W 1 {nobody}",
    "the outside, which has no route": "ping -c 1 -W 1 192.0.2.1",
    "the outside, IPv6": "ping -6 -c 1 -W 1 2001:db8::1",
    "the outside, by a route of its own": (
        "ip route add default via {gateway}; ping -c 1 -W 1 192.0.2.1; ip route del default"
    ),
    "the outside, by the mirror": (
        "ip route add default via {mirror}; ping -c 1 -W 1 192.0.2.1; ip route del default"
    ),
    "somebody's name": "getent hosts nobody.example",
    "another port of the gateway": "curl -sS -m 1 http://{gateway}:8000/",
}


@pytest.mark.parametrize("to", STRAY)
def test_a_stray_packet_is_dropped_and_counted(
    walled: Fleet, one: Host, other: Host, to: str
) -> None:
    addresses = {
        "other": other.address,
        "nobody": re.sub(r"\d+$", "250", one.address),
        "gateway": walled.gateway,
        "mirror": walled.lab.mirror.host.address,
    }
    before = lab.strays(walled.name)
    done = one.try_(STRAY[to].format(**addresses))
    assert done.returncode != 0 or "route del" in STRAY[to], done.stdout
    after = lab.strays(walled.name)
    assert after[one.name] > before[one.name]
    assert after[other.name] == before[other.name]


def test_a_demo_that_strayed_fails_and_says_which_host(walled: Fleet, one: Host) -> None:
    one.try_("getent hosts nobody.example")
    done = fleet("demo", "--check", "--name", walled.name)
    assert done.code == 1
    (line,) = fleets.lines_about(done.err, one)
    words(line, "packets to others than the mirror", "does not know the mirror")
    assert "no packet to anything" not in done.out
