"""fleet weights verify: hash and inspect the models' files, and learn what nobody has published.

The document of `fleet weights verify --json` (`version` 1):

    {"version": 1, "command": "weights verify", "exit_code": 0|1, "seconds": S, "bytes_read": N,
     "sets": as in `fleet weights list --json`,
     "problems": [LINE, …],
     "learnt": [{"set": NAME, "files": N}, …]}

`bytes_read` counts what was hashed in this run; what had not changed since it was hashed before is
not read again. `learnt` are sets whose sizes and sha256 were written down at this first sight.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from gpufleet.cli import options
from gpufleet.cli.weights import list_

if TYPE_CHECKING:
    from gpufleet.weights.digests import Progress

VERSION = 1

#: Seconds between two lines about progress in a pipe.
_PAUSE = 10.0


def verify(
    names: options.Names = None,
    store: options.Store = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every file again, also those that did not change.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Hash and inspect weight files; say what is wrong with each and what to do.

    Files that were hashed before and did not change are not read again. What the catalogue does
    not know of a set that is whole is learnt, and held to from then on. Without NAME: all sets of
    which something is here. Exit code 1 if anything is wrong, or a named set is not whole.
    """
    from gpufleet import catalog
    from gpufleet.cli import output
    from gpufleet.weights import stock
    from gpufleet.weights.digests import Digests

    sets = list_.chosen(names, store)
    if names is None:
        digests = Digests()
        sets = [(n, at) for n, at in sets if stock.look(n, at, digests).state != "missing"]
    named = [name for name in catalog.names() if names is None or name in names]
    models = {name: catalog.model(name).weights for name in named}
    begun, read = time.monotonic(), 0
    with watching(as_json) as show:

        def watch(progress: Progress) -> None:
            nonlocal read
            read = progress.done
            show(progress)

        done = stock.verify(sets, deep=deep, models=models, watch=watch)
    problems = done.problems()
    exit_code = 1 if problems else 0
    seconds = time.monotonic() - begun
    if as_json:
        learnt = [{"set": s.name, "files": len(s.learnt.files)} for s in done.sets if s.learnt]
        document = {
            "version": VERSION,
            "command": "weights verify",
            "exit_code": exit_code,
            "seconds": round(seconds, 3),
            "bytes_read": read,
            "sets": [list_.described(one) for one in done.sets],
            "problems": problems,
            "learnt": learnt,
        }
        print(json.dumps(document, ensure_ascii=False))
        raise typer.Exit(exit_code)
    for one in done.sets:
        if one.learnt:
            print(f"{one.name}: learnt sizes and sha256 of {len(one.learnt.files)} files")
    for line in problems:
        print(line, file=sys.stderr)
    whole = sum(one.state == "verified" for one in done.sets)
    took = f"{list_.size(read)} read in {output.duration(seconds)}"
    print(f"{whole} of {len(done.sets)} sets verified, {took}")
    raise typer.Exit(exit_code)


@contextmanager
def watching(as_json: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows hashing while it goes on: a bar on a terminal, now and then a line in a pipe."""
    from gpufleet.cli import output

    if as_json:
        yield lambda progress: None
    elif output.on_terminal():
        with _bar() as watch:
            yield watch
    else:
        yield _Lines()


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.progress import TransferSpeedColumn as Rate

    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(), Rate(), TimeRemainingColumn())
    with Bars(*columns, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda progress: bars.update(task, completed=progress.done, total=progress.of)


class _Lines:
    def __init__(self) -> None:
        self._next = time.monotonic() + _PAUSE

    def __call__(self, progress: Progress) -> None:
        left = progress.seconds_left
        if time.monotonic() < self._next or left is None:
            return
        from gpufleet.cli import output

        self._next = time.monotonic() + _PAUSE
        size = list_.size
        done = f"hashed {size(progress.done)} of {size(progress.of)}"
        print(f"{done}, {size(int(progress.rate))}/s, {output.duration(left)} left", flush=True)
