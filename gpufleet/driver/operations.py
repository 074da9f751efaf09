"""Operations that bring the driver to a host, for every kernel that runs or boots next."""

from __future__ import annotations

import time
from collections.abc import Generator
from io import StringIO
from pathlib import Path
from shlex import quote

import gevent
from paramiko import SSHException
from pyinfra import host, logger
from pyinfra.api import (
    FileUploadCommand,
    FunctionCommand,
    QuoteString,
    RsyncCommand,
    State,
    StringCommand,
    operation,
)
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host
from pyinfra.facts.server import Command

from gpufleet import render
from gpufleet.apt import APT, INSTALL
from gpufleet.catalog import Drivers
from gpufleet.demo.plan import PROCESSES
from gpufleet.demo.plan import UNIT as DEMO
from gpufleet.driver import files, heal, sources
from gpufleet.driver.facts import GpuFacts
from gpufleet.driver.heal import Sight, Step
from gpufleet.driver.plan import Refusal, runfile_version
from gpufleet.kernel.facts import KernelFacts
from gpufleet.kernel.grub import entry_of
from gpufleet.seen import changed, fresh
from gpufleet.settings import Settings
from gpufleet.shell import failing, script

Commands = Generator[StringCommand | FileUploadCommand | RsyncCommand | FunctionCommand]

#: Folders on the host: gpufleet's state, and the programs that it leaves there.
STATE = "/var/lib/gpufleet"
PROGRAMS = "/usr/local/lib/gpufleet"

#: How the sources of a host are read: a line `file`, tab, path, then its lines after a plus.
SOURCES = (
    "for p in /etc/apt/sources.list /etc/apt/sources.list.d/*.list "
    "/etc/apt/sources.list.d/*.sources; do "
    '[ -f "$p" ] || continue; printf \'file\\t%s\\n\' "$p"; sed \'s/^/+/\' "$p"; echo; done'
)

# $1 file as uploaded, $2 destination.
_SOURCE = r"""set -e
install -D -m 644 -o root -g root "$1" "$2"
rm -f "$1"
"""

# $1 host of NVIDIA's repository, $2 distribution as it names them, such as debian12. Its keyring
# package brings a source for the host outside China too; only the key is taken from it.
_KEYRING = r"""set -e
key=/usr/share/keyrings/cuda-archive-keyring.gpg
[ -s "$key" ] && exit 0
new=$(mktemp -d); trap 'rm -rf "$new"' EXIT
curl -fsSL --retry 2 -o "$new/keyring.deb" \
  "https://$1/compute/cuda/repos/$2/x86_64/cuda-keyring_1.1-1_all.deb" || {
  echo "no keyring package at $1 for $2: check the host's way out, or driver.source" >&2; exit 1; }
dpkg-deb -x "$new/keyring.deb" "$new/x"
install -D -m 644 "$new/x$key" "$key"
"""

# Package work waits for others and is not joined by the daily timers.
_WITH_FRESH_LISTS = (
    r"""
timers=$(systemctl list-units --plain --no-legend 'apt-daily*.timer' | cut -d' ' -f1)
[ -z "$timers" ] || systemctl stop $timers
trap '[ -z "$timers" ] || systemctl start $timers' EXIT
"""
    + f"{APT} update || exit\n"
)

# $@ names. A version is asked for by name: the pin of the kernel then does not hide it. What no
# source has is left out; that is found afterwards, where it counts.
_HEADERS = (
    _WITH_FRESH_LISTS
    + r"""
for name in "$@"; do
  # Headers that these are built upon, such as -common, are hidden by the pin like these.
  set -- "$@" $(apt-cache show -- "$name" 2>/dev/null | grep -m 1 '^Depends:' | tr ',' '\n' |
    sed -n 's/^\(Depends:\)\{0,1\} *\(linux-headers-[^ ]*\).*/\2/p')
done
for name in "$@"; do
  version=$(apt-cache madison -- "$name" | sed -n '1s/^[^|]*| *\([^ ]*\) *|.*/\1/p')
  if [ -n "$version" ]; then set -- "$@" "$name=$version"
  else echo "the package sources do not have $name (any more)"; fi
  shift
done
[ $# = 0 ] && exit 0
"""
    + f'{INSTALL} -- "$@"\n'
)

