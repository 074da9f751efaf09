"""Weights reach hosts through whatever happens on the way: nothing half-made is ever in use, and
nothing is sent that a host has already."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleets
import pytest
import yaml
from fleets import HOME, ROOT, UNIT, Boot, Done, Fleet, Host, Running, fleet, ok, words

#: Slow enough to be met on the way: pico's 4 MB take five seconds.
SLOW = ("--bandwidth", "800")


@pytest.fixture(scope="module")
def lab(can_boot: None) -> Iterator[Fleet]:
    """Two hosts that nothing was ever deployed to."""
    name = f"t-{os.getpid()}-push"
    try:
        yield fleets.boot(name, 2)
    finally:
        fleets.take_down(name)


@pytest.fixture
def bare(lab: Fleet) -> Host:
    """A host without any weights."""
    host = lab.hosts[1]
    host.sh(f"rm -rf {HOME}")
    return host


@pytest.fixture
def path(bare: Host, tmp_path: Path) -> Path:
    """An inventory of that host alone."""
    return fleets.inventory(tmp_path, {bare.name: bare.data()})


def pushed(done: Done, host: Host) -> dict[str, Any]:
    """What `--json` says of a host's weights."""
    assert done.code == 0, done.out + done.err
    (found,) = (one for one in done.document["hosts"] if one["name"] == host.name)
    return dict(found["weights"])


def arrived(host: Host) -> int:
    """Bytes that lie in the host's staging folders."""
    staged = host.path(f"{HOME}/incoming").glob("weights-*/**/*")
    return sum(path.stat().st_size for path in staged if path.is_file())


def travelling(push: Running, host: Host, least: int = 300_000) -> None:
    """Wait until some of the files have arrived."""
    fleets.until(lambda: arrived(host) > least or push.ended, "bytes arrive", 120, 0.02)
    assert not push.ended, push.said()


def versions(host: Host) -> list[Path]:
    return sorted(host.path(f"{HOME}/weights").glob("pico-*"))


