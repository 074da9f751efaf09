"""Which system serves which `model.arch`; a new system is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import DemoConfig, Section
from .engine import Engine, ModelDemoError
from .minigpt4 import settings as minigpt4


@dataclass(frozen=True)
class System:
    """How to check a system's configuration (light) and how to load it (heavy)."""

    read: Callable[[Section], Any]
    load: Callable[[Any, str, str], Engine]


def _load_minigpt4(settings: minigpt4.Settings, device: str, model_id: str) -> Engine:
    from .minigpt4.load import load

    return load(settings, device, model_id)


SYSTEMS = {"mini_gpt4": System(minigpt4.read, _load_minigpt4)}


def find(arch: str, origin: str) -> System:
    """The system of an arch; ModelDemoError names those there are."""
    if arch not in SYSTEMS:
        raise ModelDemoError(
            f"{origin}: model.arch is {arch!r}; this demo serves {', '.join(sorted(SYSTEMS))}"
        )
    return SYSTEMS[arch]


def load(config: DemoConfig, device: str = "auto", model_id: str = "pico") -> Engine:
    """Load the configured system on `auto`, `cpu` or `cuda`; raises ModelDemoError."""
    return SYSTEMS[config.arch].load(config.settings, device, model_id)
