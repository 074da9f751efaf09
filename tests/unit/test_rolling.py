"""In which order apply goes over hosts, and what stops it: as pure decisions, and in runs of the
real pyinfra command on hosts whose answers are given (its @fake connector)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Container

import pytest

from gpufleet import ROOT
from gpufleet.run import pyinfra, rolling
from gpufleet.run.events import Picture
from gpufleet.run.rolling import Batch, Kind, Member, batches, following
from gpufleet.settings import parse

A, B = Kind("debian 12", "amd64", ("0x20b5",), "535.247.01"), Kind("ubuntu 24.04", "generic")


def fleet_of(kind: Kind, count: int, prefix: str, **settings) -> list[Member]:
    return [Member(f"{prefix}{number}", kind, **settings) for number in range(1, count + 1)]


def some_fleet(seed: int) -> list[Member]:
    chance = random.Random(seed)
    kinds = [Kind(os=f"os {number}") for number in range(chance.randint(1, 4))]
    return [
        Member(
            f"h{number}", chance.choice(kinds), chance.random() < 0.7, chance.choice([0, 1, 2, 5])
        )
        for number in range(chance.randint(1, 25))
    ]


FLEETS = [pytest.param(some_fleet(seed), id=f"seed {seed}") for seed in range(60)]


def names(order: list[Batch]) -> list[tuple[str, ...]]:
    return [batch.hosts for batch in order]


def test_a_canary_goes_first_and_then_batches():
    order = batches(fleet_of(A, 5, "a", batch=2))
    assert order == [Batch(("a1",), True), Batch(("a2", "a3")), Batch(("a4", "a5"))]


def test_without_a_size_all_go_at_once_after_the_canaries_of_all_kinds():
    order = batches(fleet_of(A, 3, "a") + fleet_of(B, 2, "b"))
    assert order == [Batch(("a1", "b1"), True), Batch(("a2", "a3", "b2"))]


def test_without_canaries_batches_begin_at_once():
    assert batches(fleet_of(A, 3, "a", canary=False, batch=2)) == [
        Batch(("a1", "a2")),
        Batch(("a3",)),
    ]


def test_the_smallest_batch_of_a_kind_counts_and_other_kinds_do_not_raise_it():
    small = [Member("a1", A, batch=3), Member("a2", A), Member("a3", A, batch=1), Member("a4", A)]
    order = batches([*small, *fleet_of(B, 4, "b", batch=3)])
    assert names(order)[0] == ("a1", "b1")
    assert names(order)[1:] == [("a2",), ("a3",), ("a4",), ("b2", "b3", "b4")]


def test_a_host_that_shall_be_no_canary_waits_for_one_of_its_kind():
    assert batches([Member("a1", A, canary=False), Member("a2", A)]) == [
        Batch(("a2",), True),
        Batch(("a1",)),
    ]


@pytest.mark.parametrize("members", FLEETS)
def test_every_host_has_its_turn_exactly_once(members):
    order = batches(members)
    assert sorted(name for batch in order for name in batch.hosts) == sorted(
        m.name for m in members
    )
    assert all(batch.hosts for batch in order)


@pytest.mark.parametrize("members", FLEETS)
def test_there_is_one_canary_of_each_kind_that_wants_one_and_they_go_before_all_others(members):
    kinds = {one.name: one.kind for one in members}
    order = batches(members)
    assert [batch.canaries for batch in order[1:]] == [False] * (len(order) - 1)
    canaries = [kinds[name] for batch in order if batch.canaries for name in batch.hosts]
    assert len(canaries) == len(set(canaries))
    assert set(canaries) == {one.kind for one in members if one.canary}


@pytest.mark.parametrize("members", FLEETS)
def test_no_batch_is_larger_than_any_of_its_hosts_or_their_kind_allows(members):
    kinds = {one.name: one.kind for one in members}
    for batch in batches(members):
        if not batch.canaries:
            here = {kinds[name] for name in batch.hosts}
            sizes = [one.batch for one in members if one.kind in here and one.batch]
            assert len(batch.hosts) <= min(sizes, default=len(members))


@pytest.mark.parametrize("members", FLEETS)
@pytest.mark.parametrize("end", ["failed", "stopped"])
def test_one_host_that_does_not_make_it_stops_all_that_come_after_it(members, end):
    chance = random.Random(len(members))
    states: dict[str, str] = {}
    unlucky = chance.choice(members).name
    while batch := following(members, states):
        assert unlucky not in states
        states |= {name: end if name == unlucky else "done" for name in batch.hosts}
    assert states[unlucky] == end


@pytest.mark.parametrize("members", FLEETS)
def test_hosts_that_are_unreachable_prove_nothing_and_stop_nothing(members):
    """Before any host but the canaries goes, one host of its kind has taken the apply."""
    chance = random.Random(len(members))
    kinds = {one.name: one.kind for one in members}
    careful = {one.kind for one in members if one.canary}
    states: dict[str, str] = {}
    while batch := following(members, states):
        proven = {kinds[name] for name, state in states.items() if state == "done"}
        assert not set(batch.hosts) & set(states)
        if batch.canaries:
            assert not {kinds[name] for name in batch.hosts} & proven
        else:
            assert {kinds[name] for name in batch.hosts} & careful <= proven
        states |= {name: chance.choice(["done", "unreachable"]) for name in batch.hosts}
    assert set(states) == set(kinds)


def test_if_the_canary_is_unreachable_the_next_host_of_its_kind_becomes_it():
    members = fleet_of(A, 4, "a") + fleet_of(B, 2, "b")
    states = {"a1": "unreachable", "b1": "done"}
    assert following(members, states) == Batch(("a2",), canaries=True)
    assert following(members, states | {"a2": "done"}) == Batch(("a3", "a4", "b2"))


def settings(**data):
    return parse(data, "h")


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([settings(), settings()], False),
        ([settings(), settings(accelerator="cuda")], True),
        ([settings(accelerator="cuda")], False),
        ([settings(accelerator="cuda", rolling={"canary": False})] * 2, False),
        ([settings(accelerator="cuda", rolling={"canary": False, "batch": 1})] * 2, True),
        ([settings(), settings(rolling={"batch": 3})], True),
        ([settings(rolling={"canary": True}), settings()], False),
        ([], False),
    ],
)
def test_hosts_roll_where_a_batch_is_set_or_a_canary_can_try_a_driver(hosts, expected):
    assert rolling.in_effect(hosts) is expected


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("5.15.0-91-generic", "generic"),
        ("6.8.0-1018-nvidia-64k", "nvidia-64k"),
        ("6.1.0-18-cloud-amd64", "cloud-amd64"),
        ("6.1.0-0.deb11.13-amd64", "amd64"),
        ("6.12.43+deb13-amd64", "amd64"),
        ("6.12.9+bpo-rt-amd64", "bpo-rt-amd64"),
        ("5.14.0-362.8.1.el9_3.x86_64", "x86_64"),
        ("5.4.119-19-0009.11", ""),
        ("", ""),
    ],
)
def test_the_flavour_of_a_kernel_is_what_its_updates_share(release, expected):
    assert rolling.flavour(release) == expected


def test_hosts_with_the_same_models_are_alike_however_many_of_them_they_have():
    lines = ["os\tdebian 12", "kernel\t6.1.0-18-amd64", "driver\t535.247.01"]
    eight = rolling.parse([*lines, *["gpu\t0x20b5"] * 8])
    assert eight == rolling.parse([*lines, "gpu\t0x20b5"]) == A
    assert rolling.parse([*lines, "gpu\t0x20b5", "gpu\t0x2330"]) != eight
    assert rolling.parse([]) == Kind()


def test_the_script_answers_on_this_machine():
    done = subprocess.run(["sh", "-c", rolling.SCRIPT], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    release = os.uname().release if hasattr(os, "uname") else ""
    assert rolling.parse(done.stdout.splitlines()).kernel == rolling.flavour(release)


def test_a_member_survives_its_way_to_the_fleet_command():
    member = Member("a1", A, canary=False, batch=3)
    assert rolling.read(member.dump()) == member


@pytest.mark.parametrize(
    ("failed", "batch", "expected"),
    [
        (
            {"h1": "base: Install"},
            Batch(("h1",), True),
            "stopped after canary h1 failed: base: Install; 2 hosts untouched: h3, h4",
        ),
        (
            {"h1": "base: Install", "h2": "demo: Run"},
            Batch(("h1", "h2"), True),
            "stopped after canaries h1, h2 failed; 2 hosts untouched: h3, h4",
        ),
        (
            {"h2": "health: Ask the demo"},
            Batch(("h1", "h2")),
            "stopped after h2 failed: health: Ask the demo; 2 hosts untouched: h3, h4",
        ),
        ({}, Batch(("h1",), True), "stopped; 2 hosts untouched: h3, h4"),
    ],
)
def test_one_line_says_why_it_stopped_and_whom_it_left_alone(failed, batch, expected):
    assert rolling.stopped(failed, batch, ["h3", "h4"]) == expected


DEPLOY = """
import time
from pathlib import Path
from pyinfra import host
from pyinfra.api import DeployError, deploy
from pyinfra.operations import python, server
from gpufleet.run.events import emit
from gpufleet.run.only import selected