def whole(host: Host) -> None:
    """Fail unless the one version on the host is the catalogue's files, byte for byte."""
    here = fleets.weights(host)
    source = ROOT / "files" / "weights" / "pico"
    files = [path for path in here.rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        assert file.read_bytes() == (source / file.relative_to(here)).read_bytes()


def sessions(host: Host) -> int:
    """How many commands sshd has started so far, this one among them."""
    return int(host.sh("journalctl -t sshd -o cat | grep -c '^Starting session: command'"))


def test_a_push_needs_nothing_deployed_and_the_next_one_a_single_command(
    lab: Fleet, bare: Host, tmp_path: Path
) -> None:
    one, two = lab.hosts
    path = lab.inventory(tmp_path, {"accelerator": "cuda"})
    first = fleet("weights", "push", "-i", path, "--via", "rsync", "--json")
    for host in lab.hosts:
        seen = pushed(first, host)
        assert (seen["via"], seen["bytes_there"]) == ("rsync", 0)
        assert seen["bytes_sent"] > 4_000_000
        whole(host)
        assert host.sh(f"ls {HOME}") == "incoming\nweights"
        assert host.try_("id minigpt4").returncode != 0
    # A content that is known under any name is not sent again.
    (two.path(f"{HOME}/weights") / fleets.weights(two).name).rename(two.path("/root/gone"))
    one.path("/etc/ssh/sshd_config.d/00-count.conf").write_text("LogLevel VERBOSE\n")
    one.reload_sshd()
    path = lab.inventory(tmp_path)
    counts = []
    for only in ("preflight", "weights"):
        before = sessions(one)
        done = ok(fleet("apply", "-i", path, "--limit", one.name, "--only", only, "--json"))
        assert done.changed(one.name) == {}
        counts.append(sessions(one) - before - 1)
    assert counts[1] - counts[0] == 1
    again = fleet("weights", "push", "-i", path)
    assert again.code == 0
    for host in lab.hosts:
        words(again.out, f"{host.name} weights:", "were there")
    assert "sent" not in again.out
    whole(two)


@pytest.mark.long
def test_hosts_exchange_pieces_among_themselves(lab: Fleet, tmp_path: Path) -> None:
    for host in lab.hosts:
        host.sh(f"rm -rf {HOME}")
    done = fleet("weights", "push", "-i", lab.inventory(tmp_path), "--via", "swarm", "--json")
    for host in lab.hosts:
        seen = pushed(done, host)
        assert (seen["via"], seen["bytes_there"]) == ("swarm", 0)
        whole(host)
        assert host.sh("systemctl list-units --all --no-legend 'gpufleet*'") == ""


@pytest.mark.long
@pytest.mark.parametrize("via", ["rsync", "swarm"])
def test_an_account_that_may_sudo_brings_them_as_root_does(
    lab: Fleet, tmp_path: Path, via: str
) -> None:
    for host in lab.hosts:
        host.sh(
            f"rm -rf {HOME}; id ops || {{ useradd -m -s /bin/sh ops && install -d -m 700 -o ops "
            "~ops/.ssh && install -m 600 -o ops ~root/.ssh/authorized_keys ~ops/.ssh/; }"
        )
        host.path("/etc/sudoers.d/ops").write_text("ops ALL=(ALL) NOPASSWD: ALL\n")
    path = lab.inventory(tmp_path, {"ssh_user": "ops", "_sudo": True})
    done = fleet("weights", "push", "-i", path, "--via", via, "--json")
    for host in lab.hosts:
        assert pushed(done, host)["via"] == via
        whole(host)
        assert host.sh(f"find {HOME} -not -user root") == ""


def test_a_cut_connection_is_made_again_and_nothing_is_sent_twice(
    bare: Host, path: Path, tmp_path: Path
) -> None:
    push = Running(tmp_path, "weights", "push", "-i", path, *SLOW, "--via", "rsync", "--json")
    travelling(push, bare)
    # Every session that is logged in, ours too: the listener stays.
    bare.try_("kill -9 $(ps -eo pid,args | awk '/sshd(-session)?: root@notty/ {print $1}')")
    done = push.wait(120)
    assert pushed(done, bare)["bytes_there"] == 0
    whole(bare)


@pytest.mark.long
def test_a_host_that_reboots_on_the_way_gets_the_rest(
    bare: Host, path: Path, tmp_path: Path
) -> None:
    push = Running(tmp_path, "weights", "push", "-i", path, *SLOW, "--via", "rsync", "--json")
    travelling(push, bare)
    bare.try_("systemctl reboot --force --force")
    pushed(push.wait(180), bare)
    whole(bare)


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(70, marks=pytest.mark.long)], ids=["a_moment", "a_minute"]
)
def test_a_laptop_that_was_closed_meanwhile_goes_on(
    bare: Host, path: Path, tmp_path: Path, seconds: float
) -> None:
    push = Running(tmp_path, "weights", "push", "-i", path, *SLOW, "--via", "rsync", "--json")
    travelling(push, bare)
    held = push.stop()
    time.sleep(seconds)
    push.go_on(held)
    pushed(push.wait(180), bare)
    whole(bare)


@pytest.mark.long
def test_a_file_that_changes_on_the_laptop_meanwhile_is_noticed_and_nothing_lands(
    bare: Host, path: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(ROOT / "files" / "weights" / "pico", tmp_path / "store"))
    slow = ("--store", store, *SLOW, "--via", "rsync")
    push = Running(tmp_path, "weights", "push", "-i", path, *slow)
    travelling(push, bare)
    # The last that is sent, and as large as it was.
    file = max(store.rglob("vicuna-pico/*.bin"))
    file.write_bytes(bytes(file.stat().st_size))
    done = push.wait(120)
    assert done.code == 1
    words(done.complaint, bare.name, str(file), "changed on this machine while it was sent")
    assert versions(bare) == []
    shutil.copy2(ROOT / "files/weights/pico" / file.relative_to(store), file)
    pushed(fleet("weights", "push", "-i", path, "--store", store, "--json"), bare)
    whole(bare)


