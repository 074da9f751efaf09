"""The kernel task: what its operations are given is made when they look, and once for each look."""

from __future__ import annotations

from pyinfra.api import Config, Inventory, State
from pyinfra.context import ctx_state

from tasks.kernel import _AsOf


def test_what_an_operation_is_given_is_made_when_preparing_and_again_when_executing():
    host = ["broken"]
    made: list[list[str]] = []

    def look() -> list[str]:
        made.append(list(host))
        return made[-1]

    given = _AsOf(look)
    assert made == []
    state = State(Inventory((["@fake/host"], {})), Config())
    with ctx_state.use(state):
        assert (list(given), len(given), given[0]) == (["broken"], 1, "broken")
        host.clear()
        assert list(given) == ["broken"]
        state.is_executing = True
        assert list(given) == []
        assert not given
    assert made == [["broken"], []]
