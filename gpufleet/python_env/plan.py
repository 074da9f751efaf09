"""Decides which environment a host needs, from the lock files, and whether it is whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpufleet import ROOT
from gpufleet.errors import FleetError
from gpufleet.settings import Settings

#: The interpreter that the locks are made for (requirements/lock).
PYTHON = "python3.11"

#: Packages of a lock that the index may lack: builds of torch without CUDA have a local version.
_LOCAL_VERSION = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+\+[^\s;\\]+)", re.MULTILINE)


@dataclass(frozen=True)
class Lock:
    """A requirements file of exact versions with hashes, and the interpreter it is for."""

    path: Path
    python: str

    @property
    def text(self) -> str:
        """The file's text."""
        return self.path.read_text("utf-8")

    @property
    def digest(self) -> str:
        """16 hex digits that name the environment: the lock and its interpreter."""
        return hashlib.sha256(f"{self.python}\n{self.text}".encode()).hexdigest()[:16]

    def split(self) -> tuple[str, str]:
        """The lock in two: what any index has, and what needs the index of local versions."""
        common: list[str] = []
        local: list[str] = []
        for requirement in re.split(r"\n(?=\S)", self.text.strip()):
            (local if _LOCAL_VERSION.match(requirement) else common).append(requirement)
        return "\n".join([*common, ""]), "\n".join([*local, ""]) if local else ""


#: The lock of the tool that makes the environment on the host.
UV_LOCK = Lock(ROOT / "files" / "demo" / "uv.lock", PYTHON)


def lock_for(accelerator: str) -> Lock:
    """The lock of the demo's environment. Raises FleetError where this version has none."""
    path = ROOT / "files" / "demo" / f"{accelerator}.lock"
    if not path.is_file():
        raise FleetError(
            f"no locked environment for accelerator {accelerator}: "
            f"files/demo/{accelerator}.lock is missing; take the file from the repository"
        )
    return Lock(path, PYTHON)


def each_downloads(settings: Settings) -> bool:
    """Whether every host downloads the lock's wheels for itself: torch for GPUs and CUDA's
    libraries are 2.8 GiB, too much for a laptop's line to carry to each of a fleet's hosts."""
    source = settings.python_env.source
    return source == "index" or (source == "auto" and settings.accelerator == "cuda")


@dataclass(frozen=True)
class Environments:
    """The environments of a host by digest, which of them are whole, and its conda."""

    whole: frozenset[str]
    all: frozenset[str]
    conda: str = ""
    """The sha256 of the installer that made ROOT/conda, `half` if that is not whole, or empty."""
    written: frozenset[str] = frozenset()
    """gpufleet's records of files that it wrote for login shells."""

    def records(self, paths: Iterable[str]) -> bool:
        """Whether gpufleet wrote any of these files."""
        return any(record.endswith(path) for record in self.written for path in paths)


def parse(lines: Iterable[str]) -> Environments:
    """Read the EnvironmentsOnHost fact's lines: `whole` or `half`, tab, digest; others by key."""
    pairs = [(key, value) for key, _, value in (line.partition("\t") for line in lines)]
    return Environments(
        frozenset(value for key, value in pairs if key == "whole"),
        frozenset(value for key, value in pairs if key in ("whole", "half")),
        next((value for key, value in pairs if key == "conda"), ""),
        frozenset(value for key, value in pairs if key == "written"),
    )
