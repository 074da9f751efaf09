"""Facts that preflight decides on: one script, one round trip."""

from __future__ import annotations

from pyinfra.api import FactBase, FactProcessError, StringCommand

from gpufleet.pci import NVIDIA_GPUS
from gpufleet.preflight.plan import HostPicture, parse
from gpufleet.shell import script
from gpufleet.weights.plan import STORED

# $1 folder of the deploy, $2 port of the demo, $3 python that the environment needs.
# POSIX sh and what a minimal Debian has; every line is a key, a tab and a value.
_SCRIPT = (
    r"""
say() { printf '%s\t%s\n' "$1" "$2"; }
[ -r /etc/os-release ] && . /etc/os-release
say os "${ID-unknown}"; say os_like "${ID_LIKE-}"; say os_version "${VERSION_ID-}"
say os_codename "${VERSION_CODENAME-}"
say arch "$(uname -m)"; say uid "$(id -u)"; say init "$(cat /proc/1/comm)"
say memory_kib "$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
d=$1; while [ ! -d "$d" ]; do d=${d%/*}; d=${d:-/}; done
say disk_free_kib "$(df -Pk "$d" | awk 'NR==2 {print $4}')"
say disk_used_kib "$([ -d "$1" ] && du -skx "$1" | cut -f1 || echo 0)"
[ -x "/usr/bin/$3" ] && say python "/usr/bin/$3"
"""
    + NVIDIA_GPUS
    + r"""
if command -v nvidia-smi >/dev/null; then
  smi=$(nvidia-smi --query-gpu=driver_version,memory.total --format=csv,noheader,nounits \
    2>/dev/null)
  say driver "$(printf '%s\n' "$smi" | sed -n 's/^\([0-9][0-9.]*\),.*/\1/p' | head -n 1)"
  printf '%s\n' "$smi" | sed -n 's/^[0-9.]*, *\([0-9][0-9]*\)$/gpu_memory_mib\t\1/p'
fi
# 0A is LISTEN (include/net/tcp_states.h)
hex=$(printf '%04X' "$2"); n=$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
  awk -v p=":$hex" '$4 == "0A" && substr($2, length($2)-4) == p {print $10}' | head -n 1)
if [ -n "$n" ]; then
  say port_taken unknown
  for fd in /proc/[0-9]*/fd/*; do
    [ "$(readlink "$fd" 2>/dev/null)" = "socket:[$n]" ] || continue
    pid=${fd#/proc/}; pid=${pid%%/*}
    say port_taken "$(cat "/proc/$pid/comm") (pid $pid)"
    say port_cgroup "$(cat "/proc/$pid/cgroup" | tr '\n' ' ')"
    break
  done
fi
"""
    + STORED
)


class Preflight(FactBase[HostPicture | None]):
    """What the host is and has, as preflight needs it: `HostPicture`, or None if
    its shell did not run the script."""

    def command(self, root: str, port: int, python: str) -> StringCommand:
        return script(_SCRIPT, root, str(port), python)

    @staticmethod
    def default() -> HostPicture | None:
        return None

    def process(self, output: list[str]) -> HostPicture:
        try:
            return parse(output)
        except (KeyError, ValueError) as error:
            raise FactProcessError(f"unexpected output of the preflight script: {error}") from error
