"""When a host's demo counts as well."""

from dataclasses import replace

import pytest

from gpufleet.demo.plan import Service
from gpufleet.run.status import HostStatus

WELL = Service(
    active="active",
    enabled=True,
    needs_reload=False,
    revision_on_disk="a1",
    revision_running="a1",
    since="Sat 2026-11-21 02:27:07 UTC",
    memory_bytes=2**30,
    health='{"status": "ok", "model": "pico", "revision": "a1"}',
)


def test_a_demo_that_runs_answers_and_will_run_again_is_well():
    status = HostStatus("gpu1", WELL)
    assert status.healthy
    assert (status.model, status.health) == ("pico", "ok")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"active": "failed", "health": ""}, "unit is failed"),
        ({"enabled": False}, "not started at boot"),
        ({"revision_running": "a0"}, "runs an older revision"),
        ({"health": '{"status": "loading", "model": "pico"}'}, "loading"),
        ({"health": '{"status": "failed", "error": "out of memory"}'}, "out of memory"),
        ({"health": "<html>"}, "no answer"),
        ({"health": ""}, "no answer"),
    ],
)
def test_everything_else_is_a_problem_with_a_name(changes, problem):
    status = HostStatus("gpu1", replace(WELL, **changes))
    assert not status.healthy
    assert status.problem == problem


def test_each_of_several_processes_must_be_well():
    ill = replace(WELL, name="minigpt4-demo@1.service", health='{"status": "loading"}')
    one = replace(WELL, name="minigpt4-demo@0.service")
    assert HostStatus("gpu1", replace(WELL, processes=(one, one))).healthy
    status = HostStatus("gpu1", replace(WELL, processes=(one, ill)))
    assert status.problem == "minigpt4-demo@1.service: loading"
    down = replace(one, active="failed")
    whole = replace(WELL, active="failed", processes=(one, down))
    assert HostStatus("gpu1", whole).problem == "minigpt4-demo@0.service is failed"


def test_each_of_several_processes_is_in_the_document():
    one = replace(WELL, name="minigpt4-demo@0.service")
    (said,) = HostStatus("gpu1", replace(WELL, processes=(one,))).as_dict()["processes"]
    assert (said["name"], said["health"], said["error"]) == (one.name, "ok", None)
    assert HostStatus("gpu1", WELL).as_dict()["processes"] == []


def test_a_host_that_was_not_reached_has_no_service():
    status = HostStatus("gpu1", None, "gpu1: cannot connect as root@10.0.0.1:22: no answer in time")
    assert not status.healthy
    assert status.as_dict()["error"] == status.error
    assert status.as_dict()["memory_bytes"] is None
