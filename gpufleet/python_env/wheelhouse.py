"""Collects the wheels of a lock on the operator's machine, with the operator's own pip."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import platformdirs

from gpufleet.alone import alone
from gpufleet.errors import FleetError
from gpufleet.python_env.plan import Lock

#: Wheel tags that a supported host accepts (glibc 2.28 and newer, x86_64), newest first: PEP 600.
_PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux_2_12_x86_64"),
    *("manylinux1_x86_64", "manylinux_2_5_x86_64", "linux_x86_64"),
]


_this_process = threading.Lock()


def cache() -> Path:
    """Where wheelhouses are kept between runs."""
    return platformdirs.user_cache_path("gpufleet") / "wheelhouse"


def build(lock: Lock, torch_index: str, into: Path | None = None) -> Path:
    """Download every wheel of the lock, hashes checked, and return the folder that holds them.

    A folder that is whole is returned at once; a download that was cut off continues. Wheels with
    a local version, such as torch's build without CUDA, come from where pip is configured to look
    and, failing that, from `torch_index`.

    Raises FleetError, one line, if a wheel cannot be had.
    """
    parent = into or cache()
    folder = parent / lock.digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FleetError(f"cannot make {folder}: {error.strerror}; check its parent") from None
    with _this_process, alone(parent / f"{lock.digest}.flock"):
        whole = folder / ".whole"
        if not whole.exists():
            common, local = lock.split()
            _download(common, lock, folder)
            if local:
                _download_local(local, lock, folder, torch_index)
            (folder / "requirements.lock").write_text(lock.text, "utf-8")
            whole.touch()
            _forget_others(parent, keep=folder)
    return folder


def _pip(requirements: str, lock: Lock, folder: Path, *options: str) -> str | None:
    """Run pip download; None if it went well, else its last line."""
    listed = folder / "wanted.txt"
    listed.write_text(requirements, "utf-8")
    version = lock.python.removeprefix("python")
    abi = "cp" + version.replace(".", "")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--dest", str(folder), "--requirement", str(listed)]
    command += ["--implementation", "cp", "--python-version", version]
    for tag in (abi, "abi3", "none"):
        command += ["--abi", tag]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    listed.unlink()
    if done.returncode == 0:
        return None
    mismatch = re.search(r"^\s*(\S+==\S+) from .*:\n\s*Expected sha256", done.stderr, re.MULTILINE)
    if mismatch is not None:
        return f"{mismatch[1]} does not have the lock's hash"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or done.stderr.strip().splitlines() or ["pip said nothing"])[0]


def _download(requirements: str, lock: Lock, folder: Path) -> None:
    problem = _pip(requirements, lock, folder)
    if problem is not None:
        raise FleetError(
            f"pip cannot download {lock.path.name} ({problem.removeprefix('ERROR: ')}): "
            "check `pip config list` and the network of this machine"
        )


def _download_local(requirements: str, lock: Lock, folder: Path, torch_index: str) -> None:
    if _pip(requirements, lock, folder) is None:
        return
    problem = _pip(requirements, lock, folder, "--index-url", torch_index)
    if problem is not None:
        raise FleetError(
            f"pip finds no {requirements.split()[0]} where it is configured to look, nor at "
            f"{torch_index} ({problem.removeprefix('ERROR: ')}): set python_env.torch_index"
        )


def _forget_others(parent: Path, keep: Path) -> None:
    """Remove whole wheelhouses of older locks: each holds hundreds of MiB."""
    whole = [folder for folder in parent.iterdir() if (folder / ".whole").exists()]
    for folder in sorted(whole, key=lambda f: (f / ".whole").stat().st_mtime)[:-3]:
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
