"""What the unit tests share: a private cache, a shell that stands for a host's, a small model."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpufleet.catalog import Model
from gpufleet.settings import Settings, parse

Shell = Callable[..., subprocess.CompletedProcess[str]]

#: The small model's files, by path below the weights folder.
CONTENTS = {
    "vit.pth": b"vision tower",
    "qformer.pth": b"queries",
    "llama/config.json": b"{}\n",
    "llama/model 1.bin": b"\x00\x01" * 4096,
    "projection.pth": b"one linear layer",
    "health.png": b"a picture",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The operator's cache folder: empty, and nobody else's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "gpufleet"


@pytest.fixture
def sh() -> Shell:
    """Run a command line as a host's `sh` would, with nothing of this process's environment."""

    def run(command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        return subprocess.run(
            ["sh", "-c", str(command)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **{"env": path, **options},
        )

    return run


@pytest.fixture
def model_data(tmp_path: Path) -> dict[str, Any]:
    """A catalogue entry as it is written in YAML."""
    small = {
        "schema": 1,
        "title": "all files of the small model",
        "kind": "llama",
        "sources": [{"huggingface": "somebody/small"}],
        "evidence": {"source": "this test", "seen": "2026-11-21", "state": "verified"},
        "files": [
            {"path": path, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
            for path, text in CONTENTS.items()
        ],
    }
    own = tmp_path / "small-set.yaml"
    own.write_text(yaml.safe_dump(small), "utf-8")
    return {
        "schema": 2,
        "title": "a small model",
        "system": "mini_gpt4",
        "accelerators": ["cpu", "cuda"],
        "needs": {"disk_mib": 1000, "memory_mib": 2000},
        "minigpt4": {
            "image_size": 64,
            "num_query_token": 16,
            "vit": {"width": 128, "depth": 4, "heads": 4, "mlp_width": 256, "patch_size": 8},
            "qformer": {
                "hidden_size": 128,
                "layers": 2,
                "heads": 4,
                "intermediate_size": 256,
                "cross_attention_frequency": 1,
            },
            "vit_file": "vit.pth",
            "qformer_file": "qformer.pth",
            "llama_dir": "llama",
            "projection_file": "projection.pth",
        },
        "health": {"picture": "health.png", "question": "How many?", "answer": "Two."},
        "weights": [str(own)],
    }


@pytest.fixture
def model(model_data: dict[str, Any]) -> Model:
    return Model.model_validate(model_data)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder that holds the small model's files."""
    folder = tmp_path / "the weights"
    for path, content in CONTENTS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def settings(weights: Path) -> Settings:
    return parse({"model": "small", "weights": {"source": str(weights)}}, "host")