# Installs the driver's packages. Whether DKMS could build is not judged here: apt fails for it on
# some distributions and hides it on others. Only packages that did not arrive are a failure.
# $1 source of the driver, then names.
_PACKAGES = (
    _WITH_FRESH_LISTS
    + r"""
source=$1; shift
for name in "$@"; do
  from=$(LC_ALL=C apt-get -s install --no-install-recommends -- "$name" 2>/dev/null |
    sed -n "s/^Inst \($name\|$name:[a-z0-9]*\) .*(\(.*\))\$/\2/p" | head -n 1)
  case $source:$from in
    distribution:*"NVIDIA CUDA"*)
      echo "$name would come from NVIDIA's repository and driver.source is distribution: set it \
to nvidia, or remove that source from /etc/apt on the host" >&2; exit 1;;
  esac
done
"""
    + f'{INSTALL} -- "$@" && exit 0\n'
    + r"""
code=$?
for name in "$@"; do
  case $(dpkg-query -W -f '${db:Status-Status}' -- "$name" 2>/dev/null) in
    installed | half-configured | unpacked | triggers-*) ;;
    *) exit $code;;
  esac
done
echo "apt failed and the packages are there: the modules are looked at next"
"""
)

# $1 kernel release, $2 driver version, empty for any. Builds below that kernel only. A build whose
# connection was lost goes on without one, and two of them in one folder spoil each other: what it
# started holds the lock until it has ended.
_DKMS = r"""
k=$1 v=$2
exec 9> /run/gpufleet-dkms.lock
flock -w 1800 9 || {
  echo "a build of the driver has been running for 30 minutes: end it (ps -C dkms), apply" >&2
  exit 1; }
for conf in /usr/src/nvidia*/dkms.conf; do
  [ -f "$conf" ] || continue
  d=${conf%/dkms.conf}; d=${d##*/}; name=${d%-*} have=${d##*-}
  [ -z "$v" ] || [ "$have" = "$v" ] || continue
  # DKMS calls a module that somebody deleted installed; version 2 does so also when forced.
  case $(dkms --version) in
    *[!.0-9]2.*)
      [ ! -d "/var/lib/dkms/$name/$have/$k" ] || dkms remove -m "$name" -v "$have" -k "$k";;
  esac
  [ -d "/var/lib/dkms/$name/$have" ] || dkms add -m "$name" -v "$have"
  dkms build --force -m "$name" -v "$have" -k "$k" &&
    dkms install --force -m "$name" -v "$have" -k "$k"
  found=yes
done
[ -n "$found" ] || echo "no DKMS source of driver ${v:-of any version} below /usr/src"
exit 0
"""

# $1 kernel release, then names of packages that hold its modules, ready made.
_PREBUILT = (
    r"""
k=$1; shift
"""
    + f"{APT} update || exit\n"
    + f'{INSTALL} --reinstall -- "$@" || exit\n'
    + r"""
depmod "$k"
"""
)

# $1 kernel release, or all.
_INITRAMFS = r"""
if command -v update-initramfs >/dev/null; then
  if [ "$1" = all ] || [ -e "/boot/initrd.img-$1" ]; then update-initramfs -u -k "$1"
  else update-initramfs -c -k "$1"; fi
elif ! command -v dracut >/dev/null; then
  echo "nothing here makes initrds: apt-get install initramfs-tools, then apply" >&2; exit 1
elif [ "$1" = all ]; then dracut -f --regenerate-all
else dracut -f --kver "$1"; fi
"""

# Sets the kernel that GRUB boots from now on. $1 id of its entry, $2 the effective GRUB_DEFAULT.
# An id that does not resolve would silently boot the first entry.
_GRUB = r"""set -e
last=${1##*>}
grep -qF "'$last'" /boot/grub/grub.cfg || grep -qF "\"$last\"" /boot/grub/grub.cfg || {
  echo "GRUB has no entry $1: run update-grub on the host, then apply" >&2; exit 1; }
if [ "$2" = saved ]; then grub-set-default "$1"; exit; fi
f=/etc/default/grub.d/zy-gpufleet-kernel.cfg
mkdir -p "${f%/*}"
printf '# Written by gpufleet: the kernel that works. Remove it and run update-grub to drop it.\n\
GRUB_DEFAULT="%s"\n' "$1" > "$f"
update-grub
"""

