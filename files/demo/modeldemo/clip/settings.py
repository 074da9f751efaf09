"""What CLIP reads from its configuration, with every file checked before anything loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine import ModelDemoError
from ..hub_folder import Settings
from ..hub_folder import read as read_folder

if TYPE_CHECKING:
    from ..config import Section


def read(model: Section) -> Settings:
    """Its folder and precision; raises ModelDemoError, one line that names file and key."""
    settings = read_folder(model, ("tokenizer.json", "vocab.json"), ("preprocessor_config.json",))
    folder = settings.folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
        raise ModelDemoError(
            f"{folder}: vocab.json without merges.txt; copy it from the model's repository"
        )
    if settings.precision in ("8bit", "4bit"):
        raise ModelDemoError(
            f"{model.origin('precision')}: model.precision is {settings.precision}; CLIP is small "
            "and its numbers are the answer: set it to auto, which is fp32"
        )
    return settings
