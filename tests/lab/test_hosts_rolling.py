"""Hosts are applied to one kind's canary first, then in batches, and a failure stops the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleets
from fleets import HOME, Boot, Done, Fleet, Host, fleet, ok, words

CONFIG = f"{HOME}/config/minigpt4_eval.yaml"


def _order(done: Done) -> list[list[int]]:
    """The batches, as the hosts' numbers."""
    return [[int(name.rpartition("-")[2]) for name in batch] for batch in done.document["order"]]


def _states(done: Done) -> list[str]:
    return [host["state"] for host in done.document["hosts"]]


def _written(host: Host) -> int:
    """When its configuration was written, in nanoseconds of this machine's clock."""
    return host.path(CONFIG).stat().st_ctime_ns


def _in_batches(lab: Fleet, folder: Path, **settings: Any) -> Path:
    return lab.inventory(folder, {"rolling": {"batch": 2}, **settings})


def test_a_canary_of_each_kind_goes_first_and_then_batches(boot: Boot, tmp_path: Path) -> None:
    lab = boot(4)
    h1, h2, h3, h4 = lab.hosts
    path = _in_batches(lab, tmp_path)
    before = [host.snapshot() for host in lab.hosts]

    planned = fleet("plan", "-i", path, "--only", "config", "--json")
    assert planned.code == 3
    assert _order(planned) == [[1], [2, 3], [4]]
    assert [fleets.touched(b, h.snapshot()) for b, h in zip(before, lab.hosts, strict=True)] == (
        [[]] * 4
    )

    done = ok(fleet("apply", "-i", path, "--only", "config", "--json"))
    assert (_order(done), _states(done)) == ([[1], [2, 3], [4]], ["done"] * 4)
    assert _written(h1) < min(_written(h2), _written(h3))
    assert max(_written(h2), _written(h3)) < _written(h4)

    # Another driver makes another kind, whose first host goes before all that follow.
    h3.sh("touch /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.535.247.01")
    for host in lab.hosts:
        host.sh(f"rm {CONFIG}")
    done = ok(fleet("apply", "-i", path, "--only", "config"))
    begun = [line for line in done.out.splitlines() if line.startswith("next: ")]
    assert begun == [f"next: {h1.name}, {h3.name} (canaries)", f"next: {h2.name}, {h4.name}"]
    assert max(_written(h1), _written(h3)) < min(_written(h2), _written(h4))

    again = ok(fleet("apply", "-i", path, "--only", "config", "--json"))
    assert all(again.changed(host.name) == {} for host in lab.hosts)


def test_a_failure_stops_what_has_not_begun_and_nothing_is_touched_there(
    boot: Boot, tmp_path: Path
) -> None:
    lab = boot(4)
    h1, h2, h3, h4 = lab.hosts
    names = [host.name for host in lab.hosts]
    before = [host.snapshot() for host in lab.hosts]

    # No demo runs here, so health fails on the canary.
    path = _in_batches(lab, tmp_path, health={"timeout": 1})
    done = fleet("apply", "-i", path, "--only", "config,health", "--json")
    assert done.code == 1
    assert (_order(done), _states(done)) == ([[1]], ["failed", *["untouched"] * 3])
    health, stopped = done.document["errors"]
    words(health, f"{h1.name}: health: Ask the demo: ")
    assert stopped == (
        f"stopped after canary {h1.name} failed: health: Ask the demo; "
        f"3 hosts untouched: {', '.join(names[1:])}"
    )
    assert h1.path(CONFIG).exists()
    for host, snapshot in list(zip(lab.hosts, before, strict=True))[1:]:
        assert fleets.touched(snapshot, host.snapshot()) == []

    # One of a batch: those beside it go on, those after it do not.
    h2.sh(f"mkdir -p {HOME} && touch {HOME}/config")
    done = fleet("apply", "-i", path, "--only", "config")
    assert done.code == 1
    assert "Traceback" not in done.out + done.err
    words(done.err, f"{h2.name}: config: ", f"stopped after {h2.name} failed: config: ")
    words(done.err, f"1 host untouched: {h4.name}")
    words(done.out, f"failed: {h2.name}, untouched: {h4.name}")
    assert h3.path(CONFIG).exists()
    assert fleets.touched(before[3], h4.snapshot()) == []
    h2.sh(f"rm {HOME}/config")

    # The canary answers when it is asked for its kind, and no more when its turn comes.
    text = path.read_text()
    seen = tmp_path / "seen"
    path.write_text(
        f"{text}\nfrom pathlib import Path\nif Path({str(seen)!r}).exists():\n"
        f"    hosts[0][1]['ssh_port'] = 1\nPath({str(seen)!r}).touch()\n"
    )
    done = fleet("apply", "-i", path, "--only", "config", "--json")
    assert done.code == 1
    assert (_order(done), _states(done)) == ([[1], [2], [3, 4]], ["unreachable", *["done"] * 3])
    (line,) = done.document["errors"]
    words(line, f"{h1.name}: cannot connect as", "check the address")
    assert h4.path(CONFIG).exists()
