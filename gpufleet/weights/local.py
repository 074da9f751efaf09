"""Verifies weight files on the operator's machine, hashing each once until it changes."""

from __future__ import annotations

from pathlib import Path

from gpufleet import ROOT, catalog
from gpufleet.catalog import Model, WeightFile
from gpufleet.settings import Settings
from gpufleet.weights import stock, store
from gpufleet.weights.store import Store


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
    """Everything that is wrong with the model's files on this machine, a line each.

    Raises FleetError as `files` does, where nothing is wrong but something is not known.
    """
    folder = source(settings, model)
    if not folder.is_dir():
        get = Store(folder).command("fetch", settings.model)
        return [f"weights.source: no folder {folder}: {get}"]
    sets = [(name, Store(folder)) for name in model.weights]
    models = {settings.model: model.weights}
    found = stock.verify(sets, learn=False, models=models).problems()
    if not found:
        files(settings, model)
    return found
