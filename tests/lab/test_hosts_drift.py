"""What drifted is healed, and nothing but what drifted is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fleets
import pytest
from fleets import HOME, UNIT, Fleet, Host, fleet, ok

WEIGHTS = f"{HOME}/weights/blobs"


@dataclass(frozen=True)
class Drift:
    """What happens to a host behind the deploy's back, and which concerns must put it right."""

    what: str
    happen: Callable[[Host], object]
    heals: tuple[str, ...]


def _edit(path: str, old: str, new: str) -> Callable[[Host], object]:
    def happen(host: Host) -> None:
        file = host.path(path)
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return happen


def _flip_a_byte(host: Host) -> None:
    """Size and modification time stay as they were: only the content tells."""
    file = max(host.path(WEIGHTS).rglob("*"), key=lambda path: path.stat().st_size)
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        byte = stream.read(1)
        stream.seek(before.st_size // 2)
        stream.write(bytes([byte[0] ^ 0x10]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _truncate(host: Host) -> None:
    file = max(host.path(WEIGHTS).iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def _delete_a_weight(host: Host) -> None:
    fleets.weights(host).joinpath("vicuna-pico/config.json").unlink()


def _half_an_environment(host: Host) -> None:
    environment = next(host.path(f"{HOME}/envs").iterdir())
    (environment / ".whole").unlink()
    shutil.rmtree(next(environment.glob("lib/python*/site-packages/transformers")))


def _sh(command: str) -> Callable[[Host], object]:
    return lambda host: host.sh(command)


# Two at a time, one a host: each is healed by itself.
DRIFTS = [
    (
        Drift("the service is stopped", _sh(f"systemctl stop {UNIT}"), ("demo",)),
        Drift("the service is disabled", _sh(f"systemctl disable -q {UNIT}"), ("demo",)),
    ),
    (
        Drift(
            "the unit is edited",
            _edit(f"/etc/systemd/system/{UNIT}", "NoNewPrivileges=yes", "NoNewPrivileges=no"),
            ("demo",),
        ),
        Drift("a package is removed", _sh("apt-get remove -q -y tmux"), ("base",)),
    ),
    (
        Drift(
            "minigpt4.yaml is edited",
            _edit(f"{HOME}/config/minigpt4.yaml", "prompt:", "# mine\n  prompt:"),
            ("config",),
        ),
        Drift("a weight file has a flipped bit", _flip_a_byte, ("weights",)),
    ),
    (
        Drift("a weight file is cut off", _truncate, ("weights",)),
        Drift("a weight file is gone", _delete_a_weight, ("weights",)),
    ),
    (
        Drift("the environment lost a package", _half_an_environment, ("python_env",)),
        Drift(
            "the account is gone",
            _sh(f"systemctl stop {UNIT} && userdel minigpt4"),
            ("base", "demo"),
        ),
    ),
    (
        Drift(
            "the configuration lost its modes",
            _sh(f"chmod 600 {HOME}/config/*.yaml"),
            ("config",),
        ),
        Drift(
            "minigpt4_eval.yaml is gone",
            _sh(f"rm {HOME}/config/minigpt4_eval.yaml"),
            ("config",),
        ),
    ),
]


@pytest.mark.parametrize(
    ("first", "second"), DRIFTS, ids=[f"{a.what}; {b.what}" for a, b in DRIFTS]
)
def test_drift_is_healed_by_its_own_concern(deployed: Fleet, first: Drift, second: Drift) -> None:
    pairs = list(zip(deployed.hosts, (first, second), strict=True))
    right = {host.name: _fingerprint(host) for host in deployed.hosts}
    for host, drift in pairs:
        drift.happen(host)
    done = deployed.apply()
    for host, drift in pairs:
        # The service may be restarted on top: what drifted may be what it has read.
        changed = tuple(done.changed(host.name))
        assert changed in (drift.heals, (*drift.heals, "demo")), drift.what
    for host in deployed.hosts:
        assert host.healthy()
        assert host.show("UnitFileState") == "enabled"
        assert _fingerprint(host) == right[host.name]


def _fingerprint(host: Host) -> str:
    """Digests, modes and owners of all that the demo is made of, packages and account."""
    return host.sh(
        f"cd {HOME} && find app config weights /etc/systemd/system/{UNIT} -type f"
        " ! -name .verified -exec sha256sum {} + -exec stat -c '%n %a %U %G' {} + | sort;"
        " ls envs/*/lib/python*/site-packages | sort; cat envs/*/.whole;"
        " dpkg-query -W -f '${Package} ${db:Status-Status}\n';"
        " getent passwd minigpt4 | cut -d: -f6-"
    )


def test_an_application_that_was_edited_on_the_host_is_put_right(
    deployed: Fleet, one: Host
) -> None:
    (application,) = _applications(one)
    file = one.path(f"{HOME}/app/{application}/modeldemo/engine.py")
    right = file.read_text()
    file.write_text(right + "\nprint('not ours')\n")
    try:
        done = deployed.apply("--limit", one.name)
        assert list(done.changed(one.name)) == ["demo"]
        assert file.read_text() == right
        assert one.healthy()
    finally:
        file.write_text(right)


def test_a_process_that_read_an_edited_configuration_does_not_stay(
    one: Host, deployed: Fleet
) -> None:
    config = one.path(f"{HOME}/config/minigpt4.yaml")
    text = config.read_text()
    config.write_text(text.replace("model:", "model:\n  # what the process reads now\n", 1))
    one.sh(f"systemctl restart {UNIT}")
    misled = one.pid
    done = deployed.apply("--limit", one.name)
    assert config.read_text() == text
    assert list(done.changed(one.name)) == ["config", "demo"]
    assert one.pid != misled


def test_a_process_that_read_damaged_weights_does_not_stay(one: Host, deployed: Fleet) -> None:
    """Even if it runs: it would go on answering nonsense with the right files beside it."""
    file = fleets.weights(one) / "health.png"
    text = file.read_bytes()
    file.write_bytes(text + b"\0")
    one.sh(f"systemctl restart {UNIT}")
    misled = one.pid
    done = deployed.apply("--limit", one.name)
    assert file.read_bytes() == text
    assert list(done.changed(one.name)) == ["weights", "demo"]
    assert one.pid != misled


def test_a_new_revision_of_the_application_replaces_the_old_one(
    deployed: Fleet, two: Host, tmp_path: Path
) -> None:
    checkout = fleets.checkout(tmp_path / "checkout")
    source = checkout / "files" / "demo" / "modeldemo" / "engine.py"
    source.write_text(source.read_text() + "\n# the next revision\n")
    inventory = fleets.inventory(tmp_path, {two.name: two.data()})
    before, old = two.pid, _applications(two)
    done = fleet("apply", "-i", inventory, "--json", cwd=checkout)
    assert set(done.changed(two.name)) == {"demo"}
    assert two.pid != before
    assert two.healthy()
    (new,) = _applications(two)
    assert [new] != old
    running = two.sh(f"tr '\\0' '\\n' < /proc/{two.pid}/environ")
    assert f"PYTHONPATH={HOME}/app/{new}" in running.splitlines()
    ok(deployed.apply("--limit", two.name))
    assert _applications(two) == old


def _applications(host: Host) -> list[str]:
    return [path.name for path in host.path(f"{HOME}/app").iterdir()]
