"""Operations that bring weight files to a host, verified before they get their final names."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from io import StringIO
from pathlib import Path
from shlex import quote

from pyinfra import host
from pyinfra.api import FileUploadCommand, QuoteString, RsyncCommand, StringCommand, operation

from gpufleet.catalog import WeightFile
from gpufleet.shell import script
from gpufleet.weights.facts import WeightsOnHost
from gpufleet.weights.plan import to_record, to_send

# $1 folder with the files, $2 final folder (the same where files only need a record), $3 list:
# digest, two blanks, path, as sha256sum -c reads it. Each file is verified, moved and recorded by
# itself, so that a cut-off run keeps what it had. A file that fails is removed, to be sent anew.
_VERIFY = r"""set -e
umask 022
from=$1 to=$2 list=$3; bad=0
while read -r sum path; do
  if [ "$(sha256sum < "$from/$path" | cut -d' ' -f1)" != "$sum" ]; then
    echo "weight file $path is corrupt on this host: its sha256 is not the catalogue's; \
it was removed, apply again" >&2
    rm -f "$from/$path"; bad=1; continue
  fi
  if [ "$from" != "$to" ]; then
    case $path in */*) mkdir -p "$to/${path%/*}";; esac
    mv -f "$from/$path" "$to/$path"
  fi
  chmod 644 "$to/$path"
  printf '%s %s %s\n' "$sum" "$(stat -c '%s %.9Z %i' "$to/$path")" "$path" >> "$to/.verified"
done < "$list"
[ $bad = 0 ] && rm -rf "$list"
[ $bad = 0 ] && { [ "$from" = "$to" ] || rm -rf "$from"; }
exit $bad
"""


def _listing(files: Sequence[WeightFile]) -> StringIO:
    return StringIO("".join(f"{file.sha256}  {file.path}\n" for file in files))


@operation()
def synced(
    *, folder: str, incoming: str, files: Sequence[WeightFile], source: Path, bandwidth_kib: int
) -> Generator[RsyncCommand | FileUploadCommand | StringCommand]:
    """Bring the files to `folder`: what is missing or differs is sent.

    A transfer that was cut off continues. The host verifies every file before its final name.
    """
    found = host.get_fact(WeightsOnHost, folder=folder, paths=tuple(f.path for f in files))
    send, record = to_send(files, found), to_record(files, found)
    if not send and not record:
        host.noop("all weight files are there and verified")
        return
    listing = f"{incoming}.sha256"
    yield StringCommand("install -d -m 755", QuoteString(folder), QuoteString(incoming))
    if record:
        yield FileUploadCommand(_listing(record), listing)
        yield script(_VERIFY, folder, folder, listing)
    if send:
        yield FileUploadCommand(_listing(send), listing)
        flags = ["-rt", "--relative", "--partial", "--inplace", "--chmod=F644,D755"]
        if bandwidth_kib:
            flags.append(f"--bwlimit={bandwidth_kib}")
        # The dot ends what --relative leaves away: the host gets the paths of the catalogue.
        sources = " ".join(quote(f"{source}/./{file.path}") for file in send)
        yield RsyncCommand(sources, quote(f"{incoming}/"), flags)
        yield script(_VERIFY, incoming, folder, listing)
