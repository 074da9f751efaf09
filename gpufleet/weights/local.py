"""Verifies weight files on the operator's machine, hashing each once until it changes."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import platformdirs

from gpufleet import ROOT, catalog
from gpufleet.catalog import Model, WeightFile
from gpufleet.settings import Settings
from gpufleet.weights import store
from gpufleet.weights.store import Store

_BLOCK = 1 << 22


def source(settings: Settings, model: Model) -> Path:
    """The folder that holds the model's files: the setting's, the checkout's or the store."""
    if settings.weights.source is not None:
        return Path(settings.weights.source).expanduser()
    inside = {catalog.weight_set(name).in_checkout for name in model.weights}
    if len(inside) == 1 and (own := inside.pop()) is not None:
        return ROOT / own
    return store.default()


def files(settings: Settings, model: Model) -> tuple[WeightFile, ...]:
    """Every file that a host needs for the model; paths are below `source`.

    Raises FleetError, one line, where the catalogue does not know a file and nothing was learnt.
    """
    return store.files(model.weights, Store(source(settings, model)))


def check_source(settings: Settings, model: Model) -> list[str]:
    """Everything that is wrong with the model's files on this machine, a line a file."""
    folder = source(settings, model)
    if not folder.is_dir():
        return [f"weights.source: no folder {folder}: ./fleet weights fetch {settings.model}"]
    with _Digests() as digests:
        return [
            problem
            for file in files(settings, model)
            if (problem := _problem(folder, file, digests))
        ]


def _problem(folder: Path, file: WeightFile, digests: _Digests) -> str | None:
    path = folder / file.path
    fetch = "fetch it again"
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"weight file {path}: {size} bytes, expected {file.bytes}: {fetch}"
        sha256 = digests.of(path)
    except FileNotFoundError:
        return f"weight file {path} is missing: fetch it"
    except OSError as error:
        return f"weight file {path}: {error.strerror}: check its permissions and the disk"
    if sha256 != file.sha256:
        return (
            f"weight file {path} is corrupt: sha256 {sha256[:12]}… is not the catalogue's: {fetch}"
        )
    return None


class _Digests:
    """sha256 by file, remembered between runs while size, mtime and inode stay the same."""

    def __init__(self) -> None:
        self._path = platformdirs.user_cache_path("gpufleet") / "sha256.json"
        self._known: dict[str, list[object]] = {}

    def __enter__(self) -> _Digests:
        try:
            self._known = dict(json.loads(self._path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}  # a cache: without it, files are hashed again
        self._before = dict(self._known)
        return self

    def __exit__(self, *_: object) -> None:
        if self._known == self._before:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside = self._path.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps(self._known), "utf-8")
            aside.replace(self._path)

    def of(self, path: Path) -> str:
        """Hex digest of a file."""
        stat = path.stat()
        key = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(path.resolve()))
        if known is not None and known[:3] == key:
            return str(known[3])
        hasher = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                hasher.update(block)
        self._known[str(path.resolve())] = [*key, hasher.hexdigest()]
        return hasher.hexdigest()
