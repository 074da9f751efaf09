"""The process of a push: reads what to do from stdin, a line of JSON each, and tells on stdout."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpufleet.catalog import WeightFile
from gpufleet.errors import FleetError
from gpufleet.weights.swarm.client import Member
from gpufleet.weights.swarm.torrent import Source


def say(message: dict[str, Any]) -> None:
    """A line to the parent; one that is gone is noticed by stdin's end."""
    with suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


async def main() -> None:
    """One push, from its first line until stdin ends or a file of this machine changes."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    given = json.loads(await lines.readline())
    try:
        from gpufleet.weights.swarm.push import Push
    except ImportError as error:
        return say({"failed": f"this machine's python has no libtorrent ({error}): use rsync"})
    files = [
        Source(WeightFile(path=path, bytes=size, sha256=sha256), Path(place), tuple(stat))
        for path, size, sha256, place, stat in given["files"]
    ]
    push = Push(
        files,
        say,
        upload_kib=given["upload_kib"],
        quiet=given["quiet"],
        encrypt=given["encrypt"],
    )

    async def obey() -> str:
        while line := await lines.readline():
            member = json.loads(line)["join"]
            member["ssh"], member["paths"] = tuple(member["ssh"]), tuple(member["paths"])
            push.join(Member(**member))
        return ""

    async def feed() -> str:
        try:
            await push.open()
        except FleetError as error:
            return str(error)
        return await push.watch()

    # Hosts are reached and prepared while the files are hashed.
    tasks = {asyncio.create_task(obey()), asyncio.create_task(feed())}
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    why = "".join(task.result() for task in done)
    if why:
        say({"failed": why})
    await push.close()
    return None


if __name__ == "__main__":
    # An ssh that ends while it is being ended is no news (Popen reaps it before asyncio does).
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    try:
        asyncio.run(main())
    except FleetError as error:
        say({"failed": str(error)})
