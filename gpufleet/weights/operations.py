"""Operations that bring weight files to a host, and remove those that nothing uses any more."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Literal

from pyinfra import host
from pyinfra.api import FunctionCommand, QuoteString, StringCommand, operation

from gpufleet.apt import APT, INSTALL
from gpufleet.catalog import WeightFile
from gpufleet.seen import changed, fresh
from gpufleet.shell import script
from gpufleet.weights.facts import WeightsInUse, WeightsOnHost
from gpufleet.weights.plan import Progress, abandoned, landing, older, staging, version
from gpufleet.weights.swarm.plan import worth
from gpufleet.weights.transfer import Order, Way, bring

# A host that nothing was deployed to yet may have no rsync, and no package lists.
_RSYNC = f"{INSTALL} rsync || {{ {APT} update && {INSTALL} rsync; }}\n"

# $1 folder of the deploy, then versions to remove and, after --, those of which a part arrived.
# Contents that no version has any more go with them.
_PRUNE = r"""
w=$1/weights b=$1/weights/blobs root=$1; shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do rm -rf "$w/$1" || exit; shift; done
[ $# -eq 0 ] || shift
for v in "$@"; do rm -rf "$root/incoming/weights-$v"; done
cd "$b" 2>/dev/null || exit 0
used=$(find "$w/" -mindepth 2 -type l -printf '%l\n' | sed 's|.*/||' | sort -u)
for f in [0-9a-f]*; do
  [ -f "$f" ] || continue
  printf '%s\n' "$used" | grep -qxF "$f" || rm -f "$f"
done
stat -c '%n %s %.9Z %i' [0-9a-f]* 2>/dev/null | grep -xF -f .verified > .verified.new
mv -f .verified.new .verified
"""


@operation()
def landed(
    *,
    root: str,
    model: str,
    files: Sequence[WeightFile],
    source: Path,
    way: Way,
    via: Literal["auto", "rsync", "swarm"] = "rsync",
    hosts: int = 1,
    bandwidth_kib: int = 0,
    encrypt: bool = False,
    at_once: int = 0,
    deep: bool = False,
    report: Callable[[Progress], None],
) -> Generator[StringCommand | FunctionCommand]:
    """Have these files of a model on the host, verified, in its version's folder.

    Contents that the host has under any model are not sent. `deep` reads all of them there.
    `hosts` is how many get this version in this run, by which `auto` chooses.
    """
    wanted = tuple(dict.fromkeys(file.sha256 for file in files))
    stored = fresh(WeightsOnHost, root=root, wanted=wanted, deep=deep)
    plan = landing(model, files, stored)
    if plan.nothing:
        report(Progress("done", files=len(files), there=plan.bytes))
        host.noop("all weight files are there and verified")
        return
    changed()
    incoming = str(staging(root, plan.version))
    yield StringCommand("install -d -m 755", QuoteString(f"{root}/weights"), QuoteString(incoming))
    if plan.send and not stored.rsync:
        yield script(_RSYNC)
    swarm = via == "swarm" or (via == "auto" and worth(plan.to_send, hosts)[0])
    order = Order(
        root=root,
        plan=plan,
        source=source,
        files=tuple(files),
        via="swarm" if swarm else "rsync",
        bandwidth_kib=bandwidth_kib,
        encrypt=encrypt,
        at_once=at_once,
    )
    yield FunctionCommand(bring, (order, way, report, changed), {})


@operation()
def pruned(
    *, root: str, model: str, files: Sequence[WeightFile], keep: int, deep: bool = False
) -> Generator[StringCommand]:
    """Remove the model's older versions but the newest `keep`, once the demo runs on these files.

    What the service uses stays, whatever it is, and everything while it runs on an older
    configuration.
    """
    current = version(model, files)
    wanted = tuple(dict.fromkeys(file.sha256 for file in files))
    stored = fresh(WeightsOnHost, root=root, wanted=wanted, deep=deep)
    going, parts = older(model, current, stored, keep), abandoned(model, current, stored)
    if going and (used := fresh(WeightsInUse, root=root)) is not None:
        going = tuple(name for name in going if name not in used)
    else:
        going = ()
    if not going and not parts:
        host.noop("no older weights to remove")
        return
    changed()
    yield script(_PRUNE, root, *going, *(["--", *parts] if parts else []))
