"""Shows that hosts are being asked, while they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gpufleet.cli import output


@contextmanager
def hosts(as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """What to call with how many hosts have answered, of how many: a bar on a terminal."""
    if as_json or not output.on_terminal():
        yield lambda done, of: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("asking hosts"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def several(names: list[str], limit: int = 4) -> str:
    """Hosts as a line begins with them: the first few, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
