"""Operations that make the demo's environment on a host."""

from __future__ import annotations

from collections.abc import Generator
from io import StringIO
from shlex import quote

from pyinfra import host
from pyinfra.api import FileUploadCommand, QuoteString, RsyncCommand, StringCommand, operation

from gpufleet.errors import FleetError
from gpufleet.python_env import wheelhouse
from gpufleet.python_env.facts import EnvironmentsOnHost
from gpufleet.python_env.plan import UV_LOCK, Lock
from gpufleet.shell import failing, script

# $1 folder of the deploy, $2 digest, $3 interpreter, then uv's options for where wheels come from.
# uv unpacks a wheel once, into its cache, and hard-links it into the environment. The marker is
# written last, so an environment that has it is whole.
_MAKE = r"""set -e
umask 022
root=$1 digest=$2 python=$3; shift 3
new=$root/envs/$digest wheels=$root/incoming/$digest
rm -rf "$new"
"$python" -m zipfile -e "$wheels"/uv-*.whl "$wheels/uv"
uv=$(ls "$wheels"/uv/uv-*.data/scripts/uv); chmod 755 "$uv"
export UV_CACHE_DIR="$root/incoming/cache" UV_PYTHON_DOWNLOADS=never
export UV_SYSTEM_CERTS=1 UV_NO_PROGRESS=1
"$uv" venv --quiet --no-project --python "$python" "$new"
"$uv" pip sync --quiet --python "$new/bin/python" --require-hashes "$@" "$wheels/requirements.lock"
"$uv" pip check --quiet --python "$new/bin/python"
rm -f "$new/.lock"  # uv leaves it writable for everybody
printf '%s\n' "$digest" > "$new/.whole"
rm -rf "$root/incoming/cache" "$wheels"
"""


@operation()
def environment(
    *, root: str, lock: Lock, from_index: bool, torch_index: str
) -> Generator[RsyncCommand | FileUploadCommand | StringCommand]:
    """Make the environment of a lock at ROOT/envs/DIGEST, unless it is there and whole.

    The operator's pip downloads the wheels, once for all hosts, and rsync brings them. With
    `from_index` it brings uv's own alone, and the host downloads the rest for itself.
    """
    if lock.digest in host.get_fact(EnvironmentsOnHost, root=root).whole:
        host.noop(f"environment {lock.digest} is whole")
        return
    incoming = f"{root}/incoming/{lock.digest}"
    # First of all, so that finding out what would change does not start a download.
    yield StringCommand("mkdir -p", QuoteString(incoming))
    try:
        folders = [wheelhouse.build(UV_LOCK, torch_index)]
        if not from_index:
            folders.append(wheelhouse.build(lock, torch_index))
    except FleetError as error:
        yield failing(str(error))
        return
    # Wheels are compressed already; what a cut-off transfer brought is kept and continued.
    sources = " ".join(quote(f"{folder}/") for folder in folders)
    flags = ["-rt", "--partial", "--include='*.whl'", "--exclude='*'", "--chmod=F644,D755"]
    yield RsyncCommand(sources, quote(f"{incoming}/"), flags)
    if from_index:
        # Safe beside the default index: every file must have the hash that the lock names.
        options = ["--index", torch_index, "--index-strategy", "unsafe-best-match"]
    else:
        options = ["--offline", "--no-index", "--find-links", incoming]
    yield FileUploadCommand(StringIO(lock.text), f"{incoming}/requirements.lock")
    yield script(_MAKE, root, lock.digest, f"/usr/bin/{lock.python}", *options)


@operation()
def prune(*, root: str, keep: str) -> Generator[StringCommand]:
    """Remove environments that no lock asks for any more; `keep` is the one that is in use."""
    others = sorted(host.get_fact(EnvironmentsOnHost, root=root).all - {keep})
    if not others:
        host.noop("no other environments")
        return
    yield StringCommand("rm -rf", *(QuoteString(f"{root}/envs/{digest}") for digest in others))