def note():
    with open({out!r}, "a") as out:
        out.write(host.name + "\\n")
    while Path({out!r} + ".hold").exists():
        time.sleep(0.05)

@deploy("preflight")
def preflight():
    if finding := host.data.get("fake_finding"):
        emit("finding", host=host.name, concern="preflight", message=finding)
        raise DeployError("preflight, nothing was changed")

@deploy("base")
def base():
    python.call(name="Note", function=note)
    server.shell(name="Change it", commands=["change"])

preflight()
if selected("base"):
    base()
"""

DEBIAN = "os\tdebian 12\nkernel\t6.1.0-18-amd64\ndriver\t"
UBUNTU = "os\tubuntu 24.04\nkernel\t6.8.0-45-generic\ndriver\t"


@pytest.fixture
def fleet(tmp_path):
    """Writes a deploy and an inventory of hosts that answer what they are told to."""

    def make(hosts: dict[str, dict], **settings) -> dict:
        (tmp_path / "deploy.py").write_text(DEPLOY.format(out=str(tmp_path / "out")))
        entries = []
        for name, data in hosts.items():
            answers = {"libnvidia-ml": data.pop("kind", DEBIAN).splitlines()}
            if data.pop("fails", False):
                answers["change"] = {"success": False, "stderr": "E: broken"}
            fake = {"fake_responses": answers, "fake_delay": 0, "fake_delay_jitter": 0}
            entries.append((name, {**fake, "rolling": settings, **data}))
        (tmp_path / "inv.py").write_text(f"hosts = {entries!r}\n")
        return {"inventory": tmp_path / "inv.py", "deploy": tmp_path / "deploy.py"}

    return make


def four(**data) -> dict[str, dict]:
    """Four hosts; `data` adds to that of h1, h2 …"""
    return {f"@fake/h{number}": data.get(f"h{number}", {}) for number in range(1, 5)}


def went(tmp_path) -> list[str]:
    """The hosts that were changed, in order."""
    out = tmp_path / "out"
    return out.read_text().replace("@fake/", "").split() if out.exists() else []


def order(result: pyinfra.Result) -> list[str]:
    return [str(batch).replace("@fake/", "") for batch in result.order]


def states(result: pyinfra.Result) -> list[str]:
    return [host.state for host in result.hosts]


def test_apply_goes_in_batches_and_what_it_did_adds_up(fleet, tmp_path):
    result = pyinfra.apply(**fleet(four(h3={"kind": UBUNTU}), batch=1))
    assert (result.errors, result.exit_code) == ((), 0)
    assert order(result) == ["h1, h3 (canaries)", "h2", "h4"]
    assert sorted(went(tmp_path)[:2]) == ["h1", "h3"]
    assert went(tmp_path)[2:] == ["h2", "h4"]
    assert states(result) == ["done"] * 4
    assert [host.concerns["base"].operations for host in result.hosts] == [2] * 4
    assert result.changed == 8
    said = result.log.read_text().splitlines()
    assert [line for line in said if line.startswith("# @fake")] == [
        "# @fake/h1, @fake/h3 (canaries)",
        "# @fake/h2",
        "# @fake/h4",
    ]


def test_without_a_batch_or_a_driver_all_go_at_once(fleet, tmp_path):
    result = pyinfra.apply(**fleet(four(), canary=True))
    assert (result.exit_code, result.order) == (0, ())
    assert sorted(went(tmp_path)) == ["h1", "h2", "h3", "h4"]
    assert result.log.read_text().count("-m pyinfra") == 1


def test_a_canary_that_fails_leaves_the_others_untouched(fleet, tmp_path):
    result = pyinfra.apply(**fleet(four(h1={"fails": True}), batch=2))
    assert result.exit_code == 1
    assert result.errors == (
        "@fake/h1: base: Change it: E: broken; see the log",
        "stopped after canary @fake/h1 failed: base: Change it; "
        "3 hosts untouched: @fake/h2, @fake/h3, @fake/h4",
    )
    assert went(tmp_path) == ["h1"]
    assert states(result) == ["failed", "untouched", "untouched", "untouched"]
    assert (result.failed, len(result.untouched)) == (["@fake/h1"], 3)


def test_a_host_of_a_batch_that_fails_lets_its_batch_end_and_stops_the_next(fleet, tmp_path):
    result = pyinfra.apply(**fleet(four(h2={"fails": True}), batch=2))
    assert result.exit_code == 1
    assert result.errors[1] == (
        "stopped after @fake/h2 failed: base: Change it; 1 host untouched: @fake/h4"
    )
    assert states(result) == ["done", "failed", "done", "untouched"]
    assert set(went(tmp_path)) == {"h1", "h2", "h3"}


def test_the_last_host_that_fails_leaves_nobody_untouched(fleet):
    result = pyinfra.apply(**fleet(four(h4={"fails": True}), batch=2))
    assert result.exit_code == 1
    assert len(result.errors) == 1
    assert states(result) == ["done", "done", "done", "failed"]


def test_a_finding_of_the_last_host_keeps_even_the_canary_from_going(fleet, tmp_path):
    result = pyinfra.apply(**fleet(four(h4={"fake_finding": "disk full: free some"}), batch=1))
    assert result.exit_code == 1
    assert result.errors == ("@fake/h4: preflight: disk full: free some",)
    assert states(result) == ["stopped", "stopped", "stopped", "failed"]
    assert went(tmp_path) == []
    assert result.order == ()


def test_an_unreachable_host_is_reported_and_the_next_is_the_canary(fleet, tmp_path):
    gone = {"ssh_hostname": "127.0.0.1", "ssh_port": 1, "ssh_user": "ops"}
    result = pyinfra.apply(**fleet({"gone": gone, **four()}, batch=3))
    assert result.exit_code == 1
    assert len(result.errors) == 1
    assert result.errors[0].startswith("gone: cannot connect as ops@127.0.0.1:1")
    assert order(result) == ["h1 (canary)", "h2, h3, h4"]
    assert states(result) == ["unreachable", *["done"] * 4]


def test_limit_and_only_hold_for_every_batch(fleet, tmp_path):
    options = fleet(four(), batch=1)
    limited = pyinfra.apply(**options, limit=["@fake/h2,@fake/h3"])
    assert order(limited) == ["h2 (canary)", "h3"]
    assert went(tmp_path) == ["h2", "h3"]
    nothing = pyinfra.apply(**options, only=["kernel"])
    assert [host.concerns for host in nothing.hosts] == [{}] * 4
    assert went(tmp_path) == ["h2", "h3"]


def test_a_group_of_a_hosts_name_is_not_taken_for_the_host(fleet, tmp_path):
    options = fleet(four(), batch=1)
    with options["inventory"].open("a") as inventory:
        inventory.write('globals()["@fake/h1"] = [name for name, _ in hosts]\n')
    assert len(pyinfra.plan(**options, limit=["@fake/h1"]).hosts) == 4
    result = pyinfra.apply(**options)
    assert order(result) == ["h1 (canary)", "h2", "h3", "h4"]
    assert went(tmp_path) == ["h1", "h2", "h3", "h4"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ("hosts[2:] = []", "@fake/h3: the inventory has it no more; apply again"),
        ("hosts[2][1]['modle'] = 'x'", "@fake/h3: unknown setting modle, did you mean model?"),
    ],
)
def test_an_inventory_that_is_edited_meanwhile_stops_at_the_next_batch(fleet, tmp_path, edit, says):
    options = fleet(four(), batch=1)
    with options["inventory"].open("a") as inventory:
        inventory.write(
            f"from pathlib import Path\nif Path({str(tmp_path / 'out')!r}).exists() and "
            f"'h2' in Path({str(tmp_path / 'out')!r}).read_text():\n    {edit}\n"
        )
    result = pyinfra.apply(**options)
    assert result.exit_code == 1
    assert result.errors[0].startswith(says)
    assert result.errors[1] == "stopped; 1 host untouched: @fake/h4"
    assert states(result) == ["done", "done", "stopped", "untouched"]
    assert went(tmp_path) == ["h1", "h2"]


def test_plan_says_the_order_and_changes_nothing(fleet, tmp_path, capsys):
    from gpufleet.cli.output import document, finish

    result = pyinfra.plan(**fleet(four(h4={"kind": UBUNTU}), batch=2))
    assert result.exit_code == 3
    assert order(result) == ["h1, h4 (canaries)", "h2, h3"]
    assert all(host.pending for host in result.hosts)
    assert went(tmp_path) == []
    assert document(result)["order"] == [["@fake/h1", "@fake/h4"], ["@fake/h2", "@fake/h3"]]
    finish(result, as_json=False)
    line = "order of apply: @fake/h1, @fake/h4 (canaries); then @fake/h2, @fake/h3"
    assert line in capsys.readouterr().out.splitlines()


def test_untouched_hosts_are_shown_as_such(fleet, capsys):
    from gpufleet.cli.output import document, finish

    result = pyinfra.apply(**fleet(four(h1={"fails": True}), batch=3))
    shown = json.loads(json.dumps(document(result)))
    assert [host["state"] for host in shown["hosts"]] == ["failed", *["untouched"] * 3]
    assert shown["order"] == [["@fake/h1"]]
    assert shown["hosts"][1]["concerns"] == []
    finish(result, as_json=False)
    closing = capsys.readouterr().out.splitlines()[-1]
    assert "failed: @fake/h1, untouched: @fake/h2, @fake/h3, @fake/h4" in closing


RUN = """
import sys
from pathlib import Path
from gpufleet.cli import output
from gpufleet.run import pyinfra
with output.watching(as_json=False, verbose=False) as watch:
    result = pyinfra.apply(Path(sys.argv[1]), deploy=Path(sys.argv[2]), watch=watch)
