"""Operations that run an nginx of gpufleet's own beside whatever else the host has."""

from __future__ import annotations

from collections.abc import Generator

from pyinfra import host
from pyinfra.api import StringCommand, operation

from gpufleet.apt import APT, INSTALL
from gpufleet.base.facts import AptPackages
from gpufleet.base.plan import lists_are_stale
from gpufleet.gateway.facts import BalancerState
from gpufleet.gateway.plan import Balancer, is_right, paths
from gpufleet.managed.facts import STATE
from gpufleet.shell import script

# The package starts a web server on port 80, which nobody asked for: it is kept from that, now and
# at boot. Somebody who wants it enables it.
_INSTALL = f"""
systemctl mask --runtime --quiet nginx.service
{INSTALL} nginx; code=$?
systemctl unmask --runtime --quiet nginx.service
[ "$code" = 0 ] || exit "$code"
systemctl disable --quiet nginx.service
"""

# $1 nginx's unit, $2 that of its watch, $3 program, $4 user, $5 `restart` where nginx was started
# from another unit. Anything else that is new never costs a connection.
_RUN = r"""
systemctl daemon-reload
systemctl enable --quiet "$1" "$2"
systemctl reset-failed "$1" "$2" 2>/dev/null
since=$(date '+%Y-%m-%d %H:%M:%S')
systemctl "$5" "$1" 2>/dev/null && systemctl restart "$2" 2>/dev/null &&
  runuser -u "$4" -- "$3" once >/dev/null && exit 0
line=$(journalctl -u "$1" -u "$2" --since "$since" -o cat | grep -E 'emerg|error' | tail -n 1)
[ -n "$line" ] || line=$(journalctl -u "$1" --since "$since" -o cat | grep . | tail -n 1)
echo "$1 does not run: $line" >&2
exit 1
"""

# $1 nginx's unit, $2 that of its watch, then its files. All that was noted of them goes too.
_REMOVE = rf"""
systemctl disable --quiet --now "$2" "$1" 2>/dev/null
rm -rf "/var/cache/${{1%.service}}"
shift 2
for f in "$@"; do rm -f "$f" {STATE}/written"$f" {STATE}/originals"$f".absent; done
rmdir "${{1%/*}}" {STATE}/written"${{1%/*}}" {STATE}/originals"${{1%/*}}" 2>/dev/null
systemctl daemon-reload
"""


@operation()
def nginx() -> Generator[StringCommand]:
    """Install the distribution's nginx, unless it is there, without starting its web server."""
    found = host.get_fact(AptPackages, packages=("nginx",))
    if found.installed:
        host.noop("nginx is installed")
        return
    if lists_are_stale(found):
        yield StringCommand(APT, "update")
    yield script(_INSTALL)


@operation()
def balancing(*, balancer: Balancer, configuration: str) -> Generator[StringCommand]:
    """Run the nginx, enabled, with the configuration of this digest in force."""
    found = host.get_fact(BalancerState, balancer=balancer.name)
    if is_right(found, configuration):
        host.noop(f"{balancer.unit} runs")
        return
    yield script(
        _RUN,
        balancer.unit,
        balancer.watch,
        balancer.program,
        balancer.user,
        "start" if found.fresh else "restart",
    )


@operation()
def removed(*, balancer: str) -> Generator[StringCommand]:
    """Stop the nginx of this name and remove all of it, if it is there."""
    if not host.get_fact(BalancerState, balancer=balancer).there:
        host.noop(f"no {balancer} here")
        return
    yield script(_REMOVE, f"{balancer}.service", f"{balancer}-watch.service", *paths(balancer))
