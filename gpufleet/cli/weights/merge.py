"""fleet weights merge: make Vicuna from LLaMA and a delta, in little memory.

The document of `--json` (`version` 1):

    {"version": 1, "command": "weights merge", "exit_code": 0, "seconds": S, "output": FOLDER,
     "state": "merged"|"there", "delta": "v0"|"v1.1", "rows": N, "tensors": N, "bytes": N,
     "kept": BYTES, "dropped": N, "learnt": N}

"there": the output was made by this very merge before. "kept" are bytes that a merge which was
killed had written, and that were verified instead of computed again. "dropped" tensors (inv_freq)
are those that no model reads. "learnt" are files of a NAME's set whose sizes and sha256 were
written down, as `fleet weights verify` does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gpufleet import ROOT
from gpufleet.cli.options import Json, Store
from gpufleet.errors import FleetError, UsageError

if TYPE_CHECKING:
    from gpufleet.weights.merge.engine import Progress
    from gpufleet.weights.store import Store as Stores


class Form(str, Enum):
    """What the output is written as."""

    safetensors = "safetensors"
    bin = "bin"


class Version(str, Enum):
    """What a delta can be."""

    v0 = "v0"
    v1_1 = "v1.1"


def merge(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A set of the catalogue that is merged, or a model."),
    ] = None,
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="LLaMA's folder.")] = None,
    delta: Annotated[Path | None, typer.Option(metavar="DIR", help="The delta's folder.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to make; must not be there.")
    ] = None,
    store: Store = None,
    version: Annotated[
        Version | None, typer.Option(help="Refuse a delta of another version.")
    ] = None,
    form: Annotated[Form, typer.Option("--format", help="Of the output.")] = Form.safetensors,
    shard_mib: Annotated[
        int, typer.Option(min=1, metavar="MIB", help="At most this in one file of the output.")
    ] = 4096,
    memory_mib: Annotated[int, typer.Option(min=1, metavar="MIB", help="Memory for buffers.")] = 64,
    threads: Annotated[
        int, typer.Option(min=0, max=64, help="0: as many as cores, at most 4.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make Vicuna from LLaMA and a delta, v0 or v1.1, as FastChat's apply_delta does.

    Tensors are bit for bit the same; memory stays the same however large the model is. Give NAME,
    with both parts in the store, or --base, --delta and --output. What does not belong together
    is refused before a byte is written; a merge that was killed goes on where it was; the output
    appears when it is whole.
    """
    from rich.filesize import decimal

    from gpufleet.cli import output as show
    from gpufleet.weights.merge import child, engine, environment

    folders, wanted, made = _folders(name, base, delta, output, store)
    job = engine.Job(
        *folders,
        version=version.value if version else wanted,
        form=form.value,
        shard_bytes=shard_mib << 20,
        memory=memory_mib << 20,
        threads=threads or min(4, os.cpu_count() or 1),
    )
    started = time.monotonic()
    prepared = engine.prepare(job)
    if not as_json:
        count = sum(len(shard.sums) for shard in prepared.merge.shards)
        size = decimal(prepared.merge.bytes)
        print(f"Vicuna {prepared.merge.version}: {count} tensors, {size}, to {job.output}")
    try:
        python = environment.python(lambda line: print(line, file=sys.stderr, flush=True))
        if made is not None and not prepared.there:
            made[1].forget(made[0])
        with _watching(as_json) as report:
            result = child.merge(job, python, report)
        learnt = _learn(*made, as_json) if made is not None else 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    seconds = time.monotonic() - started
    if as_json:
        said = {"version": 1, "command": "weights merge", "exit_code": 0}
        said |= {"seconds": round(seconds, 3), "output": str(job.output), "state": result.state}
        said |= {"delta": result.version, "rows": result.rows, "tensors": result.tensors}
        said |= {"bytes": result.bytes, "kept": result.kept, "dropped": result.dropped}
        said |= {"learnt": learnt}
        print(json.dumps(said, ensure_ascii=False))
    elif result.state == "there":
        print(f"{job.output} is there already, made by this very merge: nothing to do")
    else:
        kept = f", {decimal(result.kept)} of it from before" if result.kept else ""
        dropped = f"; without {result.dropped} inv_freq" if result.dropped else ""
        took = show.duration(seconds)
        print(f"merged in {took}{kept}: {job.output}, {result.rows} rows{dropped}")
    if learnt and not as_json:
        print(f"learnt sizes and sha256 of {learnt} files")


