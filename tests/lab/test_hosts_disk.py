"""A disk that is too small is found before anything changes; one that fills up meanwhile fails its
own host only, and the same command finishes once there is space."""

from __future__ import annotations

from pathlib import Path

import fleets
from fleets import HOME, UNIT, Boot, Fleet, Host, fleet, inventory, ok, words


def test_a_host_with_a_small_disk_is_refused_and_no_host_changes(
    deployed: Fleet, one: Host, boot: Boot, tmp_path: Path
) -> None:
    small = boot(1, "--disk-mib", "400").hosts[0]
    before, served = small.snapshot(), one.pid
    one.sh(f"systemctl disable -q {UNIT}")  # something to heal, which must wait
    try:
        hosts = {host.name: host.data() for host in (one, small)}
        done = fleet("apply", "-i", inventory(tmp_path, hosts))
        assert done.code == 1
        words(done.complaint, f"{small.name}: preflight", "disk full", "MiB free", HOME, "needs")
        assert one.show("UnitFileState") == "disabled"
    finally:
        one.sh(f"systemctl enable -q {UNIT}")
    assert fleets.touched(before, small.snapshot()) == []
    assert one.pid == served


# Fills the disk as soon as wheels arrive, to 16 MiB that apt's and sshd's own files may need.
FILL = r"""
while ! ls /opt/minigpt4/incoming/*/*.whl >/dev/null 2>&1; do sleep 0.05; done
fallocate -l $(( $(df -Pk / | awk 'NR==2 {print $4}') * 1024 - 16777216 )) /full
"""


def test_a_disk_that_fills_up_fails_its_host_and_the_same_command_finishes_later(
    deployed: Fleet, one: Host, boot: Boot, tmp_path: Path
) -> None:
    filling: Host = boot(1, "--disk-mib", "2600").hosts[0]
    filling.path("/root/fill").write_text(FILL)
    filling.sh("systemd-run -q --unit fill sh /root/fill")
    one.sh(f"systemctl stop {UNIT}")
    fleet_file = inventory(tmp_path, {host.name: host.data() for host in (filling, one)})
    done = fleet("apply", "-i", fleet_file)
    assert done.code == 1
    words(done.complaint, f"{filling.name}: python_env", "No space left", "free space")
    assert f"failed: {filling.name}" in done.out
    # The other host went on, and nothing is served from the half-made one.
    assert one.healthy()
    assert filling.try_("ss -Hltn 'sport = :7860'").stdout == ""
    assert not list(filling.path(f"{HOME}/envs").glob("*/.whole"))
    filling.path("/full").unlink()
    done = ok(fleet("apply", "-i", fleet_file, "--json"))
    assert {"python_env", "weights", "config", "demo"} <= set(done.changed(filling.name))
    assert done.changed(one.name) == {}
    fleets.until(filling.healthy, "the host that had no space serves", 60)
