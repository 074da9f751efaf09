"""status, logs and tunnel on a real fleet."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import fleets
from fleets import UNIT, Fleet, Host, Running, fleet, inventory, ok, words


def test_status_says_of_every_host_what_runs_there(deployed: Fleet) -> None:
    done = ok(fleet("status", "-i", "inventory/lab.py", "--json", GPUFLEET_LAB=deployed.name))
    document = done.document
    assert (document["version"], document["exit_code"]) == (1, 0)
    assert [host["name"] for host in document["hosts"]] == [h.name for h in deployed.hosts]
    for said, host in zip(document["hosts"], deployed.hosts, strict=True):
        health = json.loads(host.sh("curl -s http://127.0.0.1:7860/healthz"))
        assert said["healthy"] is True
        assert (said["active"], said["enabled"]) == ("active", True)
        assert said["model"] == "pico"
        assert said["revision_running"] == said["revision_on_disk"] == health["revision"]
        memory = host.show("MemoryCurrent")
        if memory.isdigit():  # not where this machine lends its labs no memory controller
            assert abs(said["memory_bytes"] - int(memory)) < 64 * 2**20


def test_status_fails_on_a_stopped_demo_and_on_an_unreachable_host(
    deployed: Fleet, one: Host, two: Host, tmp_path: Path
) -> None:
    nobody = deployed.gateway.rpartition(".")[0] + ".250"
    hosts = {h.name: h.data() for h in (one, two)}
    hosts["gone"] = {**one.data(), "ssh_hostname": nobody}
    path = inventory(tmp_path, hosts)
    two.sh(f"systemctl stop {UNIT}")
    try:
        done = fleet("status", "-i", path, "--json")
        said = {host["name"]: host for host in done.document["hosts"]}
        table = fleet("status", "-i", path)
    finally:
        two.sh(f"systemctl start {UNIT}")
    assert done.code == 1
    assert [said[name]["healthy"] for name in (one.name, two.name, "gone")] == [True, False, False]
    assert said[two.name]["active"] == "inactive"
    words(said["gone"]["error"], "cannot connect as", nobody)
    assert table.code == 1
    rows = {line.split()[0]: line for line in table.out.splitlines()}
    words(rows[one.name], " ok ", "active", "pico")
    words(rows[two.name], "inactive")
    words(rows["gone"], "unreachable")
    words(table.complaint, "gone: cannot connect as", nobody, "check the address")


def test_status_sees_that_the_process_is_not_the_revision_on_disk(
    deployed: Fleet, one: Host
) -> None:
    unit = one.path(f"/etc/systemd/system/{UNIT}")
    text = unit.read_text()
    revision = text.split("MODELDEMO_REVISION=")[1][:16]
    unit.write_text(text.replace(revision, "0" * 16))
    try:
        done = fleet("status", "-i", "inventory/lab.py", "--json", GPUFLEET_LAB=deployed.name)
    finally:
        # The file is not what the process was started from any more: apply puts both right.
        mended = deployed.apply("--limit", one.name)
    said = done.document["hosts"][0]
    assert done.code == 1
    assert (said["revision_running"], said["revision_on_disk"]) == (revision, "0" * 16)
    assert said["healthy"] is False
    assert list(ok(mended).changed(one.name)) == ["demo"]
    assert unit.read_text() == text
    assert one.healthy()


def test_logs_show_what_the_demo_wrote(one: Host) -> None:
    own = one.sh(f"journalctl -u {UNIT} -n 5 --no-pager -o cat").splitlines()
    done = ok(fleet("logs", one.name, "-n", "5"))
    assert own
    for line in own:
        assert line in done.out
    assert any("pico answers after" in line for line in ok(fleet("logs", one.name)).out.split("\n"))


def test_logs_of_a_host_that_there_is_not_say_so(deployed: Fleet) -> None:
    done = fleet("logs", "nowhere-1")
    assert done.code == 2
    words(done.complaint, "nowhere-1", "-i")


def test_the_tunnel_brings_the_demo_here_until_ctrl_c(one: Host, tmp_path: Path) -> None:
    port = fleets.free_port()
    tunnel = Running(tmp_path, "tunnel", one.name, "--local", str(port))
    try:
        fleets.until(lambda: fleets.listens(port), "the tunnel listens", 30)
        words(tunnel.said()[0], f"http://127.0.0.1:{port}", one.name, "Ctrl-C")
        assert fleets.get(f"http://127.0.0.1:{port}/healthz").json()["status"] == "ok"
        # On this machine only, and there for one: a second tunnel to the same port says so.
        assert not fleets.listens(port, _outside(one))
        second = fleet("tunnel", one.name, "--local", str(port))
        assert second.code == 2
        words(second.complaint, f"port {port}", "in use", "--local")
        tunnel.interrupt()
        assert tunnel.process.wait(10) in (0, 130, 255, -signal.SIGINT)
    finally:
        tunnel.kill()
    assert not fleets.listens(port)


def _outside(host: Host) -> str:
    """This machine's address in the lab: where others would look for the tunnel."""
    return host.address.rpartition(".")[0] + ".1"


def test_a_tunnel_to_a_host_that_does_not_answer_ends_with_a_line(
    deployed: Fleet, one: Host, tmp_path: Path
) -> None:
    nobody = deployed.gateway.rpartition(".")[0] + ".250"
    path = inventory(tmp_path, {"gone": {**one.data(), "ssh_hostname": nobody}})
    done = fleet("tunnel", "gone", "--local", str(fleets.free_port()), "-i", path, timeout=90)
    assert done.code != 0
    assert "Traceback" not in done.err
    assert nobody in done.complaint
