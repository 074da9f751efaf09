"""Looks at a folder in the Hugging Face layout before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .engine import ModelDemoError
from .minigpt4.files import check_file, check_path, shards
from .precision import Precision, read_precision

if TYPE_CHECKING:
    from .config import Section


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
    folder = check_path(model.get("path", str), "model.path", Path(model.origin("path")))
    if not folder.is_dir():
        raise ModelDemoError(f"{folder}: not a directory; model.path is the model's own folder")
    for names in (("config.json",), *needed):
        there = [folder / name for name in names if (folder / name).is_file()]
        if not there:
            raise ModelDemoError(
                f"{folder}: no {' or '.join(names)}; copy it from the model's repository"
            )
        check_file(there[0])
    for shard in shards(folder):
        check_file(shard)
    return Settings(folder, precision)
