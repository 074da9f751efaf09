"""Operations on managed files: write them whole and validated, put back what was there before."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from io import StringIO
from pathlib import PurePosixPath

from pyinfra import host
from pyinfra.api import FileUploadCommand, StringCommand, operation

from gpufleet.managed.facts import STATE, ManagedFiles
from gpufleet.managed.plan import ManagedFile, differing
from gpufleet.shell import script

# $1 new file, $2 destination, $3 mode, $4 owner, $5 group. The original is kept once, before the
# first write; a rename within the folder makes the change atomic.
_INSTALL = f"""set -e
umask 022
o={STATE}/originals"$2"
if [ ! -e "$o" ] && [ ! -h "$o" ] && [ ! -e "$o.absent" ]; then
  mkdir -p "${{o%/*}}"
  if [ -e "$2" ]; then cp -a "$2" "$o.copy"; mv "$o.copy" "$o"; else : > "$o.absent"; fi
fi
mkdir -p "${{2%/*}}" {STATE}/written"${{2%/*}}"
install -m "$3" -o "$4" -g "$5" "$1" "$2.gpufleet-new"
mv -f "$2.gpufleet-new" "$2"
sha256sum < "$2" | cut -d" " -f1 > {STATE}/written"$2"
rm -f "$1"
"""

# $1 path. Refuses if somebody edited the file since gpufleet wrote it.
_RESTORE = f"""set -e
o={STATE}/originals"$1"
if [ ! -e "$o" ] && [ ! -h "$o" ] && [ ! -e "$o.absent" ]; then  # an earlier run was cut off here
  rm -f {STATE}/written"$1"
  exit 0
fi
if [ -e "$1" ] && [ "$(sha256sum < "$1" | cut -d" " -f1)" != "$(cat {STATE}/written"$1")" ]; then
  echo "$1 was edited since gpufleet wrote it: keep your version by removing \
{STATE}/written$1, or delete $1, then apply again" >&2
  exit 1
fi
if [ -e "$o.absent" ]; then rm -f "$1"; rm -f "$o.absent"; else mv -f "$o" "$1"; fi
rm -f {STATE}/written"$1"
"""


@operation()
def files(wanted: Sequence[ManagedFile]) -> Generator[FileUploadCommand | StringCommand]:
    """Write each file that differs: uploaded aside, validated, then renamed into place.

    The bytes that were there before gpufleet's first write are kept and can be restored.
    """
    paths = tuple(file.path for file in wanted)
    changed = differing(wanted, host.get_fact(ManagedFiles, paths=paths)) if paths else []
    if not changed:
        host.noop("all files are as they should be")
        return
    incoming = f"{STATE}/incoming"
    yield StringCommand("install -d -m 700", incoming)
    for file in changed:
        new = f"{incoming}/{PurePosixPath(file.path).name}"
        yield FileUploadCommand(StringIO(file.content), new)
        if file.validate is not None:
            yield StringCommand(file.validate.replace("{}", new), ">&2")
        yield script(_INSTALL, new, file.path, file.mode, file.owner, file.group)


@operation()
def restored(paths: Sequence[str]) -> Generator[StringCommand]:
    """Put back, byte for byte, what lay at each path before gpufleet wrote there.

    Fails on a file that was edited since, and leaves it alone.
    """
    records = host.get_fact(ManagedFiles, paths=tuple(paths)).records if paths else {}
    if not records:
        host.noop("gpufleet wrote none of these files")
        return
    for path in records:
        yield script(_RESTORE, path)
