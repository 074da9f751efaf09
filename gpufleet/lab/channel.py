"""Makes the lab's own Miniconda installer and conda channel, laid out as mirror sites do."""

from __future__ import annotations

import re
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

import platformdirs

from gpufleet import ROOT
from gpufleet.alone import alone
from gpufleet.errors import FleetError
from gpufleet.lab.image import unpack
from gpufleet.lab.machine import Progress, remove_tree, run, say_nothing
from gpufleet.lab.sources import RELEASES
from gpufleet.python_env import wheelhouse
from gpufleet.python_env.plan import PYTHON, Lock

DOUBLE = Path(__file__).parent / "conda_double"
LOCK = Lock(ROOT / "requirements" / "conda-double.lock", PYTHON)

#: The installer's name, as Anaconda calls the newest one.
INSTALLER = "Miniconda3-latest-Linux-x86_64.sh"

_RELEASE = RELEASES["debian:12"]
_DEBS = ("python3.11", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib")
# Debian's python has pip write below /usr/local, and looks there: a prefix of conda's is its own.
_SCHEME = 'if sys.base_prefix != sys.prefix or hasattr(sys, "real_prefix"):\n        # virtual'
# Its site module is frozen into the program, so site-packages is added by what that imports last.
_SITE = """\
import os, site, sys
site.addsitedir(os.path.join(sys.prefix, "lib/python3.11/site-packages"))
"""


def ensure(progress: Progress = say_nothing, into: Path | None = None) -> Path:
    """The folder that a mirror serves as /anaconda: made once, then kept.

    `pkgs/main` and `cloud/conda-forge` are channels with python and pip, `miniconda/` holds the
    installer and its .sha256. Needs Debian's sources and pip on this machine; FleetError, one
    line, where they do not answer.
    """
    kept = into or platformdirs.user_cache_path("gpufleet") / "conda"
    target = kept / _digest()
    if target.exists():
        return target
    kept.mkdir(parents=True, exist_ok=True)
    with alone(kept.with_name(f"{kept.name}.flock")):
        if not target.exists():
            older = sorted(kept.iterdir(), key=lambda folder: folder.stat().st_mtime)
            for folder in older[:-2]:  # others may be served just now
                remove_tree(folder)
            progress("making the lab's Miniconda and its channel (once)", None)
            with tempfile.TemporaryDirectory(dir=kept) as scratch:
                _make(Path(scratch)).rename(target)
            target.chmod(0o755)
    return target


def checksum(anaconda: Path) -> str:
    """The sha256 of the installer in a folder that `ensure` made."""
    return (anaconda / "miniconda" / f"{INSTALLER}.sha256").read_text().split()[0]


def _digest() -> str:
    files = [*sorted(DOUBLE.glob("*.*")), Path(__file__), LOCK.path]
    return sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _make(scratch: Path) -> Path:
    wheels = wheelhouse.build(LOCK, torch_index="")
    prefix, tools = scratch / "prefix", scratch / "tools"
    _python(scratch / "debs", prefix)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(tools)
    out = scratch / "out"
    # Without -I: the packages that it imports are beside it, and nothing of this machine's.
    run(
        *("env", "-i", f"PYTHONPATH={tools}", "PYTHONDONTWRITEBYTECODE=1"),
        *(prefix / "bin" / "python", DOUBLE / "pack.py", prefix, wheels, DOUBLE, out),
    )
    return out


def _python(scratch: Path, prefix: Path) -> None:
    """Debian's python as a prefix that can lie anywhere and that pip installs into."""
    scratch.mkdir()
    usr = unpack(_DEBS, _RELEASE, scratch) / "usr"
    for kind in ("bin", "lib/python3.11"):
        (prefix / kind).parent.mkdir(parents=True, exist_ok=True)
        (usr / kind).rename(prefix / kind)
    library = prefix / "lib/python3.11"
    schemes = library / "sysconfig.py"
    text = schemes.read_text("utf-8")
    if text.count(_SCHEME) != 1:
        raise FleetError(f"{_DEBS[0]} of {_RELEASE.name} is not the one that is known here")
    schemes.write_text(text.replace(_SCHEME, "if True:\n        # virtual"), "utf-8")
    (library / "EXTERNALLY-MANAGED").unlink()
    (library / "_distutils_system_mod.py").unlink()
    (library / "sitecustomize.py").unlink(missing_ok=True)  # a link into /etc
    (library / "sitecustomize.py").write_text(_SITE)
    (library / "site-packages").mkdir()
    (library / "site-packages" / "README.txt").write_text("Python packages go here.\n")
    for name in ("python", "python3"):
        (prefix / "bin" / name).symlink_to("python3.11")
    for path in library.rglob("*"):
        # Links to what other packages of Debian would bring.
        if path.is_symlink() and not path.exists():
            path.unlink()
    for path in (prefix / "bin").iterdir():
        if path.is_symlink() and re.match(r"\.\./lib", str(path.readlink())):
            path.unlink()
