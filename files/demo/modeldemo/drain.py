"""Lets a server end its work: no new connections, then the last answers, whoever asked for them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uvicorn

QUIET = 1.0  # seconds without a request after which no connection is likely to bring one


def stop_listening(server: uvicorn.Server) -> None:
    """Take no more connections, but for those that Linux has established by now."""
    # A timer's turn comes after what has arrived: nobody is hung up on who was let in already.
    asyncio.get_running_loop().call_later(0, lambda: [one.close() for one in server.servers])


async def drained(server: uvicorn.Server) -> None:
    """Take no more connections; return when no answer is given any more, nor was for a second.

    A page that is only open is no work.
    """
    stop_listening(server)
    loop = asyncio.get_running_loop()
    quiet_since = loop.time()
    while loop.time() - quiet_since < QUIET:
        for connection in server.server_state.connections:
            if _works(connection.cycle):
                quiet_since = loop.time()
                # Its client's next question is for whoever listens then.
                connection.cycle.keep_alive = False
        await asyncio.sleep(0.05)


def _works(cycle: Any) -> bool:
    """Whether this is a request that is not answered yet."""
    return cycle and not cycle.response_complete and "/heartbeat/" not in cycle.scope["path"]