def _learn(name: str, where: Stores, as_json: bool) -> int:
    """Write down what a merge has made of a set, unless that is known; how many files.

    Raises FleetError, one line, for the first thing that is wrong with it.
    """
    from gpufleet import catalog
    from gpufleet.cli.weights import verify
    from gpufleet.weights import stock
    from gpufleet.weights.digests import Digests

    if catalog.weight_set(name).listed:
        return 0
    if stock.look(name, where, Digests()).state not in ("here", "verified"):
        where.forget(name)  # it is of files that were there before
    with verify.watching(as_json) as watch:
        done = stock.verify([(name, where)], watch=watch)
    if problems := done.problems():
        raise FleetError(problems[0])
    learnt = done.sets[0].learnt
    return len(learnt.files) if learnt else 0


def _folders(
    name: str | None, base: Path | None, delta: Path | None, output: Path | None, store: Path | None
) -> tuple[tuple[Path, Path, Path], Literal["v0", "v1.1"] | None, tuple[str, Stores] | None]:
    """Base, delta and output, the version that the catalogue says, the set and its store."""
    given = (base, delta, output)
    if name is None:
        if base is None or delta is None or output is None:
            raise UsageError("give a NAME of the catalogue, or --base, --delta and --output")
        if store is not None:
            raise UsageError("--store goes with a NAME, not with --base, --delta and --output")
        return (base, delta, output), None, None
    from gpufleet import catalog
    from gpufleet.weights import store as stores

    if any(given):
        raise UsageError("give either a NAME of the catalogue or --base, --delta and --output")
    made = [one for one in stores.sets([name]) if catalog.weight_set(one).made is not None]
    if not made:
        raise UsageError(f"{name}: nothing of it is merged; ./fleet weights fetch {name} gets it")
    weights = catalog.weight_set(made[0])
    assert weights.made is not None
    where = stores.Store(store or stores.default())
    found = []
    for part in (weights.made.base, weights.made.delta):
        one = catalog.weight_set(part)
        folder = where.folder(one)
        if not folder.is_dir() and one.in_checkout is not None:
            folder = stores.Store(ROOT / one.in_checkout).folder(one)
        if not folder.is_dir():
            get = where.command("fetch", part)
            raise UsageError(f"{folder}, the {one.title}, is missing: {get}")
        found.append(folder)
    output = where.folder(weights)
    return (found[0], found[1], output), weights.made.version, (made[0], where)


@contextmanager
def _watching(as_json: bool) -> Iterator[Callable[[Progress], None]]:
    """What to call with how far it is: a bar on a terminal, now and then a line in a pipe."""
    from gpufleet.cli import output

    if as_json:
        yield lambda progress: None
    elif output.on_terminal():
        from rich import progress as bars

        columns = (bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn())
        with bars.Progress(*columns, bars.TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=None)
            yield lambda progress: bar.update(task, completed=progress.done, total=progress.of)
    else:
        yield _Lines()


class _Lines:
    """A line every ten seconds, with rate and time left."""

    EVERY = 10.0

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.said < self.EVERY or not progress.done:
            return
        from rich.filesize import decimal

        self.said = now
        rate = progress.done / (now - self.began)
        left = (progress.of - progress.done) / rate
        done, of = decimal(progress.done), decimal(progress.of)
        print(f"{done} of {of}, {decimal(int(rate))}/s, {left:.0f} s left", flush=True)