# Units that keep the module in use, stopped before it is unloaded and started again after it.
_SERVICES = f"""{DEMO} $(ls {PROCESSES} 2>/dev/null) nvidia-dcgm.service dcgm.service \
nvidia-persistenced.service nvidia-fabricmanager.service"""

# $1: `load` the module, `reload` it, or `unload` it for an installer; $2: the module's name, which
# is not nvidia where Debian built it. A module that is in use stays loaded, and then everything
# that was stopped for it runs again.
_LOAD = (
    r"""
list=/run/gpufleet-stopped
start() {
  [ -f "$list" ] || return 0
  while read -r unit; do systemctl start "$unit" </dev/null || bad="$bad $unit"; done < "$list"
  rm -f "$list"
}
modules="nvidia_drm nvidia_modeset nvidia_uvm nvidia_peermem nvidia nouveau"
if [ "$1" != load ]; then
"""
    + f"  for unit in {_SERVICES}; do\n"
    + r"""
    systemctl -q is-active "$unit" || continue
    echo "$unit" >> "$list"
    systemctl stop "$unit"
  done
  # All of them before any goes: other modules that use one are unloaded before it.
  for m in $modules; do
    d=/sys/module/$m
    [ -d "$d" ] || continue
    [ "$(cat "$d/refcnt")" -gt "$(ls "$d/holders" | wc -l)" ] || continue
    held=$(fuser /dev/nvidia* 2>/dev/null | tr ' ' '\n' | grep . | sort -u |
      while read -r p; do printf '%s (pid %s), ' "$(cat "/proc/$p/comm")" "$p"; done)
    start
    echo "module $m is in use${held:+ by ${held%, }}: stop that and apply, or reboot \
(kernel.reboot: when-safe lets apply do it)" >&2
    exit 1
  done
  for m in $modules; do
    [ ! -d "/sys/module/$m" ] || rmmod "$m" || { start; exit 1; }
  done
  [ "$1" != unload ] || exit 0
fi
modprobe nvidia 2>/dev/null || modprobe "$2" || { start; exit 1; }
# Without it CUDA finds no device. Its node is nvidia-modprobe's to make, or, where that is not
# installed, made as NVIDIA's installation guide has it.
modprobe nvidia-uvm 2>/dev/null || modprobe "$2-uvm"
! command -v nvidia-modprobe >/dev/null || nvidia-modprobe -c 0 -u
uvm=$(sed -n 's/^ *\([0-9]*\) nvidia-uvm$/\1/p' /proc/devices)
[ -e /dev/nvidia-uvm ] || [ -z "$uvm" ] || mknod -m 666 /dev/nvidia-uvm c "$uvm" 0
start
[ -e /dev/nvidia-uvm ] || { echo "the module is loaded and /dev/nvidia-uvm is missing: look what \
modprobe nvidia-uvm says on the host" >&2; exit 1; }
[ -z "$bad" ] || { echo "the module is loaded and$bad did not start: see journalctl" >&2; exit 1; }
exit 0
"""
)

# $1 unit, enabled and started; where it does not start, its own first complaint says why.
_SERVICE = r"""
systemctl enable --quiet "$1" 2>/dev/null  # some packages have it started by udev instead
# Ubuntu's stops as soon as it runs if nothing wants it, and udev does so only when a module comes.
[ "$(systemctl show -p StopWhenUnneeded --value "$1")" != yes ] ||
  systemctl add-wants --quiet multi-user.target "$1"
since=$(date '+%Y-%m-%d %H:%M:%S')
systemctl restart "$1" 2>/dev/null && exit 0
said=$(journalctl -u "$1" --since "$since" -o cat | grep .)
line=$(printf '%s\n' "$said" | grep -m 1 -iE 'fail|error|cannot|unable')
[ -n "$line" ] || line=$(printf '%s\n' "$said" | tail -n 1)
echo "$1 did not start: $line" >&2
exit 1
"""

