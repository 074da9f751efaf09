"""fleet weights fetch: bring the files of models and weight sets to this machine, verified.

The document of `fleet weights fetch --json` (`version` 1); what is unknown is null:

    {"version": 1, "command": "weights fetch", "exit_code": 0|1|130, "store": FOLDER,
     "huggingface": {"address": URL, "why": TEXT}, "seconds": S, "errors": [LINE, …],
     "sets": [{"name": SET, "origin": "REPOSITORY@COMMIT"|URL, "error": LINE,
               "files": [{"path": PATH, "state": STATE, "bytes": N, "of": N, "sha256": HEX,
                          "source": TEXT, "why": TEXT}, …]}, …]}

`path` is below the store. STATE is "present" (it was there), "fetched", "picked" (from a folder
of --from), "failed" (`why` says why), or what it was about when Ctrl-C, or an error that ended the
whole run, came: "waiting", "checking", "copying", "fetching", "resting", "stopped". `bytes` of a
file that is not whole are kept for the next run.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpufleet.cli import options
from gpufleet.errors import FleetError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gpufleet.weights.fetch.run import Fetch
    from gpufleet.weights.fetch.work import File

VERSION = 1

#: Seconds between two lines that say how far it is, in a pipe.
_EVERY = 30.0

STOPPED = 130


class Hub(str, Enum):
    """Which of a set's sources come first."""

    huggingface = "huggingface"
    modelscope = "modelscope"


def fetch(
    names: options.Names = None,
    store: options.Store = None,
    folders: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="A folder that a browser downloads into: what is in it is taken from there.",
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="SITE", help="The mirror site to ask instead of Hugging Face, or `official`."
        ),
    ] = None,
    hub: Annotated[Hub | None, typer.Option(help="Which of a set's sources come first.")] = None,
    inventory: Annotated[
        Path | None,
        typer.Option(
            "-i",
            "--inventory",
            metavar="FILE",
            help="Its settings say mirror, hub and store.",
        ),
    ] = None,
    limit: options.Limit = None,
    parts: Annotated[
        bool,
        typer.Option("--parts", help="Of a merged set fetch base and delta, to merge them here."),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, max=32, help="Files at once.")] = 4,
    patience: Annotated[
        float,
        typer.Option(
            metavar="HOURS", min=0, help="How long to go on asking while not a byte comes."
        ),
    ] = 72,
    as_json: options.Json = False,
) -> None:
    """Fetch the files of models and weight sets, each verified before it gets its name.

    A fetch that was cut off, by Ctrl-C too, goes on where it was when the command is run again.
    Hugging Face is asked where --mirror says, else HF_ENDPOINT, else the inventory's settings. A
    token comes from HF_TOKEN or hf auth login, ModelScope's from MODELSCOPE_API_TOKEN. Exit code 1
    if a file could not be had.
    """
    from gpufleet.run import operator
    from gpufleet.settings import Weights
    from gpufleet.weights import store as stores
    from gpufleet.weights.digests import Digests
    from gpufleet.weights.fetch import run
    from gpufleet.weights.fetch.endpoint import endpoints
    from gpufleet.weights.fetch.plan import Policy
    from gpufleet.weights.fetch.work import Options

    if not names:
        raise UsageError("fleet weights fetch: name a model or a weight set; ./fleet weights list")
    sets = run.sets_of(names, parts)
    mirrors, weights = operator.read(inventory, limit or ()) if inventory else (None, Weights())
    root = store or (Path(weights.source).expanduser() if weights.source else stores.default())
    chosen = Options(
        stores.Store(root.absolute()),
        endpoints(mirror, mirrors),
        hub.value if hub else weights.hub,
        tuple(folders or ()),
        jobs,
        Policy(patience=patience * 3600),
    )
    begun = time.monotonic()
    errors: list[str] = []
    stopped = False
    with _showing(as_json) as (say, watch):
        fetching = run.Fetch(sets, chosen, Digests(), say)
        try:
            fetching.run(lambda: watch(fetching))
        except FleetError as error:
            errors.append(str(error))
        except KeyboardInterrupt:
            fetching.stop()
            stopped = True
    errors += [one.error for one in fetching.sets if one.error]
    exit_code = STOPPED if stopped else 0 if not errors and _whole(fetching) else 1
    seconds = time.monotonic() - begun
    if as_json:
        print(json.dumps(_document(fetching, exit_code, errors, seconds), ensure_ascii=False))
    else:
        for line in errors:
            print(line, file=sys.stderr)
        print(_summary(fetching, exit_code, names, seconds), flush=True)
    raise typer.Exit(exit_code)


def _whole(fetching: Fetch) -> bool:
    return all(one.done for one in fetching.sets)


