"""Labs on this machine: what their hosts are, what they survive, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fleets
import pytest

from gpufleet import ROOT, lab
from gpufleet.apt_sources import Entry
from gpufleet.errors import FleetError
from gpufleet.lab import image, machine, sources, state

NAME = f"t{os.getpid()}"
SIDE = f"{NAME}-side"
FLEET = [sys.executable, "-m", "gpufleet.cli", "lab"]


pytestmark = pytest.mark.lab

#: systemd-nspawn's own, of each folder that a container runs on.
NSPAWN_LOCKS = Path("/run/systemd/nspawn/locks")


@pytest.fixture(scope="session")
def base_image() -> None:
    """The image that the tests boot; skips, with the lab's own reason, where there can be none."""
    fleets.require_image("debian:12")


def fleet(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FLEET, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **options,  # type: ignore[call-overload]
    )


def traces() -> set[str]:
    """All on this machine that a lab could leave, save what belongs to the labs of others."""
    found = {f"mount {line.split(' ', 2)[2]}" for line in lines("/proc/self/mountinfo")}
    found |= {f"link {path.name}" for path in Path("/sys/class/net").iterdir()}
    found |= {f"forward {line}" for line in lines("/proc/sys/net/ipv4/ip_forward")}
    watchers = lines("/proc/sys/fs/inotify/max_user_instances")
    found |= {f"inotify instances {line}" for line in watchers}
    found |= set(rules())
    found |= {f"loop {line}" for line in machine.run("losetup", "--all").splitlines()}
    places = [Path("/run/netns"), state.STATE, *Path("/run/systemd/nspawn").glob("*")]
    places.append(machine.cgroup_root())
    found |= {f"file {path}" for place in places if place.exists() for path in place.iterdir()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().replace("\0", " ")
            groups = (process / "cgroup").read_text()
        except OSError:
            continue
        if not command:
            continue  # ended, and about to be reaped
        if "gpufleet" in groups or "nspawn" in command or "mmdebstrap" in command:
            found.add(f"process {process.name} {command} {groups}")
    return {trace for trace in found if not any(mine in trace for mine in others())}


def rules() -> Iterator[str]:
    """The firewall's lines, each with the table that it belongs to, whose name may be a lab's."""
    table = ""
    for line in machine.run("nft", "--stateless", "list", "ruleset").splitlines():
        table = line if line.startswith("table") else table
        yield f"nft {table} {line}"


def lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def others() -> list[str]:
    """Words that mark what belongs to labs that were here before these tests, or came since."""
    theirs = [each for each in lab.labs() if not each.name.startswith(NAME)]
    words = [each.name for each in theirs]
    words += [state.LabRecord(each.name, "", "", each.subnet).subnet.bridge for each in theirs]
    # Forwarding stays on, and inodes locked, for as long as anyone has a lab.
    return [*words, "forward", "/locks/", "machine.json", "inode-"] if theirs else words


@pytest.fixture(autouse=True)
def nothing_stays_behind(base_image: None) -> Iterator[None]:
    """Every test takes its labs down, and this machine is then as it was before."""
    before = traces()
    yield
    for name in (NAME, SIDE):
        lab.down(name)
    assert traces() - before == set()


def test_hosts_are_whole_servers_that_reach_each_other_and_the_outside() -> None:
    seen = lab.up(NAME, 2)
    one, two = seen.hosts
    for host in seen.hosts:
        assert seen.run(host, "systemctl is-system-running --wait").stdout == "running\n"
        assert seen.run(host, "hostname").stdout == f"{host.name}\n"
        assert seen.run(host, "cat /proc/1/comm").stdout == "systemd\n"
        assert "systemd" in (seen.root(host) / "sbin/init").readlink().name
        assert seen.run(host, "ls -x /sys/class/net").stdout.split() == ["eth0", "lo"]
        assert seen.run(host, "sysctl -w net.ipv4.tcp_syncookies=2").returncode == 0
    assert seen.run(one, f"ping -c 1 -W 5 {two.address}").returncode == 0
    update = seen.run(one, "apt-get update --error-on=any")
    assert update.returncode == 0, update.stderr
    ids = {(seen.root(host) / "etc/machine-id").read_text() for host in seen.hosts}
    assert len(ids) == 2


def test_packages_are_installed_at_once_and_downloaded_only_once() -> None:
    seen = lab.up(NAME, 1)
    install = seen.run(f"{NAME}-1", "apt-get install -y hello && hello")
    assert "Hello, world!" in install.stdout, install.stderr
    assert (seen.root(f"{NAME}-1") / "usr/bin/hello").is_file()
    lab.down(NAME)
    seen = lab.up(NAME, 1)
    to_fetch = seen.run(f"{NAME}-1", "apt-get install --print-uris -qq hello")
    assert (to_fetch.returncode, to_fetch.stdout) == (0, "")
    again = seen.run(f"{NAME}-1", "apt-get install -y --no-download hello && hello")
    assert "Hello, world!" in again.stdout, again.stderr


def test_a_host_trusts_what_this_machine_trusts_besides() -> None:
    seen = lab.up(NAME, 1)
    added = image.trust.added_certificates()
    bundle = seen.run(f"{NAME}-1", "cat /etc/ssl/certs/ca-certificates.crt").stdout
    trusted = image.trust.certificates(bundle)
    assert set(image.trust.certificates("".join(added.values()))) <= set(trusted)
    assert len(trusted) > 100  # the distribution's own


def test_nothing_is_trusted_on_first_use_and_a_wrong_key_is_refused() -> None:
    seen = lab.up(NAME, 1)
    known = seen.known_hosts.read_text()
    offered = machine.run("ssh-keyscan", "-t", "ed25519", seen.hosts[0].address).split()
    assert known.split()[1:] == offered[1:3]
    wrong = (state.STATE / NAME / "key.pub").read_text().split()[1]
    seen.known_hosts.write_text(f"{seen.hosts[0].address} ssh-ed25519 {wrong}\n")
    assert seen.run(f"{NAME}-1", "true").returncode == 255
    # `up` writes it anew from the keys it made.
    lab.up(NAME, 1)
    assert seen.known_hosts.read_text() == known


def test_a_fresh_machine_gets_what_it_lacks_and_is_told_what_it_cannot_do() -> None:
    # A lab host is a fresh machine, but for its filesystem: an overlay cannot carry another.
    fresh, host = lab.up(NAME, 1), f"{NAME}-1"
    checkout = fresh.root(host) / "opt/checkout"
    shutil.copytree(ROOT / "gpufleet", checkout / "gpufleet")
    script = (
        "from pathlib import Path; from gpufleet.errors import FleetError\n"
        "from gpufleet.lab import machine, sources, state\n"
        "from gpufleet.lab.container import Container\n"
        "image = sources.release('debian:12')\n"
        "print(*machine.ensure_packages(image)); print(*machine.ensure_packages(image))\n"
        "machine.require_kernel()\n"
        "subnet = state.LabRecord('lab', '', '', '10.213.0.0/24').subnet\n"
        "host = Container('lab-1', Path('/var/lib/gpufleet/lab/lab/hosts/lab-1'), subnet, 1)\n"
        "Path('/key').touch(); Path('/key.pub').touch()\n"
        "host.prepare(None, Path('/key'), '', {})\n"
        "try: host.start(Path('/opt'))\n"
        "except FleetError as error: print(error)\n"
    )
    (checkout / "fresh.py").write_text(script)
    done = fresh.run(host, "cd /opt/checkout && python3 fresh.py")
    assert done.returncode == 0, done.stderr
    installed, again, refused = done.stdout.splitlines()
    assert installed == "mmdebstrap nftables rsync systemd-container"
    assert again == ""
    assert refused.startswith("lab-1: the overlayfs filesystem under /var/lib/gpufleet/lab/lab/")
    assert fresh.run(host, "command -v mmdebstrap systemd-nspawn nft rsync").returncode == 0


def test_labs_stand_side_by_side_and_go_one_by_one() -> None:
    one, side = lab.up(NAME, 1), lab.up(SIDE, 1)
    assert one.subnet != side.subnet
    lab.down(NAME)
    assert side.run(f"{SIDE}-1", "getent hosts localhost && ip route get 192.0.2.1").returncode == 0
    assert SIDE in [each.name for each in lab.labs()]
    assert NAME not in [each.name for each in lab.labs()]
    with pytest.raises(FleetError, match=f"no lab '{NAME}' is up"):
        lab.load(NAME)


def test_up_again_adds_hosts_and_leaves_running_ones_alone() -> None:
    seen = lab.up(NAME, 1)
    boot = seen.run(f"{NAME}-1", "cat /proc/sys/kernel/random/boot_id; echo kept > /root/mark")
    grown = lab.up(NAME, 3)
    assert [host.name for host in grown.hosts] == [f"{NAME}-{number}" for number in (1, 2, 3)]
    same = grown.run(f"{NAME}-1", "cat /proc/sys/kernel/random/boot_id; cat /root/mark")
    assert same.stdout == boot.stdout + "kept\n"
    assert grown.run(f"{NAME}-3", "hostname").stdout == f"{NAME}-3\n"
    assert len(lab.up(NAME, 1).hosts) == 3


def test_a_host_reboots_and_keeps_its_files_and_address() -> None:
    seen = lab.up(NAME, 1)
    before = seen.run(f"{NAME}-1", "cat /proc/sys/kernel/random/boot_id; echo kept > /root/mark")
    seen.run(f"{NAME}-1", "systemctl reboot")
    wait_for(lambda: boot_of(seen, f"{NAME}-1") not in ("", before.stdout))
    assert seen.run(f"{NAME}-1", "cat /root/mark").stdout == "kept\n"


def boot_of(seen: lab.Lab, host: str) -> str:
    return seen.run(host, "cat /proc/sys/kernel/random/boot_id").stdout


@pytest.mark.parametrize("end", ["poweroff", "supervisor killed", "machine rebooted"])
def test_a_dead_host_comes_back_with_its_files(end: str) -> None:
    before = set(NSPAWN_LOCKS.glob("inode-*"))
    seen = lab.up(NAME, 2)
    seen.run(f"{NAME}-1", "echo kept > /root/mark")
    group = machine.cgroup_root() / f"gpufleet-{NAME}-1"
    if end == "poweroff":
        seen.run(f"{NAME}-1", "systemctl poweroff")
    elif end == "supervisor killed":
        for pid in (group / "boot-1/supervisor/cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    else:
        # What a reboot of this machine takes away: processes, mounts, namespaces, links, /run.
        for host in seen.hosts:
            (machine.cgroup_root() / f"gpufleet-{host.name}/cgroup.kill").write_text("1")
        wait_for(lambda: not any(host.running for host in lab.load(NAME).hosts))
        machine.unmount_below(seen.directory)
        for host in seen.hosts:
            machine.run("ip", "netns", "delete", f"gpufleet-{host.name}")
        bridge = state.LabRecord(NAME, "", "", seen.subnet).subnet.bridge
        machine.run("ip", "link", "delete", bridge)
        machine.run("nft", "delete", "table", "ip", f"gpufleet-{NAME}")
        for lock in set(NSPAWN_LOCKS.glob("inode-*")) - before:
            lock.unlink()  # named after the mount's number, which the next mount may not get
    wait_for(lambda: not lab.load(NAME).hosts[0].running)
    back = lab.up(NAME, 2)
    assert all(host.running for host in back.hosts)
    assert back.run(f"{NAME}-1", "cat /root/mark").stdout == "kept\n"
    assert back.run(f"{NAME}-2", f"ping -c 1 -W 5 {back.hosts[0].address}").returncode == 0


def test_a_host_that_is_killed_outright_leaves_no_lock() -> None:
    seen = lab.up(NAME, 2)
    roots = [seen.root(host).stat() for host in seen.hosts]
    locks = [NSPAWN_LOCKS / f"inode-{root.st_dev}:{root.st_ino}" for root in roots]
    assert all(lock.exists() for lock in locks)
    for host in seen.hosts:
        (machine.cgroup_root() / f"gpufleet-{host.name}/cgroup.kill").write_text("1")
    wait_for(lambda: not any(host.running for host in lab.load(NAME).hosts))
    lab.down(NAME)
    assert not any(lock.exists() for lock in locks)


def test_a_full_disk_is_the_hosts_own() -> None:
    lab.up(NAME, 1)
    seen = lab.up(NAME, 2, disk_mib=96)
    full, roomy = f"{NAME}-2", f"{NAME}-1"
    fill = seen.run(full, "head -c 200M /dev/zero > /fill")
    assert fill.returncode != 0
    assert "No space left on device" in fill.stderr
    assert "No space left on device" in seen.run(full, "head -c 5M /dev/zero > /m").stderr
    assert seen.run(full, "rm /fill && echo room > /more && cat /more").stdout == "room\n"
    assert seen.run(roomy, "head -c 200M /dev/zero > /fill").returncode == 0


def test_the_outside_is_reached_through_a_firewall_that_drops() -> None:
    seen = lab.up(NAME, 1)
    subnet = state.LabRecord(NAME, "", "", seen.subnet).subnet
    chain = ("ip", "filter", "FORWARD")
    had_one = machine.succeeds("nft", "list", "chain", *chain)
    if not had_one:
        machine.run("nft", "add", "table", "ip", "filter")
        machine.run("nft", "add chain ip filter FORWARD { type filter hook forward priority 0; }")
    # As Docker and ufw do, but for this lab alone, so that others' labs go on.
    machine.run("nft", "add", "rule", *chain, "iifname", subnet.bridge, "drop")
    update = "apt-get update --error-on=any"
    try:
        assert seen.run(f"{NAME}-1", f"timeout 4 {update}").returncode != 0
        seen = lab.up(NAME, 1)
        again = seen.run(f"{NAME}-1", update)
        assert again.returncode == 0, again.stderr
        lab.down(NAME)
        left = machine.run("nft", "list", "chain", *chain)
        assert [line.strip() for line in left.splitlines() if subnet.bridge in line] == [
            f'iifname "{subnet.bridge}" drop'
        ]
    finally:
        if not had_one:
            machine.run("nft", "delete", "table", "ip", "filter")


def exists(*parts: str) -> Callable[[], bool]:
    return lambda: Path(*parts).exists()


HOST = state.STATE / NAME / "hosts" / f"{NAME}-1"
GROUP = Path(
    "/sys/fs/cgroup/unified" if Path("/sys/fs/cgroup/unified").exists() else "/sys/fs/cgroup"
)
POINTS = {
    "the directory": exists(str(state.STATE), NAME),
    "the state": exists(str(state.STATE), NAME, "lab.json"),
    "the key": exists(str(state.STATE), NAME, "key.pub"),
    "the host's directory": exists(str(HOST)),
    "the host's files": exists(str(HOST), "disk/files/etc/hostname"),
    "the mount": lambda: bool(machine.mounts_below(HOST / "root")),
    "the namespace": exists(f"/run/netns/gpufleet-{NAME}-1"),
    "the control group": exists(str(GROUP), f"gpufleet-{NAME}-1"),
    "the boot": exists(str(GROUP), f"gpufleet-{NAME}-1/boot-1/payload"),
}


@pytest.mark.parametrize("then", ["down", "up"])
@pytest.mark.parametrize("point", POINTS)
def test_up_killed_at_any_point_is_cleaned_and_continued(point: str, then: str) -> None:
    with subprocess.Popen(
        [*FLEET, "up", "--name", NAME, "--hosts", "2"], cwd=ROOT, stderr=subprocess.DEVNULL
    ) as up:
        wait_for(POINTS[point], pause=0.001)
        up.kill()
    if then == "up":
        seen = lab.up(NAME, 2)
        assert seen.run(f"{NAME}-1", "hostname").stdout == f"{NAME}-1\n"
        assert seen.run(f"{NAME}-2", "hostname").stdout == f"{NAME}-2\n"
    # The fixture takes it down and looks for what stays.


@pytest.mark.parametrize("point", ["the state", "the mount", "the boot"])
def test_ctrl_c_ends_up_at_once_in_one_line(point: str) -> None:
    with subprocess.Popen(
        [*FLEET, "up", "--name", NAME, "--hosts", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0 if sys.version_info >= (3, 11) else None,
    ) as up:
        wait_for(POINTS[point], pause=0.001)
        started = time.monotonic()
        os.kill(up.pid, signal.SIGINT)
        _, said = up.communicate(timeout=30)
        took = time.monotonic() - started
    assert up.returncode == 130
    assert "Traceback" not in said
    assert took < 5


MIRROR = state.STATE / NAME / "hosts" / f"{NAME}-mirror" / "root"
WALLED_POINTS = {
    "the mirror's record": exists(str(state.STATE), NAME, "mirror.json"),
    "the wall": lambda: machine.succeeds("nft", "list", "table", "bridge", f"gpufleet-{NAME}"),
    "the mirror's package": exists(str(MIRROR), "var/lib/dpkg/info/nginx-common.list"),
    "the mirror's key": exists(str(MIRROR), "etc/nginx/mirror/tls"),
    "the mirror's site": exists(str(state.STATE), NAME, "mirror-site.json"),
}


@pytest.mark.parametrize("then", ["down", "up"])
@pytest.mark.parametrize("point", WALLED_POINTS)
def test_a_walled_up_killed_at_any_point_is_cleaned_and_continued(point: str, then: str) -> None:
    with subprocess.Popen(
        [*FLEET, "up", "--walled", "--name", NAME, "--hosts", "1"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as up:
        wait_for(WALLED_POINTS[point], seconds=60, pause=0.001)
        up.kill()
    if then == "up":
        # Whatever was written of it, `up` alone makes a walled lab of it, or is told to.
        seen = lab.up(NAME, 1, walled=True)
        assert behind_the_wall(seen)


def behind_the_wall(seen: lab.Lab) -> bool:
    """Whether the first host gets its mirror's pages, with trust, and nothing of anybody else."""
    page = "wget -q -T 5 -t 1 -O- https://mirror.gpufleet.test/pytorch/whl/cpu/"
    assert "torch" in seen.run(seen.hosts[0], page).stdout
    assert lab.strays(NAME) == {host.name: 0 for host in seen.hosts}
    away = seen.run(seen.hosts[0], "ping -c 1 -W 1 192.0.2.1")
    return away.returncode != 0 and lab.strays(NAME)[seen.hosts[0].name] > 0


def test_a_walled_lab_is_put_right_after_anything_of_it_died() -> None:
    seen = lab.up(NAME, 1, walled=True)
    assert seen.mirror_host is not None
    # One packet, since nobody has to look for the gateway's address again and again.
    away = f"ping -c 1 -W 1 {state.LabRecord(NAME, '', '', seen.subnet).subnet.gateway}"
    seen.run(seen.hosts[0], away)
    counted = lab.strays(NAME)
    assert counted[seen.hosts[0].name] > 0
    # The service, the host, and what a reboot of this machine takes from the network.
    seen.run(seen.mirror_host, "systemctl stop nginx; rm /etc/nginx/mirror/site.conf")
    grown = lab.up(NAME, 2)
    page = "wget -q -T 5 -t 1 -O- https://mirror.gpufleet.test/pytorch/whl/cpu/"
    assert all("torch" in grown.run(host, page).stdout for host in grown.hosts)
    # What was counted stays so, and a new host begins with nothing.
    assert lab.strays(NAME) == {**counted, f"{NAME}-2": 0}
    seen.run(seen.mirror_host, "systemctl poweroff")
    wait_for(lambda: not lab.load(NAME).mirror.host.running)
    machine.run("nft", "delete", "table", "bridge", f"gpufleet-{NAME}")
    back = lab.up(NAME, 2)
    assert all("torch" in back.run(host, page).stdout for host in back.hosts)
    assert lab.strays(NAME)[f"{NAME}-2"] == 0
    back.run(back.hosts[1], away)
    assert lab.strays(NAME)[f"{NAME}-2"] > 0


def test_the_command_lists_a_walled_lab_with_its_mirror() -> None:
    up = fleet("up", "--walled", "--name", NAME, "--hosts", "1", "--json")
    assert up.returncode == 0, up.stderr
    (made,) = json.loads(up.stdout)["labs"]
    assert made["walled"]
    assert made["mirror"]["name"] == f"{NAME}-mirror"
    assert [host["name"] for host in made["hosts"]] == [f"{NAME}-1"]
    rows = [row.split() for row in fleet("list").stdout.splitlines() if row.startswith(NAME)]
    assert [row[1:4] for row in rows] == [
        ["debian:12", "(walled)", f"{NAME}-1"],
        ["debian:12", "(walled)", f"{NAME}-mirror"],
    ]
    assert fleet("ssh", f"{NAME}-mirror", "hostname").stdout == f"{NAME}-mirror\n"


def test_a_lab_stays_walled_or_not() -> None:
    lab.up(NAME, 1)
    refused = fleet("up", "--walled", "--name", NAME)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"fleet: lab {NAME} is not walled: "
        f"`fleet lab down --name {NAME}` first, or give another --name\n"
    )


def test_a_killed_image_build_leaves_no_process_and_is_swept_by_the_next() -> None:
    # A small image of its own, so that nobody's is touched.
    kept = [path / "root" for path in image.CACHE.glob("images/debian-12-*")]
    small = replace(
        image.recipe(sources.release("debian:12")), packages=("ca-certificates",), revision=-1
    )
    build = (
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from gpufleet.lab import image, sources\n"
        "small = replace(image.recipe(sources.release('debian:12')), "
        "packages=('ca-certificates',), revision=-1)\n"
        f"image.ensure(small, [Path(p) for p in {list(map(str, kept))!r}])\n"
    )

    def unfinished() -> list[Path]:
        return list(image.CACHE.glob("images/.building-*/root/var"))

    with subprocess.Popen([sys.executable, "-c", build], cwd=ROOT) as first:
        wait_for(lambda: bool(unfinished()))
        first.kill()
    (left,) = unfinished()
    wait_for(lambda: not any(str(left.parent) in trace for trace in traces()))
    with subprocess.Popen([sys.executable, "-c", build], cwd=ROOT) as second:
        wait_for(lambda: not left.exists())
        second.send_signal(signal.SIGINT)
    assert not small.directory.exists()
    assert not unfinished()
    assert all(root.is_dir() for root in kept)


def test_an_archive_that_does_not_answer_is_one_line_and_leaves_no_image() -> None:
    nowhere = Entry(("deb",), ("http://127.0.0.1:9/debian",), ("bookworm",), ("main",))
    wanted = replace(image.recipe(sources.release("debian:12")), sources=(nowhere,))
    with pytest.raises(FleetError) as error:
        image.ensure(wanted)
    assert str(error.value).startswith("the archive of debian:12 does not answer from this mach")
    assert "127.0.0.1:9" in str(error.value)
    assert "\n" not in str(error.value)
    assert not wanted.directory.exists()


def test_the_command_lists_labs_for_people_and_programs() -> None:
    up = fleet("up", "--name", NAME, "--hosts", "1", "--json")
    assert up.returncode == 0, up.stderr
    (made,) = json.loads(up.stdout)["labs"]
    assert up.stderr == ""
    listed = json.loads(fleet("list", "--json").stdout)
    assert listed["version"] == 1
    assert made in listed["labs"]
    (host,) = made["hosts"]
    assert host == {"name": f"{NAME}-1", "address": host["address"], "running": True}
    rows = fleet("list").stdout.splitlines()
    assert f"{NAME}  debian:12  {NAME}-1  {host['address']}  running".split() in [
        row.split() for row in rows
    ]
    there = fleet("ssh", f"{NAME}-1", "cat", "/etc/hostname", ";", "exit", "7")
    assert (there.returncode, there.stdout) == (7, f"{NAME}-1\n")
    assert fleet("down", "--name", NAME).stdout == f"lab {NAME} is down\n"
    assert fleet("down", "--name", NAME).stdout == f"no lab {NAME} was up\n"


def test_the_inventory_reaches_the_labs_hosts_with_pyinfra() -> None:
    lab.up(NAME, 2)
    pyinfra = Path(sys.executable).with_name("pyinfra")
    call = [str(pyinfra), "-y", "inventory/lab.py", "exec", "--", "cat", "/etc/hostname"]

    def run_on(name: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "GPUFLEET_LAB": name}
        return subprocess.run(
            call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    done = run_on(NAME)
    assert done.returncode == 0, done.stderr
    for host in (f"{NAME}-1", f"{NAME}-2"):
        assert f"[{host}] {host}" in done.stdout + done.stderr
    missing = run_on(SIDE)
    assert missing.returncode != 0
    assert "Traceback" not in missing.stdout + missing.stderr
    assert f"no lab '{SIDE}' is up on this machine: `fleet lab up` starts one" in (
        missing.stdout + missing.stderr
    ).replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["up", "--hosts", "0"], "a lab has 1 to 240 hosts, not 0"),
        (["up", "--image", "debian:1"], "unknown image 'debian:1': choose one of debian:12"),
        (["up", "--name", "No"], "'No' cannot name a lab"),
        (["up", "--disk-mib", "1"], "a host's disk has at least 64 MiB, not 1"),
        (["up", "--walled", "--vm"], "virtual machines cannot be walled: leave --vm or --wa"),
        (["down", "--name", "../x"], "'../x' cannot name a lab"),
    ],
)
def test_invalid_input_is_one_line_and_changes_nothing(
    arguments: list[str], complaint: str
) -> None:
    name = [] if "--name" in arguments else ["--name", NAME]
    before = traces()
    refused = fleet(*arguments, *name)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"fleet: {complaint}")
    assert refused.stderr.count("\n") == 1
    assert traces() - before == set()


def test_a_running_lab_keeps_its_image() -> None:
    lab.up(NAME, 1)
    refused = fleet("up", "--name", NAME, "--image", "debian:13")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"fleet: lab {NAME} runs debian:12, not debian:13: "
        f"`fleet lab down --name {NAME}` first, or give another --name\n"
    )


def test_without_root_the_lab_says_so_in_one_line() -> None:
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "from gpufleet import lab\n"
        "from gpufleet.errors import FleetError\n"
        "for call in (lab.up, lab.down):\n"
        "    try:\n"
        f"        call({NAME!r})\n"
        "    except FleetError as error:\n"
        "        print(error)\n"
    )
    # Imported before the rights are dropped: the checkout may be root's alone.
    early = "import gpufleet.lab, gpufleet.errors\n"
    done = subprocess.run(
        [sys.executable, "-c", early + script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line = "the lab makes containers and needs root: run the command with sudo\n"
    assert done.stdout == 2 * line


def wait_for(condition: Callable[[], bool], seconds: float = 30, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(pause)
