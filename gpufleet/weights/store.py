"""A folder on the operator's machine with the files of weight sets, and what was learnt of them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import platformdirs

from gpufleet import catalog
from gpufleet.catalog import WeightFile, WeightSet
from gpufleet.errors import FleetError


def default() -> Path:
    """Where weights are kept unless a setting or an option names another folder."""
    return platformdirs.user_data_path("gpufleet") / "weights"


@dataclass(frozen=True)
class Learnt:
    """What the first verified sight of a set told: all its files, and where they came from."""

    origin: str
    """Without an address, such as ``lmsys/vicuna-7b-delta-v0@1a2b…`` or ``merge of A and B``."""
    files: tuple[WeightFile, ...]
    """Paths are below the set's folder."""
    at: str = field(default="")
    """The day, ISO 8601."""


class Store:
    """The weight files below a folder. `learn` is all that writes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, weights: WeightSet) -> Path:
        """Where a set's files lie."""
        return self.root / weights.folder if weights.folder else self.root

    def command(self, verb: str, name: str, *options: str) -> str:
        """The command line that does something with a set in this store."""
        words = ["./fleet weights", verb, name, *options]
        if self.root.absolute() != default():
            words += ["--store", shlex.quote(str(self.root))]
        return " ".join(words)

    def learnt(self, name: str) -> Learnt | None:
        """What was learnt of a set here. Raises FleetError for a record that makes no sense."""
        path = self._record(name)
        try:
            said = json.loads(path.read_text("utf-8"))
            files = tuple(WeightFile(**one) for one in said.pop("files"))
            return Learnt(files=files, **said)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FleetError(f"{path}: {error.strerror}: check its permissions") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            line = f"{path}: not a record of learnt files: remove it, then"
            raise FleetError(f"{line} {self.command('verify', name)}") from None

    def learn(self, name: str, learnt: Learnt) -> None:
        """Write down what a verified sight of a set told; whole or not at all.

        Raises FleetError where the store cannot be written.
        """
        path = self._record(name)
        aside = path.with_suffix(f".{os.getpid()}")
        files = [one.model_dump() for one in learnt.files]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps({**asdict(learnt), "files": files}, indent=1), "utf-8")
            aside.replace(path)
        except OSError as error:
            raise FleetError(
                f"cannot write {path}: {error.strerror}: make the store writable, or copy "
                "the files to one that is: what they must be cannot be noted"
            ) from None

    def forget(self, name: str) -> None:
        """Drop what was learnt of a set, which is about to be another one. Raises FleetError."""
        path = self._record(name)
        try:
            if path.exists():
                path.unlink()
        except OSError as error:
            line = f"cannot remove {path}: {error.strerror}: make the store writable"
            raise FleetError(line) from None

    def files(self, name: str) -> tuple[WeightFile, ...]:
        """Every file of a set, wholly known, with its path below the store.

        The catalogue's word goes before what was learnt. Raises FleetError, one line, where size
        or sha256 of a file, or the list of files, is not known yet.
        """
        weights = catalog.weight_set(name)
        record = self.learnt(name)
        learnt = {file.path: file for file in record.files} if record else {}
        found: dict[str, WeightFile] = {}
        for listed in weights.files:
            other = learnt.get(listed.path)
            size = other.bytes if listed.bytes is None and other else listed.bytes
            sha256 = other.sha256 if listed.sha256 is None and other else listed.sha256
            if size is None or sha256 is None:
                raise FleetError(self._unknown(name, weights, listed.path))
            found[listed.path] = WeightFile(path=listed.path, bytes=size, sha256=sha256)
        if not weights.listed:
            if record is None:
                raise FleetError(self._unknown(name, weights))
            found |= {path: file for path, file in learnt.items() if path not in found}
        return tuple(
            file.model_copy(update={"path": weights.place(file.path)}) for file in found.values()
        )

    def _record(self, name: str) -> Path:
        return self.root / ".learnt" / f"{Path(name).stem}.json"

    def _unknown(self, name: str, weights: WeightSet, path: str = "") -> str:
        what = f"the sha256 of {path} is" if path else "its files are"
        ways = [self.command("merge", name)] if weights.made else []
        ways += [self.command("fetch", name)] if weights.sources else []
        how = " or ".join(ways)
        return f"weight set {name}: {what} not known yet: {how}, or {self.command('verify', name)}"


def sets(names: Sequence[str]) -> list[str]:
    """The weight sets that are meant by names of models and of sets, each once, in order.

    Raises UsageError for a name of neither, listing near ones.
    """
    found: dict[str, None] = {}
    for name in names:
        if name in catalog.names():
            found |= dict.fromkeys(catalog.model(name).weights)
        else:
            catalog.weight_set(name)
            found[name] = None
    return list(found)


def files(names: Sequence[str], store: Store) -> tuple[WeightFile, ...]:
    """The files of several sets, each path once. Raises FleetError as `Store.files` does."""
    every = {file.path: file for name in names for file in store.files(name)}
    return tuple(every.values())
