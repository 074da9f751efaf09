"""What the operations' tests share: a process that pyinfra patched, and a private cache."""

from __future__ import annotations

from pathlib import Path

import pyinfra_cli  # type: ignore[import-untyped]  # noqa: F401  patches, before there are threads
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The operator's cache folder: empty, and nobody else's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpufleet"
