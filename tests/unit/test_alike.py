"""Hosts in the same state: one is asked, all have the answer, and a failure is nobody else's."""

from __future__ import annotations

import gevent
import pytest

from gpufleet.run.alike import Alike
from gpufleet.upgrade.plan import NONE, State, Upgrade, of_this_host


def fleet(states: str, failing: str = "") -> tuple[list[str], list[str]]:
    """The answers of hosts a, b, … in these states, and who was asked; some fail when asked."""
    answers: Alike[str] = Alike()
    asked: list[str] = []

    def ask(name: str) -> str:
        asked.append(name)
        gevent.sleep(0.01)
        if name in failing:
            raise ValueError(name)
        return f"{name} said so"

    def one(name: str, state: str) -> str:
        try:
            return answers.get(state, lambda: ask(name))
        except ValueError:
            return "failed"

    jobs = [gevent.spawn(one, name, state) for name, state in zip("abcdef", states, strict=False)]
    gevent.joinall(jobs, raise_error=True)
    return [job.value for job in jobs], asked


def test_one_of_them_is_asked():
    assert fleet("111") == (["a said so"] * 3, ["a"])


def test_every_state_has_its_own_answer():
    said, asked = fleet("1212")
    assert said == ["a said so", "b said so"] * 2
    assert asked == ["a", "b"]


@pytest.mark.parametrize("failing", ["a", "ab"])
def test_where_one_fails_the_next_is_asked(failing: str):
    said, asked = fleet("1111", failing)
    teller = "abcd"[len(failing)]
    assert said == ["failed"] * len(failing) + [f"{teller} said so"] * (4 - len(failing))
    assert asked == list("abcd"[: len(failing) + 1])


def test_the_age_of_the_lists_is_each_hosts_own():
    said = Upgrade(True, lists_age_s=60)
    assert of_this_host(said, State("d", 7200)).lists_age_s == 7200
    assert of_this_host(Upgrade(True), State("d", 7200)).lists_age_s is None
    assert of_this_host(NONE, State("", None)) == NONE
