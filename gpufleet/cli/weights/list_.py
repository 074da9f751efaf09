"""fleet weights list: what of the models' files is here, what is missing, and how to get it.

The document of `fleet weights list --json` (`version` 1); what is unknown is null:

    {"version": 1, "command": "weights list", "exit_code": 0,
     "sets": [{"name": NAME, "title": TEXT, "kind": KIND, "folder": DIR,
               "state": "verified"|"here"|"partial"|"missing"|"wrong",
               "bytes": N, "here": N, "lacks": TEXT, "pairs": [NAME, …],
               "made": {"base": NAME, "delta": NAME, "version": "v0"|"v1.1"},
               "next": [COMMAND, …],
               "files": [{"path": PATH, "state": as above, "bytes": N, "here": N,
                          "sha256": HEX, "known": "catalogue"|"learnt"|"no",
                          "problem": LINE}, …]}, …],
     "models": [{"name": NAME, "title": TEXT, "state": as above,
                 "weights": [NAME, …]}, …]}

`here` as a state: whole by its size, and not hashed since it last changed; as a number: bytes that
are there, of unfinished downloads too. `known` is where the sha256 is from. `next` are commands,
each of which would complete or mend the set.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpufleet.cli import options

if TYPE_CHECKING:
    from gpufleet.catalog import Model
    from gpufleet.weights.stock import File, Stock
    from gpufleet.weights.store import Store

VERSION = 1


def list_sets(
    names: options.Names = None, store: options.Store = None, as_json: options.Json = False
) -> None:
    """Show what of the models' files is on this machine and what to do for the rest.

    With a set that is to be merged come the two that it is made of, as long as it is not there.
    Looks at names and sizes only; what `verify` hashed before and has not changed since counts as
    verified. Without NAME: all of the catalogue.
    """
    from gpufleet import catalog
    from gpufleet.cli import output
    from gpufleet.weights import stock
    from gpufleet.weights.digests import Digests

    digests = Digests()
    stocks = [stock.look(name, where, digests) for name, where in chosen(names, store)]
    for one in [one for one in stocks if one.state in ("missing", "partial", "wrong")]:
        made = one.weights.made
        for name in (made.base, made.delta) if made else ():
            if all(other.name != name for other in stocks):
                stocks.append(stock.look(name, stock.place(name, store), digests))
    by_name = {one.name: one for one in stocks}
    models = {
        name: catalog.model(name)
        for name in (catalog.names() if names is None else names)
        if name in catalog.names()
    }
    if as_json:
        document = {
            "version": VERSION,
            "command": "weights list",
            "exit_code": 0,
            "sets": [described(one) for one in stocks],
            "models": [_model(name, model, by_name) for name, model in models.items()],
        }
        print(json.dumps(document, ensure_ascii=False))
        return
    headings = ["SET", "STATE", "FILES", "SIZE", "SHA256", "FITS", "NEXT"]
    output.print_rows(headings, [_row(one) for one in stocks])
    print("NEXT is ./fleet weights merge, fetch or verify SET; --json has the whole commands")
    if models:
        print()
        rows = [
            [name, _state(model, by_name), ", ".join(model.weights)]
            for name, model in models.items()
        ]
        output.print_rows(["MODEL", "STATE", "SETS"], rows)


def chosen(names: list[str] | None, store: Path | None) -> list[tuple[str, Store]]:
    """The sets that are meant, each with the store to look in; without names, all."""
    from gpufleet import catalog
    from gpufleet.weights import stock
    from gpufleet.weights.store import sets

    wanted = catalog.weight_sets() if names is None else sets(names)
    return [(name, stock.place(name, store)) for name in wanted]


def size(number: int | None) -> str:
    """Bytes as a person reads them: 13.5 GB."""
    if number is None:
        return "?"
    amount, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _row(one: Stock) -> list[str]:
    whole = sum(file.state in ("verified", "here") for file in one.files)
    of = f"{len(one.files)}" if one.files and not one.lacks else "?"
    amount = size(one.bytes if one.bytes is not None else one.here or None)
    if one.bytes is not None and one.here not in (0, one.bytes):
        amount = f"{size(one.here)} of {amount}"
    known = {file.known for file in one.files}
    hashes = "-" if not known else "some" if len(known) > 1 and "no" in known else min(known)
    fits = ", ".join(one.weights.pairs)
    verbs = " or ".join(
        re.sub(r"^\./fleet weights (\w+) .*", r"\1", command) for command in one.next
    )
    return [one.name, one.state, f"{whole}/{of}", amount, hashes, fits, verbs]


def _state(model: Model, stocks: dict[str, Stock]) -> str:
    """Of the model: that of its worst set, `partial` where some are there."""
    states = {stocks[name].state for name in model.weights}
    if len(states) == 1:
        return states.pop()
    if "wrong" in states:
        return "wrong"
    return "partial" if states & {"missing", "partial"} else "here"


def described(one: Stock) -> dict[str, Any]:
    """A set as the JSON documents of list and verify have it."""
    made = one.weights.made
    return {
        "name": one.name,
        "title": one.weights.title,
        "kind": one.weights.kind,
        "folder": str(one.folder),
        "state": one.state,
        "bytes": one.bytes,
        "here": one.here,
        "lacks": one.lacks or None,
        "pairs": list(one.weights.pairs),
        "made": made.model_dump() if made else None,
        "next": list(one.next),
        "files": [_file(one, file) for file in one.files],
    }


def _file(one: Stock, file: File) -> dict[str, Any]:
    return {
        "path": file.path,
        "state": file.state,
        "bytes": file.bytes,
        "here": file.here,
        "sha256": file.sha256,
        "known": file.known,
        "problem": one.line(file) or None,
    }


def _model(name: str, model: Model, stocks: dict[str, Stock]) -> dict[str, Any]:
    return {
        "name": name,
        "title": model.title,
        "state": _state(model, stocks),
        "weights": list(model.weights),
    }
