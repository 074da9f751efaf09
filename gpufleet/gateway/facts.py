"""Facts about an nginx of gpufleet's own."""

from __future__ import annotations

from pyinfra.api import FactBase, StringCommand

from gpufleet.gateway.plan import Running, parse, paths
from gpufleet.shell import script

# $1 its name, then its files. What nginx reads is a marked copy of its configuration: without the
# marks it must be what the file is.
_STATE = r"""
name=$1
shift
for f in "$@"; do [ -e "$f" ] && echo "there=$f"; done
[ -e "/etc/systemd/system/$name.service" ] || exit 0
active=yes enabled=yes
since() {  # $1 unit, then files: whether it runs as they are
  started=$(systemctl show --timestamp=us "$1" -p ExecMainStartTimestamp --value)
  [ "$(systemctl show "$1" -p NeedDaemonReload --value)" = no ] && [ -n "$started" ] &&
    shift && [ -z "$(find "$@" -newerct "$started" 2>/dev/null)" ] && echo yes || echo no
}
for u in "$name.service" "$name-watch.service"; do
  systemctl -q is-active "$u" || active=no
  systemctl -q is-enabled "$u" 2>/dev/null || enabled=no
done
echo "active=$active"; echo "enabled=$enabled"
echo "fresh=$(since "$name.service" "/etc/systemd/system/$name.service")"
echo "watch_fresh=$(since "$name-watch.service" "/etc/systemd/system/$name-watch.service" \
  "/etc/$name/balance")"
if [ -r "/run/$name/nginx.conf" ]; then
  sed 's/^\( *server [^ ]* \)down /\1/' "/run/$name/nginx.conf" | sha256sum |
    sed 's/^\([0-9a-f]*\).*/loaded=\1/'
fi
"""


class BalancerState(FactBase[Running]):
    """Whether the nginx of this name runs, with what, and which files of it are there."""

    def command(self, balancer: str) -> StringCommand:
        return script(_STATE, balancer, *paths(balancer))

    @staticmethod
    def default() -> Running:
        return Running()

    def process(self, output: list[str]) -> Running:
        return parse(output)
