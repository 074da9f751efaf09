"""Finds or makes what has torch on the operator's machine: merging needs it, nothing else does."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpufleet import ROOT
from gpufleet.errors import FleetError
from gpufleet.python_env.plan import PYTHON, Lock
from gpufleet.settings import PythonEnv

_OWN, _DEMO = ROOT / ".venv-merge", ROOT / ".venv-demo"
_STAMP = ".installed-from"

#: Of torch without CUDA and typing-extensions, seen on Linux: download and on the disk.
_SIZE = "192 MB, 700 MB on the disk"


@dataclass(frozen=True)
class Python:
    """An interpreter that can import torch, once `path` is on its PYTHONPATH."""

    executable: str
    path: tuple[str, ...]


def python(say: Callable[[str], None]) -> Python:
    """The interpreter that merges; installs torch beside .venv on first use, saying so.

    Torch without CUDA comes from where pip is configured to look and, failing that, from
    PyTorch's wheel site. The environment of the demo's tests does as well, where it is there.

    Raises FleetError, one line, where there is no interpreter or no build of torch.
    """
    if (_DEMO / _STAMP).is_file():
        return Python(str(_DEMO / "bin" / "python"), ())
    lock, executable = _lock()
    folder = _OWN / lock.digest
    if not folder.is_dir():
        say(f"installing torch without CUDA into {_OWN.name}, once ({_SIZE})")
        _install(lock, folder)
    return Python(executable, (str(folder),))


def _lock() -> tuple[Lock, str]:
    """The lock of this system, and an interpreter that it is for."""
    own = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Lock(ROOT / "requirements" / "merge-macos.lock", own), sys.executable
    if sys.platform != "linux" or platform.machine() != "x86_64":
        system = f"{platform.system()} on {platform.machine()}"
        raise FleetError(
            f"torch for merging is locked for Linux on x86_64 and macOS on arm64, not {system}: "
            "merge on another machine"
        )
    # The build without CUDA is one file a Python version, and its hash is in the lock.
    executable = sys.executable if own == PYTHON else shutil.which(PYTHON)
    if executable is None:
        raise FleetError(
            f"merging needs {PYTHON}, which torch is locked for: install it, or make .venv with it"
        )
    return Lock(ROOT / "requirements" / "merge-linux.lock", PYTHON), executable


def _install(lock: Lock, folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "tmp").mkdir(parents=True)
    try:
        common, local = lock.split()
        _pip(common, lock, aside)
        if local:
            index = PythonEnv().torch_index
            try:
                _pip(local, lock, aside)
            except FleetError:
                _pip(local, lock, aside, "--index-url", index)
        shutil.rmtree(aside / "tmp")
        if not folder.is_dir():  # another first use may have been faster
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _pip(requirements: str, lock: Lock, folder: Path, *options: str) -> None:
    listed = folder / "tmp" / "wanted.txt"
    listed.write_text(requirements, "utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--target", str(folder), "--requirement", str(listed)]
    if lock.python != f"python{sys.version_info.major}.{sys.version_info.minor}":
        version = lock.python.removeprefix("python")
        command += ["--implementation", "cp", "--python-version", version]
        for tag in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64"):
            command += ["--platform", tag]
    # Torch is too large for many a temporary folder.
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = (errors or done.stderr.strip().splitlines() or ["pip said nothing"])[0]
        raise FleetError(
            f"pip cannot install {lock.path.name} ({said.removeprefix('ERROR: ')}): "
            "check `pip config list` and the network of this machine"
        )