@pytest.mark.long
def test_a_disk_that_fills_up_is_one_line_and_the_next_push_goes_on(
    boot: Boot, tmp_path: Path
) -> None:
    host = boot(1, "--disk-mib", "1200").hosts[0]
    path = fleets.inventory(tmp_path, {host.name: host.data()})
    fill = "fallocate -l $(( $(df -Pk / | awk 'NR==2 {print $4}') * 1024 - %d )) /full"
    host.sh(fill % (100 << 20))
    done = fleet("weights", "push", "-i", path)
    assert done.code == 1
    words(done.complaint, f"{host.name}: preflight: disk full", "pico", "free", "more")
    assert not host.path(HOME).exists()
    host.path("/full").unlink()
    push = Running(tmp_path, "weights", "push", "-i", path, *SLOW, "--via", "rsync")
    travelling(push, host)
    host.sh(fill % (1 << 20))
    done = push.wait(120)
    assert done.code == 1
    words(done.complaint, f"{host.name}: weights", "disk is full", "still to come", "goes on from")
    assert versions(host) == []
    there = arrived(host)
    assert there > 300_000
    host.path("/full").unlink()
    seen = pushed(fleet("weights", "push", "-i", path, "--json"), host)
    assert seen["bytes_there"] > 0
    whole(host)


@pytest.mark.long
def test_deep_finds_what_no_record_tells(bare: Host, path: Path) -> None:
    pushed(fleet("weights", "push", "-i", path, "--json"), bare)
    blob = max(bare.path(f"{HOME}/weights/blobs").iterdir(), key=lambda one: one.stat().st_size)
    record = bare.path(f"{HOME}/weights/blobs/.verified")
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    line = bare.sh(f"cd {HOME}/weights/blobs && stat -c '%n %s %.9Z %i' {blob.name}")
    kept = [one for one in record.read_text().splitlines() if not one.startswith(blob.name)]
    record.write_text("\n".join([*kept, line, ""]))
    assert pushed(fleet("weights", "push", "-i", path, "--json"), bare)["bytes_sent"] == 0
    seen = pushed(fleet("weights", "push", "-i", path, "--deep", "--json"), bare)
    assert seen["bytes_sent"] == len(content)
    whole(bare)


def test_an_old_version_stays_until_the_demo_is_healthy_on_the_new_one(
    deployed: Fleet, tmp_path: Path
) -> None:
    host = deployed.hosts[0]
    checkout = fleets.checkout(tmp_path / "checkout")
    picture = checkout / "files" / "weights" / "pico" / "examples" / "1.png"
    picture.write_bytes((picture.with_name("2.png")).read_bytes() + b"\0")
    _describe(checkout, picture)
    model = checkout / "catalog" / "models" / "pico.yaml"
    right = model.read_text()
    model.write_text(right.replace("is left of", "is above"))
    own = {host.name: {**host.data(), "weights": {"keep": 0}}}
    path = fleets.inventory(tmp_path, own)
    (old,) = versions(host)
    done = fleet("apply", "-i", path, "--json", cwd=checkout)
    assert done.code == 1
    words(" ".join(done.document["errors"]), "health", "expected 'The star is above the circle.'")
    (seen,) = (one["weights"] for one in done.document["hosts"])
    # Only what is new in it has travelled.
    assert seen["bytes_sent"] == picture.stat().st_size
    assert len(versions(host)) == 2
    assert old in versions(host)
    # Neither a push nor one concern alone takes away what a service may use.
    ok(fleet("apply", "-i", path, "--only", "weights", cwd=checkout))
    assert len(versions(host)) == 2
    model.write_text(right)
    served = host.pid
    done = ok(fleet("apply", "-i", path, "--json", cwd=checkout))
    assert done.changed(host.name) == {"health": ["Remove older weights"]}
    assert host.pid == served
    assert versions(host) != [old]
    assert len(versions(host)) == 1
    used = {os.readlink(link).rpartition("/")[2] for link in _links(host)}
    assert used == {one.name for one in host.path(f"{HOME}/weights/blobs").glob("[0-9a-f]*")}
    assert ok(fleet("apply", "-i", path, "--json", cwd=checkout)).changed(host.name) == {}
    # Back to the first: its contents but one are there.
    done = ok(fleet("apply", "-i", path, "--json"))
    (seen,) = (one["weights"] for one in done.document["hosts"])
    assert seen["bytes_sent"] == (ROOT / "files/weights/pico/examples/1.png").stat().st_size
    assert versions(host) == [old]


