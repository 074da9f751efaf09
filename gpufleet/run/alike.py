"""Questions that hosts in the same state answer alike: one of them is asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar, cast

if TYPE_CHECKING:
    from gevent.event import AsyncResult

_T = TypeVar("_T")


class Alike(Generic[_T]):
    """Answers by the state of the hosts that share them."""

    def __init__(self) -> None:
        self._answers: dict[str, AsyncResult[_T]] = {}

    def get(self, state: str, ask: Callable[[], _T]) -> _T:
        """What `ask` says for the first host that is in this state; the others wait for it.

        Where it raises, that host has no answer, and the next one is asked.
        """
        from gevent.event import AsyncResult

        while (answer := self._answers.get(state)) is not None:
            with suppress(Exception):
                return cast(_T, answer.get())
        mine: AsyncResult[_T] = AsyncResult()
        self._answers[state] = mine
        try:
            said = ask()
        except BaseException as error:
            del self._answers[state]
            mine.set_exception(error)
            raise
        mine.set(said)
        return said
