"""The service as systemd, the kernel and a stranger on the network see it."""

from __future__ import annotations

import json
import re

import fleets
import pytest
from fleets import HOME, UNIT, Fleet, Host
from modeldemo.pico import pictures

USER = "minigpt4"


def test_it_is_active_and_starts_at_boot(deployed: Fleet) -> None:
    for host in deployed.hosts:
        assert host.show("ActiveState") == "active"
        assert host.show("UnitFileState") == "enabled"
        assert host.show("NRestarts") == "0"


def test_it_runs_as_a_user_of_its_own_that_nobody_can_log_in_as(one: Host) -> None:
    uid = int(one.sh(f"ps -o uid= -p {one.pid}"))
    assert 0 < uid < 1000  # a system account: login.defs' UID_MIN is 1000
    assert uid == int(one.sh(f"id -u {USER}"))
    assert one.sh(f"getent passwd {USER}").endswith(":/usr/sbin/nologin")
    assert one.sh(f"getent shadow {USER}").split(":")[1][0] in "!*"
    groups = one.sh(f"grep ^Groups: /proc/{one.pid}/status").split()[1:]
    assert set(groups) <= {one.sh(f"id -g {USER}")}


def test_it_listens_on_the_loopback_and_nowhere_else(deployed: Fleet) -> None:
    for host in deployed.hosts:
        sockets = host.sh("ss -Hltnp").splitlines()
        own = [line.split()[3] for line in sockets if f"pid={host.pid}," in line]
        assert own == ["127.0.0.1:7860"]
        assert not fleets.listens(7860, host.address)
        assert fleets.listens(22, host.address)


def test_its_exposure_is_3_or_better(one: Host) -> None:
    said = one.sh(f"systemd-analyze security --no-pager {UNIT}")
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert level is not None, said
    assert float(level[1]) <= 3.0


def test_it_can_change_nothing_that_it_runs(deployed: Fleet) -> None:
    for host in deployed.hosts:
        foreign = f"find {HOME} ! -user root -o ! -group root"
        assert host.sh(foreign) == ""
        writable = f"find {HOME} ! -type l -perm /022"
        assert host.sh(writable) == ""
        assert host.sh(f"cd / && runuser -u {USER} -- find {HOME} ! -type l -writable") == ""


def test_it_sees_the_filesystem_read_only(one: Host) -> None:
    # In the service's own mount namespace, as root: not even that may write there.
    for place in (HOME, "/etc", "/usr"):
        mount = one.sh(f"nsenter -t {one.pid} -m findmnt -no OPTIONS -T {place}")
        assert "ro" in mount.split(","), f"{place}: {mount}"


def test_it_has_no_capability_and_cannot_gain_any(one: Host) -> None:
    status = dict(
        line.split(":\t", 1) for line in one.sh(f"cat /proc/{one.pid}/status").splitlines()
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"  # a filter is loaded (proc(5))


def test_systemd_denies_it_every_address_but_the_loopback(one: Host) -> None:
    assert set(one.show("IPAddressDeny").split()) == {"::/0", "0.0.0.0/0"}
    assert set(one.show("IPAddressAllow").split()) == {"127.0.0.0/8", "::1/128"}


def test_it_cannot_reach_the_outside(deployed: Fleet, one: Host) -> None:
    if not one.show("IPIngressBytes").isdigit() and "IPAddressDeny" in one.sh(
        "systemd-run -q --wait --pipe -p IPAddressDeny=any "
        f"curl -s -m 5 telnet://{deployed.gateway}:22 >/dev/null; echo IPAddressDeny"
    ):
        pytest.skip("this kernel gives containers no cgroup BPF, which IPAddressDeny works by")
    greeting = f"curl -s -m 5 sftp://{deployed.gateway}:22"
    group = f"/sys/fs/cgroup/system.slice/{UNIT}/cgroup.procs"
    inside = one.try_(f"sh -c 'echo $$ > {group} && exec {greeting}'")
    assert inside.returncode == 7  # curl(1): failed to connect
    assert one.try_(greeting).returncode != 7


def test_it_answers_programs(one: Host) -> None:
    with one.tunnel() as url:
        health = fleets.get(f"{url}/healthz")
        assert (health.status_code, health.json()["status"]) == (200, "ok")
        models = fleets.get(f"{url}/v1/models")
        assert [model["id"] for model in models.json()["data"]] == ["pico"]
        assert "# TYPE" in fleets.get(f"{url}/metrics").text


def test_it_stays_under_1_5_gib_while_it_answers(one: Host) -> None:
    with one.tunnel() as url:
        for example in pictures.held_out_examples(seed=11, count=8):
            fleets.ask(url, example)
        fleets.get(url)
    status = one.sh(f"cat /proc/{one.pid}/status")
    kib = sum(int(n) for n in re.findall(r"^(?:VmRSS|VmSwap):\s+(\d+) kB", status, re.M))
    assert 50 * 1024 < kib < 1.5 * 2**20


def test_it_says_which_revision_it_is(one: Host) -> None:
    health = json.loads(one.sh("curl -s http://127.0.0.1:7860/healthz"))
    unit = one.path(f"/etc/systemd/system/{UNIT}").read_text()
    revision = re.search(r"^Environment=MODELDEMO_REVISION=(\w{16})$", unit, re.M)
    assert revision is not None
    assert health["revision"] == revision[1]


def test_it_comes_back_after_a_crash_and_after_a_reboot(deployed: Fleet) -> None:
    crashed, rebooted = deployed.hosts
    killed, booted = crashed.pid, _init(rebooted)
    crashed.sh(f"kill -9 {killed}")
    rebooted.try_("systemctl reboot")
    fleets.until(lambda: _init(rebooted) not in ("", booted), "a new boot", 60)
    for host in (crashed, rebooted):
        fleets.until(host.healthy, f"{host.name} answers again", 180, every=0.5)
        assert host.show("ActiveState") == "active"
    assert crashed.pid not in (0, killed)
    example = pictures.held_out_examples(seed=3, count=1)[0]
    for host in (crashed, rebooted):
        with host.tunnel() as url:
            assert pictures.is_right(fleets.ask(url, example), example.answer)


def _init(host: Host) -> str:
    """When the host's init started (proc(5): field 22 of stat), empty while it is down."""
    return host.try_("awk '{print $22}' /proc/1/stat", timeout=15).stdout.strip()
