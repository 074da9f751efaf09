"""The lab's decisions: networks, names, state, trust, locks."""

import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from gpufleet.errors import FleetError, UsageError
from gpufleet.lab import network, state, trust
from gpufleet.lab.locks import locked
from gpufleet.lab.network import free_subnet
from gpufleet.lab.state import HostRecord, LabRecord

PEM = """-----BEGIN CERTIFICATE-----
{}
-----END CERTIFICATE-----
"""


def networks(*names: str) -> list[IPv4Network]:
    return [IPv4Network(name) for name in names]


def test_a_lab_gets_the_first_free_network() -> None:
    taken = networks("0.0.0.0/0", "192.0.2.0/24", "10.213.0.0/24", "10.213.1.128/25")
    assert free_subnet(taken).network == IPv4Network("10.213.2.0/24")


def test_a_vpn_over_all_of_ten_leads_to_another_range() -> None:
    assert free_subnet(networks("10.0.0.0/8")).network == IPv4Network("172.29.0.0/24")


def test_a_single_address_in_use_is_avoided() -> None:
    assert free_subnet(networks("10.213.0.53/32")).network == IPv4Network("10.213.1.0/24")


def test_no_free_network_is_one_line() -> None:
    everything = networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
    with pytest.raises(FleetError, match=r"no private /24 is free .* take down a lab or a route"):
        free_subnet(everything)


def test_names_of_links_fit_the_kernel_and_are_unique() -> None:
    links = set()
    for network_name in ("10.213.255.0/24", "172.29.255.0/24", "192.168.255.0/24"):
        subnet = network.Subnet(IPv4Network(network_name))
        links |= {subnet.bridge, *map(subnet.link, range(1, network.MOST_HOSTS + 1))}
        assert subnet.address(network.MOST_HOSTS) in subnet.network
    assert len(links) == 3 * (network.MOST_HOSTS + 1)
    assert max(map(len, links)) <= 15


@pytest.mark.parametrize("name", ["lab", "a", "a-1", "operations-2", "x" * 32])
def test_a_lab_is_kept_under_its_name(name: str) -> None:
    assert state.lab_directory(name) == state.STATE / name


@pytest.mark.parametrize(
    "name", ["", "../lab", "Lab", "1lab", "lab-", "lab_1", "x" * 33, "-x", "a b"]
)
def test_what_cannot_name_a_lab_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a lab"):
        state.lab_directory(name)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabRecord:
    monkeypatch.setattr(state, "STATE", tmp_path)
    lab = LabRecord("lab", "debian:12", "/images/x/root", "10.213.0.0/24")
    lab = lab.with_host(HostRecord(2, 128)).with_host(HostRecord(1))
    lab.directory.mkdir()
    state.save(lab)
    return lab


def test_a_lab_is_loaded_as_it_was_saved(kept: LabRecord) -> None:
    assert state.load("lab") == kept
    assert [kept.host_name(host) for host in kept.hosts] == ["lab-1", "lab-2"]
    assert state.load("other") is None
    assert state.names() == ["lab"]


def test_a_host_takes_the_place_of_the_one_with_its_number(kept: LabRecord) -> None:
    assert kept.with_host(HostRecord(1, prepared=True)).hosts == (
        HostRecord(1, prepared=True),
        HostRecord(2, 128),
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 1, "hosts": 3}'])
def test_a_damaged_state_is_one_line_that_names_the_file(kept: LabRecord, text: str) -> None:
    (kept.directory / "lab.json").write_text(text)
    with pytest.raises(FleetError, match=r"lab/lab\.json: not a lab's state") as error:
        state.load("lab")
    assert "\n" not in str(error.value)


def test_a_state_of_a_newer_gpufleet_is_left_alone(kept: LabRecord) -> None:
    (kept.directory / "lab.json").write_text('{"version": 2}')
    with pytest.raises(FleetError, match="with the gpufleet that made it"):
        state.load("lab")


def test_hosts_get_the_operators_way_to_the_archive_and_no_more() -> None:
    dump = (
        'APT::Architecture "amd64";\n'
        'Acquire::http::Proxy "http://127.0.0.1:3142";\n'
        'Acquire::http::Proxy::local.example "DIRECT";\n'
        'Acquire::Check-Valid-Until "false";\n'
        'Acquire::https::Verify-Peer "false";\n'
        'Acquire::GzipIndexes "true";\n'
    )
    assert trust.apt_options(dump, {"https_proxy": "http://proxy.example:8080"}) == [
        'Acquire::http::Proxy "http://127.0.0.1:3142";',
        'Acquire::http::Proxy::local.example "DIRECT";',
        'Acquire::Check-Valid-Until "false";',
        'Acquire::https::Proxy "http://proxy.example:8080";',
    ]


def test_proxy_variables_come_in_both_spellings() -> None:
    assert trust.proxy_variables({"HTTPS_PROXY": "http://p.example:1", "PATH": "/bin"}) == {
        "https_proxy": "http://p.example:1",
        "HTTPS_PROXY": "http://p.example:1",
    }


@pytest.mark.parametrize("loopback", ["127.0.0.1", "127.0.1.1", "localhost", "[::1]"])
def test_a_proxy_on_the_operators_loopback_is_reached_over_the_bridge(loopback: str) -> None:
    text = f'Acquire::http::Proxy "http://{loopback}:3142/";'
    gateway = IPv4Address("10.213.0.1")
    assert trust.seen_from_host(text, gateway) == text.replace(loopback, "10.213.0.1")
    elsewhere = 'Acquire::http::Proxy "http://localhost.example:3142";'
    assert trust.seen_from_host(elsewhere, gateway) == elsewhere


def test_certificates_are_told_apart_by_content_not_by_layout() -> None:
    one, two = PEM.format("AAAA\nBBBB"), PEM.format("AAAABBBB")
    assert len(trust.certificates(one + "# a comment\n" + two)) == 1
    assert len(trust.certificates(one + PEM.format("CCCC"))) == 2
    assert trust.certificates("no certificate at all") == {}


def test_a_bundle_named_in_the_environment_is_trusted_by_hosts(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.crt"
    bundle.write_text(PEM.format("R1BVRkxFRVQ="))
    added = trust.added_certificates({"SSL_CERT_FILE": str(bundle)})
    assert PEM.format("R1BVRkxFRVQ=") in added.values()
    assert all(name.startswith("operator-") and name.endswith(".crt") for name in added)


def test_one_command_holds_a_lab_at_a_time(tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    told: list[str] = []
    holder = (
        "import sys, pathlib\n"
        "from gpufleet.lab.locks import locked\n"
        f"with locked(pathlib.Path({str(lab)!r})):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
        f"    pathlib.Path({str(lab)!r}).rmdir()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"

        def progress(step: str, _fraction: float | None) -> None:
            told.append(step)
            other.stdin.close()

        with locked(lab, progress):
            # The other removed the directory while we waited: what we hold is the new one.
            assert lab.is_dir()
            assert other.wait() == 0
    assert told == [f"waiting for another command that holds {lab}"]
