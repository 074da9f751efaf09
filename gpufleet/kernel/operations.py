"""Operations that pin a kernel, see that the pin holds, and lift it again."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pyinfra import host
from pyinfra.api import StringCommand, operation

from gpufleet.kernel import rhel
from gpufleet.kernel.facts import KernelFacts
from gpufleet.kernel.plan import (
    HOLDS,
    PIN,
    Drift,
    holds,
    leaks,
    target,
)
from gpufleet.seen import changed, fresh
from gpufleet.shell import failing, script

# $1 and $2 packages to unhold and to hold, $3 those that are gpufleet's own then, separated by
# blanks. What is noted is noted first: a run that is cut off leaves no hold that nobody knows.
# apt-mark does not wait for dpkg's lock (DPkg::Lock::Timeout is apt-get's), hence the loop. Its
# exit code says little about a name: what dpkg has then decides.
_HOLD = rf"""
export LC_ALL=C
mark() {{
  tries=300
  while ! said=$(apt-mark "$@" 2>&1); do
    case $said in *lock*) ;; *) printf '%s\n' "$said" >&2; return 1;; esac
    tries=$((tries - 1))
    if [ $tries -eq 0 ]; then
      echo "dpkg is locked for 10 minutes: end what uses apt (ps -C apt,apt-get,dpkg), apply" >&2
      exit 1
    fi
    sleep 2
  done
}}
mkdir -p {HOLDS.rpartition("/")[0]}
known=$(cat {HOLDS} 2>/dev/null)
printf '%s\n' $known $3 | sed '/^$/d' | sort -u > {HOLDS}.new && mv {HOLDS}.new {HOLDS} || exit 1
[ -z "$1" ] || mark unhold $1
[ -z "$2" ] || mark hold $2
for name in $2; do
  state=$(dpkg-query -W -f '${{db:Status-Want}} ${{db:Status-Status}}' "$name" 2>&1)
  [ "$state" = 'hold installed' ] || {{
    echo "$name reads '$state', not 'hold installed': run apt-mark hold $name, see what it says" >&2
    exit 1; }}
done
if [ -n "$3" ]; then printf '%s\n' $3 > {HOLDS}; else rm -f {HOLDS}; fi
"""

# Names that dnf versionlock holds because of gpufleet.
_LOCKED = rf"""set -e
mkdir -p {HOLDS.rpartition("/")[0]}
printf '%s\n' "$@" > {HOLDS}
"""

# update-grub says nothing of a default that names no entry; the caller looks afterwards.
_UPDATE_GRUB = r"""
said=$(update-grub 2>&1) && exit 0
echo "update-grub failed: $(printf '%s\n' "$said" | grep . | tail -n 1)" >&2
exit 1
"""

# $1 release.
_NOTE = rf"""set -e
mkdir -p {PIN.rpartition("/")[0]}
printf '%s\n' "$1" > {PIN}.new
mv {PIN}.new {PIN}
"""


@operation()
def working(problems: Sequence[str]) -> Generator[StringCommand]:
    """Fail the host if there are problems with the kernel that is to be pinned: a kernel on which
    the GPU does not work is never pinned, and the pin that is there stays as it is."""
    found = list(problems)
    if found:
        yield failing(f"not pinned: {'; '.join(found)}: mend that (see fleet doctor), then apply")
    else:
        host.noop("the GPU works on the kernel to pin")


@operation()
def held(*, drift: Drift) -> Generator[StringCommand]:
    """Hold exactly the packages that the pin is made of, and see that each hold is in force.

    Holds that gpufleet set earlier and that are not wanted any more go; a person's own stay.
    """
    picture = fresh(KernelFacts)
    release = target(picture, drift)
    if picture.family == "rhel":
        commands = rhel.pin(picture, release)
        if not commands:
            host.noop(f"kernel {release} is locked")
            return
        changed()
        for command in commands:
            yield StringCommand(command)
        yield script(_LOCKED, *rhel.locks(picture))
        changed()
        return
    change = holds(picture, release)
    if change.nothing:
        host.noop(f"all packages of kernel {release} and the driver are held")
        return
    changed()
    yield script(_HOLD, " ".join(change.remove), " ".join(change.add), " ".join(change.own))
    changed()


@operation()
def unheld() -> Generator[StringCommand]:
    """Lift the holds that gpufleet set, and forget the pin; a person's own holds stay."""
    picture = fresh(KernelFacts)
    if not (picture.own_holds or picture.pinned):
        host.noop("gpufleet pinned no kernel here")
        return
    changed()
    if picture.family == "rhel":
        for command in rhel.unpin(picture):
            yield StringCommand(command)
    elif still := [name for name in picture.own_holds if name in picture.holds]:
        yield script(_HOLD, " ".join(still), "", "")
    yield StringCommand("rm -f", PIN, HOLDS)
    changed()


@operation()
def booting(*, drift: Drift | None) -> Generator[StringCommand]:
    """Take GRUB's settings into grub.cfg, and see that its default is the kernel to pin.

    Without a drift there is no pin any more: grub.cfg follows the settings, whatever they are.
    """
    picture = fresh(KernelFacts)
    grub = picture.grub
    release = target(picture, drift) if drift else None
    made = grub.default in {"", "0"} if grub.written in {"", "0"} else grub.default == grub.written
    if grub.written == "${saved_entry}":
        made = grub.default == "saved"
    if not grub.present or picture.family == "rhel":  # there, grubby says what boots
        host.noop("no GRUB to set up here")
        return
    if made and release in {None, grub.boots}:
        host.noop(f"GRUB boots {grub.boots} by default")
        return
    changed()
    yield script(_UPDATE_GRUB)
    changed()
    after = fresh(KernelFacts).grub
    if release is not None and after.boots != release:
        yield failing(
            f"GRUB boots {after.boots or 'nothing that is known'} by default, not {release}, also "
            f"after update-grub ({after.boots_reason}): see that the kernel is installed and that "
            "no later file of /etc/default/grub.d sets GRUB_DEFAULT"
        )


@operation()
def pinned(*, drift: Drift) -> Generator[StringCommand]:
    """See by the host's own word that nothing leaks, then note which kernel is pinned."""
    picture = fresh(KernelFacts)
    release = target(picture, drift)
    found = leaks(picture, release)
    if found:
        yield failing(f"the pin of kernel {release} leaks: " + "; ".join(found))
    elif picture.pinned == release:
        host.noop(f"kernel {release} is pinned")
    else:
        changed()
        yield script(_NOTE, release)
        changed()
