"""What CLIP reads from its configuration, with every file checked before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..engine import ModelDemoError
from ..hub_folder import WEIGHTS, Settings, read_path
from ..hub_folder import read as read_folder
from ..minigpt4.files import check_file
from ..precision import read_precision

if TYPE_CHECKING:
    from ..config import Section

# The words of OpenAI's own tokenizer, as its package has them.
WORDS = "bpe_simple_vocab_16e6.txt.gz"


def read(model: Section) -> Settings:
    """Its folder and precision; raises ModelDemoError, one line that names file and key."""
    folder = read_path(model)
    if archive(folder):
        settings = _openai(folder, model)
    else:
        settings = read_folder(
            model, ("tokenizer.json", "vocab.json"), ("preprocessor_config.json",)
        )
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


def archive(folder: Path) -> Path | None:
    """OpenAI's own file, where the folder holds it in place of Hugging Face's."""
    found = sorted(folder.glob("*.pt"))
    theirs = any((folder / name).is_file() for name in WEIGHTS)
    return found[0] if found and not theirs else None


def _openai(folder: Path, model: Section) -> Settings:
    file = archive(folder)
    assert file
    check_file(file)
    if not (folder / WORDS).is_file():
        raise ModelDemoError(
            f"{folder}: {file.name} without {WORDS}, the tokenizer's words; copy it from OpenAI's "
            "clip package"
        )
    check_file(folder / WORDS)
    return Settings(folder, read_precision(model))