# $1 the .run file, $2 kernel release, $3 folder of the module's sources in it, which is how its
# flavour is chosen. The first lines of its log that say ERROR tell why it failed.
_RUNFILE = r"""
chmod 700 "$1"
sh "$1" --check >/dev/null || { echo "$1 is damaged: bring it again" >&2; exit 1; }
if ! sh "$1" --silent --no-questions --dkms --no-x-check --kernel-name="$2" -m="$3"; then
  line=$(sed -n 's/^ERROR: *//p' /var/log/nvidia-installer.log 2>/dev/null | head -n 1)
  echo "the .run file did not install: ${line:-see /var/log/nvidia-installer.log}" >&2
  exit 1
fi
rm -f "$1"
[ ! -f /run/gpufleet-stopped ] || xargs -r systemctl start < /run/gpufleet-stopped
rm -f /run/gpufleet-stopped
"""

# A one-shot trial: GRUB takes the next entry once, and the unit reboots into the saved one if
# nobody confirms. $1 kernel release, $2 id of its GRUB entry.
_TRIAL = rf"""set -e
if [ "$(cat {STATE}/trial-failed 2>/dev/null)" = "$1" ]; then
  echo "kernel $1 failed its trial boot: read journalctl -b -1 -u gpufleet-trial, mend it, remove \
{STATE}/trial-failed and apply" >&2
  exit 1
fi
chmod 755 {PROGRAMS}/trial
systemctl daemon-reload
systemctl enable --quiet gpufleet-trial.service
printf '%s\n' "$1" > {STATE}/trial
grub-reboot "$2"
grub-editenv list | grep -qxF "next_entry=$2" || {{
  rm -f {STATE}/trial
  systemctl disable --quiet gpufleet-trial.service
  echo "GRUB cannot remember a one-shot entry here (LVM, RAID or btrfs): reboot by hand" >&2
  exit 1
}}
sync
"""

# Ends the trial for good: the kernel proved itself.
_CONFIRM = rf"""set -e
rm -f {STATE}/trial {STATE}/trial-failed
systemctl disable --quiet gpufleet-trial.service
systemctl stop gpufleet-trial.service
rm -f /etc/systemd/system/gpufleet-trial.service {PROGRAMS}/trial
systemctl daemon-reload
"""

# $1 kernel release whose trial failed.
_GIVE_UP = rf"""
printf '%s\n' "$1" > {STATE}/trial-failed
rm -f {STATE}/trial
systemctl disable --quiet gpufleet-trial.service
"""

# Notes which services must run again afterwards. In the background, so that the session ends
# before the host does.
_REBOOT = rf"""
mkdir -p {STATE}
for unit in {_SERVICES}; do
  ! systemctl -q is-active "$unit" || echo "$unit"
done > {STATE}/before-reboot
sync
( sleep 1; systemctl reboot ) </dev/null >/dev/null 2>&1 &
"""

_BOOT_ID = "cat /proc/sys/kernel/random/boot_id"

# sshd answers before the end of the boot. $1 seconds to wait. Prints what does not work that
# worked before the reboot.
_BOOTED = rf"""
end=$(( $(date +%s) + $1 ))
timeout "$1" systemctl is-system-running --wait >/dev/null 2>&1
before=$(cat {STATE}/before-reboot); rm -f {STATE}/before-reboot
for unit in $before; do
  while ! systemctl -q is-active "$unit"; do
    if systemctl -q is-failed "$unit" || [ "$(date +%s)" -ge "$end" ]; then
      echo "$unit does not run"; break
    fi
    sleep 1
  done
done
exit 0
"""


def _look(
    settings: Settings, drivers: Drivers, *, sought: bool = False, tried: bool = False
) -> Sight | Refusal:
    """What the host is and what is to be done there; two commands, unless it was seen before."""
    kernels, gpus = fresh(KernelFacts), fresh(GpuFacts)
    return heal.look(settings, drivers, kernels, gpus, sought=sought, tried=tried)


