"""Which system serves which `model.arch`; a new system is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .clip import settings as clip
from .config import DemoConfig, Section
from .engine import Engine, ModelDemoError
from .minigpt4 import settings as minigpt4
from .starchat import settings as starchat


@dataclass(frozen=True)
class System:
    """How to check a system's configuration (light), and its class, whose import is heavy."""

    read: Callable[[Section], Any]
    engine: Callable[[], type[Engine]]


def _minigpt4() -> type[Engine]:
    from .minigpt4.engine import MiniGPT4Engine

    return MiniGPT4Engine


def _starchat() -> type[Engine]:
    from .starchat.engine import StarChatEngine

    return StarChatEngine


def _clip() -> type[Engine]:
    from .clip.engine import ClipEngine

    return ClipEngine


SYSTEMS = {
    "mini_gpt4": System(minigpt4.read, _minigpt4),
    "starchat": System(starchat.read, _starchat),
    "clip": System(clip.read, _clip),
}


def find(arch: str, origin: str) -> System:
    """The system of an arch; ModelDemoError names those there are."""
    if arch not in SYSTEMS:
        raise ModelDemoError(
            f"{origin}: model.arch is {arch!r}; this demo serves {', '.join(sorted(SYSTEMS))}"
        )
    return SYSTEMS[arch]


def load(config: DemoConfig, device: str = "auto", model_id: str = "pico") -> Engine:
    """Load the configured system on `auto`, `cpu` or `cuda`; raises ModelDemoError."""
    return SYSTEMS[config.arch].engine().load(config.settings, device, model_id)
