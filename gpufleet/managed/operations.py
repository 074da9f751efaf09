"""Operations on managed files: write them whole and validated, put back what was there before."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from io import StringIO
from pathlib import PurePosixPath

from pyinfra import host
from pyinfra.api import FileUploadCommand, StringCommand, operation

from gpufleet.managed.facts import STATE, ManagedFiles
from gpufleet.managed.plan import UNSETTLED, ManagedFile, differing
from gpufleet.shell import script

_INCOMING = f"{STATE}/incoming"

# The original is kept once, before the first write; a rename within the folder makes each change
# atomic. Everything that needs room on the disk comes before what it replaces.
_FUNCTIONS = f"""set -e
umask 022
keep() {{  # $1 path
  o={STATE}/originals"$1"
  if [ -e "$o" ] || [ -h "$o" ] || [ -e "$o.absent" ]; then return; fi
  mkdir -p "${{o%/*}}"
  if [ -e "$1" ]; then cp -a "$1" "$o.copy"; mv "$o.copy" "$o"; else : > "$o.absent"; fi
}}
put() {{  # $1 new file, $2 path, $3 mode, $4 owner, $5 group
  keep "$2"
  mkdir -p "${{2%/*}}"
  install -m "$3" -o "$4" -g "$5" "$1" "$2.gpufleet-new"
  mv -f "$2.gpufleet-new" "$2"
}}
put_back() {{  # $1 path
  o={STATE}/originals"$1"
  if [ -e "$o.absent" ]; then rm -f "$1"; fi
  if [ -e "$o" ] || [ -h "$o" ]; then
    cp -a "$o" "$1.gpufleet-new"
    mv -f "$1.gpufleet-new" "$1"
  fi
}}
record() {{  # $1 path, $2 what to note instead of its digest
  r={STATE}/written"$1"
  mkdir -p "${{r%/*}}"
  echo "${{2:-$(sha256sum < "$1" | cut -d" " -f1)}}" > "$r.gpufleet-new"
  mv -f "$r.gpufleet-new" "$r"
}}
forget() {{  # $1 path
  o={STATE}/originals"$1"
  rm -f "$o" "$o.absent" {STATE}/written"$1"
}}
"""

# $1 new file, $2 destination, $3 mode, $4 owner, $5 group.
_INSTALL = f"""{_FUNCTIONS}
path=$2
trap 'rm -f "$path.gpufleet-new"' EXIT
put "$@"
record "$2"
rm -f "$1"
"""

# $1 a shell script that must succeed for the change to stay, or nothing; then for each file: new
# file (none: put back what was there before gpufleet), path, mode, owner, group. All files change
# or none does. What was in force is kept aside, so a switch that fails, or that was killed, is
# undone whole, here or when the next one begins. The check gets the same five values for each file.
_SWITCH = f"""{_FUNCTIONS}
found={STATE}/switch
each() {{  # $1 what to do with each file
  what=$1
  shift
  while [ $# -gt 0 ]; do
    "$what" "$1" "$2" "$3" "$4" "$5"
    shift 5
  done
}}
undo() {{
  while IFS= read -r line; do
    p=${{line#?}}
    rm -f "$p.gpufleet-new"
    case $line in
      -*) rm -f "$p" ;;
      *) if [ -e "$found/files$p" ] || [ -h "$found/files$p" ]; then mv -f "$found/files$p" "$p"; fi
    esac
  done < "$found/paths"
  rm -rf "$found"
}}
refuse_edited() {{
  if [ -n "$1" ] || [ ! -e "$2" ] || [ ! -e {STATE}/written"$2" ]; then return; fi
  wrote=$(cat {STATE}/written"$2")
  if [ "$wrote" = {UNSETTLED} ] || [ "$wrote" = "$(sha256sum < "$2" | cut -d" " -f1)" ]; then
    return
  fi
  o={STATE}/originals"$2"
  if [ ! -e "$o" ] && [ ! -h "$o" ] && [ ! -e "$o.absent" ]; then return; fi
  echo "gpufleet: $2 was edited since gpufleet wrote it: keep your version by removing \\
{STATE}/written$2, or delete $2, then run it again" >&2
  exit 1
}}
remember() {{
  for p in "$2" {STATE}/written"$2" {STATE}/originals"$2" {STATE}/originals"$2".absent; do
    if [ -e "$p" ] || [ -h "$p" ]; then
      mkdir -p "$found.new/files${{p%/*}}"
      cp -a "$p" "$found.new/files$p"
      echo "+$p" >> "$found.new/paths"
    else
      echo "-$p" >> "$found.new/paths"
    fi
  done
}}
change() {{
  record "$2" {UNSETTLED}
  if [ -n "$1" ]; then put "$@"; else put_back "$2"; fi
}}
settle() {{ if [ -n "$1" ]; then record "$2"; else forget "$2"; fi; }}
check=$1
shift
clean() {{ rm -rf "$found.new" {_INCOMING}; }}
trap clean EXIT
trap 'exit 1' HUP INT PIPE TERM
if [ -d "$found" ]; then undo; fi
each refuse_edited "$@"
rm -rf "$found.new"
mkdir -p "$found.new"
each remember "$@"
mv "$found.new" "$found"
trap 'code=$?; trap - EXIT; undo; clean; exit $code' EXIT
each change "$@"
if [ -n "$check" ]; then sh -c "$check" check "$@"; fi
each settle "$@"
mv "$found" "$found.new"
trap clean EXIT
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
    yield StringCommand("install -d -m 700", _INCOMING)
    for file in changed:
        new = f"{_INCOMING}/{PurePosixPath(file.path).name}"
        yield FileUploadCommand(StringIO(file.content), new)
        if file.validate is not None:
            yield StringCommand(file.validate.replace("{}", new), ">&2")
        yield script(_INSTALL, new, file.path, file.mode, file.owner, file.group)


@operation()
def switched(
    wanted: Sequence[ManagedFile], gone: Sequence[str], check: str
) -> Generator[FileUploadCommand | StringCommand]:
    """Change several files as one: write those wanted, put back what lay at the `gone` paths.

    `check` is a shell script that runs on the host once all are changed; it gets new file (empty
    for one put back), path, mode, owner and group of each. Where it or a write fails, every file
    is again what it was before, and the host fails with what the check said.
    """
    paths = (*(file.path for file in wanted), *gone)
    found = host.get_fact(ManagedFiles, paths=paths) if paths else None
    changed = differing(wanted, found) if found else []
    back = [path for path in gone if found and path in found.records]
    if not changed and not back:
        host.noop("all files are as they should be")
        return
    arguments: list[str] = []
    if changed:
        yield StringCommand("install -d -m 700", _INCOMING)
    for number, file in enumerate(changed):
        new = f"{_INCOMING}/{number}-{PurePosixPath(file.path).name}"
        yield FileUploadCommand(StringIO(file.content), new)
        if file.validate is not None:
            yield StringCommand(file.validate.replace("{}", new), ">&2")
        arguments += [new, file.path, file.mode, file.owner, file.group]
    for path in back:
        arguments += ["", path, "", "", ""]
    yield script(_SWITCH, check, *arguments)


@operation()
def restored(paths: Sequence[str]) -> Generator[StringCommand]:
    """Put back, byte for byte, what lay at each path before gpufleet wrote there.

    Fails where one was edited since, and then leaves all of them alone.
    """
    records = host.get_fact(ManagedFiles, paths=tuple(paths)).records if paths else {}
    if not records:
        host.noop("gpufleet wrote none of these files")
        return
    yield script(_SWITCH, "", *(part for path in records for part in ("", path, "", "", "")))
