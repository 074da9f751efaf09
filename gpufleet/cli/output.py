"""Shows a run: a live table on a terminal, a line each in a pipe, or one JSON document.

The document of `fleet apply --json` (`version` 1):

    {"version": 1, "command": "apply", "inventory": FILE, "exit_code": 0|1|2|130,
     "seconds": S, "log": FILE, "errors": [LINE, …], "order": [[HOST, …], …],
     "hosts": [{"name": HOST, "state": "done"|"failed"|"unreachable"|"stopped"|"untouched",
                "changed": N, "findings": [TEXT, …], "warnings": [TEXT, …],
                "weights": null|{"via": "rsync"|"swarm"|"", "files": N, "bytes_sent": N,
                                 "bytes_there": N, "seconds": S, "why": TEXT},
                "concerns": [{"name": CONCERN, "state": "ok"|"failed"|"stopped", "seconds": S,
                              "operations": N, "changed": [OPERATION, …]}, …]}, …]}

`fleet plan --json` has "command": "plan", exit code 3 where apply has changes to make, and in
each host "pending": [{"concern": CONCERN, "operation": OPERATION}, …] instead of "changed" and
"concerns". Times are in seconds.

"order" are the batches in which apply went, or would go (plan): the canaries, then the others;
it is empty where all hosts go at once. "weights" are null where the run did not come to them or
they failed; "via" is empty where nothing was sent, "why" says why it was not the swarm, where
that was meant. `fleet weights push --json` has "command": "weights push". A host is "untouched"
where a failure or Ctrl-C ended the run before its batch: nothing was changed there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from gpufleet.run.events import Concern, Host, Picture
    from gpufleet.run.pyinfra import Result, Watch
    from gpufleet.weights.plan import Progress

VERSION = 1


def on_terminal() -> bool:
    """Whether a person watches standard output."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """As a person reads it: 4.2 s, 38 s, 12 min 5 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def outcome(concern: Concern) -> str:
    """How a concern ended, in words."""
    if concern.state == "ok" and concern.changed:
        return f"changed {len(concern.changed)}"
    return concern.state


@contextmanager
def watching(as_json: bool, verbose: bool) -> Iterator[Watch]:
    """What shows a run while it goes on; --verbose shows pyinfra's own lines in its stead."""
    if as_json or verbose:
        yield lambda picture: None
    elif on_terminal():
        with _live() as watch:
            yield watch
    else:
        yield _Lines()


class _Lines:
    """A line for each host and concern when it ends, for each batch when it begins, and at every
    tenth of a host's weights."""

    def __init__(self) -> None:
        self.shown: set[tuple[str, str]] = set()
        self.batches = 0
        self.steps: dict[str, str] = {}

    def __call__(self, picture: Picture) -> None:
        # What ended before a batch began is printed before it.
        self._ended(picture)
        for batch in picture.order[self.batches :]:
            print(f"next: {batch}", flush=True)
        self.batches = len(picture.order)
        for host in picture.hosts.values():
            if host.weights and host.state == "running":
                self._travelled(host.name, host.weights)

    def _travelled(self, name: str, weights: Progress) -> None:
        step = f"{weights.state} {10 * weights.bytes // max(weights.of, 1)}"
        if weights.state not in ("done", "waiting") and self.steps.get(name) != step:
            self.steps[name] = step
            print(f"{name} weights: {travelling(weights)}", flush=True)

    def _ended(self, picture: Picture) -> None:
        for host, concern in picture.ended():
            if (host.name, concern.name) not in self.shown:
                self.shown.add((host.name, concern.name))
                seconds = duration(concern.seconds)
                print(f"{host.name} {concern.name} {outcome(concern)} ({seconds})", flush=True)


@contextmanager
def _live() -> Iterator[Watch]:
    from rich.live import Live

    from gpufleet.run.events import Picture

    latest = Picture()

    def watch(picture: Picture) -> None:
        nonlocal latest
        latest = picture

    with Live(get_renderable=lambda: screen(latest), refresh_per_second=4):
        yield watch


def travelling(weights: Progress) -> str:
    """How far a host's weights are, in words."""
    from gpufleet.weights.plan import size

    if weights.state == "verifying":
        return "the host verifies what arrived"
    if weights.state in ("waiting", "starting", "cut"):
        return weights.why or {"cut": "the connection broke"}.get(weights.state, "begins")
    said = [f"{100 * weights.bytes // max(weights.of, 1)} % of {size(weights.of)}"]
    if weights.rate > 0:
        left = duration((weights.of - weights.bytes) / weights.rate)
        said += [f"{size(weights.rate)}/s", f"{left} left"]
    if weights.via == "swarm":
        said.append(f"{weights.peers} peer{'s' * (weights.peers != 1)}")
    return ", ".join(said)


def overall(picture: Picture) -> str:
    """How far the weights of all hosts together are; empty where none travel."""
    from gpufleet.weights.plan import size

    every = [host.weights for host in picture.hosts.values() if host.weights and host.weights.of]
    going = [one for one in every if one.state != "done"]
    if not going:
        return ""
    done, of = sum(one.bytes for one in every), sum(one.of for one in every)
    rate = sum(one.rate for one in going)
    speed = f", {size(rate)}/s, {duration((of - done) / rate)} left" if rate > 0 else ""
    return (
        f"weights: {len(every) - len(going)} of {len(every)} host{'s' * (len(every) != 1)}, "
        f"{100 * done // of} % of {size(of)}{speed}"
    )


