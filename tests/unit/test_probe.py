"""The probe, run by this machine's python3 as a host runs it, against real servers and faults."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback import (
    MACHINE,
    MIB,
    SERVICES,
    Request,
    Server,
    certified,
    everything,
    in_release,
    repodata,
    serving,
)

from gpufleet.catalog import Service
from gpufleet.mirrors.choice import Candidate, Found, Via
from gpufleet.mirrors.facts import MirrorProbe
from gpufleet.mirrors.plan import AptSources
from gpufleet.mirrors.probe import (
    BYTES,
    FAILED_TTL,
    SECONDS,
    Host,
    Kept,
    digests,
    due,
    plan,
    read,
    requests,
    stagger,
    suites_of,
    without_stale,
)

DEBIAN_TEXT = """\
Types: deb
URIs: http://deb.example.org/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://deb.example.org/debian-security
Suites: bookworm-security
Components: main
"""
SOURCES = AptSources(
    "debian", "bookworm", {"/etc/apt/sources.list.d/debian.sources": DEBIAN_TEXT}, ()
)
HOST = Host(SOURCES)
SUBDIR = MACHINE["subdir"]


@pytest.fixture
def probe(tmp_path: Path, sh: Any) -> Callable[..., Kept]:
    """Run the fact's own command line here, with the host's memory in a folder of the test."""

    def run(*servers: Server | Candidate, env: dict[str, str] | None = None, **how: Any) -> Kept:
        candidates = [
            one if isinstance(one, Candidate) else Candidate(one.site(f"site{i}"))
            for i, one in enumerate(servers)
        ]
        document = json.loads(plan(candidates, how.pop("host", HOST), **how))
        document["cache"] = str(tmp_path / "state" / "probed.json")
        options = {"env": {"PATH": "/usr/bin:/bin", **env}} if env else {}
        done = sh(MirrorProbe().command(json.dumps(document)), **options)
        assert (done.returncode, done.stderr) == (0, "")
        return MirrorProbe().process(done.stdout.splitlines())

    return run


def one(kept: Kept, service: Service, site: str = "site0") -> Found:
    (found,) = [row for row in kept.found if (row.service, row.site) == (service, site)]
    assert "\n" not in found.why
    return found


def test_a_good_site_passes_for_every_service_with_evidence_and_a_speed(probe):
    with serving() as site:
        kept = probe(site)
    assert {row.service for row in kept.found} == set(SERVICES)
    for row in kept.found:
        assert (row.state, row.via) == ("ok", "public"), row
        assert row.why
        assert row.speed is not None
        assert row.speed > 0
        assert abs(row.at - time.time()) < 60
    assert one(kept, "pypi").why == "1 files with SHA-256 at /pypi/simple/pip/"
    assert one(kept, "apt").parts == ("debian",)
    assert set(one(kept, "apt").dates) == {"debian/bookworm", "debian/bookworm-updates"}
    assert set(one(kept, "conda").parts) == {"conda-forge", "pytorch", "pkgs/main", "pkgs/r"}


def test_each_service_is_asked_as_its_own_client_asks(probe):
    with serving() as site:
        probe(site)
    agents = {path: headers["User-Agent"] for path, headers in site.asked}
    accepts = {path: headers["Accept"] for path, headers in site.asked}
    assert re.match(r'pip/[0-9.]+ \{"ci":null,"cpu":', agents["/pypi/simple/pip/"])
    assert accepts["/pypi/simple/pip/"].startswith("application/vnd.pypi.simple.v1+json, ")
    assert agents["/debian/dists/bookworm/InRelease"].startswith("Debian APT-HTTP/")
    assert agents["/anaconda/pkgs/main/noarch/repodata.json"].startswith("conda/")
    assert "hf_hub/" in agents["/api/models/openai-community/gpt2"]


def test_security_suites_are_asked_for_only_where_they_may_come_from_the_mirror(probe):
    with serving() as site:
        kept = probe(site, host=replace(HOST, apt_security=True), services=["apt"])
    assert set(one(kept, "apt").parts) == {"debian", "debian-security"}
    del site.files["/debian-security/dists/bookworm-security/InRelease"]
    with serving(site.files) as site:
        kept = probe(site, host=replace(HOST, apt_security=True), services=["apt"])
    assert one(kept, "apt").state == "ok"
    assert one(kept, "apt").parts == ("debian",)
    assert "has no /debian-security/dists" in one(kept, "apt").why


def test_a_site_that_refuses_pip_alone_fails_for_pip_alone(probe):
    """As a firewall did in 2026-09, while curl got 200."""

    def refuse(request: Request) -> bool:
        if not request.headers["User-Agent"].startswith("pip/"):
            return False
        request.answer(403, b"blocked")
        return True

    with serving(fault=refuse) as site:
        kept = probe(site, services=["pypi", "conda", "apt"])
    assert one(kept, "pypi").state == "refused"
    assert one(kept, "pypi").why == "answers 403 to pip, though not to curl"
    assert one(kept, "conda").passed
    assert one(kept, "apt").passed


def test_a_site_that_refuses_everybody_says_so(probe):
    def refuse(request: Request) -> bool:
        request.answer(403, b"")
        return True

    with serving(fault=refuse) as site:
        kept = probe(site, services=["pypi"])
    assert one(kept, "pypi").why == "answers 403 to pip for /pypi/simple/pip/"


def test_one_subchannel_that_is_missing_is_left_out_and_the_rest_stay(probe):
    files = {path: body for path, body in everything().items() if "/pkgs/r/noarch" not in path}
    with serving(files) as site:
        found = one(probe(site, services=["conda"]), "conda")
    assert found.state == "ok"
    assert set(found.parts) == {"conda-forge", "pytorch", "pkgs/main"}
    assert found.why.endswith("pkgs/r: has no /anaconda/pkgs/r/noarch/repodata.json (404)")


def test_a_site_without_conda_forge_is_of_no_use_for_conda(probe):
    files = {path: body for path, body in everything().items() if "/conda-forge/" not in path}
    with serving(files) as site:
        found = one(probe(site, services=["conda"]), "conda")
    assert found.state == "missing"
    assert f"/anaconda/cloud/conda-forge/{SUBDIR}/repodata.json" in found.why


def test_a_channel_without_any_package_is_of_no_use(probe):
    empty = b'{"info": {}, "packages": {}, "packages.conda": {}, "repodata_version": 1}'
    files = {p: empty if p.endswith("repodata.json") else b for p, b in everything().items()}
    with serving(files) as site:
        found = one(probe(site, services=["conda"]), "conda")
    assert (found.state, found.why) == (
        "missing",
        "/anaconda/cloud/conda-forge has no packages",
    )


def test_an_index_that_is_no_longer_valid_is_stale(probe):
    path = "/debian/dists/bookworm-updates/InRelease"
    valid = {"Valid-Until": "Sat, 01 Aug 2026 00:00:00 UTC"}
    with serving(everything() | {path: in_release("bookworm-updates", **valid)}) as site:
        found = one(probe(site, services=["apt"]), "apt")
    assert found.state == "stale"
    assert found.why == f"{path} was valid until Sat, 01 Aug 2026 00:00:00 UTC"


def test_an_index_that_is_days_older_than_another_sites_is_stale(probe):
    path = "/debian/dists/bookworm-updates/InRelease"
    old = everything() | {path: in_release("bookworm-updates", age=9 * 86400)}
    with serving() as new, serving(old) as behind:
        kept = probe(new, behind, services=["apt"])
    assert one(kept, "apt", "site0").passed
    late = one(kept, "apt", "site1")
    assert late.state == "stale"
    assert late.why == "debian/bookworm-updates is 9 days older than another site's"


def test_an_index_of_another_suite_is_refused(probe):
    path = "/debian/dists/bookworm/InRelease"
    with serving(everything() | {path: in_release("trixie")}) as site:
        found = one(probe(site, services=["apt"]), "apt")
    assert (found.state, found.why) == ("garbage", f"{path} is that of trixie")


@pytest.mark.parametrize("service", list(SERVICES))
def test_garbage_with_200_does_not_pass(probe, service: Service):
    def rubbish(request: Request) -> bool:
        request.answer(200, b"<html><body>It works!</body></html>")
        return True

    with serving(fault=rubbish) as site:
        found = one(probe(site, services=[service]), service)
    assert found.state == "garbage"
    assert found.why.startswith("answers 200 with '<html><body>It works!")


@pytest.mark.parametrize("service", list(SERVICES))
def test_a_login_page_with_200_is_named_as_one(probe, service: Service):
    def portal(request: Request) -> bool:
        request.answer(200, b"<html><form action=/auth><input name=user></form></html>")
        return True

    with serving(fault=portal) as site:
        found = one(probe(site, services=[service]), service)
    assert (found.state, found.why) == ("portal", "a login page answers in its place")


def test_a_redirect_to_another_site_is_named(probe):
    with serving() as other:

        def away(request: Request) -> bool:
            request.answer(302, b"", {"Location": f"http://{other.place}{request.path}"})
            return True

        with serving(fault=away) as site:
            kept = probe(site, services=["pypi", "conda", "apt"])
    for service in ("pypi", "conda", "apt"):
        found = one(kept, service)
        assert (found.state, found.why) == ("elsewhere", f"redirects to {other.place}")
    assert other.asked == []


def test_a_redirect_within_the_site_is_followed(probe):
    files = everything()
    files["/moved/"] = files.pop("/pypi/simple/pip/").replace(b"../../", b"/pypi/")

    def along(request: Request) -> bool:
        if request.path != "/pypi/simple/pip/":
            return False
        request.answer(301, b"", {"Location": "/moved/"})
        return True

    with serving(files, along) as site:
        assert one(probe(site, services=["pypi"]), "pypi").passed


def test_a_portal_that_redirects_to_its_own_page_is_named(probe):
    with serving() as login:

        def caught(request: Request) -> bool:
            request.answer(302, b"", {"Location": f"http://{login.place}/hello?from=here"})
            return True

        with serving(fault=caught) as site:
            found = one(probe(site, services=["apt"]), "apt")
    assert found.state == "portal"
    assert found.why == f"a page of {login.place} answers in its place: a login portal?"
    assert login.asked == []


def test_an_index_whose_files_lie_elsewhere_is_named(probe):
    page = b'<a href="https://files.example.org/pip-25-py3-none-any.whl#sha256=%s">x</a>'
    files = everything() | {"/pypi/simple/pip/": page % (b"0" * 64)}
    with serving(files) as site:
        found = one(probe(site, services=["pypi"]), "pypi")
    assert (found.state, found.why) == (
        "elsewhere",
        "its index links files on files.example.org",
    )


def test_an_index_in_json_is_read_too(probe):
    url = "../../packages/pip-25.0-py3-none-any.whl"
    page = {"files": [{"filename": "x", "url": url, "hashes": {"sha256": "0" * 64}}]}
    with serving(everything() | {"/pypi/simple/pip/": json.dumps(page).encode()}) as site:
        assert one(probe(site, services=["pypi"]), "pypi").passed


def test_an_index_without_hashes_does_not_pass(probe):
    page = b'<a href="/pypi/packages/pip-25.0-py3-none-any.whl">x</a>'
    with serving(everything() | {"/pypi/simple/pip/": page}) as site:
        assert one(probe(site, services=["pypi"]), "pypi").state == "garbage"


@pytest.mark.parametrize("service", ["pypi", "conda", "apt", "torch", "hf"])
def test_a_site_that_has_its_index_but_not_its_files_does_not_pass(probe, service: Service):
    def dies(request: Request) -> bool:
        if not re.search(r"\.(whl|conda|xz|gz)$|vocab", request.path):
            return False
        request.answer(502, b"")
        return True

    with serving(fault=dies) as site:
        found = one(probe(site, services=[service]), service)
    assert found.state == "refused"
    assert found.why.startswith("its index is well, a file is not: answers 502 to ")


def test_a_file_that_is_not_what_its_name_says_does_not_pass(probe):
    path = "/pypi/packages/pip-25.0-py3-none-any.whl"
    with serving(everything() | {path: b"<html>later</html>" * 999}) as site:
        found = one(probe(site, services=["pypi"]), "pypi")
    assert found.state == "garbage"
    assert "which is no .whl file" in found.why


def test_a_connection_that_is_cut_is_named(probe):
    def cut(request: Request) -> bool:
        request.send_response(200)
        request.send_header("Content-Length", "100000")
        request.end_headers()
        request.give(b"<html>" + bytes(994))
        request.close_connection = True
        return True

    with serving(fault=cut) as site:
        found = one(probe(site, services=["pypi"]), "pypi")
    assert (found.state, found.why) == ("cut", "cuts the connection after 1000 bytes")


def test_a_connection_that_is_cut_before_any_answer_is_named(probe):
    def cut(request: Request) -> bool:
        request.close_connection = True
        return True

    with serving(fault=cut) as site:
        found = one(probe(site, services=["pypi"]), "pypi")
    assert (found.state, found.why) == ("cut", "cuts the connection after 0 bytes")


def test_a_site_that_hangs_is_given_up_and_does_not_hold_up_another(probe):
    def hang(request: Request) -> bool:
        time.sleep(30)
        return True

    with serving(fault=hang) as hanging, serving() as good:
        kept = probe(hanging, good)
    assert {one(kept, s, "site0").state for s in SERVICES} == {"slow"}
    assert one(kept, "pypi", "site0").why == "gives 0 bytes in 5 s"
    assert {one(kept, s, "site1").state for s in SERVICES} == {"ok"}
    assert kept.seconds < SECONDS


def test_a_slow_site_is_measured_as_slow_and_not_for_long(probe):
    def drip(request: Request) -> bool:
        if not request.path.endswith(".whl"):
            return False
        request.send_response(206)
        request.send_header("Content-Length", str(MIB))
        request.end_headers()
        request.give(b"PK\x03\x04")
        for _ in range(300):
            time.sleep(0.02)
            request.give(bytes(1000))
        return True

    with serving(fault=drip) as slow, serving() as fast:
        kept = probe(slow, fast, services=["pypi"])
    speeds = [one(kept, "pypi", site).speed for site in ("site0", "site1")]
    assert speeds[0] is not None
    assert speeds[1] is not None
    assert speeds[0] < 100_000
    assert speeds[1] > 10 * speeds[0]


def test_nobody_there_is_one_line(probe):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = Server({}, None)
    site = server.site().model_copy(update={"hosts": (f"127.0.0.1:{port}",)})
    server.server_close()
    kept = probe(Candidate(site))
    assert {(row.state, row.why) for row in kept.found} == {("unreachable", "refuses connections")}


def test_a_name_that_does_not_exist_is_one_line(probe):
    server = Server({}, None)
    site = server.site().model_copy(update={"hosts": ("no-such-host.invalid",)})
    server.server_close()
    found = one(probe(Candidate(site), services=["pypi"]), "pypi", "one")
    assert (found.state, found.why) == ("unreachable", "its name cannot be resolved")


def test_a_certificate_that_nobody_vouches_for_is_named(probe, tmp_path: Path):
    with serving(certificate=certified(tmp_path, "127.0.0.1")) as site:
        kept = probe(site)
    assert {row.state for row in kept.found} == {"certificate"}
    assert "self-signed certificate" in one(kept, "pypi").why


def test_a_certificate_for_another_name_is_named(probe, tmp_path: Path):
    certificate = certified(tmp_path, "mirror.example.org")
    with serving(certificate=certificate) as site:
        kept = probe(site, services=["pypi"], env={"SSL_CERT_FILE": str(certificate[0])})
    found = one(kept, "pypi")
    assert found.state == "certificate"
    assert "127.0.0.1" in found.why


def test_a_good_certificate_passes(probe, tmp_path: Path):
    certificate = certified(tmp_path, "127.0.0.1")
    with serving(certificate=certificate) as site:
        kept = probe(site, services=["pypi"], env={"SSL_CERT_FILE": str(certificate[0])})
    assert one(kept, "pypi").passed


def test_a_host_without_certificate_authorities_is_told_what_to_do(probe, tmp_path: Path):
    env = {"SSL_CERT_FILE": str(tmp_path / "none.pem"), "SSL_CERT_DIR": str(tmp_path / "none")}
    with serving(certificate=certified(tmp_path, "127.0.0.1")) as site:
        found = one(probe(site, services=["pypi"], env=env), "pypi")
    assert "install ca-certificates" in found.why


def test_ten_sites_and_five_services_stay_within_their_bytes(probe):
    """Files are far larger than what is read of them; bytes are counted where they are sent."""
    five: list[Service] = ["pypi", "conda", "apt", "miniconda", "torch"]
    files = everything(size=8 * MIB)
    contexts = [serving(files) for _ in range(10)]
    servers = [context.__enter__() for context in contexts]
    try:
        kept = probe(*servers, services=five)
    finally:
        for context in contexts:
            context.__exit__(None, None, None)
    assert len(kept.found) == 50
    assert {row.state for row in kept.found} == {"ok"}
    sent = sum(server.sent for server in servers)
    assert sent < 40 * MIB
    assert kept.bytes <= BYTES
    assert all(row.speed for row in kept.found)
    assert 0 < kept.seconds < 20


def test_no_more_than_its_bytes_are_read_even_of_sites_that_know_no_ranges(probe):
    def whole(request: Request) -> bool:
        body = request.server.files.get(request.path)
        if body is None:
            return False
        request.answer(200, body)
        return True

    with serving(everything(size=8 * MIB), whole) as site:
        kept = probe(site)
    assert {row.state for row in kept.found} == {"ok"}
    assert kept.bytes < 10 * MIB


def test_a_flat_page_of_wheels_is_one_for_find_links(probe):
    wheel = "torch-2.4.0%2Bcu121-cp311-cp311-linux_x86_64.whl"
    page = f'<a href="{wheel}">{wheel}</a> <a href="torchvision-0.19%2Bcu121-x.whl">v</a>'
    files = {"/wheels/cu121/": page.encode(), f"/wheels/cu121/{wheel}": b"PK\x03\x04" + bytes(9999)}
    services = {"torch": {"url": "/wheels/{cuda}/", "style": "find-links"}}
    with serving(files) as site:
        at = Candidate(site.site("a", services=services))
        found = one(probe(at, host=replace(HOST, cuda="cu121")), "torch", "a")
        assert (found.state, found.why) == ("ok", "1 wheels of torch +cu121")
        site.files["/wheels/cu118/"] = page.encode()
        found = one(probe(at, host=replace(HOST, cuda="cu118")), "torch", "a")
    assert (found.state, found.why) == ("missing", "has no torch +cu118 at /wheels/cu118/")


def test_nvidias_archive_is_the_folder_of_the_distribution(probe):
    machine = MACHINE["machine"]
    folder = f"/compute/cuda/repos/debian12/{machine}"
    release = in_release("x").replace(b"Codename: x\n", b"")
    files = {f"{folder}/InRelease": release, f"{folder}/Packages.gz": b"\x1f\x8b" + bytes(9999)}
    host = replace(HOST, sources=replace(SOURCES, version="12"))
    with serving(files) as site:
        services = {"cuda_apt": {"url": "/compute/cuda/repos"}}
        found = one(probe(Candidate(site.site("a", services=services)), host=host), "cuda_apt", "a")
    assert (found.state, found.why) == ("ok", f"signed: {folder}")


class TestMemory:
    """What the host remembers between probes."""

    def test_is_what_was_said(self, probe, tmp_path: Path):
        with serving() as site:
            said = probe(site)
        path = tmp_path / "state" / "probed.json"
        assert read(path.read_text()) == replace(said, bytes=0, seconds=0)
        assert path.stat().st_mode & 0o777 == 0o644
        assert [p.name for p in path.parent.iterdir()] == ["probed.json"]

    def test_of_one_service_stays_when_another_is_probed(self, probe):
        with serving() as site:
            probe(site, services=["pypi", "apt"])
            del site.files["/pypi/simple/pip/"]
            kept = probe(site, services=["pypi"])
        assert one(kept, "pypi").state == "missing"
        assert one(kept, "apt").passed
        assert set(kept.probed) == {"pypi", "apt"}

    def test_of_one_site_stays_when_another_is_probed_and_is_not_taken_for_all(self, probe):
        with serving() as first, serving() as second:
            kept = probe(first, second, services=["pypi"], only=["site1"])
            assert [row.site for row in kept.found] == ["site1"]
            assert kept.probed == {}
            probe(first, second, services=["pypi"])
            kept = probe(first, second, services=["pypi"], only=["site0"])
        assert {row.site for row in kept.found} == {"site0", "site1"}
        assert len(kept.found) == 2

    def test_forgets_a_site_that_is_no_longer_there(self, probe):
        with serving() as first, serving() as second:
            probe(first, second, services=["pypi"])
            kept = probe(first, services=["pypi"])
        assert [row.site for row in kept.found] == ["site0"]

    @pytest.mark.parametrize("text", ["", "{", '{"version": 2}', '{"version": 1}', "[]", "null"])
    def test_that_is_spoilt_is_nothing(self, probe, tmp_path: Path, text: str):
        assert read(text) == Kept()
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "probed.json").write_text(text)
        with serving() as site:
            assert one(probe(site, services=["pypi"]), "pypi").passed

    def test_that_cannot_be_kept_is_said_and_the_results_are_there(self, probe, tmp_path: Path):
        (tmp_path / "state").write_text("in the way")
        with serving() as site:
            kept = probe(site, services=["pypi"])
        assert one(kept, "pypi").passed
        assert "probed.json: " in kept.note


def found(service: Service = "pypi", site: str = "a", **changes: Any) -> Found:
    return Found(**{"service": service, "site": site, "state": "ok", "why": "x", **changes})


class TestWhenToProbe:
    DAY = 86400.0

    def kept(self, at: float, digest: str = "d", **changes: Any) -> Kept:
        return Kept((found(**changes),), {"pypi": (at, digest)})

    def test_never_asked(self):
        assert due(Kept(), {"pypi": "d", "apt": "e"}, 0, 168) == ("pypi", "apt")

    def test_not_while_it_holds(self):
        assert due(self.kept(0), {"pypi": "d"}, 6.9 * self.DAY, 168) == ()
        assert due(self.kept(0), {"pypi": "d"}, 7.1 * self.DAY, 168) == ("pypi",)
        assert due(self.kept(0), {"pypi": "d"}, 2 * 3600, 1) == ("pypi",)

    def test_when_other_questions_would_be_asked(self):
        assert due(self.kept(0), {"pypi": "other"}, 1, 168) == ("pypi",)

    def test_soon_again_when_nothing_passed(self):
        failed = self.kept(0, state="cut")
        assert due(failed, {"pypi": "d"}, FAILED_TTL - 1, 168) == ()
        assert due(failed, {"pypi": "d"}, FAILED_TTL + 1, 168) == ("pypi",)

    def test_when_the_clock_was_put_back(self):
        assert due(self.kept(1000), {"pypi": "d"}, 10, 168) == ("pypi",)


class TestQuestions:
    def site(self, **changes: Any) -> Candidate:
        server = Server({}, None)
        site = server.site("a", **changes)
        server.server_close()
        return Candidate(site)

    def test_change_with_the_suites_and_the_site_and_nothing_else(self):
        site = self.site()
        other = replace(HOST, sources=replace(SOURCES, codename="trixie"))
        assert digests([site], HOST) == digests([site], HOST)
        changed = {s for s, d in digests([site], other).items() if d != digests([site], HOST)[s]}
        assert changed <= {"apt"}
        assert "apt" not in digests([site], other)
        cuda = digests([site], replace(HOST, cuda="cu121"))
        assert {s for s, d in cuda.items() if d != digests([site], HOST)[s]} == {"torch"}

    def test_are_not_asked_for_apt_of_a_site_without_the_hosts_archive(self):
        services = {"apt": {"archives": {"ubuntu": "/ubuntu"}}}
        assert requests(self.site(services=services).site, HOST) == {}

    def test_name_the_suites_of_the_distribution_and_nobody_elses(self):
        text = (
            DEBIAN_TEXT + "\nTypes: deb\nURIs: https://x.example/linux/debian\nSuites: bookworm\n"
        )
        sources = replace(SOURCES, files={"/etc/apt/sources.list.d/debian.sources": text})
        assert suites_of(sources, False) == {"debian": ("bookworm", "bookworm-updates")}
        assert suites_of(sources, True)["debian-security"] == ("bookworm-security",)

    def test_are_spread_over_the_fleet_by_the_hosts_names(self):
        waits = [stagger(f"gpu-{i}", 100) for i in range(100)]
        assert stagger("gpu-1", 1) == 0
        assert waits == [stagger(f"gpu-{i}", 100) for i in range(100)]
        assert 0 <= min(waits) < 10 < 40 < max(waits) <= 49.5
        assert max(stagger(f"gpu-{i}", 10_000) for i in range(100)) <= 60

    def test_begin_with_another_site_on_another_host(self):
        sites = []
        for i in range(4):
            server = Server({}, None)
            sites.append(Candidate(server.site(f"s{i}")))
            server.server_close()
        firsts = {
            json.loads(plan(sites, HOST, name=f"h{i}"))["sites"][0]["site"] for i in range(40)
        }
        assert firsts == {"s0", "s1", "s2", "s3"}


def test_sites_are_late_only_against_others_of_the_same_suite():
    def row(site: str, days: float, suite: str = "debian/bookworm") -> Found:
        return found("apt", site, dates={suite: 1e9 - days * 86400})

    rows = [row("a", 0), row("b", 2.9), row("c", 3.1), row("d", 50, "ubuntu/noble")]
    assert [r.state for r in without_stale(rows)] == ["ok", "ok", "stale", "ok"]


@pytest.mark.parametrize("via", ["public", "internal", "internal-http"])
def test_the_way_to_a_site_is_part_of_what_is_found(probe, via: Via):
    with serving() as site:
        kept = probe(Candidate(site.site("a"), via), services=["pypi"])
    assert [row.via for row in kept.found] == [via]


def test_a_large_repodata_is_judged_by_its_beginning(probe):
    files = everything()
    large = repodata(SUBDIR)[:-1] + b', "removed": [' + b'"x.conda", ' * 10**6 + b'"y"]}'
    for path in [p for p in files if p.endswith(f"{SUBDIR}/repodata.json")]:
        files[path] = large
    with serving(files) as site:
        assert one(probe(site, services=["conda"]), "conda").passed
        assert site.sent < 2 * MIB
        for path in [p for p in files if p.endswith(f"{SUBDIR}/repodata.json")]:
            site.files[path] = large.replace(SUBDIR.encode(), b"linux-32")
        wrong = one(probe(site, services=["conda"]), "conda")
    assert wrong.state == "garbage"
    assert wrong.why.endswith("repodata.json is that of linux-32")
