"""What StarChat reads from its configuration, with every file checked before anything loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hub_folder import Settings
from ..hub_folder import read as read_folder

if TYPE_CHECKING:
    from ..config import Section


def read(model: Section) -> Settings:
    """Its folder and precision; raises ModelDemoError, one line that names file and key."""
    return read_folder(model, ("tokenizer.json",))