@operation()
def permitted(*, settings: Settings, drivers: Drivers) -> Commands:
    """Fail the host, before any change, where no driver fits or something forbids to touch it."""
    at = _look(settings, drivers)
    refusals = at.findings if isinstance(at, Refusal) else at.decision.refusals
    for note in () if isinstance(at, Refusal) else at.decision.notes:
        logger.warning(f"{host.print_prefix}{note}")
    if refusals:
        yield failing("; ".join(refusals))
    else:
        host.noop("; ".join(at.choice.reasons) if isinstance(at, Sight) else "")


@operation()
def components(*, settings: Settings, drivers: Drivers) -> Commands:
    """Make the driver's packages known to apt, where some are missing.

    The distribution's own come from the host's own addresses, as further components; NVIDIA's
    from its repository, with its key.
    """
    at = _look(settings, drivers)
    if isinstance(at, Refusal) or not at.wanted or at.kernels.family != "debian":
        host.noop("no package is missing")
        return
    source = at.choice.source
    content = sources.wanted(at.kernels, source, host.get_fact(Command, command=SOURCES) or "")
    if content is None:
        host.noop("the package sources are enabled")
        return
    changed()
    if site := sources.repository_host(source):
        yield script(_KEYRING, site, sources.repository(at.kernels))
    yield StringCommand("install -d -m 700", f"{STATE}/incoming")
    yield FileUploadCommand(StringIO(content), f"{STATE}/incoming/driver.sources")
    yield script(_SOURCE, f"{STATE}/incoming/driver.sources", sources.PATH)


@operation()
def headers(*, settings: Settings, drivers: Drivers) -> Commands:
    """Install the headers of the running kernel and of the one that boots next, exactly these.

    Before the driver: its packages would bring the headers of the latest kernel instead.
    """
    at = _look(settings, drivers)
    steps = () if isinstance(at, Refusal) else at.steps("headers")
    if not steps:
        host.noop("no headers are missing")
        return
    changed()
    for step in steps:
        yield script(_HEADERS, *step.packages)
    changed()


@operation()
def packages(*, settings: Settings, drivers: Drivers) -> Commands:
    """Install the driver's packages that are missing, from one origin."""
    at = _look(settings, drivers)
    missing = () if isinstance(at, Refusal) else heal.missing(at.kernels, at.choice)
    if isinstance(at, Refusal) or not missing:
        host.noop("all packages of the driver are installed")
        return
    changed()
    yield script(_PACKAGES, at.choice.source, *missing)
    changed()


@operation()
def runfile(*, settings: Settings, drivers: Drivers) -> Commands:
    """Bring the .run file of driver.runfile to the host and install it, once for its version."""
    at = _look(settings, drivers)
    if isinstance(at, Refusal) or at.choice.source != "runfile":
        host.noop("no .run file is asked for")
        return
    here = Path(settings.driver.runfile or "")
    version = runfile_version(here.name)
    if version and at.gpus.userland == version and at.kernels.runfile:
        host.noop(f"driver {version} is installed")
        return
    if not here.is_file() or not version:
        yield failing(
            f"driver.runfile: {settings.driver.runfile} is no NVIDIA-Linux-…-VERSION.run file on "
            "this machine: name one"
        )
        return
    changed()
    there = f"{STATE}/incoming/{here.name}"
    yield StringCommand("install -d -m 700", f"{STATE}/incoming")
    yield RsyncCommand(quote(str(here)), quote(there), ["-t", "--partial", "--inplace"])
    if at.gpus.loaded:  # the installer refuses to work beside a module that is loaded
        yield script(_LOAD, "unload", "nvidia")
    folder = "kernel-open" if at.choice.flavour == "open" else "kernel"
    yield script(_RUNFILE, there, at.kernels.running, folder)
    changed()


@operation()
def nouveau(*, settings: Settings, drivers: Drivers, everywhere: bool = False) -> Commands:
    """Make the initrds anew that would still load nouveau; `everywhere` makes all of them."""
    at = _look(settings, drivers)
    if isinstance(at, Refusal):
        host.noop("no driver fits")
        return
    having = [one.release for one in at.kernels.kernels if one.nouveau_in_initrd]
    releases = [one.release for one in at.kernels.kernels] if everywhere else having
    if not releases:
        host.noop("nouveau is in no initrd")
        return
    if full := heal.boot_full(at.kernels, releases):
        yield failing(full)
        return
    changed()
    yield script(_INITRAMFS, "all")
    changed()