def _summary(fetching: Fetch, exit_code: int, names: list[str], seconds: float) -> str:
    """The closing line."""
    from gpufleet.cli import output
    from gpufleet.weights.fetch import plan
    from gpufleet.weights.fetch.work import DONE

    files = fetching.files
    done = [file for file in files if file.state in DONE]
    new = [file for file in done if file.state != "present"]
    line = f"{len(done)} of {len(files)} files are there and verified"
    if new:
        line += f", {len(new)} of them new ({plan.amount(sum(file.bytes for file in new))})"
    line += f", {output.duration(seconds)}; {fetching.options.store.root}"
    if exit_code == STOPPED:
        again = fetching.options.store.command("fetch", " ".join(names))
        return f"stopped; {again} goes on from here; {line}"
    failed = [file.place for file in files if file.state == "failed"]
    return f"{line}; failed: {', '.join(failed)}" if failed else line


Watch = Callable[["Fetch"], None]


@contextmanager
def _showing(as_json: bool) -> Iterator[tuple[Callable[[str], None], Watch]]:
    """What shows a line, and what shows how far it is."""
    from gpufleet.cli import output

    if as_json:
        yield lambda line: None, lambda fetching: None
    elif output.on_terminal():
        with _bars() as shown:
            yield shown
    else:
        lines = _Lines()
        yield lines.say, lines.watch


class _Lines:
    """A line for each file that is done, and now and then one for all."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """Print a line; threads call it."""
        with self._lock:
            print(line, flush=True)

    def watch(self, fetching: Fetch) -> None:
        """Print what is new."""
        from gpufleet.weights.fetch import plan

        for file in fetching.files:
            if file.state in ("fetched", "present") and file.place not in self._told:
                self._told.add(file.place)
                by = f" from {file.source}" if file.state == "fetched" else ""
                self.say(f"{file.place} {file.state}{by} ({plan.amount(file.bytes)})")
        if time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            self.say(_overall(fetching))


def _overall(fetching: Fetch) -> str:
    from gpufleet.weights.fetch import plan
    from gpufleet.weights.fetch.work import DONE

    files = fetching.files
    done = sum(file.state in DONE for file in files)
    have, of = _bytes(files)
    return f"{done} of {len(files)} files, {plan.amount(have)} of {plan.amount(of)}"


def _bytes(files: list[File]) -> tuple[int, int]:
    """Bytes that are there, and bytes of all files whose size is known."""
    return sum(file.bytes for file in files), sum(file.of or file.bytes for file in files)


@contextmanager
def _bars() -> Iterator[tuple[Callable[[str], None], Watch]]:
    """A bar for each file on its way, and one for all."""
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, refresh_per_second=4, speed_estimate_period=20) as progress:
        bars = _Bars(progress)
        yield lambda line: progress.console.print(escape(line), highlight=False), bars.watch


class _Bars:
    """Which file has which bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._all: TaskID | None = None

    def watch(self, fetching: Fetch) -> None:
        """Bring the bars up to date."""
        from gpufleet.weights.fetch.work import DONE

        for file in fetching.files:
            active = file.state in ("checking", "copying", "fetching", "resting")
            if active and file.place not in self._tasks:
                self._tasks[file.place] = self._progress.add_task(
                    _short(file.place), total=file.of, completed=file.bytes, now=""
                )
            if (task := self._tasks.get(file.place)) is None:
                continue
            now = f"rests: {file.why}" if file.state == "resting" else file.state
            self._progress.update(
                task,
                completed=file.bytes,
                total=file.of,
                now="" if now == "fetching" else now[:60],
                visible=file.state not in DONE,
            )
        if fetching.files:
            have, of = _bytes(fetching.files)
            if self._all is None:
                self._all = self._progress.add_task("all", total=of, completed=have, now="")
            self._progress.update(self._all, completed=have, total=of)


def _short(place: str, width: int = 36) -> str:
    return place if len(place) <= width else f"…{place[1 - width :]}"


def _document(fetching: Fetch, exit_code: int, errors: list[str], seconds: float) -> dict[str, Any]:
    endpoints = fetching.options.endpoints
    return {
        "version": VERSION,
        "command": "weights fetch",
        "exit_code": exit_code,
        "store": str(fetching.options.store.root),
        "huggingface": {"address": endpoints.huggingface, "why": endpoints.why},
        "seconds": round(seconds, 3),
        "errors": errors,
        "sets": [
            {
                "name": one.name,
                "origin": one.origin or None,
                "error": one.error or None,
                "files": [
                    {
                        "path": file.place,
                        "state": file.state,
                        "bytes": file.bytes,
                        "of": file.of,
                        "sha256": file.sha256 or None,
                        "source": file.source or None,
                        "why": file.why or None,
                    }
                    for file in one.files
                ],
            }
            for one in fetching.sets
        ],
    }
