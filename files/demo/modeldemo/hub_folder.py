"""Looks at a folder in the Hugging Face layout before anything heavy is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .engine import ModelDemoError
from .minigpt4.files import check_file, check_path
from .precision import Precision, read_precision

if TYPE_CHECKING:
    from .config import Section


# In order of preference: an index of shards, or the one file.
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Settings:
    """A model that one folder holds, and the precision of its weights in memory."""

    folder: Path
    precision: Precision = "auto"


def read(model: Section, *needed: tuple[str, ...]) -> Settings:
    """The `model` section of a system whose files are all in the folder `model.path`.

    Each of `needed` is a group of file names of which one must be there whole. Raises
    ModelDemoError, one line that names file and key.
    """
    precision = read_precision(model)
    folder = read_path(model)
    for names in (("config.json",), *needed):
        there = [folder / name for name in names if (folder / name).is_file()]
        if not there:
            raise ModelDemoError(
                f"{folder}: no {' or '.join(names)}; copy it from the model's repository"
            )
        check_file(there[0])
    for file in weight_files(folder):
        check_file(file)
    return Settings(folder, precision)


def read_path(model: Section) -> Path:
    """The folder `model.path`, absolute and there; raises ModelDemoError."""
    folder = check_path(model.get("path", str), "model.path", Path(model.origin("path")))
    if not folder.is_dir():
        raise ModelDemoError(f"{folder}: not a directory; model.path is the model's own folder")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: the first of WEIGHTS that is whole.

    Repositories have several, and people fetch one of them with the indexes of all. Raises
    ModelDemoError where none is whole.
    """
    found = [_listed(folder / name) for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise ModelDemoError(
            f"{folder}: no weights ({', '.join(WEIGHTS)}); bring the model's own folder there, in "
            "Hugging Face's layout"
        )
    # None is whole: the check of its files says what the first lacks.
    return next((files for files in found if all(map(Path.is_file, files))), found[0])


def _listed(file: Path) -> list[Path]:
    if not file.name.endswith(".index.json"):
        return [file]
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        return [file.parent / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelDemoError(f"{file}: not a shard index; fetch it again") from error
