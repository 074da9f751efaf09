"""What the events of a run add up to."""

import json
import os

import pytest

from gpufleet.run.events import ENV, Event, Picture, emit, read


def picture_of(*lines: str) -> Picture:
    picture = Picture()
    for line in lines:
        event = read(line)
        assert event is not None
        picture.fold(event)
    return picture


CONNECTED = '{"kind": "connected", "host": "gpu1", "at": 100.0}'
STARTED = (
    '{"kind": "started", "host": "gpu1", "concern": "base", "operation": "Install", "at": 101.0}'
)
CHANGED = (
    '{"kind": "finished", "host": "gpu1", "concern": "base", "operation": "Install",'
    ' "changed": true, "seconds": 2.5, "at": 103.5}'
)
UNCHANGED = (
    '{"kind": "finished", "host": "gpu1", "concern": "base", "operation": "Create",'
    ' "changed": false, "seconds": 0.5, "at": 104.0}'
)
NEXT = '{"kind": "started", "host": "gpu1", "concern": "demo", "operation": "Run", "at": 105.0}'
FAILED = (
    '{"kind": "failed", "host": "gpu1", "concern": "demo", "operation": "Run",'
    ' "message": "one\\ntwo", "seconds": 1.0, "at": 106.0}'
)


def test_a_running_operation_is_shown_with_its_concern_and_start():
    host = picture_of(CONNECTED, STARTED).hosts["gpu1"]
    assert (host.state, host.concern, host.operation, host.since) == (
        "running",
        "base",
        "Install",
        101.0,
    )


def test_between_two_operations_nothing_runs():
    assert picture_of(CONNECTED, STARTED, CHANGED).hosts["gpu1"].operation == ""


def test_seconds_add_up_and_only_changes_are_listed():
    concern = picture_of(CONNECTED, STARTED, CHANGED, UNCHANGED).hosts["gpu1"].concerns["base"]
    assert concern.seconds == 3.0
    assert concern.operations == 2
    assert concern.changed == ["Install"]


def test_a_concern_ends_when_the_next_one_starts():
    picture = picture_of(CONNECTED, STARTED, CHANGED)
    assert list(picture.ended()) == []
    picture.fold(Event("started", "gpu1", concern="demo", operation="Run"))
    assert [(host.name, concern.name) for host, concern in picture.ended()] == [("gpu1", "base")]


def test_the_last_concern_ends_with_the_run():
    picture = picture_of(CONNECTED, STARTED, CHANGED)
    picture.close()
    assert [concern.state for _, concern in picture.ended()] == ["ok"]
    assert picture.hosts["gpu1"].state == "done"


def test_what_a_stopped_run_left_undone_is_not_ok():
    picture = picture_of(CONNECTED, STARTED, CHANGED, NEXT)
    picture.close(complete=False)
    host = picture.hosts["gpu1"]
    assert host.state == "stopped"
    assert not host.ok
    assert [concern.state for concern in host.concerns.values()] == ["ok", "stopped"]


def test_a_failed_operation_fails_host_and_concern_and_keeps_its_output():
    picture = picture_of(CONNECTED, STARTED, CHANGED, NEXT, FAILED)
    picture.close()
    host = picture.hosts["gpu1"]
    assert host.state == "failed"
    assert host.concerns["demo"].state == "failed"
    assert host.error is not None
    assert host.error.message.splitlines() == ["one", "two"]


def test_of_nested_failures_the_inner_one_is_the_cause():
    outer = (
        '{"kind": "failed", "host": "gpu1", "concern": "demo", "operation": "Outer", "at": 107.0}'
    )
    error = picture_of(CONNECTED, NEXT, FAILED, outer).hosts["gpu1"].error
    assert error is not None
    assert error.operation == "Run"


def test_a_host_that_reboots_in_an_operation_is_not_unreachable():
    lost = '{"kind": "unreachable", "host": "gpu1", "message": "timed out", "at": 102.0}'
    host = picture_of(CONNECTED, STARTED, lost).hosts["gpu1"]
    assert host.state == "running"
    assert host.error is None


def test_a_host_that_never_answered_is_unreachable():
    lost = '{"kind": "unreachable", "host": "gpu1", "message": "timed out", "at": 102.0}'
    assert picture_of(lost).hosts["gpu1"].state == "unreachable"


def test_a_failed_fact_fails_the_host_outside_of_any_concern():
    host = picture_of(
        CONNECTED, '{"kind": "failed", "host": "gpu1", "message": "x", "at": 102.0}'
    ).hosts["gpu1"]
    assert host.state == "failed"
    assert host.concerns == {}


def test_a_warning_stops_nothing_and_is_kept_once():
    warning = (
        '{"kind": "warning", "host": "gpu1", "concern": "mirrors", "message": "look", "at": 102.0}'
    )
    picture = picture_of(CONNECTED, warning, warning)
    picture.close()
    host = picture.hosts["gpu1"]
    assert host.warnings == ["mirrors: look"]
    assert host.state == "done"


@pytest.mark.parametrize("line", ["", "{", "[]", "1", '{"kind": "other"}', '{"surprise": 1}'])
def test_a_line_that_is_no_event_is_passed_over(line):
    assert read(line) is None


def test_an_event_survives_the_pipe(monkeypatch):
    incoming, outgoing = os.pipe()
    monkeypatch.setenv(ENV, str(outgoing))
    emit("finding", host="gpu1", concern="preflight", message="disk\nfull – ü")
    line = os.read(incoming, 65536).decode()
    os.close(incoming)
    os.close(outgoing)
    event = read(line)
    assert event is not None
    assert (event.host, event.concern, event.message) == ("gpu1", "preflight", "disk\nfull – ü")
    assert line.count("\n") == 1


def test_without_the_fleet_command_events_go_nowhere(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    emit("finding", host="gpu1", message=json.dumps({}))


def test_a_run_stops_when_nobody_reads_its_events(monkeypatch):
    incoming, outgoing = os.pipe()
    os.close(incoming)
    monkeypatch.setenv(ENV, str(outgoing))
    with pytest.raises(SystemExit):
        emit("connected", host="gpu1")
    os.close(outgoing)
