"""The walled lab's decisions: where its mirror fetches from, what a fault says, what is kept."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from gpufleet import render
from gpufleet.errors import FleetError, UsageError
from gpufleet.lab import faults, network, state, walled
from gpufleet.lab.container import Container
from gpufleet.lab.labs import Host, Lab
from gpufleet.lab.state import MIRROR, HostRecord, LabRecord
from gpufleet.lab.walled import Upstream
from gpufleet.settings import Settings

HTML = """<a href="https://files.example/packages/a.whl#sha256=0">a</a>
<a href='https://more.example:8443/b.whl'>b</a> <a href="../../relative/c.whl">c</a>
<p>https://not-a-link.example/</p>"""
JSON = '{"files": [{"url": "https://files.example/a.whl"}, {"url":"http://x.example/b.whl"}]}'


def test_the_hosts_of_files_are_those_of_the_links():
    assert walled.file_hosts(HTML) == ["https://files.example", "https://more.example:8443"]
    assert walled.file_hosts(JSON) == ["http://x.example", "https://files.example"]


def test_an_index_is_taken_apart_and_its_password_kept_out_of_the_address():
    index = Upstream.at("https://me:secret@index.example:8081/api/pypi/simple")
    assert (index.origin, index.path) == ("https://index.example:8081", "/api/pypi/simple/")
    assert index.authorization == "bWU6c2VjcmV0"
    assert index.above.path == "/api/pypi/"
    assert index.root == Upstream(index.origin, "/", index.authorization)
    assert index.below("x/").path == "/api/pypi/simple/x/"
    assert Upstream.at("http://h.example").path == "/"


@pytest.mark.parametrize("url", ["file:///srv/simple", "ftp://h.example/", "h.example/simple"])
def test_an_index_that_no_proxy_can_fetch_is_refused_in_one_line(url: str):
    with pytest.raises(FleetError, match="can fetch from http and https only") as error:
        Upstream.at(url)
    assert "\n" not in str(error.value)


def test_links_of_every_kind_are_kept_on_the_mirror():
    text = render.text(
        "mirror-site.nginx.j2",
        archives={"debian": Upstream.at("http://deb.example/debian")},
        index=Upstream.at("https://me:secret@index.example/api/simple/"),
        file_hosts=[Upstream.at("https://files.example")],
    )
    assert "sub_filter 'https://files.example/' '/pypi/files/0/';" in text
    assert 'rewrite "^/pypi/web/simple/(.*)$" "/api/simple/$1" break;' in text
    assert 'rewrite "^/pypi/web/(.*)$" "/api/$1" break;' in text
    assert 'rewrite "^/pypi/index/(.*)$" "/$1" break;' in text
    # To the index alone, and never to the hosts of files or the archives.
    assert text.count('Authorization "Basic bWU6c2VjcmV0"') == 3


class TestFaults:
    @pytest.mark.parametrize("service", faults.SERVICES)
    @pytest.mark.parametrize("kind", [kind for kind in faults.KINDS if kind != "certificate"])
    def test_every_service_can_fail_in_every_way(self, service: str, kind: str):
        text = faults.snippet(service, kind)
        assert text.count("{") == text.count("}")
        assert text.rstrip().endswith("}")

    def test_only_the_index_is_stale_and_only_packages_are_dead(self):
        assert '"^/pypi/web/simple/."' in faults.snippet("pypi", "stale")
        assert '"^/pypi/(?!web/simple/)"' in faults.snippet("pypi", "dead")
        assert "$uri" not in faults.snippet("pypi", "forbidden")

    def test_a_fault_meets_one_path_and_one_client_where_it_is_told_so(self):
        text = faults.snippet("pypi", "forbidden", path="^/pypi/web/", agent="^pip/")
        assert 'if ($uri ~* "^/pypi/web/") {' in text
        assert 'if ($http_user_agent ~* "^pip/") {' in text
        assert text.endswith('if ($met = "pa") { return 403; }\n')

    def test_a_slow_mirror_is_as_slow_as_told(self):
        assert "set $limit_rate 7k;" in faults.snippet("apt", "slow", rate="7k")

    @pytest.mark.parametrize(
        ("service", "kind", "more", "complaint"),
        [
            ("pip", "slow", {}, "the mirror has no service 'pip': it has apt, pypi, torch, "),
            ("apt", "sluggish", {}, "no fault 'sluggish' of apt: there are slow, forbidden"),
            ("site", "stale", {}, "no fault 'stale' of site"),
            ("apt", "certificate", {}, "no fault 'certificate' of apt"),
            ("apt", "slow", {"path": "("}, r"'\(': no regular expression"),
            ("apt", "slow", {"agent": 'a"b'}, "a pattern holds no"),
        ],
    )
    def test_what_there_is_not_is_refused(
        self, service: str, kind: str, more: dict[str, str], complaint: str
    ):
        with pytest.raises(UsageError, match=complaint):
            faults.snippet(service, kind, **more)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabRecord:
    monkeypatch.setattr(state, "STATE", tmp_path)
    lab = LabRecord("lab", "debian:12", "/images/x/root", "10.213.0.0/24", hosts=(HostRecord(1),))
    lab.directory.mkdir()
    return lab


