"""Facts about distribution packages."""

from __future__ import annotations

from pyinfra.api import FactBase, StringCommand

from gpufleet.base.plan import Packages, parse
from gpufleet.shell import script

# dpkg --audit prints what an interrupted run left half-installed or half-configured; an update
# that was killed leaves files in /var/lib/dpkg/updates.
_SCRIPT = r"""
dpkg-query -W -f '${db:Status-Status}\t${Package}\n' "$@" 2>/dev/null | sed -n '/^installed/p'
if [ -n "$(dpkg --audit)" ] || ls /var/lib/dpkg/updates | grep -q .; then echo interrupted; fi
# Lists are as old as the last update, and stale once a source was edited after it.
lists=$(find /var/lib/apt/lists -maxdepth 1 -type f -name '*Packages*' | head -n 1)
updated=$(stat -c %Y /var/lib/apt/lists /var/lib/apt/lists/partial \
  2>/dev/null | sort -n | tail -n 1)
edited=$(stat -c %Y /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
  sort -n | tail -n 1)
if [ -n "$lists" ] && [ "${edited:-0}" -le "$updated" ]; then
  printf 'lists_age_s\t%s\n' $(( $(date +%s) - updated ))
fi
"""


class AptPackages(FactBase[Packages]):
    """Which of the given packages are installed, and the state of dpkg and apt: `Packages`."""

    def command(self, packages: tuple[str, ...]) -> StringCommand:
        return script(_SCRIPT, *packages)

    @staticmethod
    def default() -> Packages:
        return Packages(frozenset(), False, None)

    def process(self, output: list[str]) -> Packages:
        return parse(output)