@operation()
def modules(*, settings: Settings, drivers: Drivers) -> Commands:
    """Give the running kernel and the one that boots next a module of the installed driver.

    Each is judged by what modinfo finds for it, never by an exit code. Where the next kernel
    cannot have one, GRUB keeps booting the running kernel, and the host fails with the reason.
    """
    at = _look(settings, drivers, sought=True)
    if isinstance(at, Refusal):
        host.noop("no driver fits")
        return
    steps = at.steps("prebuilt", "dkms", "runfile", "depmod", "initramfs")
    for step in steps:
        changed()
        yield _step(step)
    if steps:
        changed()
    after = _look(settings, drivers, tried=True)
    if isinstance(after, Refusal):
        yield failing("; ".join(after.findings))
        return
    # What apt left half-configured because a build failed can be finished now.
    if after.unconfigured and all(care.ok for care in after.decision.kernels):
        changed()
        yield StringCommand("DEBIAN_FRONTEND=noninteractive dpkg --configure -a --force-confold")
        changed()
    complaint = after.unhealed
    if after.keeps:
        yield from _default(after, after.kernels.running)
    if complaint:
        yield failing(complaint)
    elif not steps:
        host.noop("every kernel that runs or boots next has its module")


def _step(step: Step) -> StringCommand:
    if step.kind == "prebuilt":
        return script(_PREBUILT, step.release, *step.packages)
    if step.kind == "depmod":
        return StringCommand("depmod", QuoteString(step.release))
    if step.kind == "initramfs":
        return script(_INITRAMFS, step.release)
    return script(_DKMS, step.release, step.version)


def _default(at: Sight, release: str) -> Commands:
    """Have GRUB boot this kernel from now on."""
    entry = entry_of(at.kernels.grub, release)
    changed()
    if entry is None:
        yield failing(f"GRUB has no entry for kernel {release}: run update-grub on the host, apply")
        return
    yield script(_GRUB, entry, at.kernels.grub.default)
    changed()


@operation()
def loaded(*, settings: Settings, drivers: Drivers) -> Commands:
    """Load the module, or exchange the loaded one for the one on the disk if nobody uses it."""
    at = _look(settings, drivers, tried=True)
    if isinstance(at, Refusal) or at.decision.load == "nothing":
        host.noop("the module on the disk is the one that is loaded, with its devices")
        return
    if at.decision.load == "reboot":
        if settings.kernel.reboot == "when-safe" and at.decision.reboot == "safe":
            host.noop("the module is in use: the host is rebooted")
            return
        reasons = "; ".join(at.decision.reasons)
        yield failing(f"{reasons}: stop what uses it, or set kernel.reboot to when-safe")
        return
    changed()
    yield script(_LOAD, at.decision.load, at.module)
    changed()


@operation()
def services(*, settings: Settings, drivers: Drivers) -> Commands:
    """Run the persistence daemon, and the fabric manager where NVSwitches need it."""
    at = _look(settings, drivers, tried=True)
    if isinstance(at, Refusal):
        host.noop("no driver fits")
        return
    if wrong := heal.fabric_problem(at.choice, at.gpus):
        yield failing(wrong)
        return
    units = heal.idle_services(at.choice, at.gpus)
    if not units:
        host.noop("the driver's services run")
        return
    changed()
    for unit in units:
        yield script(_SERVICE, unit)
    changed()


@operation()
def boot_guard(*, enabled: bool) -> Commands:
    """Have the boot guard run at the next boot, or not any more."""
    if files.guarded(fresh(GpuFacts)) == enabled:
        host.noop(f"the boot guard is {'enabled' if enabled else 'not there'}")
        return
    changed()
    if enabled:
        yield StringCommand("systemctl daemon-reload && systemctl enable --quiet", files.GUARD)
    else:
        yield StringCommand("systemctl disable --quiet", files.GUARD)
    changed()


