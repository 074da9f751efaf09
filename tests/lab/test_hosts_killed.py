"""An apply that was killed anywhere leaves nothing half-made in service, and the next one
continues; two at once do not meet."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import fleets
from fleets import HOME, UNIT, Boot, Fleet, Host, Running, fleet, inventory, ok, words
from modeldemo.pico import pictures

# Every file of every package is the one that its wheel's RECORD names (PEP 376).
INTACT = r"""
import base64, hashlib, importlib.metadata, pathlib, sys
bad = []
for package in importlib.metadata.distributions():
    for file in package.files:
        path = pathlib.Path(file.locate())
        if file.hash is None or file.hash.mode != "sha256" or path.suffix == ".pyc":
            continue
        digest = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            bad.append(str(path))
print(len(bad), bad[:5])
"""


def _wheels_travel(host: Host) -> bool:
    return any(host.path(f"{HOME}/incoming").glob("*/.*.whl.*"))


def _uv_installs(host: Host) -> bool:
    return any(host.path(f"{HOME}/envs").glob("*/lib/python*/site-packages/torch"))


def _weights_travel(host: Host) -> bool:
    return any(host.path(f"{HOME}/incoming").glob("weights-pico-*/**/*.*"))


def _config_is_written(host: Host) -> bool:
    return host.path(f"{HOME}/config/minigpt4_eval.yaml").exists()


def _service_starts(host: Host) -> bool:
    return host.try_(f"systemctl is-active {UNIT}").stdout.strip() == "activating"


#: When the apply is killed, and whether with all that it started or the command alone.
MOMENTS: list[tuple[Callable[[Host], bool], bool]] = [
    (_wheels_travel, True),
    (_uv_installs, False),
    (_weights_travel, False),
    (_config_is_written, True),
    (_service_starts, False),
]


def test_killed_at_any_moment_it_continues_and_never_serves_a_half(
    boot: Boot, tmp_path: Path
) -> None:
    host = boot(1).hosts[0]
    # Slow enough to be met on the way.
    path = inventory(tmp_path, {host.name: {**host.data(), "weights": {"bandwidth_kib": 2048}}})
    for moment, descendants in MOMENTS:
        apply = Running(tmp_path, "apply", "-i", path)
        name = moment.__name__.strip("_").replace("_", " ")
        try:
            fleets.until(
                lambda moment=moment, apply=apply: moment(host) or apply.ended, name, 300, 0.01
            )
            assert not apply.ended, f"it ended before: {name}\n{apply.said()}"
        finally:
            apply.kill(descendants)
        if moment is not _service_starts:
            assert host.try_("ss -Hltn 'sport = :7860'").stdout == "", name
            assert host.try_(f"systemctl is-active {UNIT}").stdout.strip() == "inactive", name
    done = ok(fleet("apply", "-i", path, "--json"))
    assert host.healthy()
    assert host.sh(f"ls {HOME}/incoming") == ""
    assert host.sh(f"{HOME}/envs/*/bin/python - <<'END'\n{INTACT}\nEND", timeout=300) == "0 []"
    example = pictures.held_out_examples(seed=17, count=1)[0]
    with host.tunnel() as url:
        assert pictures.is_right(fleets.ask(url, example), example.answer)
    assert done.document["errors"] == []
    assert ok(fleet("apply", "-i", path, "--json")).changed(host.name) == {}


def test_while_an_update_is_killed_the_old_revision_goes_on(
    deployed: Fleet, one: Host, tmp_path: Path
) -> None:
    changed = deployed.inventory(tmp_path, {"demo": {"queue": 9}})
    old, unit = one.pid, one.path(f"/etc/systemd/system/{UNIT}")
    apply = Running(tmp_path, "apply", "-i", changed, "--limit", one.name, "--only", "demo")
    try:
        fleets.until(
            lambda: "--max-waiting 9" in unit.read_text() or apply.ended, "the unit", 120, 0.005
        )
    finally:
        apply.kill()
    # Whichever process there is now is a whole one: the old one, or the new one as it comes up.
    if one.pid == old:
        assert one.healthy()
    ok(fleet("apply", "-i", changed, "--limit", one.name))
    assert one.healthy()
    assert "--max-waiting 9" in one.sh(f"tr '\\0' ' ' < /proc/{one.pid}/cmdline")
    ok(deployed.apply("--limit", one.name))
    assert one.healthy()


def test_ctrl_c_says_where_every_host_was_and_the_next_apply_continues(
    deployed: Fleet, one: Host, two: Host, tmp_path: Path
) -> None:
    for host in deployed.hosts:
        host.sh(f"rm -f {HOME}/envs/*/.whole {HOME}/config/*.yaml")
    path = deployed.inventory(tmp_path)
    apply = Running(tmp_path, "apply", "-i", path)
    fleets.until(
        lambda: all(any(h.path(f"{HOME}/incoming").glob("*/*.whl")) for h in (one, two)),
        "wheels arrive",
        120,
        0.02,
    )
    pressed = time.monotonic()
    apply.interrupt()
    done = apply.wait(120)
    assert time.monotonic() - pressed < 30
    assert done.code == 130
    assert "Traceback" not in done.out + done.err
    for host in deployed.hosts:
        (line,) = fleets.lines_about(done.err, host)
        words(line, "stopped in python_env")
    assert "stopped; the same command continues from here" in done.out
    assert "continues from here" in done.out
    done = ok(fleet("apply", "-i", path, "--json"))
    for host in deployed.hosts:
        assert {"python_env", "config"} <= set(done.changed(host.name))
        assert host.healthy()


def test_a_second_apply_of_the_same_inventory_says_that_one_is_running(
    deployed: Fleet, tmp_path: Path
) -> None:
    path = deployed.inventory(tmp_path)
    first = Running(tmp_path, "apply", "-i", path)
    try:
        fleets.until(lambda: first.said()[0] or first.ended, "the first has begun", 60, 0.02)
        second = fleet("apply", "-i", path)
        assert second.code == 1
        words(second.complaint, str(path), f"process {first.process.pid}", "wait for that to end")
        assert first.wait(300).code == 0
    finally:
        first.kill()
    ok(fleet("apply", "-i", path))
