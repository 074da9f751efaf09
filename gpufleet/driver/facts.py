"""Facts about a host's GPUs and their driver: one script, one round trip."""

from __future__ import annotations

from pyinfra.api import FactBase, FactProcessError, StringCommand

from gpufleet.driver.files import OWNED
from gpufleet.driver.picture import GpuPicture
from gpufleet.driver.plan import parse
from gpufleet.shell import script

# POSIX sh and what a minimal Debian or RHEL has; every line is a key, a tab and tab-separated
# values. It only reads. A GPU that hangs makes nvidia-smi hang: it is not waited for.
_SCRIPT = rf"""
export LC_ALL=C
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH
say() {{ k=$1; shift; printf '%s' "$k"; printf '\t%s' "$@"; echo; }}
gpu=
for d in /sys/bus/pci/devices/*; do
  read -r v 2>/dev/null < "$d/vendor" && [ "$v" = 0x10de ] || continue
  read -r c < "$d/class"
  a=${{d##*/}}
  case $c in
    0x03*)
      read -r i < "$d/device"; l=$(readlink "$d/driver"); gpu=yes
      say gpu "$a" "${{i#0x}}" "${{l##*/}}"
      # The kernel remembers vendor and class; what is gone answers ones to every read.
      [ "$(od -An -tx1 -N4 "$d/config" 2>/dev/null | tr -d ' \n')" = ffffffff ] && say lost "$a";;
    0x0680*) say nvswitch;;
  esac
done
for d in /proc/driver/nvidia/gpus/*; do
  [ -e "$d" ] && [ ! -e "/sys/bus/pci/devices/${{d##*/}}" ] && gpu=yes && say lost "${{d##*/}}"
done
for d in /proc/driver/nvidia-nvswitch/devices/*; do [ -e "$d" ] && say nvswitch && break; done
grep -qs SW_MNG /sys/class/infiniband/*/device/vpd && say nvswitch
[ -d /sys/module/nouveau ] && say nouveau
[ -r /sys/module/nvidia/version ] && say loaded "$(cat /sys/module/nvidia/version)"
for d in /sys/module/nvidia /sys/module/nvidia_*; do
  [ -r "$d/refcnt" ] && say module "$(cat "$d/refcnt")" "$(ls "$d/holders" 2>/dev/null | wc -l)"
done

# The libraries that programs get, else those where packages and .run files put them.
f=$(ldconfig -p 2>/dev/null |
  sed -n 's/^[[:space:]]*libnvidia-ml\.so\.1 (.*x86-64.*) => //p' | head -n 1)
if [ -n "$f" ]; then f=$(readlink -f "$f"); else
  for f in /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.*.* /usr/lib64/libnvidia-ml.so.*.* \
      /usr/lib/x86_64-linux-gnu/nvidia/current/libnvidia-ml.so.*.* \
      /usr/lib/x86_64-linux-gnu/nvidia/*/libnvidia-ml.so.*.*; do
    [ -e "$f" ] && break
  done
fi
[ -e "$f" ] && say userland "${{f##*/libnvidia-ml.so.}}"

if command -v nvidia-smi >/dev/null; then
  out=$(timeout -k 2 20 nvidia-smi --query-gpu=pci.bus_id,name,memory.total,driver_version \
    --format=csv,noheader,nounits 2>&1 </dev/null)
  say smi $?
  [ -n "$out" ] && printf '%s\n' "$out" | tr '\t' ' ' | sed 's/^/smi_line\t/'
fi
systemctl show -p Id,LoadState,ActiveState nvidia-persistenced.service \
  nvidia-fabricmanager.service 2>/dev/null | sed -n 's/^\([A-Za-z]*\)=/unit\t\1\t/p'
command -v nv-fabricmanager >/dev/null && say fabricmanager "$(timeout 5 nv-fabricmanager \
  --version 2>/dev/null </dev/null | sed -n 's/^.*[: ]\([0-9][0-9.]*\).*$/\1/p' | head -n 1)"

any=
for f in /dev/nvidia*; do [ -e "$f" ] && [ ! -d "$f" ] && any=yes && say device "${{f##*/}}"; done
if [ -n "$any" ]; then
  find /proc/[0-9]*/fd -lname '/dev/nvidia*' 2>/dev/null | cut -d / -f 3 | sort -un |
    while read -r p; do
      read -r n 2>/dev/null < "/proc/$p/comm" && say holder "$n" "$p"
    done
fi
for p in {" ".join(OWNED)}; do
  [ -f "$p" ] && say owned "$p" "$(stat -L -c %a "$p")" "$(sha256sum < "$p" | cut -d ' ' -f 1)"
done

if [ -n "$gpu" ] && command -v apt-cache >/dev/null; then
  r=$(uname -r; for f in /boot/vmlinuz-*; do echo "${{f#/boot/vmlinuz-}}"; done)
  set -- $(apt-cache pkgnames 2>/dev/null | awk -v releases="$(echo $r)" '
    BEGIN {{ n = split(releases, r, " "); for (i = 1; i <= n; i++) here[r[i]] = 1 }}
    /^nvidia-(open-)?kernel-dkms$|^nvidia-headless-no-dkms-[0-9]+-server(-open)?$/ ||
      /^(nvidia-open|cuda-drivers|nvidia-fabricmanager)-[0-9]+$/ {{ print; next }}
    match($0, /^linux-modules-nvidia-[0-9]+-server(-open)?-/) && substr($0, RLENGTH + 1) in here')
  # By version: to find candidates for itself, `show` weighs every package that there is.
  [ $# -gt 0 ] && set -- $(apt-cache policy "$@" 2>/dev/null | awk '
    /^[^ ]/ {{ name = substr($1, 1, length($1) - 1) }}
    $1 == "Candidate:" && $2 != "(none)" {{ print name "=" $2 }}')
  [ $# -gt 0 ] && apt-cache show "$@" 2>/dev/null | awk '
    function flush() {{ if (p != "") print "offer\t" p "\t" v "\t" d; p = v = d = "" }}
    /^Package: / {{ flush(); p = $2 }}
    /^Version: / {{ v = $2 }}
    /^Depends: / {{ d = substr($0, 10) }}
    END {{ flush() }}'
fi
:
"""


class GpuFacts(FactBase[GpuPicture]):
    """Everything about a host's GPUs and driver: `GpuPicture`."""

    def command(self) -> StringCommand:
        return script(_SCRIPT)

    @staticmethod
    def default() -> GpuPicture:
        return parse([])

    def process(self, output: list[str]) -> GpuPicture:
        try:
            return parse(output)
        except ValueError as error:
            raise FactProcessError(f"unexpected output of the GPU script: {error}") from error