def test_a_walled_lab_is_loaded_as_it_was_saved(kept: LabRecord):
    lab = kept.with_host(HostRecord(MIRROR, prepared=True))
    state.save(lab)
    assert state.load("lab") == lab
    assert lab.walled
    assert [lab.host_name(host) for host in lab.every_host] == ["lab-mirror", "lab-1"]
    assert lab.hosts == kept.hosts


def test_lab_json_is_the_same_for_every_lab(kept: LabRecord):
    """Other checkouts on this machine read it before they make a lab."""
    state.save(kept)
    plain = (kept.directory / "lab.json").read_text()
    state.save(kept.with_host(HostRecord(MIRROR)))
    assert (kept.directory / "lab.json").read_text() == plain
    assert "mirror" not in json.loads(plain)


def test_a_mirror_that_was_written_down_and_never_made_is_forgotten(kept: LabRecord):
    state.save(kept.with_host(HostRecord(MIRROR)))
    state.save(kept)
    loaded = state.load("lab")
    assert loaded is not None
    assert not loaded.walled


@pytest.mark.parametrize("text", ["", "[]", '{"number": 0, "x": 1}'])
def test_a_damaged_record_of_the_mirror_is_one_line_that_names_the_file(kept: LabRecord, text: str):
    state.save(kept)
    (kept.directory / "mirror.json").write_text(text)
    with pytest.raises(FleetError, match=r"lab/mirror\.json: not a lab's state"):
        state.load("lab")


def test_the_mirror_has_an_address_and_a_cable_that_no_host_has():
    subnet = network.Subnet(IPv4Network("10.213.7.0/24"))
    hosts = range(1, network.MOST_HOSTS + 1)
    assert subnet.mirror not in {subnet.address(number) for number in hosts}
    assert subnet.mirror != subnet.gateway
    assert subnet.link(MIRROR) not in {subnet.link(number) for number in hosts}


def _lab(folder: Path) -> Lab:
    host, mirror = Host("lab-1", "10.213.7.11", True), Host("lab-mirror", "10.213.7.10", True)
    return Lab("lab", "debian:12", "10.213.7.0/24", (host,), folder, mirror_host=mirror)


def test_inventories_of_a_walled_lab_take_everything_from_its_mirror(tmp_path: Path):
    made = {"site": walled._site(["debian"]), "installer_sha256": "0" * 64}
    (tmp_path / "mirror-site.json").write_text(json.dumps(made))
    settings = Settings.model_validate(_lab(tmp_path).settings)
    site = settings.mirrors.sites[settings.mirrors.site]
    carried = ("apt", "pypi", "conda", "miniconda", "torch")
    assert all(site.carries(service) for service in carried)
    assert site.scheme == "https"
    assert settings.mirrors.apt_security
    assert settings.python_env.source == "index"
    assert settings.python_env.manager == "miniconda"
    assert settings.python_env.installer_sha256 == "0" * 64
    torch = site.services.torch
    assert torch is not None
    assert settings.python_env.torch_index == site.url(torch.url.replace("{cuda}", "cpu"))
    assert site.host in network.MIRROR_NAMES


def test_a_half_made_mirror_is_one_line_that_says_what_to_do(tmp_path: Path):
    with pytest.raises(FleetError, match=r"half-made: `fleet lab up --name lab` completes it"):
        _ = _lab(tmp_path).settings


def test_a_lab_that_is_not_walled_has_no_mirror_and_sets_nothing(tmp_path: Path):
    lab = Lab("lab", "debian:12", "10.213.7.0/24", (), tmp_path)
    assert lab.settings == {}
    with pytest.raises(UsageError, match="no mirror host: `fleet lab up --walled` has one"):
        _ = lab.mirror


def test_what_pip_is_told_by_its_environment_is_the_index(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    monkeypatch.setenv("PIP_CERT", "/etc/own.pem")
    assert walled.pip_index() == walled.PipIndex("https://index.example/simple", "/etc/own.pem")
    monkeypatch.setenv("PIP_PROXY", "http://proxy.example:3128")
    with pytest.raises(FleetError, match="needs a direct way to an index"):
        walled.pip_index()


def test_a_machine_behind_a_proxy_is_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    with pytest.raises(FleetError, match=r"needs a direct way out, .*HTTPS_PROXY") as error:
        walled.require_direct_way()
    assert "\n" not in str(error.value)


def test_only_hosts_behind_the_wall_know_the_mirror_by_name_and_ask_nobody(tmp_path: Path):
    key = tmp_path / "key"
    key.touch()
    key.with_suffix(".pub").touch()
    subnet = network.Subnet(IPv4Network("10.213.7.0/24"))
    made = [Container("lab-1", tmp_path, subnet, 1, walled=walled) for walled in (True, False)]
    behind, free = (each._own_files(key, "") for each in made)
    assert f"{subnet.mirror} {' '.join(network.MIRROR_NAMES)}\n" in behind["etc/hosts"][0]
    assert behind["etc/resolv.conf"][0].startswith(f"nameserver {subnet.gateway}\n")
    assert str(subnet.mirror) not in free["etc/hosts"][0]
    assert str(subnet.gateway) not in free["etc/resolv.conf"][0]
