"""Facts about the next package upgrade: one script that simulates it, one round trip."""

from __future__ import annotations

from pyinfra.api import FactBase, StringCommand

from gpufleet.shell import script
from gpufleet.upgrade.plan import NONE, State, Upgrade, parse

# apt's own words follow each heading; plan.parse knows them. The simulation takes no lock and
# needs no network: it knows what the package lists know, whose age is told beside it.
# `apt-cache policy` tells the origins behind the short names of the simulation, and where each
# package of the driver came from.
_SCRIPT = r"""
export LC_ALL=C
command -v apt-get >/dev/null || exit 0
echo '== system'; sed -n 's/^\(ID\|VERSION_CODENAME\)=/\1=/p' /etc/os-release
echo '== simulation'
simulation=$(apt-get -s -o Debug::NoLocking=1 -o APT::Get::Show-User-Simulation-Note=0 \
  dist-upgrade 2>&1)
printf '%s\n' "$simulation"
updated=$(stat -c %Y /var/lib/apt/lists /var/lib/apt/lists/partial 2>/dev/null | sort -n |
  tail -n 1)
lists=$(find /var/lib/apt/lists -maxdepth 1 -type f -name '*Packages*' 2>/dev/null | head -n 1)
[ -n "$lists" ] && printf '== lists\n%s\n' $(( $(date +%s) - updated ))
if command -v unattended-upgrade >/dev/null; then
  echo '== unattended'
  apt-config dump | grep -E '^(Unattended-Upgrade|APT::Periodic)'
  printf 'timer=%s\n' "$(systemctl is-enabled apt-daily-upgrade.timer 2>/dev/null)"
fi
set -- $(dpkg-query -W -f '${db:Status-Status} ${Package}\n' '*nvidia*' 'libcuda1*' \
  'cuda-drivers*' 2>/dev/null | sed -n 's/^installed //p')
# Whence the packages of the driver came, and what comes: nothing else is asked of them.
coming=
case $simulation in *"
Inst "*) command -v unattended-upgrade >/dev/null && coming=yes;; esac
if [ $# -gt 0 ] || [ -n "$coming" ]; then echo '== origins'; apt-cache policy; fi
if [ $# -gt 0 ]; then echo '== installed'; apt-cache policy "$@"; fi
exit 0
"""


# All that decides what apt would do, in one digest: what is installed and held, what the archive
# offers (its Release files hold the digests of their lists; an interrupted update lacks a list),
# how apt and its timers are set up. Then the age of the lists, which differs from host to host.
_STATE = r"""
export LC_ALL=C
command -v apt-get >/dev/null || exit 0
lists=/var/lib/apt/lists
{ cat /etc/os-release /var/lib/dpkg/status /var/lib/dpkg/arch /var/lib/apt/extended_states
  find /etc/apt -type f -exec sha256sum {} + | sort
  find $lists -maxdepth 1 -type f -printf '%f %s\n' | sort
  find $lists -maxdepth 1 -type f -name '*Release' -exec sha256sum {} + | sort
  systemctl is-enabled apt-daily-upgrade.timer; } 2>/dev/null | sha256sum | cut -d' ' -f1
updated=$(stat -c %Y $lists $lists/partial 2>/dev/null | sort -n | tail -n 1)
[ -n "$updated" ] && echo $(( $(date +%s) - updated ))
exit 0
"""


class PackageState(FactBase[State]):
    """Whether two hosts would answer NextUpgrade alike, and the age of the lists: `State`."""

    def command(self) -> StringCommand:
        return script(_STATE)

    @staticmethod
    def default() -> State:
        return State("", None)

    def process(self, output: list[str]) -> State:
        digest, *age = output
        return State(digest, int(age[0]) if age else None)


class NextUpgrade(FactBase[Upgrade]):
    """What `apt-get dist-upgrade` would do now, and which of it happens by itself: `Upgrade`."""

    def command(self) -> StringCommand:
        return script(_SCRIPT)

    @staticmethod
    def default() -> Upgrade:
        return NONE

    def process(self, output: list[str]) -> Upgrade:
        return parse(output)
