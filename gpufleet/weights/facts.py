"""Facts about the weight files of a host."""

from __future__ import annotations

from pyinfra.api import FactBase, StringCommand

from gpufleet.shell import script
from gpufleet.weights.plan import Found, parse

# $1 folder, then paths. The record of what was verified lies beside the files: a line is digest,
# size, ctime with nanoseconds, inode and path, and counts only while the file still has those:
# no write, and no copy over it, leaves the ctime as it was, whatever mtime says.
# Any other file is hashed here and now.
_SCRIPT = r"""
d=$1; shift
for p in "$@"; do
  [ -f "$d/$p" ] || continue
  state=recorded
  sum=$(grep -F -- " $(stat -c '%s %.9Z %i' "$d/$p") $p" "$d/.verified" 2>/dev/null |
    cut -d' ' -f1 | tail -n 1)
  if [ -z "$sum" ]; then state=new; sum=$(sha256sum < "$d/$p" | cut -d' ' -f1); fi
  printf '%s\t%s\t%s\n' "$p" "$sum" "$state"
done
"""


class WeightsOnHost(FactBase[dict[str, Found]]):
    """Which of the given files a host has in a folder: path → `Found`."""

    def command(self, folder: str, paths: tuple[str, ...]) -> StringCommand:
        return script(_SCRIPT, folder, *paths)

    @staticmethod
    def default() -> dict[str, Found]:
        return {}

    def process(self, output: list[str]) -> dict[str, Found]:
        return parse(output)
