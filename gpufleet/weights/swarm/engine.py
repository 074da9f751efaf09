"""Has this machine's pip download libtorrent for the python of a host, hash for hash."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import platformdirs

from gpufleet import ROOT
from gpufleet.alone import alone
from gpufleet.errors import FleetError

LOCK = ROOT / "files" / "swarm" / "libtorrent.lock"


def wheel(tag: str, machine: str) -> Path:
    """The wheel for an interpreter, such as cp311, on a machine, such as x86_64.

    Raises FleetError, one line, if there is none or pip cannot have it.
    """
    locked = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    folder = platformdirs.user_cache_path("gpufleet") / "swarm" / f"{locked}-{tag}-{machine}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / ".flock"):
            if not (folder / ".whole").exists():
                _download(tag, machine, folder)
                (folder / ".whole").touch()
    except OSError as error:
        raise FleetError(f"{folder}: {error.strerror}: check its disk and permissions") from None
    return next(folder.glob("*.whl"))


def _download(tag: str, machine: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--dest", str(folder), "--requirement", str(LOCK), "--implementation", "cp"]
    command += ["--python-version", f"{tag[2]}.{tag[3:]}", "--abi", tag]
    command += ["--platform", f"manylinux_2_17_{machine}", "--platform", f"manylinux2014_{machine}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = (errors or ["ERROR: pip said nothing"])[-1].removeprefix("ERROR: ")
        raise FleetError(f"no {LOCK.stem} for {tag} on {machine}: {why}")