sys.exit(output.finish(result, as_json=False))
"""


def test_ctrl_c_in_a_batch_names_where_it_met_it_and_whom_it_left_alone(fleet, tmp_path):
    hold = tmp_path / "out.hold"
    hold.touch()
    options = fleet(four(), batch=2)
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, str(options["inventory"]), str(options["deploy"])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not went(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "next: @fake/h1 (canary)" in said
    assert "@fake/h1: stopped in base: Note" in said
    assert "3 hosts untouched: @fake/h2, @fake/h3, @fake/h4" in said
    assert "continues from here" in said
    assert "Traceback" not in said
    assert went(tmp_path) == ["h1"]
    hold.unlink()
    again = pyinfra.apply(**options)
    assert (again.exit_code, len(again.order)) == (0, 3)


class Pressed(Picture):
    """Ctrl-C is pressed when the first batch has ended and the second has not begun."""

    def close(self, complete: bool = True, names: Container[str] | None = None) -> None:
        super().close(complete, names)
        if len(self.order) == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_between_two_batches_begins_no_other(fleet, tmp_path):
    result = pyinfra.Run("apply", **fleet(four(), batch=2), picture=Pressed()).run()
    assert (result.exit_code, result.interrupted) == (130, True)
    assert result.errors == ("stopped; 3 hosts untouched: @fake/h2, @fake/h3, @fake/h4",)
    assert states(result) == ["done", *["untouched"] * 3]
    assert went(tmp_path) == ["h1"]