def _describe(checkout: Path, file: Path) -> None:
    """Have the catalogue of a checkout say what a file of pico is now."""
    path = checkout / "catalog" / "weights" / "pico-pictures.yaml"
    entry = yaml.safe_load(path.read_text())
    (listed,) = (one for one in entry["files"] if file.as_posix().endswith(one["path"]))
    listed["bytes"] = file.stat().st_size
    listed["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    path.write_text(yaml.safe_dump(entry))


def _links(host: Host) -> list[Path]:
    (version,) = versions(host)
    return [path for path in version.rglob("*") if path.is_symlink()]


# What the version before this one had made: files in a folder of the model's name, and a record
# of digest, size, ctime, inode and path.
OLD_LAYOUT = r"""
cd HOME/weights && v=$(echo pico-*) && cp -rL "$v" pico && rm -rf "$v" blobs && cd pico
find . -type f -printf '%P\n' | while read -r p; do
  echo "$(sha256sum < "$p" | cut -d' ' -f1) $(stat -c '%s %.9Z %i' "$p") $p"
done > /root/record
mv /root/record .verified
sed -i "s|weights/$v/|weights/pico/|" HOME/config/*.yaml /etc/systemd/system/UNIT
systemctl daemon-reload
systemctl restart UNIT
"""


@pytest.mark.long
def test_a_host_of_the_layout_before_is_taken_over_without_a_byte_sent(deployed: Fleet) -> None:
    host = deployed.hosts[0]
    ok(deployed.apply("--limit", host.name))
    host.sh(OLD_LAYOUT.replace("HOME", HOME).replace("UNIT", UNIT))
    done = deployed.apply("--limit", host.name)
    assert pushed(done, host)["bytes_sent"] == 0
    assert {"weights", "config", "demo", "health"} <= set(done.changed(host.name))
    assert [one.name for one in host.path(f"{HOME}/weights").iterdir() if one.name == "pico"] == []
    whole(host)
    assert host.healthy()
    served = host.pid
    assert deployed.apply("--limit", host.name).changed(host.name) == {}
    assert host.pid == served


@pytest.mark.long
def test_killed_at_any_moment_a_push_leaves_nothing_half_made(
    bare: Host, path: Path, tmp_path: Path
) -> None:
    chance = random.Random(5)
    ended = 0
    for number in range(20):
        push = Running(
            *(tmp_path, "weights", "push", "-i", path, "--bandwidth", "2000", "--via", "rsync")
        )
        time.sleep(chance.uniform(0.5, 8))
        ended += push.ended
        push.kill(descendants=bool(number % 2))
        for version in versions(bare):
            # Whatever is there under its name is whole.
            assert version.is_dir()
            whole(bare)
        if ended > 2:
            bare.sh(f"rm -rf {HOME}/weights {HOME}/incoming/*")
            ended = 0
    pushed(fleet("weights", "push", "-i", path, "--json"), bare)
    whole(bare)