@operation()
def rebooted(*, settings: Settings, drivers: Drivers) -> Commands:
    """Boot the kernel that shall run, where that is allowed and safe, as a trial.

    GRUB takes it once; the host goes back by itself if the boot is not confirmed in time. It is
    confirmed when the boot id changed, the kernel is the one meant and everything that worked
    before works on it.
    """
    at = _look(settings, drivers, tried=True)
    if isinstance(at, Refusal) or at.decision.reboot != "safe":
        host.noop("no reboot is pending that would be safe")
        return
    if settings.kernel.reboot != "when-safe":
        host.noop("; ".join(at.decision.reasons))
        return
    target = at.decision.target or at.kernels.running
    seconds = settings.kernel.reboot_timeout
    trial = target != at.kernels.running and at.kernels.grub.present
    if target != at.kernels.running and not trial and at.kernels.next_boot.release != target:
        yield failing(
            f"kernel {target} shall boot and this host has no GRUB to say so: boot it by hand"
        )
        return
    entry = entry_of(at.kernels.grub, target) or ""
    if trial and not entry:
        yield failing(f"GRUB has no entry for kernel {target}: run update-grub on the host, apply")
        return
    if trial and not at.kernels.grub.env_writable:
        yield failing(
            f"kernel {target} waits for a reboot and GRUB cannot clear a one-shot entry (/boot "
            "on LVM, RAID, btrfs or zfs), so there is no falling back: reboot by hand"
        )
        return
    changed()
    if trial:
        yield StringCommand("install -d -m 755", PROGRAMS, STATE)
        given = {"state": STATE, "program": f"{PROGRAMS}/trial", "seconds": seconds}
        yield FileUploadCommand(StringIO(render.text("trial.sh.j2", **given)), f"{PROGRAMS}/trial")
        yield FileUploadCommand(
            StringIO(render.text("trial.service.j2", **given)),
            "/etc/systemd/system/gpufleet-trial.service",
        )
        yield script(_TRIAL, target, entry)
    yield script(_REBOOT)
    yield FunctionCommand(_wait, (at.kernels.boot_id, seconds), {})
    changed()
    booted = script(_BOOTED, str(min(seconds, 600))).get_raw_value()
    said = host.get_fact(Command, command=booted) or ""
    after = _look(settings, drivers, tried=True)
    if isinstance(after, Refusal):
        yield failing("; ".join(after.findings))
        return
    failed = heal.gate(at.gpus, after, target, said)
    if failed and trial and after.kernels.running == target:
        changed()
        yield script(_GIVE_UP, target)
        yield script(_REBOOT)
        yield FunctionCommand(_wait, (after.kernels.boot_id, seconds), {})
        changed()
        now = fresh(KernelFacts).running
        yield failing(
            f"kernel {target} failed its trial boot: {'; '.join(failed)}; the host runs {now} "
            f"again: mend that, remove {STATE}/trial-failed on the host and apply"
        )
    elif failed:
        yield failing(f"after the reboot: {'; '.join(failed)}: see journalctl -b on the host")
    elif trial:
        changed()
        yield script(_CONFIRM)
        if after.kernels.next_boot.release != target:
            yield from _default(after, target)
        changed()


def _wait(state: State, host: Host, before: str, seconds: int) -> bool:
    """Reconnect once the host has booted: its boot id is another. False if it does not in time."""
    end = time.monotonic() + seconds
    gevent.sleep(2)
    while time.monotonic() < end:
        client = getattr(host.connector, "client", None)
        if client is not None:
            client.close()
        host.connector.disconnect()
        try:
            # Not by host.connect: a host that is still booting is no host that cannot be reached.
            host.connector.connect()
            done, output = host.run_shell_command(StringCommand(_BOOT_ID), _timeout=15)
            if done and output.stdout.strip() not in {"", before}:
                return True
        except (ConnectError, OSError, SSHException, EOFError, TimeoutError):
            pass
        gevent.sleep(1)
    logger.error(
        f"{host.print_prefix}it did not come back from its reboot in {seconds} s: look at its "
        "console; power it off and on to have GRUB boot the kernel that worked"
    )
    return False