def screen(picture: Picture) -> Group:
    """What a terminal shows while a run goes on."""
    from rich.console import Group

    line = overall(picture)
    return Group(table(picture), *([line] if line else []))


def table(picture: Picture) -> Table:
    """One row a host: what it does now, since when, what has changed so far."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    rows = Table(box=None, pad_edge=False)
    for heading in ("HOST", "CONCERN", "NOW", "SINCE", "CHANGED"):
        rows.add_column(heading, no_wrap=True, overflow="ellipsis")
    for host in picture.hosts.values():
        changed = ", ".join(
            f"{concern.name} {len(concern.changed)}"
            for concern in host.concerns.values()
            if concern.changed
        )
        goes_on = host.state in ("connecting", "preparing", "running")
        now: str | Table = host.state
        if host.state == "running":
            now = host.operation or "waits for the other hosts"
            if host.concern == "weights" and host.operation and host.weights:
                now = Table.grid(padding=(0, 1))
                bar = ProgressBar(max(host.weights.of, 1), host.weights.bytes, width=16)
                now.add_row(bar, travelling(host.weights))
        since = duration(max(time.time() - host.since, 0)) if goes_on else ""
        concern = host.concern if host.state != "done" else ""
        style = "" if host.ok else "dim" if host.state == "untouched" else "red"
        rows.add_row(host.name, concern, now, since, changed, style=style)
    return rows


def finish(result: Result, as_json: bool) -> int:
    """Print how the run went, errors to stderr; returns the exit code."""
    if as_json:
        print(json.dumps(document(result), ensure_ascii=False))
        return result.exit_code
    for host in result.hosts:
        for warning in host.warnings:
            print(f"{host.name}: warning: {warning}")
    for host in result.hosts:
        if line := arrived(host, always=result.command == "weights push"):
            print(line)
    for error in result.errors:
        print(error, file=sys.stderr)
    for host in result.hosts:
        for concern, operation in host.pending:
            print(f"{host.name} {concern}: {operation}")
    if result.command == "plan" and result.order:
        print(f"order of apply: {'; then '.join(map(str, result.order))}")
    print(summary(result), flush=True)
    return result.exit_code


def arrived(host: Host, always: bool) -> str:
    """A line for the weights that a host got; `always`: also where it had them all."""
    from gpufleet.weights.plan import size

    weights = host.weights
    if weights is None or weights.state != "done" or not (weights.via or always):
        return ""
    files = f"{host.name} weights: {weights.files} file{'s' * (weights.files != 1)}"
    if not weights.via:
        return f"{files}, {size(weights.there)} were there"
    return (
        f"{files}, {size(weights.sent)} sent by {weights.via}, {size(weights.there)} were there, "
        f"{duration(weights.seconds)}" + (f" (no swarm: {weights.why})" if weights.why else "")
    )


def summary(result: Result) -> str:
    """The closing line of a run."""
    hosts = f"{len(result.hosts)} host{'s' * (len(result.hosts) != 1)}"
    log = f"log: {relative(result.log)}"
    if result.interrupted:
        return f"stopped; the same command continues from here; {log}"
    if result.exit_code == 2:
        return f"nothing was changed; {log}"
    pending = sum(len(host.pending) for host in result.hosts)
    count = pending if result.command == "plan" else result.changed
    changes = f"{count or 'no'} change{'s' * (count != 1)}"
    if result.command == "plan":
        changes += " pending"
    took = duration(result.seconds)
    if result.errors:
        failed = f"failed: {', '.join(result.failed)}" if result.failed else "failed"
        if result.untouched:
            failed += f", untouched: {', '.join(result.untouched)}"
        return f"{hosts}, {failed}; {changes}, {took}; {log}"
    return f"{hosts} ok, {changes}, {took}; {log}"


def relative(path: Path) -> str:
    """The path as a person in the current folder writes it, if it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def document(result: Result) -> dict[str, Any]:
    """The JSON document that the module's docstring describes."""
    return {
        "version": VERSION,
        "command": result.command,
        "inventory": result.inventory,
        "exit_code": result.exit_code,
        "seconds": round(result.seconds, 3),
        "log": str(result.log),
        "errors": list(result.errors),
        "order": [list(batch.hosts) for batch in result.order],
        "hosts": [_host(host, result.command) for host in result.hosts],
    }


def _host(host: Host, command: str) -> dict[str, Any]:
    common: dict[str, Any] = {"name": host.name, "state": host.state}
    common |= {"findings": host.findings, "warnings": host.warnings}
    if command == "plan":
        pending = [{"concern": concern, "operation": name} for concern, name in host.pending]
        return {**common, "pending": pending}
    concerns = [
        {
            "name": concern.name,
            "state": concern.state,
            "seconds": round(concern.seconds, 3),
            "operations": concern.operations,
            "changed": concern.changed,
        }
        for concern in host.concerns.values()
    ]
    weights = host.weights if host.weights and host.weights.state == "done" else None
    came = weights and {
        "via": weights.via,
        "files": weights.files,
        "bytes_sent": weights.sent,
        "bytes_there": weights.there,
        "seconds": weights.seconds,
        "why": weights.why,
    }
    return {**common, "changed": host.changed, "weights": came, "concerns": concerns}


def print_rows(headings: list[str], rows: list[list[str]]) -> None:
    """A table on a terminal; in a pipe, lines of columns that two spaces or more keep apart."""
    if on_terminal():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for number, heading in enumerate(headings):
            table.add_column(heading, no_wrap=number == 0)  # names stay whole
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in [headings, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
